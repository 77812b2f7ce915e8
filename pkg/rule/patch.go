package rule

// Patch is a change of a [State] of one family.
type Patch struct {
	Family Family
	// Chains are new or other rules of chains; nil takes a chain away. An empty chain is not nil.
	Chains map[Table]map[string][]Rule
	// Interim are rules that chains have until what joins open sets has joined: whoever is not isolated any more is led to his
	// former chain as long as he is not in the open set. They may be of chains that are not there before or afterwards.
	Interim map[Table]map[string][]Rule
	// Sets are those that are needed now, or, if nil, not any more.
	Sets map[string]*Set
	// Join and Leave are entries of sets that stay.
	Join, Leave map[string][]Entry
}

// NewPatch returns a patch that changes nothing.
func NewPatch(f Family) *Patch {
	return &Patch{Family: f, Chains: map[Table]map[string][]Rule{}, Interim: map[Table]map[string][]Rule{}, Sets: map[string]*Set{},
		Join: map[string][]Entry{}, Leave: map[string][]Entry{}}
}

// SetChain puts a chain in; nil rules take it away.
func (p *Patch) SetChain(t Table, name string, rules []Rule) { put(p.Chains, t, name, rules) }

// SetInterim gives a chain rules for the time until open sets are complete.
func (p *Patch) SetInterim(t Table, name string, rules []Rule) { put(p.Interim, t, name, rules) }

func put(chains map[Table]map[string][]Rule, t Table, name string, rules []Rule) {
	if chains[t] == nil {
		chains[t] = map[string][]Rule{}
	}
	chains[t][name] = rules
}
