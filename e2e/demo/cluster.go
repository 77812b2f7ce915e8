package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
)

// pod is one of the demo's pods.
type pod struct {
	Namespace, Name, App string
	HostPort             uint16 // of the node, to port 80 of the pod; 0: none
	addresses            []netip.Addr
}

func (p *pod) key() string { return p.Namespace + "/" + p.Name }
func (p *pod) uid() string { return "uid-" + p.Name }

// pods are attached in this order.
var pods = []*pod{
	{Namespace: "shop", Name: "web-1", App: "webserver"},
	{Namespace: "shop", Name: "web-2", App: "webserver"},
	{Namespace: "shop", Name: "db", App: "database"},
	{Namespace: "shop", Name: "cart", App: "shopping-cart"},
	{Namespace: "tenants", Name: "app-1", App: "tenant"},
	{Namespace: "tenants", Name: "app-2", App: "tenant"},
	{Namespace: "lab", Name: "tools", App: "tools"},
	{Namespace: "lab", Name: "site", App: "site", HostPort: 9000},
}

// cluster is what the API server would hold: the demo's steps change it.
type cluster struct {
	pods       []*pod
	namespaces map[string]map[string]string // labels by name
	policies   map[string]string            // manifests by file name
}

func newCluster() *cluster {
	c := &cluster{pods: pods, namespaces: map[string]map[string]string{}, policies: map[string]string{}}
	for _, p := range pods {
		c.namespaces[p.Namespace] = map[string]string{}
	}
	return c
}

// files returns the manifests, by file name.
func (c *cluster) files() (map[string][]byte, error) {
	out := map[string][]byte{}
	for name, text := range c.policies {
		out[name] = []byte(text)
	}
	for name, labels := range c.namespaces {
		text, err := json.MarshalIndent(map[string]any{
			"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": name, "labels": labels},
		}, "", "  ")
		if err != nil {
			return nil, err
		}
		out["namespace-"+name+".json"] = text
	}
	for _, p := range c.pods {
		text, err := json.MarshalIndent(p.manifest(), "", "  ")
		if err != nil {
			return nil, err
		}
		out["pod-"+p.Name+".json"] = text
	}
	return out, nil
}

// manifest is the pod as the API server has it once kubelet has reported its addresses.
func (p *pod) manifest() map[string]any {
	status := map[string]any{"phase": "Pending"}
	if len(p.addresses) > 0 {
		ips := []map[string]any{}
		for _, a := range p.addresses {
			ips = append(ips, map[string]any{"ip": a.String()})
		}
		status = map[string]any{"phase": "Running", "podIP": p.addresses[0].String(), "podIPs": ips}
	}
	return map[string]any{
		"apiVersion": "v1", "kind": "Pod",
		"metadata": map[string]any{
			"namespace": p.Namespace, "name": p.Name, "uid": p.uid(), "labels": map[string]any{"app": p.App},
		},
		"spec": map[string]any{"containers": []map[string]any{
			{"name": "main", "image": "demo", "ports": []map[string]any{{"containerPort": ports[0]}, {"containerPort": ports[1]}}},
		}},
		"status": status,
	}
}

// write makes the folder hold these manifests and no others. Each file is replaced in one step, so that its reader never
// sees half of it.
func (c *cluster) write(dir string) error {
	want, err := c.files()
	if err != nil {
		return fmt.Errorf("write manifests: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		path := filepath.Join(dir, name)
		have, err := os.ReadFile(path)
		if err == nil && bytes.Equal(have, want[name]) {
			continue
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.WriteFile(dir+".new", want[name], 0o644); err != nil {
			return err
		}
		if err := os.Rename(dir+".new", path); err != nil {
			return err
		}
	}
	return removeOthers(dir, want)
}

func removeOthers(dir string, want map[string][]byte) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if _, wanted := want[entry.Name()]; !wanted {
			if err := os.Remove(filepath.Join(dir, entry.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
