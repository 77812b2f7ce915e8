// Package gate is the socket between the plugin and policyd: "this pod is coming; tell me when it is guarded".
//
// policyd listens on policyd.sock in the node's state folder (mode 0600). A connection carries one request and one answer,
// each a JSON object and a newline. Requests: guard (an attachment; the answer comes once the pod is guarded in the kernel, or
// with the reason why not), and ask (a named question with a JSON body, for policyd's own subcommands: status, explain).
package gate

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"

	"github.com/postern-cni/postern/pkg/attachment"
)

// Socket returns the path of policyd's socket in a state folder.
func Socket(stateDir string) string { return filepath.Join(stateDir, "policyd.sock") }

// Heartbeat returns the path of the file whose modification time says when policyd was last alive. policyd touches it
// every second, so that the plugin knows how long an absent policyd has been away.
func Heartbeat(stateDir string) string { return filepath.Join(stateDir, "policyd.heartbeat") }

// BackendFile returns the path of the file in which policyd notes the iptables backend it uses ("nft" or "legacy"), so that
// the plugin need not find out by itself.
func BackendFile(stateDir string) string { return filepath.Join(stateDir, "iptables-backend") }

// ErrAway means that nobody listens on the socket.
var ErrAway = errors.New("policyd is not running")

// Refusal is policyd's answer that it will not guard a pod now. Reason is for people and names what to look at.
type Refusal struct{ Reason string }

func (r *Refusal) Error() string { return r.Reason }

// Handler is what policyd puts behind the socket.
type Handler interface {
	// Guard returns nil once the attachment's pod is guarded, a *Refusal, or the context's error. It is called at most
	// once a connection and may take as long as the context lasts; the caller's deadline is in the context.
	Guard(ctx context.Context, a *attachment.Attachment) error
	// Ask answers a question of policyd's own subcommands ("status", "explain").
	Ask(ctx context.Context, question string, body json.RawMessage) (any, error)
}
