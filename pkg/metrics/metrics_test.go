package metrics

import (
	"fmt"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// registered returns the help text of every metric of ours, by name. A registry forgets nothing that was registered, vectors
// without a value included.
func registered(t *testing.T, m *Metrics) map[string]string {
	t.Helper()
	descs := make(chan *prometheus.Desc)
	go func() {
		defer close(descs)
		m.registry.Describe(descs)
	}()
	form := regexp.MustCompile(`fqName: ("[^"]*"), help: ("(?:[^"\\]|\\.)*")`)
	all := map[string]string{}
	for d := range descs {
		var name, help string
		parts := form.FindStringSubmatch(d.String())
		if parts == nil {
			t.Fatalf("%s: cannot be read", d)
		}
		if _, err := fmt.Sscanf(parts[1]+" "+parts[2], "%q %q", &name, &help); err != nil {
			t.Fatalf("%s: %v", d, err)
		}
		all[name] = help
	}
	return all
}

func TestEveryMetricHasThePrefixAndASentence(t *testing.T) {
	ours := 0
	for name, help := range registered(t, New("v1")) {
		if strings.HasPrefix(name, "go_") || strings.HasPrefix(name, "process_") {
			continue // of the Go runtime and of the process, by client_golang
		}
		ours++
		if !strings.HasPrefix(name, "postern_") {
			t.Errorf("%s: does not begin with postern_", name)
		}
		if !strings.HasSuffix(help, ".") {
			t.Errorf("%s: %q is no sentence", name, help)
		}
	}
	if ours < 10 {
		t.Errorf("%d metrics of ours found, so this test proves little", ours)
	}
}

func TestTheReferenceHasEveryMetric(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	all := registered(t, New("v1"))
	for name := range all {
		if strings.HasPrefix(name, "postern_") && !strings.Contains(string(readme), "`"+name+"`") {
			t.Errorf("README.md does not name %s", name)
		}
	}
	for _, name := range regexp.MustCompile("`(postern_[a-z_]+)`").FindAllStringSubmatch(string(readme), -1) {
		if _, there := all[name[1]]; !there {
			t.Errorf("README.md names %s, which does not exist", name[1])
		}
	}
}

func TestMetricsAreServedAndLint(t *testing.T) {
	m := New("v1")
	m.Failures.WithLabelValues("apply").Inc()
	m.Repairs.WithLabelValues("policies").Inc()
	m.Pods.WithLabelValues("guarded").Set(3)
	m.Restores.Inc()
	m.GuardSeconds.Observe(0.002)
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	for _, want := range []string{
		`postern_build_info{version="v1"} 1`, `postern_failures_total{kind="apply"} 1`, `postern_repairs_total{scope="policies"} 1`,
		`postern_pods{state="guarded"} 3`, `postern_iptables_restores_total 1`, `postern_guard_seconds_count 1`, `postern_synced 0`,
	} {
		if !strings.Contains(w.Body.String(), "\n"+want+"\n") {
			t.Errorf("/metrics lacks %s", want)
		}
	}
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestTwoInstancesDoNotMeet(t *testing.T) {
	a, b := New("v1"), New("v1") // would panic if they shared a registry
	a.Restores.Inc()
	w := httptest.NewRecorder()
	b.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	if !strings.Contains(w.Body.String(), "\npostern_iptables_restores_total 0\n") {
		t.Errorf("the other instance counts too:\n%s", w.Body)
	}
}
