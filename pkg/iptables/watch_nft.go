package iptables

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nlevents"
	"github.com/postern-cni/postern/pkg/rule"
)

// nftWatch reads what nf_tables announces: every object of a transaction, then NEWGEN with the writer's name.
//
// Which transactions are ours is told by the netlink port of the socket that asked for them. NEWGEN's own process number does
// not serve: it is the one of the initial PID namespace, which a container without hostPID cannot know of its children. The
// port is the kernel's choice when a program binds without one (netlink(7)), as iptables does: the process number in the
// program's own PID namespace, which is ours. While our child has the port, no other socket of the network namespace can. If it
// was taken already, the child gets another, and its work is reported as somebody else's: a look too many, none too few.
//
// A child's announcements have all been sent when it has ended, so the port is ours until what waits then has been read. What
// follows is not, even if it comes a moment later from a process of the same number.
type nftWatch struct {
	report func(...Notice)
	socket *nlevents.Socket

	mu   sync.Mutex
	ours map[uint32]bool // ports of our children

	touched map[place]*touch // by the transaction being announced; used only while the socket is read
}

type place struct {
	family rule.Family
	table  rule.Table
}

type touch struct {
	table  string   // what happened to the table itself, if anything
	chains []string // the first few
	more   bool
}

func watchNFT(report func(...Notice)) (source, error) {
	socket, err := nlevents.Open(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	if err != nil {
		return nil, err
	}
	return &nftWatch{report: report, socket: socket, ours: map[uint32]bool{}, touched: map[place]*touch{}}, nil
}

func (n *nftWatch) close() { n.socket.Close() }

func (n *nftWatch) run(ctx context.Context) error { return n.socket.Run(ctx, n.read) }

func (n *nftWatch) read() error {
	lost, err := n.socket.Read(n.take)
	if lost {
		n.report(everything("some of the kernel's notifications were lost")...)
	}
	return err
}

func (n *nftWatch) begin(rule.Family, string) write { return &nftWrite{watch: n} }

type nftWrite struct {
	watch *nftWatch
	port  uint32
}

func (w *nftWrite) started(pid int) {
	w.port = uint32(pid)
	w.watch.mu.Lock()
	defer w.watch.mu.Unlock()
	w.watch.ours[w.port] = true
}

func (w *nftWrite) ended(bool) {
	_ = w.watch.read() // an error stays, for run to return
	w.watch.mu.Lock()
	defer w.watch.mu.Unlock()
	delete(w.watch.ours, w.port)
}

// nfgenmsg is the length of the header that netfilter's messages have after netlink's (struct nfgenmsg).
const nfgenmsg = 4

// take is called for every message, in the kernel's order. Transactions of a network namespace follow one another whole
// (nf_tables holds its commit_mutex while it announces).
func (n *nftWatch) take(m nlevents.Message) {
	if m.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < nfgenmsg {
		return
	}
	family, attrs := m.Data[0], m.Data[nfgenmsg:]
	switch msg := m.Type & 0xff; msg {
	case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE:
		n.touch(family, attribute(attrs, unix.NFTA_TABLE_NAME), nil, msg)
	case unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN:
		n.touch(family, attribute(attrs, unix.NFTA_CHAIN_TABLE), attribute(attrs, unix.NFTA_CHAIN_NAME), msg)
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
		n.touch(family, attribute(attrs, unix.NFTA_RULE_TABLE), attribute(attrs, unix.NFTA_RULE_CHAIN), msg)
	case unix.NFT_MSG_NEWGEN:
		n.commit(m.Sender, attrs)
	}
}

// attribute returns the first attribute of a type, without the NUL that ends a string.
func attribute(attrs []byte, typ uint16) (value []byte) {
	nlevents.Attributes(attrs, func(t uint16, v []byte) {
		if t == typ && value == nil {
			value = v
		}
	})
	if len(value) > 0 && value[len(value)-1] == 0 {
		return value[:len(value)-1]
	}
	return value
}

// named is how many chains a report names.
const named = 3

// touch notes a change that concerns us. It runs for every rule that kube-proxy writes, so it makes nothing of the others.
func (n *nftWatch) touch(nfproto byte, table, chain []byte, msg uint16) {
	at := place{}
	switch nfproto {
	case unix.NFPROTO_IPV4:
		at.family = rule.IPv4
	case unix.NFPROTO_IPV6:
		at.family = rule.IPv6
	default:
		return
	}
	i := slices.IndexFunc(watched, func(t rule.Table) bool { return string(t) == string(table) })
	if i < 0 {
		return
	}
	at.table = watched[i]
	if chain != nil && !Ours(string(chain)) && !mayHook(at.table, string(chain)) {
		return
	}
	t := n.touched[at]
	if t == nil {
		t = &touch{}
		n.touched[at] = t
	}
	switch name := string(chain); {
	case msg == unix.NFT_MSG_DELTABLE:
		t.table = "deleted"
	case msg == unix.NFT_MSG_NEWTABLE:
		t.table = "created or changed"
	case slices.Contains(t.chains, name):
	case len(t.chains) < named:
		t.chains = append(t.chains, name)
	default:
		t.more = true
	}
}

// mayHook reports whether a rule of ours may stand in a built-in chain.
func mayHook(table rule.Table, chain string) bool {
	switch table {
	case rule.Raw:
		return chain == "PREROUTING"
	case rule.Mangle, rule.Filter:
		return chain == "FORWARD"
	case rule.NAT:
		return chain == "PREROUTING" || chain == "OUTPUT" || chain == "POSTROUTING"
	}
	return false
}

// commit ends a transaction.
func (n *nftWatch) commit(sender uint32, attrs []byte) {
	if len(n.touched) == 0 {
		return
	}
	n.mu.Lock()
	own := n.ours[sender]
	n.mu.Unlock()
	if !own {
		who := "somebody"
		if name := attribute(attrs, unix.NFTA_GEN_PROC_NAME); len(name) > 0 {
			who = string(name)
		}
		if pid := attribute(attrs, unix.NFTA_GEN_PROC_PID); len(pid) == 4 {
			who += fmt.Sprintf(" (process %d of the machine)", binary.BigEndian.Uint32(pid))
		}
		var changes []Notice
		for _, f := range rule.Families {
			for _, table := range watched {
				if t := n.touched[place{f, table}]; t != nil {
					changes = append(changes, Notice{f, table, fmt.Sprintf("%s %s table %s (%s)", who, t.what(), table, f)})
				}
			}
		}
		n.report(changes...)
	}
	clear(n.touched)
}

// what says what happened to a table: "changed chain FORWARD of", "deleted".
func (t *touch) what() string {
	if t.table != "" {
		return t.table
	}
	s := "changed chain"
	if len(t.chains) > 1 {
		s += "s"
	}
	s += " " + strings.Join(t.chains, ", ")
	if t.more {
		s += " and others"
	}
	return s + " of"
}
