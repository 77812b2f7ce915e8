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
		after time.Duration // the one before
		what  []byte
	}
	const ms = time.Millisecond
	for _, tt := range []struct {
		name   string
		listed bool
		sent   []sent
		read   []time.Duration
	}{
		{"those that follow the first", true, []sent{{0, event(9)}, {10 * ms, event(9)}, {10 * ms, event(9)}},
			[]time.Duration{0, readPause, readPause}},
		{"after a quiet time", true, []sent{{0, event(9)}, {readPause, event(9)}}, []time.Duration{0, readPause}},
		{"pauses grow", true, []sent{{0, event(9)}, {10 * ms, event(9)}, {readPause, event(9)}, {2 * readPause, event(9)},
			{readPauseMost, event(9)}}, []time.Duration{0, readPause, 3 * readPause, 3*readPause + readPauseMost,
			3*readPause + 2*readPauseMost}},
		{"and are short again", true, []sent{{0, event(9)}, {10 * ms, event(9)}, {3 * readPause, event(9)}, {ms, event(9)}},
			[]time.Duration{0, readPause, 10*ms + 3*readPause, 10*ms + 4*readPause}},
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
					for _, s := range tt.sent {
						time.Sleep(s.after)
						raw.come <- s.what
					}
					close(raw.come)
				}()
				frames := pacedFramer{protobuf.LengthDelimitedFramer, p}.NewFrameReader(conn)
				var read []time.Duration
				for begin := time.Now(); ; {
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
