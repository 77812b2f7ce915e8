package main

import (
	"testing"

	"github.com/postern-cni/postern/pkg/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }
