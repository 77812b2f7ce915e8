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

// After a reading of a connection the next one waits, where an event was read to its end in between: what comes meanwhile waits
// in the kernel and is read together, for to wake up for each event of many costs more than to decode it. The first event after a
// quiet time does not wait. Where others follow, the pause is a little longer than that between an engine's passes, so that these
// need not wait once more; and twice as long each time that three and more came within two of it, up to the longest.
const (
	readPause     = 27 * time.Millisecond
	readPauseMost = 81 * time.Millisecond
)

// pace reads the events of a watch together that come shortly after each other. It stands at both ends of the way from the
// connection to the decoder, for only the decoder's end knows where an event ends, and only the other whether more is there.
type pace struct {
	steady atomic.Bool  // the list that the watch goes on from has been read; this is not to be held up
	ended  atomic.Int64 // events whose end has been read since a connection was
}

// dial is from, with connections that are read at this pace.
func (p *pace) dial(from dialer) dialer {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := from(ctx, network, address)
		if err != nil {
			return nil, err
		}
		paced := &pausing{from: conn, pace: p, last: time.Now(), rest: readPause}
		return &pacedConn{Conn: conn, all: bufio.NewReaderSize(paced, mostAtOnce)}, nil
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
	full bool          // there may be more
	over time.Duration // the time in which what has been read since the last pause has come
	rest time.Duration // the last pause, from one reading to the next
}

func (r *pausing) Read(b []byte) (int, error) {
	if events := time.Duration(r.pace.ended.Swap(0)); events > 0 && !r.full {
		if 2*events*readPause >= 3*r.over {
			r.rest = min(2*r.rest, readPauseMost)
		} else {
			r.rest = readPause
		}
		r.over = 0
		time.Sleep(time.Until(r.last.Add(r.rest)))
	}
	n, err := r.from.Read(b)
	now := time.Now()
	r.over += now.Sub(r.last)
	r.last, r.full = now, n == len(b)
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
		f.pace.ended.Add(1)
	}
	return n, err
}
