package cniconf

import (
	"path/filepath"
	"strings"

	"github.com/postern-cni/postern/pkg/attachment"
)

// readEnvironment reads the CNI_ variables into c. A wrong one stays out of c, but for the interface and container that DEL
// needs, which are either right or empty.
func readEnvironment(c *Config, env Environment, p *problems) {
	if err := (attachment.Key{ContainerID: env.ContainerID, IfName: "eth0"}).Check(); err != nil {
		p.env("CNI_CONTAINERID", env.ContainerID,
			"1 to 200 letters, digits, '_', '.' or '-' are allowed, the first a letter or a digit")
	} else {
		c.ContainerID = env.ContainerID
	}
	if err := attachment.CheckInterfaceName(env.IfName); err != nil {
		p.env("CNI_IFNAME", env.IfName, "1 to 15 printable ASCII characters but '/', ':' and space are allowed")
	} else {
		c.IfName = env.IfName
	}
	switch {
	case env.NetNS == "" && env.Command == "DEL": // the namespace is gone
	case !filepath.IsAbs(env.NetNS) || strings.ContainsRune(env.NetNS, 0):
		p.env("CNI_NETNS", env.NetNS, "the absolute path of a network namespace is allowed")
	default:
		c.NetNS = env.NetNS
	}
	readArgs(c, env.Args, p)
	_, name, _ := strings.Cut(env.Args, "K8S_POD_NAME=")
	if env.Command == "ADD" && c.Policy == attachment.PolicyEnforce && (name == "" || name[0] == ';') {
		p.env("CNI_ARGS", env.Args,
			`K8S_POD_NAMESPACE and K8S_POD_NAME are needed to guard the pod; without Kubernetes, set "policy": "none"`)
	}
}

// argument is a key of CNI_ARGS that we know.
type argument struct {
	key     string
	to      *string
	valid   func(string) bool
	allowed string
}

// readArgs reads CNI_ARGS, KEY=value pairs with semicolons between. Other keys than ours are fine, whatever
// IgnoreUnknown says: they are the runtime's, and it does not know which plugins follow.
func readArgs(c *Config, args string, p *problems) {
	var ignoreUnknown, infra string
	known := []argument{
		{"IgnoreUnknown", &ignoreUnknown, isBool, "1, 0, true or false is allowed"},
		{"K8S_POD_NAMESPACE", &c.Pod.Namespace, func(s string) bool { return isDNSName(s, 63) && !strings.Contains(s, ".") },
			"a Kubernetes namespace (at most 63 lower case letters, digits and '-') is allowed"},
		{"K8S_POD_NAME", &c.Pod.Name, func(s string) bool { return isDNSName(s, 253) },
			"a Kubernetes pod name (at most 253 lower case letters, digits, '-' and '.') is allowed"},
		{"K8S_POD_UID", &c.Pod.UID, isID, "at most 128 letters, digits, '-', '_' and '.' are allowed"},
		{"K8S_POD_INFRA_CONTAINER_ID", &infra, isID, "at most 128 letters, digits, '-', '_' and '.' are allowed"},
	}
	seen := map[string]bool{}
	for pair := range strings.SplitSeq(args, ";") {
		if pair == "" {
			continue
		}
		key, value, ok := strings.Cut(pair, "=")
		if !ok || key == "" {
			p.env("CNI_ARGS", pair, "KEY=value pairs with ';' between them are allowed")
			continue
		}
		for _, a := range known {
			switch {
			case a.key != key || value == "": // an empty value says nothing
			case seen[key]:
				p.env("CNI_ARGS "+key, value, "one value is allowed, this is the second")
			case !a.valid(value):
				p.env("CNI_ARGS "+key, value, a.allowed)
			default:
				*a.to = value
			}
		}
		seen[key] = true
	}
	if !seen["K8S_POD_NAME"] && c.Pod.Namespace != "" || !seen["K8S_POD_NAMESPACE"] && c.Pod.Name != "" {
		p.env("CNI_ARGS", args, "K8S_POD_NAMESPACE and K8S_POD_NAME are allowed together only")
	}
}

func isBool(s string) bool {
	switch strings.ToLower(s) {
	case "1", "0", "true", "false":
		return true
	}
	return false
}

// isDNSName reports whether s is a DNS subdomain as the Kubernetes API has it (RFC 1123, lower case).
func isDNSName(s string, maxLen int) bool {
	if len(s) > maxLen {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, r := range label {
			if r != '-' && (r < '0' || r > '9') && (r < 'a' || r > 'z') {
				return false
			}
		}
	}
	return true
}

func isID(s string) bool {
	for _, r := range s {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-', r == '_', r == '.':
		default:
			return false
		}
	}
	return s != "" && len(s) <= 128
}
