// Command cmd runs the proof of package verify: `make verify` and `make verify-mutants`.
package main

import (
	"os"

	"github.com/postern-cni/postern/pkg/nettest"
	"github.com/postern-cni/postern/pkg/verify"
)

// proof runs in the scratch namespaces that nettest makes.
type proof struct{}

func (proof) Run() int { return verify.Main(os.Args[1:], os.Stdout, os.Stderr) }

func main() { nettest.Main(proof{}) }
