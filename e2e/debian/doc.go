// Package debian makes root file systems out of Debian packages, without installing anything: apt says what a package needs
// and fetches it, dpkg-deb unpacks it into a folder.
//
// Nothing is configured: maintainer scripts do not run, so users, caches (ldconfig) and links under /etc/alternatives that
// those would make are not there. Neither apt nor dpkg keeps a record of what was unpacked.
//
// The machine must be Debian or a relative of it, and the packages are those of its own release and architecture. No root is
// needed, except where apt's lists of packages are missing or out of date: then `apt-get update` brings them, which is run
// where this process may.
//
// What the package stands on:
//
//   - apt resolves against the packages that the dpkg status file names (apt.conf(5), Dir::State::status). With an empty one
//     it lists everything that is needed, as if nothing were installed. `apt-get --print-uris` prints that without a lock.
//   - From Debian 12 on /bin, /lib, /sbin and /lib64 are links into /usr, but packages of that release still hold files below
//     the old names (Debian Technical Committee, bug 978636). Unpack puts them where the links lead.
package debian
