// Package conntrack finds and deletes flows in the kernel's connection tracking table, of the network namespace of the
// calling thread.
//
// Deletion goes through one message with CTA_FILTER where the kernel has it (net/netfilter/nf_conntrack_netlink.c,
// ctnetlink_flush_conntrack): the kernel walks its table once and nothing is copied to user space. A kernel that does not
// know CTA_FILTER there takes the message for the deletion of one exact tuple, finds the tuple incomplete and answers
// EINVAL, so it never deletes too much; the table is then dumped, filtered here, and each flow deleted by its tuple, zone
// and ID. So it is always for IPv6 addresses: the kernel's filter compares them the wrong way round (seen with 6.18) and
// deletes every flow but those asked for. ctnetlink reads the family of a deletion only if the message's version is not 0.
//
// What is deleted can come back: a TCP packet from the middle of a stream makes a new entry. Install the rules first.
package conntrack
