package rule

import "net/netip"

// Drop discards the packet. In table mangle it is final, whatever other software accepts later in table filter.
type Drop struct{}

// Accept ends the walk through this table with the packet let through.
type Accept struct{}

// Return goes back to the chain that jumped here (or, after a Goto, to the one that jumped before it).
type Return struct{}

// Jump calls another chain.
type Jump struct{ Chain string }

// Goto continues in another chain without coming back: a Return there returns to this chain's own caller.
type Goto struct{ Chain string }

// DNAT rewrites the destination.
type DNAT struct{ To netip.AddrPort }

// SNAT rewrites the source address.
type SNAT struct{ To netip.Addr }

// Masquerade rewrites the source address to one of the outgoing interface.
type Masquerade struct {
	// RandomPorts has the source port chosen by chance. Else two flows that begin at once with the same port may be given the
	// same one, and the packet of the second is lost.
	RandomPorts bool
}

func (Drop) isAction()       {}
func (Accept) isAction()     {}
func (Return) isAction()     {}
func (Jump) isAction()       {}
func (Goto) isAction()       {}
func (DNAT) isAction()       {}
func (SNAT) isAction()       {}
func (Masquerade) isAction() {}
