package cluster

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	yamlv3 "go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	yamlutil "k8s.io/apimachinery/pkg/util/yaml"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"github.com/postern-cni/postern/pkg/object"
)

// objects are what one file declares.
type objects struct {
	pods       []*object.Pod
	namespaces []*object.Namespace
	policies   []*networkingv1.NetworkPolicy
	nodes      []*object.Node
}

// ParseManifests reads one text of manifests, YAML or JSON, any number of documents, Lists among them, as the API server would
// take them: a field that does not exist is an error, a namespace left out is "default", a namespace nobody declares exists.
// Objects of other kinds are passed over. The error joins all that is wrong, with the document's number, from 1.
func ParseManifests(text []byte) (object.Cluster, error) {
	o, err := parse(text)
	if err != nil {
		return object.Cluster{}, err
	}
	c, problems := merge([]named{{"", o}})
	if len(problems) > 0 {
		return object.Cluster{}, errors.New(strings.Join(problems, "; "))
	}
	return c, nil
}

// parse reads the documents of a text.
func parse(text []byte) (*objects, error) {
	docs, err := split(text)
	if err != nil {
		return nil, err
	}
	o := &objects{}
	var errs []error
	for i, doc := range docs {
		if err := o.add(doc, ""); err != nil {
			errs = append(errs, fmt.Errorf("document %d: %w", i+1, err))
		}
	}
	return o, errors.Join(errs...)
}

// split cuts a text into documents, each as JSON. A document that begins like JSON may hold several values, one after another.
func split(text []byte) ([]json.RawMessage, error) {
	var docs []json.RawMessage
	for r := yamlutil.NewYAMLReader(bufio.NewReader(bytes.NewReader(text))); ; {
		doc, err := r.Read()
		if errors.Is(err, io.EOF) {
			return docs, nil
		}
		if err != nil {
			return nil, err
		}
		values, err := jsonValues(doc)
		if len(values) == 0 {
			values, err = yamlValue(doc)
		}
		if err != nil {
			return nil, fmt.Errorf("document %d: %w", len(docs)+len(values)+1, err)
		}
		docs = append(docs, values...)
	}
}

// jsonValues reads as many JSON objects as there are. The error is about what follows the last one.
func jsonValues(doc []byte) (values []json.RawMessage, err error) {
	if !bytes.HasPrefix(bytes.TrimSpace(doc), []byte("{")) {
		return nil, nil
	}
	for dec := json.NewDecoder(bytes.NewReader(doc)); ; {
		var value json.RawMessage
		if err := dec.Decode(&value); errors.Is(err, io.EOF) {
			return values, nil
		} else if err != nil {
			return values, err
		}
		values = append(values, value)
	}
}

// yamlValue reads the one YAML value of a document. The converter stops without a word at the end of a value in braces.
func yamlValue(doc []byte) ([]json.RawMessage, error) {
	var rest yamlv3.Node
	dec := yamlv3.NewDecoder(bytes.NewReader(doc))
	err := dec.Decode(&rest)
	if err == nil {
		if err = dec.Decode(&rest); err == nil {
			err = errors.New("another value follows the first")
		}
	}
	if !errors.Is(err, io.EOF) {
		return nil, err
	}
	out, err := yaml.YAMLToJSONStrict(doc)
	if err != nil {
		return nil, err
	}
	return []json.RawMessage{out}, nil
}

// add takes in one document. Items of a typed list need not repeat their kind.
func (o *objects) add(doc json.RawMessage, kind string) error {
	if text := bytes.TrimSpace(doc); len(text) == 0 || string(text) == "null" {
		return nil // only comments
	}
	var head struct {
		metav1.TypeMeta
		Items []json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(doc, &head); err != nil {
		return err
	}
	of := head.Kind
	if head.APIVersion != "" || kind == "" {
		of = head.APIVersion + " " + head.Kind
	} else if head.Kind == "" {
		of = kind
	}
	switch of {
	case "v1 Pod":
		return o.addPod(doc)
	case "v1 Namespace":
		return o.addNamespace(doc)
	case "networking.k8s.io/v1 NetworkPolicy":
		return o.addPolicy(doc)
	case "v1 Node":
		return o.addNode(doc)
	case "v1 List", "v1 PodList", "v1 NamespaceList", "v1 NodeList", "networking.k8s.io/v1 NetworkPolicyList":
		item := strings.TrimSuffix(of, "List")
		var errs []error
		for i, text := range head.Items {
			if err := o.add(text, item); err != nil {
				errs = append(errs, fmt.Errorf("items[%d]: %w", i, err))
			}
		}
		return errors.Join(errs...)
	}
	if head.Kind == "" || head.APIVersion == "" {
		return fmt.Errorf("apiVersion %q, kind %q: both are needed", head.APIVersion, head.Kind)
	}
	for _, ours := range []string{"Pod", "Namespace", "NetworkPolicy", "Node"} {
		if strings.EqualFold(head.Kind, ours) {
			return fmt.Errorf("apiVersion %q, kind %q: known are v1 Pod, v1 Namespace, v1 Node and networking.k8s.io/v1 NetworkPolicy",
				head.APIVersion, head.Kind)
		}
	}
	return nil
}

func (o *objects) addPod(doc []byte) error {
	var p corev1.Pod
	if err := decode(doc, &p, &p.ObjectMeta); err != nil {
		return err
	}
	o.pods = append(o.pods, toPod(&p))
	return nil
}

func (o *objects) addNamespace(doc []byte) error {
	var n corev1.Namespace
	if err := decode(doc, &n, &n.ObjectMeta); err != nil {
		return err
	}
	o.namespaces = append(o.namespaces, withName(toNamespace(&n)))
	return nil
}

func (o *objects) addPolicy(doc []byte) error {
	var p networkingv1.NetworkPolicy
	if err := decode(doc, &p, &p.ObjectMeta); err != nil {
		return err
	}
	o.policies = append(o.policies, toPolicy(&p))
	return nil
}

func (o *objects) addNode(doc []byte) error {
	var n corev1.Node
	if err := decode(doc, &n, &n.ObjectMeta); err != nil {
		return err
	}
	o.nodes = append(o.nodes, toNode(&n))
	return nil
}

func decode(doc []byte, into any, meta *metav1.ObjectMeta) error {
	unknown, err := kjson.UnmarshalStrict(doc, into) // as the API server does: a boolean is no label
	if err := errors.Join(append(unknown, err)...); err != nil {
		return err
	}
	if meta.Name == "" {
		return errors.New("metadata.name: missing")
	}
	if meta.Namespace == "" {
		meta.Namespace = metav1.NamespaceDefault
	}
	return nil
}

// withName gives a namespace the label that the API server gives every namespace.
func withName(n *object.Namespace) *object.Namespace {
	all := map[string]string{}
	for k, v := range n.Labels {
		all[k] = v
	}
	all[corev1.LabelMetadataName] = n.Name
	return &object.Namespace{Name: n.Name, Labels: all}
}

// named is what a file declares.
type named struct {
	file string
	*objects
}

// merge makes one cluster of all files. Of an object that is declared twice, the first counts, in the order of file names.
func merge(files []named) (object.Cluster, []string) {
	var c object.Cluster
	var problems []string
	seen := map[string]string{}
	first := func(what, file string) bool {
		if other, twice := seen[what]; twice {
			at := "here"
			if file != "" {
				file, at = file+": ", "in "+other
			}
			problems = append(problems, fmt.Sprintf("%s%s is declared %s already; the first counts", file, what, at))
			return false
		}
		seen[what] = file
		return true
	}
	namespaces := map[string]bool{}
	exists := func(name string) {
		if !namespaces[name] {
			namespaces[name] = true
			c.Namespaces = append(c.Namespaces, withName(&object.Namespace{Name: name}))
		}
	}
	for _, f := range files {
		for _, n := range f.namespaces {
			if first("Namespace "+n.Name, f.file) {
				namespaces[n.Name] = true
				c.Namespaces = append(c.Namespaces, n)
			}
		}
	}
	for _, f := range files {
		for _, n := range f.nodes {
			if first("Node "+n.Name, f.file) {
				c.Nodes = append(c.Nodes, n)
			}
		}
		for _, p := range f.pods {
			if first("Pod "+p.Key(), f.file) {
				exists(p.Namespace)
				c.Pods = append(c.Pods, p)
			}
		}
		for _, p := range f.policies {
			if first("NetworkPolicy "+p.Namespace+"/"+p.Name, f.file) {
				exists(p.Namespace)
				c.Policies = append(c.Policies, p)
			}
		}
	}
	order(&c)
	return c, problems
}

// order sorts a cluster's lists by namespace and name.
func order(c *object.Cluster) {
	slices.SortFunc(c.Pods, func(a, b *object.Pod) int { return byName(a.Namespace, a.Name, b.Namespace, b.Name) })
	slices.SortFunc(c.Namespaces, func(a, b *object.Namespace) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(c.Nodes, func(a, b *object.Node) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(c.Policies, func(a, b *networkingv1.NetworkPolicy) int {
		return byName(a.Namespace, a.Name, b.Namespace, b.Name)
	})
}

func byName(namespaceA, nameA, namespaceB, nameB string) int {
	if namespaceA != namespaceB {
		return strings.Compare(namespaceA, namespaceB)
	}
	return strings.Compare(nameA, nameB)
}
