package iptables

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/rule"
)

// xtables asks the legacy tables of one family, in the network namespace of the thread that opened it, by the socket options
// of linux/netfilter_ipv4/ip_tables.h and linux/netfilter_ipv6/ip6_tables.h.
type xtables struct {
	socket int
	level  int
	layout entryLayout
	// names lists the tables that there are. To ask for another would create it.
	names *os.File
	// scratch is kept between looks: fresh memory costs more than the look.
	scratch []byte
}

// Options of both families (IPT_BASE_CTL and IP6T_BASE_CTL are 64).
const (
	getInfo    = 64
	getEntries = 65
)

// entryLayout are the offsets of struct ipt_entry or ip6t_entry.
type entryLayout struct{ target, next, matches int }

var layouts = map[rule.Family]entryLayout{
	rule.IPv4: {target: 88, next: 90, matches: 112},
	rule.IPv6: {target: 140, next: 142, matches: 168},
}

// figures is struct ipt_getinfo, which is ip6t_getinfo: where the table's built-in chains begin and end, how many entries it
// has and their size. It compares with ==.
type figures [tableName + 4 + 2*hooks*4 + 4 + 4]byte

const (
	tableName = 32 // XT_TABLE_MAXNAMELEN
	hooks     = 5  // NF_INET_NUMHOOKS
)

func (f *figures) word(n int) int { return int(binary.NativeEndian.Uint32(f[tableName+4*n:])) }

func (f *figures) validHooks() int     { return f.word(0) }
func (f *figures) hookEntry(h int) int { return f.word(1 + h) }
func (f *figures) entries() int        { return f.word(1 + 2*hooks) }
func (f *figures) size() int           { return f.word(2 + 2*hooks) }

// hookNames are the built-in chains by hook (enum nf_inet_hooks).
var hookNames = [hooks]string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}

func openXtables(family rule.Family) (*xtables, error) {
	domain, level, file := unix.AF_INET, unix.IPPROTO_IP, "ip_tables_names"
	if family == rule.IPv6 {
		domain, level, file = unix.AF_INET6, unix.IPPROTO_IPV6, "ip6_tables_names"
	}
	// The open file stays with this thread's namespace, as the socket does.
	names, err := os.Open("/proc/thread-self/net/" + file)
	if err != nil {
		return nil, fmt.Errorf("list tables: %w", err)
	}
	socket, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		names.Close()
		return nil, fmt.Errorf("open a raw socket of %s: %w", family, err)
	}
	return &xtables{socket, level, layouts[family], names, nil}, nil
}

func (x *xtables) close() {
	if x != nil {
		x.names.Close()
		unix.Close(x.socket)
	}
}

// all returns the figures of the watched tables that there are.
func (x *xtables) all() (map[rule.Table]figures, error) {
	var list [1024]byte // names have 31 characters at most, and the kernel has six tables
	n, err := unix.Pread(int(x.names.Fd()), list[:], 0)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", x.names.Name(), err)
	}
	out := map[rule.Table]figures{}
	for _, name := range strings.Fields(string(list[:n])) {
		for _, table := range watched {
			if string(table) != name {
				continue
			}
			f, err := x.figures(table)
			if err != nil {
				return nil, err
			}
			out[table] = f
		}
	}
	return out, nil
}

func (x *xtables) figures(table rule.Table) (f figures, err error) {
	copy(f[:], table)
	if err := x.get(getInfo, f[:]); err != nil {
		return f, fmt.Errorf("ask for the figures of table %s: %w", table, err)
	}
	return f, nil
}

// chains returns how many rules each chain of a table has. It reads the whole table: 6 ms where there
// are a thousand chains of ten rules, which take a restore 50.
func (x *xtables) chains(table rule.Table) (map[string]int, error) {
	const head = (tableName + 4 + 7) &^ 7 // struct ipt_get_entries, up to the entries
	const tries = 10
	for try := 1; ; try++ {
		f, err := x.figures(table)
		if err != nil {
			return nil, err
		}
		x.scratch = slices.Grow(x.scratch[:0], head+f.size())
		b := x.scratch[:head+f.size()]
		clear(b[:head])
		copy(b, table)
		binary.NativeEndian.PutUint32(b[tableName:], uint32(f.size()))
		err = x.get(getEntries, b)
		if errors.Is(err, unix.EAGAIN) && try < tries {
			continue // somebody changed its size between the two questions
		}
		if err != nil {
			return nil, fmt.Errorf("read table %s: %w", table, err)
		}
		return x.layout.count(&f, b[head:])
	}
}

// count walks through a table's entries. A built-in chain begins where its hook enters, another with an entry whose target
// ERROR has its name; each has one entry more than it has rules, its policy or final RETURN.
func (l entryLayout) count(f *figures, b []byte) (map[string]int, error) {
	const (
		targetHead = 32 // struct xt_entry_target: size, name, revision
		nameAt     = 2
		nameRoom   = 29
	)
	starts := map[int]string{}
	for h, name := range hookNames {
		if f.validHooks()&(1<<h) != 0 {
			starts[f.hookEntry(h)] = name
		}
	}
	chains, chain := map[string]int{}, ""
	for at := 0; at < len(b); {
		if len(b)-at < l.matches {
			return nil, fmt.Errorf("an entry at %d of %d bytes is cut", at, len(b))
		}
		target := at + int(binary.NativeEndian.Uint16(b[at+l.target:]))
		next := at + int(binary.NativeEndian.Uint16(b[at+l.next:]))
		if target < at+l.matches || next < target+targetHead || next > len(b) {
			return nil, fmt.Errorf("an entry at %d of %d bytes has its target at %d and its end at %d", at, len(b), target, next)
		}
		name, builtin := starts[at]
		switch {
		case builtin:
			chain, chains[name] = name, 0
		case text(b[target+nameAt:target+nameAt+nameRoom]) == "ERROR":
			chain = text(b[target+targetHead : next])
			chains[chain] = -1
		default:
			chains[chain]++
		}
		at = next
	}
	delete(chains, "ERROR") // the table's end
	return chains, nil
}

// text is a C string.
func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}

// get is getsockopt(2) with a structure that is question and answer.
func (x *xtables) get(option int, b []byte) error {
	length := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(x.socket), uintptr(x.level), uintptr(option),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
