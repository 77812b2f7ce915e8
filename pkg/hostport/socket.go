package hostport

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/postern-cni/postern/pkg/rule"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// socket is a socket that waits for packets of anybody.
type socket struct {
	addr   netip.Addr
	port   uint16
	v6only bool
	inode  uint32
}

// in reports whether the socket gets packets of a family: one on [::] gets IPv4 ones too unless it is IPv6 only.
func (s socket) in(family rule.Family) bool {
	return rule.FamilyOf(s.addr) == family || s.addr == netip.IPv6Unspecified() && !s.v6only
}

// Of include/uapi/linux/inet_diag.h and sock_diag.h.
const (
	sockDiagByFamily = 20
	diagRequestSize  = 56 // struct inet_diag_req_v2
	diagMessageSize  = 72 // struct inet_diag_msg
	diagSKV6Only     = 11 // INET_DIAG_SKV6ONLY

	stateClose  = 7 // of UDP: not connected, so whoever sends to it is heard; a connected client's is ESTABLISHED
	stateListen = 10
)

// listeners returns the listening sockets of a protocol (sock_diag(7)).
func listeners(proto string) ([]socket, error) {
	number := map[string]uint8{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "sctp": unix.IPPROTO_SCTP}[proto]
	state := stateListen
	if proto == "udp" {
		state = stateClose
	}
	var all []socket
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		found, err := diag(family, number, 1<<state)
		if proto == "sctp" && errors.Is(err, unix.ENOENT) {
			return nil, nil // no module sctp_diag; where SCTP itself is not loaded nobody listens
		}
		if err != nil {
			return nil, fmt.Errorf("list %s sockets: %w", proto, err)
		}
		all = append(all, found...)
	}
	return all, nil
}

type rawRequest []byte

func (r rawRequest) Len() int          { return len(r) }
func (r rawRequest) Serialize() []byte { return r }

func diag(family, proto uint8, states uint32) ([]socket, error) {
	body := make(rawRequest, diagRequestSize)
	body[0], body[1] = family, proto
	binary.NativeEndian.PutUint32(body[4:], states)
	req := nl.NewNetlinkRequest(sockDiagByFamily, unix.NLM_F_DUMP)
	req.AddData(body)
	msgs, err := req.Execute(unix.NETLINK_INET_DIAG, 0)
	if err != nil {
		return nil, err
	}
	var found []socket
	for _, m := range msgs {
		s, err := parseSocket(m)
		if err != nil {
			return nil, err
		}
		found = append(found, s)
	}
	return found, nil
}

func parseSocket(m []byte) (socket, error) {
	if len(m) < diagMessageSize {
		return socket{}, fmt.Errorf("message of %d bytes", len(m))
	}
	s := socket{port: binary.BigEndian.Uint16(m[4:]), inode: binary.NativeEndian.Uint32(m[68:])}
	if m[0] == unix.AF_INET {
		s.addr = netip.AddrFrom4([4]byte(m[8:12]))
		return s, nil
	}
	s.addr = netip.AddrFrom16([16]byte(m[8:24])).Unmap()
	attrs, err := nl.ParseRouteAttr(m[diagMessageSize:])
	if err != nil {
		return socket{}, err
	}
	for _, a := range attrs {
		if a.Attr.Type == diagSKV6Only && len(a.Value) == 1 {
			s.v6only = a.Value[0] != 0
		}
	}
	return s, nil
}

// processOf names a process that has the socket open. It reads every process's open files, so it is asked only in order
// to refuse.
func processOf(inode uint32) string {
	want := fmt.Sprintf("socket:[%d]", inode)
	dirs, _ := filepath.Glob("/proc/[0-9]*/fd") // the pattern is well formed
	for _, dir := range dirs {
		files, err := os.ReadDir(dir)
		if err != nil {
			continue // ended meanwhile, or not ours to look at
		}
		for _, f := range files {
			if to, err := os.Readlink(filepath.Join(dir, f.Name())); err != nil || to != want {
				continue
			}
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(dir)))
			comm, _ := os.ReadFile(filepath.Join(filepath.Dir(dir), "comm"))
			return fmt.Sprintf("process %s (pid %d)", strings.TrimSpace(string(comm)), pid)
		}
	}
	return "a process that cannot be seen from here, or the kernel"
}
