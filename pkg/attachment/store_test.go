package attachment

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

func sample(id string, ports ...PortMapping) *Attachment {
	return &Attachment{
		Version: 1, ContainerID: id, IfName: "eth0", NetNS: "/run/netns/" + id, Network: "pods",
		Pod: Pod{Namespace: "shop", Name: "web-0", UID: "u1"}, Policy: PolicyEnforce,
		HostInterface: HostInterface(GuardedPrefix, "u1", "eth0"), HostMAC: "02:00:00:00:00:01", PodMAC: "02:00:00:00:00:02",
		MTU: 1500, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")},
		PortMappings: ports, Created: time.Unix(1700000000, 0).UTC(),
	}
}

var web = PortMapping{HostPort: 80, ContainerPort: 8080, Protocol: "tcp"}

func put(t *testing.T, s *Store, a *Attachment) {
	t.Helper()
	if err := s.Put(a); err != nil {
		t.Fatal(err)
	}
}

func TestRecordComesBackAsItWasPut(t *testing.T) {
	s := Open(t.TempDir())
	for _, a := range []*Attachment{sample("a"), sample("b", web)} {
		put(t, s, a)
		if got, err := s.Get(a.Key()); err != nil || !reflect.DeepEqual(got, a) {
			t.Errorf("got %+v (%v), want %+v", got, err, a)
		}
	}
	all, errs := s.List()
	if len(all) != 2 || len(errs) != 0 || all[0].ContainerID != "a" || all[1].ContainerID != "b" {
		t.Errorf("list %v, %v", all, errs)
	}
	ports, errs := s.WithPorts()
	if len(ports) != 1 || len(errs) != 0 || ports[0].ContainerID != "b" {
		t.Errorf("with ports %v, %v", ports, errs)
	}
}

func TestARecordThatLosesItsPortsLeavesNoSecondFile(t *testing.T) {
	s := Open(t.TempDir())
	put(t, s, sample("a", web))
	put(t, s, sample("a"))
	if ports, _ := s.WithPorts(); len(ports) != 0 {
		t.Errorf("still has ports: %v", ports)
	}
	if names, _ := os.ReadDir(s.Dir()); len(names) != 1 {
		t.Errorf("files %v, want one", names)
	}
}

func TestAbsenceIsToleratedEverywhere(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "none"))
	k := Key{"a", "eth0"}
	if _, err := s.Get(k); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Get: %v", err)
	}
	if err := s.Delete(k); err != nil {
		t.Errorf("Delete: %v", err)
	}
	if all, errs := s.List(); len(all) != 0 || len(errs) != 0 {
		t.Errorf("List: %v, %v", all, errs)
	}
	if err := s.Sweep(); err != nil {
		t.Errorf("Sweep: %v", err)
	}
}

func TestABrokenRecordIsReportedAndStopsNothing(t *testing.T) {
	s := Open(t.TempDir())
	put(t, s, sample("good"))
	for name, content := range map[string]string{
		"bad@eth0.json": "{", "other@eth0.json": `{"version":1}`, "noat.json": "{}", "x@eth0.ports.json": "", "..@eth0.json": "{}",
	} {
		if err := os.WriteFile(filepath.Join(s.Dir(), name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(s.Dir(), "dir@eth0.json"), 0o700); err != nil {
		t.Fatal(err)
	}
	all, errs := s.List()
	if len(all) != 1 || len(errs) != 5 { // the name that begins with a dot is a temporary file's
		t.Errorf("list %v, %v", all, errs)
	}
	for _, err := range errs {
		if b := (*BrokenError)(nil); !errors.As(err, &b) {
			t.Errorf("%v is no BrokenError", err)
		}
	}
	if _, err := s.Get(Key{"bad", "eth0"}); errors.Is(err, fs.ErrNotExist) || err == nil {
		t.Errorf("a broken record reads as %v", err)
	}
	if keys, err := s.Keys(); err != nil || len(keys) != 5 {
		t.Errorf("keys %v (%v), want those of broken records too", keys, err)
	}
	if err := s.Delete(Key{"bad", "eth0"}); err != nil {
		t.Errorf("a broken record cannot be deleted: %v", err)
	}
}

func TestSweepRemovesWhatAKilledWriterLeft(t *testing.T) {
	s := Open(t.TempDir())
	put(t, s, sample("a"))
	if err := os.WriteFile(s.path(Key{"b", "eth0"}, tempPrefix, ""), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Sweep(); err != nil {
		t.Fatal(err)
	}
	if names, _ := os.ReadDir(s.Dir()); len(names) != 1 {
		t.Errorf("files %v, want one", names)
	}
}

func TestPutRefusesWhatNobodyCouldUse(t *testing.T) {
	for name, spoil := range map[string]func(*Attachment){
		"version":       func(a *Attachment) { a.Version = 2 },
		"container ID":  func(a *Attachment) { a.ContainerID = "../a" },
		"interface":     func(a *Attachment) { a.IfName = "a/b" },
		"policy":        func(a *Attachment) { a.Policy = "" },
		"prefix":        func(a *Attachment) { a.HostInterface = "psx0123" },
		"other prefix":  func(a *Attachment) { a.Policy = PolicyNone },
		"MAC":           func(a *Attachment) { a.PodMAC = "02:00" },
		"MTU":           func(a *Attachment) { a.MTU = -1 },
		"two of family": func(a *Attachment) { a.Addresses = append(a.Addresses, netip.MustParseAddr("10.0.0.3")) },
		"zone":          func(a *Attachment) { a.Addresses = []netip.Addr{netip.MustParseAddr("fe80::1%x")} },
		"mapped":        func(a *Attachment) { a.NodeAddresses = []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.1")} },
		"port":          func(a *Attachment) { a.PortMappings = []PortMapping{{Protocol: "tcp"}} },
		"protocol":      func(a *Attachment) { a.PortMappings = []PortMapping{{HostPort: 1, ContainerPort: 1, Protocol: "TCP"}} },
	} {
		a := sample("a")
		spoil(a)
		if Open(t.TempDir()).Put(a) == nil {
			t.Errorf("%s: %+v is accepted", name, a)
		}
	}
}

func lock(t *testing.T, s *Store, what Lockable) *Lock {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	l, err := s.Lock(ctx, what)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// held reports whether somebody else holds the lock.
func held(t *testing.T, s *Store, what Lockable) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	l, err := s.Lock(ctx, what)
	if err == nil {
		l.Release()
	} else if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	return err != nil
}

func TestNodeLockIsSharedByAddAndExclusiveToGC(t *testing.T) {
	s := Open(t.TempDir())
	a, b := lock(t, s, NodeShared), lock(t, s, NodeShared)
	a.Release()
	if !held(t, s, NodeExclusive) {
		t.Error("GC runs beside an ADD")
	}
	b.Release()
	gc := lock(t, s, NodeExclusive)
	if !held(t, s, NodeShared) {
		t.Error("an ADD runs beside GC")
	}
	if held(t, s, HostPorts) || held(t, s, Interface("pst0")) {
		t.Error("locks of different things exclude each other")
	}
	gc.Release()
}

func TestAWaiterGetsTheLockWhenItIsReleased(t *testing.T) {
	s := Open(t.TempDir())
	first := lock(t, s, HostPorts)
	got := make(chan *Lock)
	go func() {
		l, err := s.Lock(context.Background(), HostPorts)
		if err != nil {
			t.Error(err)
		}
		got <- l
	}()
	first.Release()
	select {
	case l := <-got:
		l.Release()
	case <-time.After(10 * time.Second):
		t.Fatal("never got it")
	}
}

func TestAWaiterThatGaveUpDoesNotKeepTheLock(t *testing.T) {
	s := Open(t.TempDir())
	first := lock(t, s, HostPorts)
	if !held(t, s, HostPorts) {
		t.Fatal("two hold it")
	}
	first.Release()
	lock(t, s, HostPorts).Release()
}

func TestAChildThatInheritsTheFileKeepsTheLock(t *testing.T) {
	s := Open(t.TempDir())
	l := lock(t, s, HostPorts)
	child := exec.Command("cat")
	child.ExtraFiles = []*os.File{l.File()}
	stdin, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	l.Release()
	if !held(t, s, HostPorts) {
		t.Error("the lock ended before the child")
	}
	stdin.Close()
	child.Wait()
	lock(t, s, HostPorts).Release()
}

func FuzzRecord(f *testing.F) {
	for _, seed := range []string{
		`{"version":1,"containerID":"a","ifName":"eth0","policy":"enforce","hostInterface":"pst0"}`,
		`{"version":1,"containerID":"a","ifName":"eth0","policy":"none","hostInterface":"psx0","addresses":["10.0.0.1","fd00::1"],
			"portMappings":[{"hostPort":1,"containerPort":2,"protocol":"udp","hostIP":"::"}]}`,
		`{"addresses":["fe80::1%eth0"]}`, `{`, `null`, `[]`, `{"created":"x"}`, `{"portMappings":[{"hostIP":1}]}`,
	} {
		f.Add("a@eth0.json", []byte(seed))
		f.Add("a@eth0.ports.json", []byte(seed))
	}
	f.Add("@.json", []byte("{}"))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		a, err := decode(name, data)
		if err != nil {
			return
		}
		if err := a.check(); err != nil {
			t.Fatalf("accepted: %v", err)
		}
		s := Open(t.TempDir())
		put(t, s, a)
		if got, err := s.Get(a.Key()); err != nil ||
			!reflect.DeepEqual(got.Addresses, a.Addresses) || len(got.PortMappings) != len(a.PortMappings) {
			t.Fatalf("read back %+v (%v), want %+v", got, err, a)
		}
	})
}
