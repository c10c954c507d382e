# SPDX-License-Identifier: Apache-2.0
# Copyright The Fairlead Authors

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)

# Root's tests that are skipped for a missing privilege or program fail instead.
STRICT := FAIRLEAD_TEST_STRICT=1
GO_TEST := $(STRICT) go test -count=1

# What has goroutines and no datapath in it: runs with the race detector, which
# needs a C compiler.
CONCURRENT := ./internal/agent/... ./internal/config/... ./internal/conntrack/... ./internal/health/... \
	./internal/metrics/... ./internal/reflector/... ./internal/sockets/...

# What is built, wherever it is built.
BUILD = CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$(VERSION)"

# Everything that the image says of itself and does not find in its binaries.
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
ARCHITECTURES := amd64 arm64

MODULES := . build/image tests/controlplane tests/parity tests/tools

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## bin/fairlead
	$(BUILD) -o bin/fairlead ./cmd/fairlead

.PHONY: image
image: ## bin/image: OCI image for amd64 and arm64, as an archive too, and its SBOMs
	for arch in $(ARCHITECTURES); do \
		GOFLAGS= GOOS=linux GOARCH=$$arch GOAMD64=v1 GOARM64=v8.0 $(BUILD) -o bin/linux-$$arch/fairlead ./cmd/fairlead || exit 1; \
	done
	cd build/image && SOURCE_DATE_EPOCH=$(SOURCE_DATE_EPOCH) go run -trimpath . -root ../.. -out ../../bin -version $(VERSION) -revision $(REVISION) \
		$(foreach arch,$(ARCHITECTURES),$(arch)=../../bin/linux-$(arch)/fairlead)

.PHONY: demo
demo: build ## a Service with three pods on this machine, without a cluster (root)
	./bin/fairlead demo

.PHONY: generate
generate: ## compile bpf/ into internal/datapath
	go generate ./...

.PHONY: fmt
fmt: ## format Go and C
	gofmt -w cmd internal tests
	find bpf -name '*.[ch]' -exec clang-format-19 --style=file --fallback-style=none -i {} +

.PHONY: lint
lint: ## go vet, staticcheck, known vulnerabilities, licences of what is linked, licence headers
	go vet ./...
	cd build/image && go vet ./...
	go tool -modfile=tests/tools/go.mod staticcheck ./...
	scripts/vulncheck.sh
	scripts/licences.sh
	scripts/check-headers.sh

.PHONY: licences
licences: ## bin/THIRD_PARTY_LICENSES, to go with the program
	mkdir -p bin
	scripts/licences.sh -o bin/THIRD_PARTY_LICENSES

.PHONY: test
test: ## install what tests need, run all of them (root)
	scripts/setup.sh
	scripts/build-control-plane.sh
	$(MAKE) test-unit
	go test -C tests/tools -timeout 5m ./...
	$(GO_TEST) -p 2 -timeout 10m $$(go list ./... | grep -v -e '/tests/e2e$$' -e '/tests/vm$$' -e '/tests/chaos$$')
	$(MAKE) test-chaos
	$(MAKE) test-image
	$(MAKE) test-e2e
	$(MAKE) test-vm
	$(MAKE) test-parity
	scripts/fuzz.sh

.PHONY: test-unit
test-unit: ## control path, with the race detector
	CGO_ENABLED=1 CC=clang-19 go test -race -timeout 10m $(CONCURRENT)

.PHONY: test-parity
test-parity: ## 200,000 random histories through kube-proxy's own code and ours
	scripts/parity.sh

.PHONY: test-image
test-image: ## the image, built twice (root)
	cd build/image && $(GO_TEST) -timeout 20m .

.PHONY: test-e2e
test-e2e: ## a real API server, real traffic (root)
	scripts/build-control-plane.sh
	$(GO_TEST) -timeout 10m ./tests/e2e

.PHONY: test-vm
test-vm: ## datapath and sockets on Linux 6.1 and 6.12 in QEMU
	scripts/vm-kernels.sh
	$(GO_TEST) -timeout 50m ./tests/vm

.PHONY: test-chaos
test-chaos: ## the short form of chaos, and full maps (root)
	$(GO_TEST) -v -timeout 10m ./tests/chaos

.PHONY: chaos
chaos: ## what may happen to an agent, thousands of times under load: a table of what failed (root, about 90 minutes)
	$(GO_TEST) -v -timeout 4h -run TestNothing ./tests/chaos -long

.PHONY: bench
bench: ## what a connection through a Service costs, beside kube-proxy (root)
	scripts/build-control-plane.sh kube-proxy
	go run ./tests/bench

.PHONY: verify
verify: generate fmt lint ## what must hold before a commit: nothing left to generate, format or tidy
	for module in $(MODULES); do (cd $$module && go mod tidy -diff) || exit 1; done
	go test -count=1 ./internal/arch
	git diff --exit-code

.PHONY: clean
clean: ## remove bin and what was downloaded and built for tests
	rm -rf bin .cache
