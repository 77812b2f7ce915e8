package gate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Listen opens policyd's socket for root alone, in place of one that a former policyd has left.
func Listen(stateDir string) (net.Listener, error) {
	path := Socket(stateDir)
	if err := os.MkdirAll(stateDir, 0o700); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	temp := path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temp, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false) // a successor may have put its own there by then
	if err := os.Rename(temp, path); err != nil {
		return nil, errors.Join(fmt.Errorf("listen on %s: %w", path, err), l.Close())
	}
	return l, nil
}

// Serve answers requests until the context ends, and then waits for those under way. A client that goes away ends its
// request's context.
func Serve(ctx context.Context, l net.Listener, h Handler) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept on %s: %w", l.Addr(), err)
		}
		wg.Go(func() { serve(ctx, conn, h) })
	}
}

func serve(ctx context.Context, conn net.Conn, h Handler) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var r request
	in := json.NewDecoder(conn)
	if err := in.Decode(&r); err != nil {
		return // the plugin connects before it asks, and may have nothing to ask in the end
	}
	go func() { // the client's end of the connection is the end of its patience
		var more json.RawMessage
		_ = in.Decode(&more)
		cancel()
	}()
	if !r.Deadline.IsZero() {
		var done context.CancelFunc
		ctx, done = context.WithDeadline(ctx, r.Deadline)
		defer done()
	}
	_ = json.NewEncoder(conn).Encode(handle(ctx, h, r)) // a client that has gone needs no answer
}

func handle(ctx context.Context, h Handler, r request) answer {
	var body any
	var err error
	switch {
	case r.Guard != nil:
		err = h.Guard(ctx, r.Guard)
	case r.Ask != "":
		body, err = h.Ask(ctx, r.Ask, r.Body)
	default:
		err = errors.New("the request is neither guard nor ask; plugin and policyd are of different versions")
	}
	var refusal *Refusal
	if errors.As(err, &refusal) {
		return answer{Refused: refusal.Reason}
	}
	if err != nil {
		return answer{Error: err.Error()}
	}
	text, err := json.Marshal(body)
	if err != nil {
		return answer{Error: err.Error()}
	}
	return answer{OK: true, Body: text}
}
