package gate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"time"

	"golang.org/x/sys/unix"

	"github.com/postern-cni/postern/pkg/attachment"
)

// request and answer are the two lines of a connection.
type request struct {
	Guard *attachment.Attachment `json:"guard,omitempty"`
	Ask   string                 `json:"ask,omitempty"`
	Body  json.RawMessage        `json:"body,omitempty"`
	// Deadline is when the asking side gives up.
	Deadline time.Time `json:"deadline"`
}

type answer struct {
	OK      bool            `json:"ok"`
	Refused string          `json:"refused,omitempty"`
	Error   string          `json:"error,omitempty"`
	Body    json.RawMessage `json:"body,omitempty"`
}

// retryPause is how often a client tries a socket on which nobody listens yet.
const retryPause = 20 * time.Millisecond

// Client is the plugin's side of one connection, and that of policyd's subcommands.
type Client struct{ conn net.Conn }

// Dial connects to policyd. While nobody listens it tries again until the context ends (a restart takes less than a second),
// and then returns an error that is [ErrAway]. The plugin calls it before it makes a pod's link: as long as policyd answers,
// its rules are in force, and an unknown link is closed.
func Dial(ctx context.Context, stateDir string) (*Client, error) {
	var away error
	for {
		conn, err := DialOnce(ctx, stateDir)
		var timeout net.Error // package net has two errors for a deadline that has passed
		switch {
		case err == nil:
			return conn, nil
		case errors.Is(err, ErrAway):
			away = err
		case away != nil && (ctx.Err() != nil || errors.As(err, &timeout) && timeout.Timeout()): // the end came in a try
			return nil, away
		default:
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, away
		case <-time.After(retryPause):
		}
	}
}

// DialOnce connects to policyd or returns an error that is [ErrAway] at once.
func DialOnce(ctx context.Context, stateDir string) (*Client, error) {
	path := Socket(stateDir)
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return nil, fmt.Errorf("connect to %s: %w", path, ErrAway)
	case err != nil:
		return nil, fmt.Errorf("connect to %s: %w", path, err)
	}
	return &Client{conn}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Guard asks policyd to guard an attachment and waits for the answer as long as the context lasts. It returns nil once the
// pod is guarded, a *[Refusal], or an error that says how the connection ended.
func (c *Client) Guard(ctx context.Context, a *attachment.Attachment) error {
	if err := c.AskGuard(ctx, a); err != nil {
		return err
	}
	return c.Guarded(ctx)
}

// AskGuard is the first half of [Client.Guard]: it asks and does not wait. The context's deadline is what policyd is told.
func (c *Client) AskGuard(ctx context.Context, a *attachment.Attachment) error {
	return c.request(ctx, request{Guard: a})
}

// Guarded is the second half.
func (c *Client) Guarded(ctx context.Context) error {
	_, err := c.answer(ctx)
	return err
}

// Ask puts a question with a body and decodes the answer's body into reply.
func (c *Client) Ask(ctx context.Context, question string, body, reply any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("ask policyd for %s: %w", question, err)
	}
	out, err := c.exchange(ctx, request{Ask: question, Body: text})
	if err != nil {
		return fmt.Errorf("ask policyd for %s: %w", question, err)
	}
	return json.Unmarshal(out, reply)
}

func (c *Client) exchange(ctx context.Context, r request) (json.RawMessage, error) {
	if err := c.request(ctx, r); err != nil {
		return nil, err
	}
	return c.answer(ctx)
}

func (c *Client) request(ctx context.Context, r request) error {
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	r.Deadline, _ = ctx.Deadline()
	if err := json.NewEncoder(c.conn).Encode(r); err != nil {
		return fmt.Errorf("write to policyd: %w", err)
	}
	return nil
}

func (c *Client) answer(ctx context.Context) (json.RawMessage, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) }) // ends a read that waits
	defer stop()
	var a answer
	if err := json.NewDecoder(c.conn).Decode(&a); err != nil {
		if ctx.Err() != nil {
			return nil, fmt.Errorf("policyd has not answered in time: %w", ctx.Err())
		}
		return nil, fmt.Errorf("read policyd's answer: %w", err)
	}
	switch {
	case a.Refused != "":
		return nil, &Refusal{a.Refused}
	case !a.OK:
		return nil, errors.New(a.Error)
	}
	return a.Body, nil
}
