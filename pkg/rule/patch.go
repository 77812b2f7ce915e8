package rule

// Patch is a change of a [State] of one family.
type Patch struct {
	Family Family
	// Chains are new or other rules of chains; nil takes a chain away. An empty chain is not nil.
	Chains map[Table]map[string][]Rule
	// Sets are those that are needed now, or, if nil, not any more.
	Sets map[string]*Set
	// Join and Leave are entries of sets that stay.
	Join, Leave map[string][]Entry
}

// NewPatch returns a patch that changes nothing.
func NewPatch(f Family) *Patch {
	return &Patch{Family: f, Chains: map[Table]map[string][]Rule{}, Sets: map[string]*Set{},
		Join: map[string][]Entry{}, Leave: map[string][]Entry{}}
}

// SetChain puts a chain in; nil rules take it away.
func (p *Patch) SetChain(t Table, name string, rules []Rule) {
	if p.Chains[t] == nil {
		p.Chains[t] = map[string][]Rule{}
	}
	p.Chains[t][name] = rules
}
