package object

import "reflect"

// Diff returns what has changed from one cluster to another.
func Diff(was, is Cluster) Changes {
	return Changes{
		Pods:       diff(was.Pods, is.Pods, (*Pod).Key),
		Namespaces: diff(was.Namespaces, is.Namespaces, func(n *Namespace) string { return n.Name }),
		Policies:   diff(was.Policies, is.Policies, PolicyKey),
		Nodes:      diff(was.Nodes, is.Nodes, func(n *Node) string { return n.Name }),
	}
}

func diff[T any](was, is []*T, key func(*T) string) map[string]*T {
	changed := map[string]*T{}
	before := make(map[string]*T, len(was))
	for _, o := range was {
		before[key(o)] = o
	}
	for _, o := range is {
		old := before[key(o)]
		if old == nil || old != o && !reflect.DeepEqual(old, o) {
			changed[key(o)] = o
		}
		delete(before, key(o))
	}
	for key := range before {
		changed[key] = nil
	}
	return changed
}
