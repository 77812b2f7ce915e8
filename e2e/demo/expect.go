package main

// expect says of each try whether it opens, as the policies of the demo mean it: written by hand from their words, so that
// it has nothing in common with what is in the kernel.
func (w *world) expect(all []*try) ([]*try, error) {
	for _, t := range all {
		t.Expected = t.From == t.To || // a pod always reaches itself
			t.From.NS == nodeNS || // and the node its pods
			w.cluster.lets(t.From, t) && w.cluster.admits(t.To, t)
	}
	return all, nil
}

// lets reports whether the policies let the connection leave its source.
func (c *cluster) lets(from *party, t *try) bool {
	if from.pod == nil || from.pod.App != "webserver" || c.policies["web-egress.yaml"] == "" {
		return true
	}
	return t.To.pod != nil && t.To.pod.App == "database" && t.PodPort == 5432
}

// admits reports whether the policies let the connection in at its destination.
func (c *cluster) admits(to *party, t *try) bool {
	switch from := t.From.pod; {
	case to.pod == nil:
		return true // a machine outside
	case to.pod.App == "site" && c.policies["site.yaml"] != "":
		return t.From.Name == laptop
	case to.pod.Namespace != "shop" || c.policies["default-deny.yaml"] == "":
		return true
	case to.pod.App == "database" && c.policies["database.yaml"] != "":
		return from != nil && from.App == "webserver" && t.PodPort == 5432
	case to.pod.App == "shopping-cart" && c.policies["cart.yaml"] == cartFromTenant:
		return from != nil && c.namespaces[from.Namespace]["tenant"] == "gold" && t.PodPort == 80
	case to.pod.App == "shopping-cart" && c.policies["cart.yaml"] == cartFromBlock:
		return t.From.Name == laptop && t.Address.Is4()
	}
	return false
}
