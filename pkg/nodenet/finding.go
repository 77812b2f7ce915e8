package nodenet

// Kind names what a [Finding] is about, for metrics and events.
type Kind string

const (
	NoPodCIDR      Kind = "no-pod-cidr"
	NoAddress      Kind = "no-address"
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
var Kinds = [...]Kind{NoPodCIDR, NoAddress, UnknownNode, ForeignAddress, Overlap, NoWay, OtherRoute, OtherCNI, TwoBackends,
	NoForwarding, IPVS}

// Blocks reports whether a node that has it is not ready to take pods.
func (k Kind) Blocks() bool { return k == NoPodCIDR || k == NoAddress || k == UnknownNode || k == IPVS }

// Finding is something that defeats the network, or would, and what to do about it.
type Finding struct {
	Kind Kind
	What string // one sentence, for people
}
