package cluster

import (
	"bufio"
	"context"
	"io"
	"net"
	"slices"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
)

// After a reading of a connection the next one waits, where in between an event was read to its end: what comes meanwhile waits in
// the kernel and is read together, for to wake up for each event of many costs more than to decode it. The first event after a
// quiet time does not wait. Where others follow, the pause is a little longer than that between an engine's passes, so that these
// need not wait once more; and twice as long each time that something has come by its end, up to the longest.
const (
	readPause     = 27 * time.Millisecond
	readPauseMost = 81 * time.Millisecond
	atOnce        = 5 * time.Millisecond // what a reading takes, with the oversleeping before it, where something was there
)

// pace reads the events of a watch together that come shortly after each other. It stands at both ends of the way from the
// connection to the decoder, for only the decoder's end knows where an event ends, and only the connection's whether more is there.
type pace struct {
	steady atomic.Bool // the list that the watch goes on from has been read; this is not to be held up
	whole  atomic.Bool // the last that was read was the end of an event
}

// dial is from, with connections that are read at this pace.
func (p *pace) dial(from dialer) dialer {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := from(ctx, network, address)
		if err != nil {
			return nil, err
		}
		return &pacedConn{Conn: conn, all: bufio.NewReaderSize(&pausing{from: conn, pace: p, rest: readPause}, mostAtOnce)}, nil
	}
}

type dialer = func(ctx context.Context, network, address string) (net.Conn, error)

// mostAtOnce is how many bytes are read at once. Where there are as many, there is no pause before the next.
const mostAtOnce = 16 << 10

// pacedConn has all that has come with one reading of the connection.
type pacedConn struct {
	net.Conn
	all *bufio.Reader
}

func (c *pacedConn) Read(b []byte) (int, error) { return c.all.Read(b) }

// pausing reads a connection after a pause.
type pausing struct {
	from io.Reader
	pace *pace
	last time.Time
	rest time.Duration // until the next
	full bool
}

func (r *pausing) Read(b []byte) (int, error) {
	follows, due := r.pace.whole.Swap(false) && !r.full, r.last.Add(r.rest)
	if follows {
		time.Sleep(time.Until(due))
	}
	n, err := r.from.Read(b)
	r.last, r.full = time.Now(), n == len(b)
	switch {
	case !follows: // it is of the same as what was read before
	case r.last.After(due.Add(atOnce)):
		r.rest = readPause
	default:
		r.rest = min(2*r.rest, readPauseMost)
	}
	return n, err
}

// pacedCodecs note at their pace where an event ends.
type pacedCodecs struct {
	runtime.NegotiatedSerializer
	pace *pace
}

// SupportedMediaTypes implements runtime.NegotiatedSerializer.
func (c pacedCodecs) SupportedMediaTypes() []runtime.SerializerInfo {
	types := slices.Clone(c.NegotiatedSerializer.SupportedMediaTypes())
	for i := range types {
		if s := types[i].StreamSerializer; s != nil {
			types[i].StreamSerializer = &runtime.StreamSerializerInfo{
				EncodesAsText: s.EncodesAsText, Serializer: s.Serializer, Framer: pacedFramer{s.Framer, c.pace}}
		}
	}
	return types
}

type pacedFramer struct {
	runtime.Framer
	pace *pace
}

// NewFrameReader implements runtime.Framer.
func (f pacedFramer) NewFrameReader(r io.ReadCloser) io.ReadCloser {
	return &pacedFrames{f.Framer.NewFrameReader(r), f.pace}
}

type pacedFrames struct {
	io.ReadCloser // of frames: an error says that one is not at its end
	pace          *pace
}

func (f *pacedFrames) Read(b []byte) (int, error) {
	n, err := f.ReadCloser.Read(b)
	if err == nil && f.pace.steady.Load() {
		f.pace.whole.Store(true)
	}
	return n, err
}
