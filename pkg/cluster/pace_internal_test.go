package cluster

import (
	"bytes"
	"context"
	"io"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
)

// arrivals is a connection that gives, as the kernel does, all that has come and fits.
type arrivals struct {
	net.Conn
	come chan []byte
	rest []byte
}

func (a *arrivals) Read(b []byte) (int, error) {
	for open := true; open; {
		var more []byte
		if len(a.rest) > 0 {
			select {
			case more, open = <-a.come:
			default:
				open = false
			}
		} else if more, open = <-a.come; !open {
			return 0, io.EOF
		}
		a.rest = append(a.rest, more...)
	}
	n := copy(b, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

func TestEventsAreReadTogether(t *testing.T) {
	event := func(size int) []byte {
		var b bytes.Buffer
		if _, err := protobuf.LengthDelimitedFramer.NewFrameWriter(&b).Write(make([]byte, size)); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	type sent struct {
		after time.Duration // the one before; the first comes after a quiet time besides
		what  []byte
	}
	const ms, quiet = time.Millisecond, time.Second
	every := func(n int, after time.Duration) (list []sent) {
		for range n {
			list = append(list, sent{after, event(9)})
		}
		return list
	}
	busy := slices.Concat(every(1, 0), every(24, 10*ms))
	busyRead := slices.Concat([]time.Duration{0}, slices.Repeat([]time.Duration{27 * ms}, 2),
		slices.Repeat([]time.Duration{81 * ms}, 6), slices.Repeat([]time.Duration{162 * ms}, 8),
		slices.Repeat([]time.Duration{243 * ms}, 8))
	for _, tt := range []struct {
		name   string
		listed bool
		sent   []sent
		read   []time.Duration // since the first came
	}{
		{"those that follow the first", true, []sent{{0, event(9)}, {10 * ms, event(9)}, {10 * ms, event(9)}},
			[]time.Duration{0, readPause, readPause}},
		{"after a quiet time", true, []sent{{0, event(9)}, {readPause, event(9)}}, []time.Duration{0, readPause}},
		{"more and more of many", true, busy, busyRead},
		{"not of fewer that follow", true, slices.Concat(busy, []sent{{120 * ms, event(9)}, {45 * ms, event(9)}, {45 * ms, event(9)}}),
			slices.Concat(busyRead, []time.Duration{360 * ms, 405 * ms, 450 * ms})},
		{"nor without a gap", true, slices.Concat(busy, every(6, 45*ms)),
			slices.Concat(busyRead, []time.Duration{324 * ms, 351 * ms, 378 * ms, 420 * ms, 465 * ms, 510 * ms})},
		{"no part waits", true, []sent{{0, event(9)[:2]}, {ms, event(9)[2:7]}, {ms, event(9)[7:]}}, []time.Duration{2 * ms}},
		{"not before there is a list", false, []sent{{0, event(9)}, {10 * ms, event(9)}}, []time.Duration{0, 10 * ms}},
		{"much is there", true, []sent{{0, slices.Concat(event(9000), event(9000), event(9000))}}, []time.Duration{0, 0, 0}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				raw := &arrivals{come: make(chan []byte, len(tt.sent))}
				p := &pace{}
				p.steady.Store(tt.listed)
				conn, err := p.dial(func(context.Context, string, string) (net.Conn, error) { return raw, nil })(t.Context(), "", "")
				if err != nil {
					t.Fatal(err)
				}
				go func() {
					time.Sleep(quiet)
					for _, s := range tt.sent {
						time.Sleep(s.after)
						raw.come <- s.what
					}
					close(raw.come)
				}()
				frames := pacedFramer{protobuf.LengthDelimitedFramer, p}.NewFrameReader(conn)
				var read []time.Duration
				for begin := time.Now().Add(quiet); ; {
					_, err := frames.Read(make([]byte, 10_000))
					if err == io.EOF {
						break
					}
					if err != nil {
						t.Fatal(err)
					}
					read = append(read, time.Since(begin))
				}
				if !slices.Equal(read, tt.read) {
					t.Errorf("read at %v, want %v", read, tt.read)
				}
			})
		})
	}
}
