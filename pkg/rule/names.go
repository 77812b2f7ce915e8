package rule

// Names of the sets with a role of their own. The plugin takes a pod out of the ready sets by itself, policyd away or not, so
// both programs know the names.

// SetPrefix begins the names of the sets of policies, NodeSetPrefix those of node networking.
const (
	SetPrefix     = "pst-"
	NodeSetPrefix = "pstn-"
)

// Direction is one of the two that policies speak of.
type Direction string

const (
	Ingress Direction = "ingress"
	Egress  Direction = "egress"
)

// ReadySet holds the (address, interface) pairs whose guard stands.
func ReadySet(f Family) string { return SetPrefix + "ready-" + f.digit() }

// OpenSet holds those that no policy isolates in a direction.
func OpenSet(f Family, d Direction) string { return SetPrefix + "open-" + string(d) + "-" + f.digit() }

// LocalSet holds the addresses of this node's pods.
func LocalSet(f Family) string { return SetPrefix + "local-" + f.digit() }

// RangeSet holds the prefixes whose addresses only this node's pods have.
func RangeSet(f Family) string { return SetPrefix + "range-" + f.digit() }

func (f Family) digit() string {
	if f == IPv4 {
		return "4"
	}
	return "6"
}
