package nodenet

import (
	"context"
	"errors"
	"sync"
	"time"
)

// Lookout looks for what would defeat policies on a node whose network somebody else keeps. Of a [Config] it uses what findings
// need.
type Lookout struct {
	reporter
	state sync.Mutex
	ready error
}

// NewLookout returns a lookout that has not looked yet.
func NewLookout(c Config) *Lookout {
	return &Lookout{reporter: c.reporter(), ready: errors.New("what else is on the node has not been looked at yet")}
}

// Ready returns nil if nothing that was found keeps the node from being ready, and else that.
func (l *Lookout) Ready() error {
	l.state.Lock()
	defer l.state.Unlock()
	return l.ready
}

// Run looks until the context ends.
func (l *Lookout) Run(ctx context.Context) error {
	for {
		found, err := around(ctx)
		if err != nil && ctx.Err() == nil {
			l.log.Error("cannot look at all of the machine", "error", err)
		}
		ready := l.report(found)
		l.state.Lock()
		l.ready = ready
		l.state.Unlock()
		pause := surroundEvery
		if ready != nil {
			pause = lookoutPause
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// lookoutPause is how soon a node that is not ready is looked at again.
const lookoutPause = 5 * time.Second
