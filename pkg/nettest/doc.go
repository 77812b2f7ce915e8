// Package nettest gives tests network namespaces of their own, as root or as an ordinary user.
//
// [Main], called from TestMain, runs the test binary again in new network, mount and PID namespaces (and, for an ordinary
// user, a user namespace in which he is root). There /run is an empty tmpfs, mounts are private, /proc belongs to the new
// PID namespace, and the process's own network namespace is a scratch "host" with nothing but lo. Whatever a test does,
// and whichever way it ends, the kernel takes all of it away with the last process: links, rules, sets, mounts, and the
// processes themselves (pid_namespaces(7): init's end kills the others; network_namespaces(7)).
//
// Inside, [NewNS] makes further namespaces, [Link] joins two of them, [TCPServer], [UDPServer], [Dial] and [Peer] try who
// reaches whom, [Backends] repeats a test for each iptables backend, and [Build] builds one of our programs. Tests that
// need the kernel begin with [Need] or anything that calls it; where namespaces are not allowed they are skipped with the
// reason.
//
// Environment: POSTERN_TEST_BACKENDS=nft or legacy limits [Backends] to one.
package nettest
