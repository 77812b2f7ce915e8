package main

import (
	"encoding/json"
	"fmt"
	"io"

	"github.com/postern-cni/postern/e2e/bench/table"
)

// tell prints what was found, and writes it.
func (o options) tell(all table.Report, stdout io.Writer) error {
	for _, line := range all.Lines {
		low, high := line.Interval()
		fmt.Fprintf(stdout, "%d %s %s: %.3g [%.3g, %.3g] %s\n", line.Row, line.Part, line.Backend, line.Value(), low, high, line.Verdict())
	}
	text, err := json.MarshalIndent(all, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "%s\n", text)
	return err
}
