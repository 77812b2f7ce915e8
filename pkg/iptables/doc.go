// Package iptables turns rules as data ([github.com/postern-cni/postern/pkg/rule]) into the text that iptables-restore takes,
// runs it, and reads what iptables-save prints back into the same data, so that wanted and actual state compare as values.
//
// It stands on these facts of iptables 1.8 in both backends (nf_tables and legacy):
//
//   - A restore with --noflush that declares a chain (":CHAIN - [0:0]") replaces the content of that chain atomically; chains
//     that it does not name stay as they are. Each table is one commit; several tables are not atomic together.
//   - A commit that only adds rules takes 2 ms with nf_tables; one that removes any waits for an RCU grace period, 13 to 18 ms.
//   - Legacy takes the lock of /run/xtables.lock (-w waits for it); nf_tables takes none.
//   - Chain names have at most 28 characters, comments at most 255, the rest of a comment is cut without a word.
//   - nf_tables announces what changes, with the writer, before the writer's program has ended. Legacy announces nothing, but
//     tells the size of a table and the places of its chains in a microsecond; see [Watcher].
//
// Nothing here knows Kubernetes, and nothing outside of chains named POSTERN-… or PST-…, and the hooks that lead into them,
// is ever written.
package iptables
