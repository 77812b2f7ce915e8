// Package dataplane brings the kernel's chains and sets from what they are to what they should be, in an order in which no
// packet passes on the way that neither state allows:
//
//  1. new sets are created and filled, and the set of local addresses grows. Where the kernel has no ready set, the rules let no
//     pod's packet pass before step 7, whoever is missing, and sets of peers are filled during step 3;
//  2. what leaves ready and peer sets is taken out;
//  3. one iptables-restore a family writes the chains that differ and puts the hooks into their places;
//  4. what leaves open sets is taken out. The chains lead to those who are isolated before they look into open sets, so both ends
//     of a packet are judged anew from the same moment; where somebody joins an open set meanwhile, it comes first, and those
//     rules themselves lead around it;
//  5. what joins open and peer sets is put in;
//  6. the caller's judge ends the flows that are not allowed any more, or will soon;
//  7. what joins ready sets is put in;
//  8. chains, then sets, that nobody uses are removed. A pod that is not isolated any more is led to its former chain until it
//     is in the open set, and only then out of the dispatch tree; there, too, ends what led around the open set in step 4.
//
// Each step leaves the kernel closed or as it was, so a process killed between any two of them leaves no hole, and the next
// one reads what is there and writes the difference alone. The families are worked through one after the other and are
// independent: what fails in one does not stop the other.
package dataplane
