package verify

import "testing"

// Whatever the path, the patches lead to the state that the same objects give at once.
func TestPatchesLeadToTheStateOfAFreshStart(t *testing.T) {
	o, _ := quick(t)
	for n := range uint64(o.patchWalks()) {
		if _, found := o.patchWalk(n, nil); found != "" {
			t.Fatal(found)
		}
	}
}

func TestEveryMistakeInPatchesIsFoundByWalks(t *testing.T) {
	o, _ := quick(t)
	for _, b := range spoilers() {
		t.Run(b.name, func(t *testing.T) {
			text, found := b.search(o)
			if !found {
				t.Error(text)
			}
			t.Log(text)
		})
	}
}

func TestAWalkIsCutDownToTheStepsThatMatter(t *testing.T) {
	o, _ := quick(t)
	b := &spoilers()[0]
	steps := walk(throw(o.seed, 0, forSteps), stepsOfAWalk)
	fails := func(steps []step) bool {
		_, text := patched(steps, b)
		return text != ""
	}
	if !fails(steps) {
		t.Fatal("the walk does not fail")
	}
	if steps = shortened(steps, fails); len(steps) > 3 || !fails(steps) {
		t.Errorf("%d steps are left", len(steps))
	}
}
