package suite

import (
	"encoding/xml"
	"fmt"
	"io"
	"strings"
	"time"
)

// junit is the part that we read of what ginkgo writes (its reporters.JUnitTestSuites).
type junit struct {
	Suites []struct {
		Cases []junitCase `xml:"testcase"`
	} `xml:"testsuite"`
}

type junitCase struct {
	Name    string  `xml:"name,attr"`
	Status  string  `xml:"status,attr"` // of ginkgo: passed, skipped, pending, failed, timedout, panicked, interrupted, aborted
	Seconds float64 `xml:"time,attr"`
	Skipped *struct {
		Message string `xml:"message,attr"`
	} `xml:"skipped"`
	Failure *junitFailure `xml:"failure"`
	Error   *junitFailure `xml:"error"`
}

// junitFailure has the message in its attribute, or, in upstream's shortened reports, only in its text.
type junitFailure struct {
	Message string `xml:"message,attr"`
	Text    string `xml:",chardata"`
}

// ReadJUnit returns a suite's results from the JUnit file of a ginkgo run. Of the specs that ginkgo lists as skipped, only those
// count that said why: the others were not selected, and upstream's suite has thousands. Of what runs before and after specs,
// only what failed counts.
func ReadJUnit(suite string, from io.Reader) ([]Result, error) {
	var report junit
	if err := xml.NewDecoder(from).Decode(&report); err != nil {
		return nil, fmt.Errorf("read the JUnit report of %s: %w", suite, err)
	}
	var results []Result
	for _, s := range report.Suites {
		for _, c := range s.Cases {
			if r, counts := c.result(suite); counts {
				results = append(results, r)
			}
		}
	}
	return results, nil
}

func (c junitCase) result(suite string) (r Result, counts bool) {
	name, spec := strings.CutPrefix(c.Name, "[It] ")
	r = Result{Suite: suite, Name: name, Time: time.Duration(c.Seconds * float64(time.Second))}
	switch failure := c.failure(); {
	case failure != nil:
		r.Status, r.Reason = Failed, failure.reason(c.Status)
		return r, true
	case c.Skipped != nil:
		r.Status = Skipped
		why, said := strings.CutPrefix(c.Skipped.Message, "skipped - ")
		r.Reason = strings.TrimSpace(why)
		return r, spec && said
	case c.Status != "" && c.Status != "passed":
		r.Status, r.Reason = Failed, "ended as "+c.Status
		return r, true
	}
	r.Status = Passed
	return r, spec
}

func (c junitCase) failure() *junitFailure {
	if c.Failure != nil {
		return c.Failure
	}
	return c.Error
}

// reason is the message, which in the text stands between ginkgo's "[FAILED]" and the place in the source.
func (f junitFailure) reason(status string) string {
	text := f.Message
	if text == "" {
		text = f.Text
		if place := strings.Index(text, "\nIn ["); place >= 0 {
			text = text[:place]
		}
		text = strings.TrimSpace(text)
		if strings.HasPrefix(text, "[") {
			if _, after, ok := strings.Cut(text, "] "); ok {
				text = after
			}
		}
	}
	text = strings.TrimSpace(text)
	if text == "" {
		text = "no message"
	}
	if status == "" || status == "failed" {
		return text
	}
	return status + ": " + text
}
