// Package isolate lets a program run itself again as init of new network, mount and PID namespaces, so that whatever it makes in
// there, processes, links, rules and mounts, goes when it ends, however it ends, and the machine outside stays as it is.
//
// The program asks [Inside] first. Outside it calls [Self.Run]; inside it calls [Enter] and does its work. The kernel ends every
// process of a PID namespace with its init (pid_namespaces(7)), and takes the namespaces away with the last process.
package isolate
