package attach

import (
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"

	"github.com/postern-cni/postern/pkg/attachment"
	"github.com/postern-cni/postern/pkg/conntrack"
	"github.com/postern-cni/postern/pkg/podlink"
)

// RemoveAll deletes the link of every pod, whether it has a record or not, and ends the flows of those that have. The pods are
// cut off. No ADD or DEL is under way meanwhile. It leaves the records, and returns the names of the links.
func RemoveAll(ctx context.Context, stateDir string) (links []string, err error) {
	store := attachment.Open(stateDir)
	unlock, err := lock(ctx, store, attachment.NodeExclusive)
	if err != nil {
		return nil, err
	}
	defer unlock()
	owners, err := podlink.Owners()
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, link := range slices.Sorted(maps.Keys(owners)) {
		if err := podlink.DeleteAny(link); err != nil {
			errs = append(errs, err)
			continue
		}
		links = append(links, link)
	}
	list, _ := store.List() // what cannot be read says nothing of flows
	var addresses []netip.Addr
	for _, a := range list {
		addresses = append(addresses, a.Addresses...)
	}
	return links, errors.Join(append(errs, conntrack.DeleteAddresses(addresses...))...)
}
