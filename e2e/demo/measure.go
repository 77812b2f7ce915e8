package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"
)

const (
	// openLimit is how long a connection has to open. Everything is on one machine: what is let through opens within
	// milliseconds. What is dropped costs the whole limit.
	openLimit = 400 * time.Millisecond
	// secondLimit is what one has that should open and did not, before it counts as refused: the machine may be busy. It
	// is longer than the first retransmission of a SYN, after one second.
	secondLimit = 4 * time.Second
	// atOnce is how many connections are tried at the same time; each that waits keeps a thread in its namespace.
	atOnce = 150
)

// listeners are the sockets on which everybody answers, one process for all: a socket stays in the namespace in which it
// was opened.
type listeners struct{ sockets []net.Listener }

// open lets a party answer on every port, in both families, with its name.
func (l *listeners) open(p *party) error {
	for _, port := range ports {
		err := in(p.NS, func() error {
			listener, err := net.Listen("tcp", fmt.Sprintf("[::]:%d", port))
			if err == nil {
				l.sockets = append(l.sockets, listener)
				go answer(listener, p.Name)
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("listen in %s: %w", p.Name, err)
		}
	}
	return nil
}

func (l *listeners) close() {
	for _, listener := range l.sockets {
		listener.Close()
	}
}

func answer(listener net.Listener, name string) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		_, _ = fmt.Fprintln(conn, name) // a client that has gone has learned what it wanted
		conn.Close()
	}
}

// measure tries all connections, many at a time.
func measure(ctx context.Context, all []*try) error {
	tryAll(ctx, all, openLimit)
	var again []*try
	for _, t := range all {
		if t.Expected && !t.Opened {
			again = append(again, t)
		}
	}
	tryAll(ctx, again, secondLimit)
	return ctx.Err()
}

func tryAll(ctx context.Context, all []*try, limit time.Duration) {
	var group sync.WaitGroup
	slots := make(chan struct{}, atOnce)
	for _, t := range all {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			err := t.dial(ctx, limit)
			t.Opened, t.Why = err == nil, ""
			if err != nil {
				t.Why = err.Error()
			}
		})
	}
	group.Wait()
}

// dial opens the connection and hears who answers.
func (t *try) dial(ctx context.Context, limit time.Duration) error {
	var conn net.Conn
	err := in(t.From.NS, func() (err error) {
		dialer := net.Dialer{Timeout: limit}
		conn, err = dialer.DialContext(ctx, "tcp", fmt.Sprintf("[%s]:%d", t.Address, t.Port))
		return err
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	name, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return fmt.Errorf("it opened, but nobody answered: %w", err)
	}
	if name = strings.TrimSpace(name); name != t.To.Name {
		return fmt.Errorf("%s answered", name)
	}
	return nil
}

// differing names the tries that went otherwise than the policies say.
func differing(step int, all []*try) []string {
	var out []string
	for _, t := range all {
		if t.Opened != t.Expected {
			line := fmt.Sprintf("step %d: %s", step, t)
			if t.Why != "" {
				line += " (" + t.Why + ")"
			}
			out = append(out, line)
		}
	}
	return out
}
