package nlevents

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// flap sets a link down and up again, some times: two announcements each.
func flap(t *testing.T, times int) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	for range times {
		if err := errors.Join(netlink.LinkSetDown(lo), netlink.LinkSetUp(lo)); err != nil {
			t.Fatal(err)
		}
	}
}

func open(t *testing.T) *Socket {
	s, err := Open(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestWhatWaitsIsReadInOneGo(t *testing.T) {
	nettest.NewNS(t, "events").Do(t, func() {
		s := open(t)
		defer s.Close()
		flap(t, 10)
		links := 0
		lost, err := s.Read(func(m Message) {
			if m.Type == unix.RTM_NEWLINK {
				links++
			}
		})
		if lost || err != nil || links < 20 {
			t.Errorf("read %d announcements of at least 20, lost some: %v, %v", links, lost, err)
		}
	})
}

func TestLostAnnouncementsAreToldOnce(t *testing.T) {
	nettest.NewNS(t, "events").Do(t, func() {
		s := open(t)
		defer s.Close()
		if err := s.SetRoom(1); err != nil {
			t.Fatal(err)
		}
		flap(t, 50)
		for _, want := range []bool{true, false} {
			if lost, err := s.Read(func(Message) {}); lost != want || err != nil {
				t.Errorf("lost some: %v, %v; want %v", lost, err, want)
			}
		}
	})
}

func TestRunWakesForWhatComesAndEndsWithItsContext(t *testing.T) {
	nettest.NewNS(t, "events").Do(t, func() {
		for _, end := range []string{"cancel", "close", "error"} {
			s := open(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			bad := errors.New("bad")
			woken := make(chan struct{}, 1000)
			var wg sync.WaitGroup
			wg.Go(func() {
				err := s.Run(ctx, func() error {
					n := 0
					_, err := s.Read(func(Message) { n++ })
					if n > 0 {
						woken <- struct{}{}
						if end == "error" {
							return bad
						}
					}
					return err
				})
				if (end == "error") != errors.Is(err, bad) {
					t.Errorf("%s: Run returned %v", end, err)
				}
			})
			flap(t, 1)
			select {
			case <-woken:
			case <-time.After(30 * time.Second):
				t.Fatalf("%s: nothing was read", end)
			}
			switch end {
			case "cancel":
				cancel()
			case "close":
				s.Close()
			}
			wg.Wait()
			s.Close()
			if lost, err := s.Read(func(Message) { t.Error("read from a closed socket") }); lost || err != nil {
				t.Errorf("a closed socket: %v, %v", lost, err)
			}
		}
	})
}
