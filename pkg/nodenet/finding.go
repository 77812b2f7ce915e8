package nodenet

import (
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"

	"github.com/postern-cni/postern/pkg/metrics"
)

// Kind names what a [Finding] is about, for metrics and events.
type Kind string

const (
	NoPodCIDR      Kind = "no-pod-cidr"
	NoAddress      Kind = "no-address"
	NoFamily       Kind = "no-family"
	UnknownNode    Kind = "unknown-node"
	ForeignAddress Kind = "foreign-address"
	Overlap        Kind = "overlapping-cidrs"
	NoWay          Kind = "no-way"
	OtherRoute     Kind = "other-route"
	OtherCNI       Kind = "other-cni"
	TwoBackends    Kind = "two-backends"
	NoForwarding   Kind = "no-forwarding"
	IPVS           Kind = "ipvs"
)

// Kinds lists all.
var Kinds = [...]Kind{NoPodCIDR, NoAddress, NoFamily, UnknownNode, ForeignAddress, Overlap, NoWay, OtherRoute, OtherCNI, TwoBackends,
	NoForwarding, IPVS}

// Blocks reports whether a node that has it is not ready to take pods.
func (k Kind) Blocks() bool {
	return k == NoPodCIDR || k == NoAddress || k == NoFamily || k == UnknownNode || k == IPVS
}

// Finding is something that defeats the network, or would, and what to do about it.
type Finding struct {
	Kind Kind   `json:"kind"`
	What string `json:"what"` // one sentence, for people
}

// Teller tells people of what is found, again and again as long as it is so. It does not wait for anything.
type Teller interface{ Tell(list []Finding) }

// reporter has findings known: in the log, a metric, to a Teller, and to those who ask.
type reporter struct {
	metrics *metrics.Metrics
	log     *slog.Logger
	teller  Teller // nil for none
	// allowIPVS: the administrator knows.
	allowIPVS bool

	mu    sync.Mutex
	found []Finding // as last reported
}

// report logs and counts findings, each once, and returns those that keep the node from being ready.
func (r *reporter) report(found []Finding) error {
	r.mu.Lock()
	before := r.found
	r.found = slices.Clone(found)
	r.mu.Unlock()
	var blocking []string
	count := map[Kind]int{}
	for _, f := range found {
		count[f.Kind]++
		if !slices.Contains(before, f) {
			r.log.Warn("finding about the node's network", "kind", f.Kind, "what", f.What)
		}
		if f.Kind.Blocks() && !(f.Kind == IPVS && r.allowIPVS) {
			blocking = append(blocking, f.What)
		}
	}
	for _, f := range before {
		if !slices.Contains(found, f) {
			r.log.Info("not so any more", "kind", f.Kind, "what", f.What)
		}
	}
	for _, k := range Kinds {
		r.metrics.NodeFindings.WithLabelValues(string(k)).Set(float64(count[k]))
	}
	if r.teller != nil {
		r.teller.Tell(found)
	}
	if len(blocking) > 0 {
		return errors.New(strings.Join(blocking, "; "))
	}
	return nil
}

// Findings returns what was found last.
func (r *reporter) Findings() []Finding {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.found)
}
