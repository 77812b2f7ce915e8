package main

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	source "github.com/postern-cni/postern/pkg/cluster"
	"github.com/postern-cni/postern/pkg/explain"
)

// expect asks package explain about each try: it reads the manifests by the words of the NetworkPolicy API, and shares no code
// with what writes the kernel's rules.
func (w *world) expect(all []*try) ([]*try, error) {
	c, err := source.ReadFolder(manifestsDir)
	if err != nil {
		return nil, fmt.Errorf("read the manifests: %w", err)
	}
	node := w.parties[len(w.parties)-1].Addresses
	for _, t := range all {
		v4 := t.Address.Is4()
		t.Expected = explain.Explain(c, explain.Query{
			From:     explain.At(c, t.From.address(v4), node),
			To:       explain.At(c, t.To.address(v4), node),
			Protocol: corev1.ProtocolTCP,
			Port:     t.PodPort,
		}).Allowed
	}
	return all, nil
}

// address is the party's address of one family; invalid if it has none.
func (p *party) address(v4 bool) netip.Addr {
	if i := slices.IndexFunc(p.Addresses, func(a netip.Addr) bool { return a.Is4() == v4 }); i >= 0 {
		return p.Addresses[i]
	}
	return netip.Addr{}
}
