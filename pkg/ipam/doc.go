// Package ipam gives out the addresses of a node's pods, in time that does not grow with the number of pods, and such that
// the process may be killed at any instant.
//
// # State
//
// All of it is in <stateDir>/ipam/<network>, on a tmpfs, guarded by one flock:
//
//	owners/<container>@<interface>  the addresses meant for that owner, one a line; written before any of them is taken
//	used/<address>                  the owner of an address in use; this is the truth about it
//	releasing/<address>             an address on its way from used to resting; at most one, normally none
//	resting/<address>               an address that waits in some range's queue
//	ranges/<range>                  a header (offset of the queue's first entry, next address never used) and the queue of
//	                                released addresses, oldest first, each with the time of its release
//	ranges/strays                   the same for released addresses of no configured range; mostly missing
//
// An address is free when it is neither used, nor releasing, nor resting. A range first gives out what was never used, then
// what has rested longest: so an address comes back as late as can be, and an IPv6 /64 is never enumerated.
//
// # Killed at any instant
//
// Every change is one rename, one unlink, or one write within a page. SIGKILL does not tear the last: the kernel looks for
// signals between the pages of a write (generic_perform_write). Reserve writes the owner's file, then takes each address
// (used/), and only then moves the range's header on. Release moves used/ to releasing/, appends to the queue, moves
// releasing/ to resting/, and removes the owner's file last. Every operation first finishes what a killed one left: it
// passes over a queue's first entry if that address is used, and completes what is in releasing/. An address is never used
// without an owner's file that names it, so DEL and GC find it; and what an owner's file names is held only if used/ agrees.
//
// Times are of CLOCK_BOOTTIME, which no one sets and which counts while the machine sleeps.
package ipam
