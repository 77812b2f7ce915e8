package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"os"
	"strings"
	"testing"
)

func TestTheReferenceHasEveryCommandAndFlag(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range commands {
		if !strings.Contains(string(readme), "\npolicyd "+c.name+" ") {
			t.Errorf("README.md shows no example of policyd %s", c.name)
		}
		flags := flag.NewFlagSet(c.name, flag.ContinueOnError)
		flags.SetOutput(io.Discard)
		if err := c.run(context.Background(), flags, []string{"-h"}, io.Discard); !errors.Is(err, flag.ErrHelp) {
			t.Errorf("policyd %s -h: %v", c.name, err)
		}
		n := 0
		flags.VisitAll(func(f *flag.Flag) {
			n++
			if !strings.Contains(string(readme), "`--"+f.Name+"`") && !strings.Contains(string(readme), "`--"+f.Name+" ") {
				t.Errorf("README.md does not name the flag --%s of policyd %s", f.Name, c.name)
			}
		})
		if n == 0 {
			t.Errorf("policyd %s -h has shown no flag, so this test proves nothing", c.name)
		}
	}
}
