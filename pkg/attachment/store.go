package attachment

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// recordVersion is the only format of record there is.
const recordVersion = 1

// File names of records. Those with port mappings have their own, so that a reading of the folder tells which records
// hostPort has to open; a temporary file begins with a dot and is no record.
const (
	plainSuffix = ".json"
	portsSuffix = ".ports.json"
	tempPrefix  = "."
)

// Store is the folder of records: one file each in <stateDir>/attachments, named container ID, "@", interface. A record is
// written beside its place and renamed into it, so a reader sees a whole record or none, and a writer may be killed at any
// instant. The folder is on a tmpfs: nothing is synced, and a reboot empties it together with the kernel's state.
//
// Methods may be called at the same time from several processes. Two writers of one record must exclude each other with
// [Store.Lock] and [Interface].
type Store struct{ stateDir string }

// BrokenError is a file that is in the place of a record and is none. It stops nobody: [Store.List] goes on to the next.
type BrokenError struct {
	Path string
	Err  error
}

func (e *BrokenError) Error() string {
	return fmt.Sprintf("read record %s: %v; DEL of that container or GC removes the file", e.Path, e.Err)
}

func (e *BrokenError) Unwrap() error { return e.Err }

// Open returns the store in a state folder. Nothing is touched: folders are made when they are first written to.
func Open(stateDir string) *Store { return &Store{stateDir: stateDir} }

// Dir returns the folder of records, for those who watch it. It may not exist yet.
func (s *Store) Dir() string { return filepath.Join(s.stateDir, "attachments") }

// String returns the key as records are named: container ID, "@", interface.
func (k Key) String() string { return k.ContainerID + "@" + k.IfName }

// Check returns an error unless both parts are as the CNI specification has them (a container ID begins with a letter or a
// digit and goes on with these, "_", "." and "-"; an interface name is what the kernel takes), and short enough for a file's
// name. Such a key is safe in a path.
func (k Key) Check() error {
	const maxContainerID = 200 // with interface and suffix below the 255 bytes of a file's name
	if k.ContainerID == "" || len(k.ContainerID) > maxContainerID || !containerIDChars(k.ContainerID) {
		return fmt.Errorf("container ID %q: 1 to %d letters, digits, '_', '.' or '-' are allowed, the first a letter or a digit",
			k.ContainerID, maxContainerID)
	}
	return CheckInterfaceName(k.IfName)
}

// containerIDChars holds CNI's rule for container IDs (specification, "Parameters"). At most one "@" can then be in a
// record's name before the interface's.
func containerIDChars(s string) bool {
	for i, c := range []byte(s) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case i > 0 && (c == '_' || c == '.' || c == '-'):
		default:
			return false
		}
	}
	return true
}

// CheckInterfaceName returns an error unless the kernel takes the name for an interface (dev_valid_name): 1 to 15 bytes,
// not "." or "..", without "/", ":" and white space. Control characters are refused as well.
func CheckInterfaceName(name string) error {
	const maxLen = 15 // IFNAMSIZ less the NUL
	bad := name == "" || len(name) > maxLen || name == "." || name == ".." ||
		strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r == 0x7f || r == '/' || r == ':' || r > 0x7e })
	if bad {
		return fmt.Errorf("interface name %q: 1 to %d printable ASCII characters but '/', ':' and space are allowed, "+
			"not \".\" or \"..\"",
			name, maxLen)
	}
	return nil
}

// Put writes the attachment's record, in place of one with the same key.
func (s *Store) Put(a *Attachment) error {
	key := a.Key()
	if err := a.check(); err != nil {
		return fmt.Errorf("write record of %s: %w", key, err)
	}
	data, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("write record of %s: %w", key, err)
	}
	if err := os.MkdirAll(s.Dir(), 0o700); err != nil {
		return fmt.Errorf("write record of %s: %w", key, err)
	}
	temp := s.path(key, tempPrefix, "")
	if err := os.WriteFile(temp, data, 0o600); err != nil {
		return fmt.Errorf("write record of %s: %w", key, err)
	}
	to, other := plainSuffix, portsSuffix
	if len(a.PortMappings) > 0 {
		to, other = other, to
	}
	if err := os.Rename(temp, s.path(key, "", to)); err != nil {
		return fmt.Errorf("write record of %s: %w", key, err)
	}
	// A writer killed here leaves both; readers take the one with ports, which frees too much rather than too little.
	return s.remove(key, s.path(key, "", other))
}

// Get reads one record. It returns an error that is fs.ErrNotExist where there is none, and a *[BrokenError] where the file
// cannot be used.
func (s *Store) Get(key Key) (*Attachment, error) {
	if err := key.Check(); err != nil {
		return nil, fmt.Errorf("read record: %w", err)
	}
	a, err := s.read(key.String() + portsSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		a, err = s.read(key.String() + plainSuffix)
	}
	return a, err
}

// Delete removes a record, whole, broken or half written. It succeeds where there is none.
func (s *Store) Delete(key Key) error {
	if err := key.Check(); err != nil {
		return fmt.Errorf("remove record: %w", err)
	}
	return s.remove(key, s.path(key, tempPrefix, ""), s.path(key, "", plainSuffix), s.path(key, "", portsSuffix))
}

// List reads every record, sorted by key, and the files that cannot be used, each a *[BrokenError]. A folder that cannot be
// read is the only error then; a missing one is an empty one.
func (s *Store) List() ([]*Attachment, []error) { return s.list(plainSuffix) }

// WithPorts reads the records that have port mappings, like [Store.List]. It opens no other file.
func (s *Store) WithPorts() ([]*Attachment, []error) { return s.list(portsSuffix) }

// Keys returns the keys that the names of the files in the folder carry, sorted, those of broken records too: GC goes by
// them, for a record that cannot be read must not stay for ever.
func (s *Store) Keys() ([]Key, error) {
	names, err := s.names(plainSuffix)
	if err != nil {
		return nil, err
	}
	var keys []Key
	for _, name := range names {
		if key, err := KeyOf(name); err == nil {
			keys = append(keys, key)
		}
	}
	return slices.Compact(keys), nil
}

// Sweep removes what killed writers left half written. The caller holds [NodeExclusive]: nobody writes.
func (s *Store) Sweep() error {
	entries, err := os.ReadDir(s.Dir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("sweep records: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), tempPrefix) {
			errs = append(errs, os.Remove(filepath.Join(s.Dir(), e.Name())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("sweep records: %w", err)
	}
	return nil
}

func (s *Store) path(key Key, prefix, suffix string) string {
	return filepath.Join(s.Dir(), prefix+key.String()+suffix)
}

func (s *Store) remove(key Key, paths ...string) error {
	var errs []error
	for _, p := range paths {
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove record of %s: %w", key, err)
	}
	return nil
}

// names lists the files that end in suffix, sorted.
func (s *Store) names(suffix string) ([]string, error) {
	entries, err := os.ReadDir(s.Dir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list records: %w", err)
	}
	var names []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), suffix) && !strings.HasPrefix(e.Name(), tempPrefix) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func (s *Store) list(suffix string) ([]*Attachment, []error) {
	names, err := s.names(suffix)
	if err != nil {
		return nil, []error{err}
	}
	byKey := map[Key]*Attachment{}
	var errs []error
	for _, name := range names {
		a, err := s.read(name)
		switch {
		case errors.Is(err, fs.ErrNotExist): // deleted since the folder was read
		case err != nil:
			errs = append(errs, err)
		case byKey[a.Key()] == nil || len(a.PortMappings) > 0:
			byKey[a.Key()] = a
		}
	}
	var all []*Attachment
	for _, a := range byKey {
		all = append(all, a)
	}
	slices.SortFunc(all, func(a, b *Attachment) int { return strings.Compare(a.Key().String(), b.Key().String()) })
	return all, errs
}

func (s *Store) read(name string) (*Attachment, error) {
	path := filepath.Join(s.Dir(), name)
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("read record: %w", err)
	case err != nil:
		return nil, &BrokenError{Path: path, Err: err}
	}
	a, err := decode(name, data)
	if err != nil {
		return nil, &BrokenError{Path: path, Err: err}
	}
	return a, nil
}

// KeyOf reads the key out of a record's file name; other names are an error.
func KeyOf(name string) (Key, error) {
	stem := strings.TrimSuffix(name, plainSuffix)
	if strings.HasSuffix(name, portsSuffix) {
		stem = strings.TrimSuffix(name, portsSuffix)
	}
	id, ifName, ok := strings.Cut(stem, "@")
	if !ok {
		return Key{}, fmt.Errorf("file name %q: CONTAINER@INTERFACE%s or CONTAINER@INTERFACE%s is expected", name, plainSuffix,
			portsSuffix)
	}
	key := Key{id, ifName}
	return key, key.Check()
}

// decode reads a record and holds it to what every reader counts on, so that a foreign or damaged file does no harm: it
// is about the container its name says, and each of its values can be used as it is.
func decode(name string, data []byte) (*Attachment, error) {
	key, err := KeyOf(name)
	if err != nil {
		return nil, err
	}
	var a Attachment
	if err := json.Unmarshal(data, &a); err != nil {
		return nil, err
	}
	if a.Key() != key {
		return nil, fmt.Errorf("containerID %q, ifName %q: the file's name says %s", a.ContainerID, a.IfName, key)
	}
	if strings.HasSuffix(name, portsSuffix) != (len(a.PortMappings) > 0) {
		return nil, fmt.Errorf("portMappings: %d of them in a file of this name", len(a.PortMappings))
	}
	return &a, a.check()
}

// check returns an error unless every field can be used as it is.
func (a *Attachment) check() error {
	if a.Version != recordVersion {
		return fmt.Errorf("version: %d: only %d is known", a.Version, recordVersion)
	}
	if err := a.Key().Check(); err != nil {
		return err
	}
	prefix := GuardedPrefix
	switch a.Policy {
	case PolicyEnforce:
	case PolicyNone:
		prefix = UnguardedPrefix
	default:
		return fmt.Errorf("policy: %q: %q or %q is allowed", a.Policy, PolicyEnforce, PolicyNone)
	}
	if err := CheckInterfaceName(a.HostInterface); err != nil || !strings.HasPrefix(a.HostInterface, prefix) {
		return fmt.Errorf("hostInterface: %q: an interface name that begins with %q is allowed", a.HostInterface, prefix)
	}
	if a.MTU < 0 || a.MTU > 65535 {
		return fmt.Errorf("mtu: %d: 0 to 65535 is allowed", a.MTU)
	}
	for _, mac := range []string{a.HostMAC, a.PodMAC} {
		if hw, err := net.ParseMAC(mac); mac != "" && (err != nil || len(hw) != 6) {
			return fmt.Errorf("hostMAC, podMAC: %q: six hexadecimal bytes are allowed", mac)
		}
	}
	if err := oneOfEachFamily(a.Addresses); err != nil {
		return fmt.Errorf("addresses: %w", err)
	}
	for _, p := range a.Ranges {
		if !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() {
			return fmt.Errorf("ranges: %q: an IPv4 or IPv6 prefix is allowed", p)
		}
	}
	if err := oneOfEachFamily(a.NodeAddresses); err != nil {
		return fmt.Errorf("nodeAddresses: %w", err)
	}
	for i, m := range a.PortMappings {
		if err := m.check(); err != nil {
			return fmt.Errorf("portMappings[%d]: %w", i, err)
		}
	}
	return nil
}

func oneOfEachFamily(addrs []netip.Addr) error {
	seen := map[int]bool{}
	for _, addr := range addrs {
		switch {
		case !plain(addr) || addr.IsUnspecified():
			return fmt.Errorf("%q: an address without zone, and not unspecified, is allowed", addr)
		case seen[addr.BitLen()]:
			return fmt.Errorf("%v: at most one address of each family is allowed", addrs)
		}
		seen[addr.BitLen()] = true
	}
	return nil
}

// plain reports whether an address is one of the two families' own: "::ffff:10.0.0.1" is an IPv4 address in IPv6 clothes
// and would be put into the wrong family's rules.
func plain(addr netip.Addr) bool { return addr.IsValid() && addr.Zone() == "" && !addr.Is4In6() }

func (m PortMapping) check() error {
	switch {
	case m.HostPort == 0 || m.ContainerPort == 0:
		return fmt.Errorf("hostPort %d, containerPort %d: 1 to 65535 is allowed", m.HostPort, m.ContainerPort)
	case m.Protocol != "tcp" && m.Protocol != "udp" && m.Protocol != "sctp":
		return fmt.Errorf("protocol: %q: tcp, udp or sctp is allowed", m.Protocol)
	case m.HostIP.IsValid() && !plain(m.HostIP):
		return fmt.Errorf("hostIP: %q: an address without zone is allowed", m.HostIP)
	}
	return nil
}
