package suite

import (
	"strings"
	"testing"
	"time"
)

// report has every way in which ginkgo says that a spec ended.
const report = `<?xml version="1.0" encoding="UTF-8"?>
<testsuites tests="10">
 <testsuite name="Kubernetes e2e suite" tests="10">
  <properties><property name="SuiteSucceeded" value="false"></property></properties>
  <testcase name="[SynchronizedBeforeSuite]" classname="Kubernetes e2e suite" status="passed" time="0.1"></testcase>
  <testcase name="[It] [sig-network] Netpol should deny" classname="Kubernetes e2e suite" status="passed" time="12.5">
   <system-out>[It] much text</system-out></testcase>
  <testcase name="[It] [sig-storage] not selected" status="skipped" time="0"><skipped message="skipped"></skipped></testcase>
  <testcase name="[It] [sig-network] wants a cloud" status="skipped" time="0.2">
   <skipped message="skipped - Only supported for providers [gce] (not skeleton)"></skipped></testcase>
  <testcase name="[It] [sig-apps] pending" status="pending" time="0"><skipped message="pending"></skipped></testcase>
  <testcase name="[It] [sig-network] shortened" status="failed" time="3">
   <failure message="" type="failed">[FAILED] no pod answered
within a minute
In [It] at: k8s.io/kubernetes/test/e2e/network/x.go:10 @ 01/02/26 03:04:05.678
</failure></testcase>
  <testcase name="[It] [sig-network] full" status="failed" time="3">
    <failure message="it said so" type="failed">stack</failure></testcase>
  <testcase name="[It] [sig-network] slow" status="timedout" time="3">
   <failure message="" type="timedout">[TIMEDOUT] A suite timeout occurred
In [It] at: x.go:10 @ 01/02/26</failure></testcase>
  <testcase name="[It] [sig-network] crash" status="panicked" time="3">
    <error message="nil map" type="panicked">stack</error></testcase>
  <testcase name="[It] [sig-network] stopped" status="interrupted" time="3">
    <error message="" type="interrupted"></error></testcase>
  <testcase name="[SynchronizedAfterSuite]" status="failed" time="1">
    <failure message="cannot end" type="failed"></failure></testcase>
 </testsuite>
</testsuites>`

func TestJUnitCountsWhatRanAndWhatSaidWhyItDidNot(t *testing.T) {
	results, err := ReadJUnit("upstream", strings.NewReader(report))
	if err != nil {
		t.Fatal(err)
	}
	const want = `[sig-network] Netpol should deny passed: 
[sig-network] wants a cloud skipped: Only supported for providers [gce] (not skeleton)
[sig-network] shortened failed: no pod answered
within a minute
[sig-network] full failed: it said so
[sig-network] slow failed: timedout: A suite timeout occurred
[sig-network] crash failed: panicked: nil map
[sig-network] stopped failed: interrupted: no message
[SynchronizedAfterSuite] failed: cannot end
`
	if got := outcomes(results); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	if results[0].Suite != "upstream" || results[0].Time != 12500*time.Millisecond {
		t.Errorf("the first result is %+v", results[0])
	}
}

func TestAReportThatIsCutShortIsAnError(t *testing.T) {
	if results, err := ReadJUnit("upstream", strings.NewReader(report[:len(report)/2])); err == nil {
		t.Errorf("no error, and results %v", results)
	}
}
