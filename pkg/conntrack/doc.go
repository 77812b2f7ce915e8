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
// Dumps are not filtered by the kernel, though it offers that too since 5.8. Among 100,000 flows the four filters that an address
// takes (source and destination, original and reply) save a third of the time at best, for two addresses nothing: the kernel
// walks its table only six times faster than it tells it. And kernels before 5.16 (of the stable ones, before 5.10.83) read the
// reply's tuple by the flags of the original one and then look for the address 0.0.0.0, so that flows to a Service would be missed
// without a word. Reading 100,000 flows takes 0.13 s, and no memory for those that nobody asked for.
//
// What is deleted can come back: a TCP packet from the middle of a stream makes a new entry. Install the rules first.
package conntrack
