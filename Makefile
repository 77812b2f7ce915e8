# One target for each thing a contributor does. `make help` lists them.

SHELL       := /bin/bash
VERSION     ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
REVISION    ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
LDFLAGS     := -s -w -X main.version=$(VERSION)
GOBUILD     := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)'
TESTTIMEOUT ?= 15m
# Of `make verify`: where chance begins. Sizes that are not given are the program's.
SEED        ?= 1
FUZZTIME    ?= 1m
# The image's name: the manifests say it, once.
IMAGE       ?= $(shell awk '/^ *- name:/ { name = $$3 } /^ *newTag:/ { print name ":" $$2 }' manifests/base/kustomization.yaml)
# What the tests and the demo run, and the Debian packages that have it.
TOOLS    := iptables-nft-restore iptables-legacy-restore ip6tables-nft-restore ip6tables-legacy-restore ipset ip nsenter sysctl
PACKAGES := iptables ipset iproute2 util-linux procps

# sbin is not in every user's PATH, and that is where iptables and ipset are.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

.DEFAULT_GOAL := build
.PHONY: build image image-root image-programs test fuzz lint demo bench bench-programs bench-root verify verify-mutants manifests e2e e2e-up e2e-down e2e-shell e2e-program e2e-root tools clean help

build: ## build bin/postern (the CNI plugin) and bin/policyd (the daemon), static
	$(GOBUILD) -o bin/postern ./plugin
	$(GOBUILD) -o bin/policyd ./policyd

image: image-programs ## bin/postern-image.tar, a container image, without a container engine: Debian's apt-get and dpkg-deb
	bin/images $(IMAGEFLAGS) postern bin/postern-image.tar
	@echo "bin/postern-image.tar: $(IMAGE)"

image-root: image-programs ## bin/image-root, the image's root file system, as manifests/Dockerfile wants it
	rm -rf bin/image-root
	bin/images $(IMAGEFLAGS) root bin/image-root

# The loopback plugin is the CNI project's, of the release that e2e/go.mod names, and says so.
IMAGEFLAGS = -name "$(IMAGE)" -version "$(VERSION)" -revision "$(REVISION)"
PLUGINS    = github.com/containernetworking/plugins
image-programs: build
	$(subst go build,go -C e2e build,$(GOBUILD)) -o ../bin/images ./images/cmd
	CGO_ENABLED=0 go -C e2e build -trimpath -buildvcs=false -ldflags "-s -w -X $(PLUGINS)/pkg/utils/buildversion.BuildVersion=$$( \
		go -C e2e list -m -f '{{.Version}}' $(PLUGINS))" -o ../bin/loopback $(PLUGINS)/plugins/main/loopback

test: tools ## unit tests, and kernel tests in namespaces of their own: root, or an ordinary user; nft and legacy
	go test -count=1 -timeout $(TESTTIMEOUT) ./...
	go -C e2e test -count=1 -timeout $(TESTTIMEOUT) ./...

# A finding ends the run and is kept under the package's testdata/fuzz: mend the code, and commit the file. Minimizing is cut
# short, for some targets run iptables each time. "context deadline exceeded" without a failing input is Go's own: at the end of
# the time it may take its workers' cancelled context for a failure (internal/fuzz, CoordinateFuzzing).
fuzz: tools ## every fuzz target, one after the other, for FUZZTIME each: make fuzz FUZZTIME=10m
	@log=$$(mktemp); trap 'rm -f $$log' EXIT; set -o pipefail; \
	grep -rHo --include='*_test.go' '^func Fuzz[A-Za-z]*' pkg plugin policyd | sort | sed 's|/[^/]*:func | |' | \
	while read -r folder target; do \
		echo "$$folder $$target"; \
		go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x -timeout 0 ./$$folder </dev/null 2>&1 | \
			tee $$log || { grep -qx ' *context deadline exceeded' $$log && ! grep -q 'Failing input' $$log; } || exit 1; \
	done

lint: ## vet, staticcheck, formatting, import directions, package comments
	@unformatted=$$(gofmt -l pkg plugin policyd e2e); \
	if [ -n "$$unformatted" ]; then echo "not formatted (run gofmt -w):" $$unformatted; exit 1; fi
	go vet ./...
	go -C e2e vet ./...
	go -C e2e/libcni112 vet ./...
	go tool staticcheck ./...
	cd e2e && go tool -modfile=../go.mod staticcheck ./...
	go test -count=1 ./pkg

demo: tools ## root: a node made of namespaces, eight pods, every kind of policy, who reaches whom
	@if [ "$$(id -u)" != 0 ]; then echo "make demo: needs root, for a network namespace of its own: sudo make demo"; exit 1; fi
	@$(MAKE) --no-print-directory build
	@$(subst go build,go -C e2e build,$(GOBUILD)) -o ../bin/demo ./demo
	@bin/demo --bin bin

verify: tools ## policies' words, rules and kernel agree: PACKETS; a backend KERNEL_PACKETS, WALKS; SEED, BACKEND=nft|legacy|both
	@go build -o bin/verify ./pkg/verify/cmd
	@bin/verify -seed $(SEED) $(if $(BACKEND),-backend $(BACKEND)) $(if $(PACKETS),-packets $(PACKETS)) \
		$(if $(KERNEL_PACKETS),-kernel-packets $(KERNEL_PACKETS)) $(if $(WALKS),-walks $(WALKS)) $(if $(BREAK),-break "$(BREAK)")

verify-mutants: tools ## break one line of the semantics at a time, and see that `make verify` would find it
	@go build -o bin/verify ./pkg/verify/cmd
	@bin/verify -mutants -seed $(SEED) $(if $(BACKEND),-backend $(BACKEND)) $(if $(PACKETS),-packets $(PACKETS)) \
		$(if $(KERNEL_PACKETS),-kernel-packets $(KERNEL_PACKETS)) $(if $(WALKS),-walks $(WALKS))

manifests: ## render what manifests/overlays say to the files that `kubectl apply` takes
	go -C e2e test -count=1 ./manifests -run Rendered -update

# Said before a quarter of an hour of building, and not after it.
e2e-root:
	@if [ "$$(id -u)" != 0 ]; then \
		echo "make e2e: needs root, for namespaces and control groups of its own: sudo env PATH=\"\$$PATH\" make e2e"; exit 1; fi

# What a run can choose, as variables of make: make e2e FAMILY=dual SUITES="networkpolicy walkthrough" FOCUS='egress'
E2E = BACKEND=$(patsubst both,,$(BACKEND)) NODES=$(NODES) FAMILY=$(FAMILY) PROXY=$(PROXY) TUNNEL=$(TUNNEL) SUITES="$(SUITES)" \
	FOCUS="$(FOCUS)" bin/e2e/bin/e2e
e2e-program: e2e-root tools
	@go -C e2e build -o ../bin/e2e/bin/e2e .
	@bin/e2e/bin/e2e build

e2e: e2e-program ## root: a real cluster on this machine, upstream's suites and ours, a table: NODES BACKEND FAMILY PROXY TUNNEL SUITES FOCUS
	@$(E2E) run

e2e-up: e2e-program ## root: bring that cluster up and leave it up, for postern to be installed
	@$(E2E) up

e2e-down: ## root: take it down
	@$(E2E) down

e2e-shell: ## root: a shell that reaches it, with kubectl
	@$(E2E) shell

bench-root:
	@if [ "$$(id -u)" != 0 ]; then \
		echo "make bench: needs root, for namespaces of its own: sudo env PATH=\"\$$PATH\" make bench"; exit 1; fi

# What a run can choose, as variables of make: make bench ROWS="1 2 13" BACKEND=nft QUICK=1. Rows 6 to 12 and 16 need an API
# server.
BENCH     = -rows "$(ROWS)" $(if $(BACKEND),-backend $(BACKEND)) $(if $(QUICK),-quick) $(if $(RECORD),-record e2e/docs)
APISERVER = $(if $(ROWS),$(filter 6 7 8 9 10 11 12 16,$(ROWS)),all)
# All sides are built with the same flags, by the same Go.
bench-programs:
	@mkdir -p bin/bench
	@$(GOBUILD) -o bin/bench/postern ./plugin
	@$(GOBUILD) -o bin/bench/policyd ./policyd
	@$(subst go build,go -C e2e build,$(GOBUILD)) -o ../bin/bench/ ./bench ./bench/floor ./bench/nothing \
		$(addprefix $(PLUGINS)/plugins/,main/ptp ipam/host-local meta/portmap)

bench: bench-root tools bench-programs ## root: how fast, beside other plugins and the bare kernel's work: ROWS="1 2 13" BACKEND QUICK=1 RECORD=1
	@$(if $(APISERVER),go -C e2e build -o ../bin/e2e/bin/e2e . && bin/e2e/bin/e2e build apiserver)
	@bin/bench/bench $(BENCH)

tools: ## see that iptables (both backends), ipset and iproute2 are there; as root on Debian or Ubuntu, install them
	@missing=; for tool in $(TOOLS); do command -v $$tool >/dev/null || missing="$$missing $$tool"; done; \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "missing:$$missing; installing $(PACKAGES)"; \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(PACKAGES); \
	else \
		echo "missing:$$missing. Install these packages (Debian's names): $(PACKAGES)"; exit 1; \
	fi

clean: ## remove what the other targets built
	@if [ -e bin/e2e/run/state.json ]; then echo "a cluster is up, and bin/e2e says how to end it: first make e2e-down"; exit 1; fi
	rm -rf bin

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
