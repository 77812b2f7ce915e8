// Package conntrack finds and deletes flows in the kernel's connection tracking table, of the network namespace of the
// calling thread.
//
// The flows of addresses are found by reading the table, once for all of them, and each is deleted by its tuple, zone and ID.
// The kernel could delete by address itself, with CTA_FILTER (net/netfilter/nf_conntrack_netlink.c, ctnetlink_flush_conntrack), in
// one message that copies nothing to user space. But an address takes four of those (source and destination, original and reply), and
// each walks the whole table, that of all network namespaces, with the lock held that every other message waits for: a hundred pods
// that start on a busy machine waited seconds for each other. And IPv6 addresses it compares the wrong way round (seen with
// 6.18): it deletes every flow but those asked for.
//
// Dumps are not filtered by the kernel either, though it offers that too since 5.8. Among 100,000 flows the four filters
// save a third of the time at best, for two addresses nothing: the kernel walks its table only six times faster than it tells it. And
// kernels before 5.16 (of the stable ones, before 5.10.83) read the reply's tuple by the flags of the original one and then look for
// the address 0.0.0.0, so that flows to a Service would be missed without a word. Reading 100,000 flows takes 0.13 s, and no memory for
// those that nobody asked for.
//
// A UDP port is one filter, and there the kernel deletes. One that does not know CTA_FILTER takes the message for the deletion of
// one exact tuple, finds the tuple incomplete and answers EINVAL, so it never deletes too much; then the table is read. ctnetlink
// reads the family of a deletion only if the message's version is not 0.
//
// What is deleted can come back: a TCP packet from the middle of a stream makes a new entry. Install the rules first.
package conntrack
