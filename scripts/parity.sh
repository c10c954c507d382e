#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Fairlead Authors
#
# Compares Fairlead's choices with kube-proxy's over random histories, 200,000 of
# them unless the arguments, which go to the tests, say otherwise (-histories N,
# -seed N). With FUZZTIME set, the fuzzer looks for more that long; it has to
# compile all of kube-proxy's dependencies for that, which takes minutes.
set -euo pipefail
cd "$(dirname "$0")/../tests/parity"

go vet .
go test -count=1 -timeout 10m -v -run '^Test' . "$@" </dev/null
go test -count=1 -run '^Fuzz' . </dev/null
if [ -n "${FUZZTIME:-}" ]; then
	# What the fuzzer finds is shrunk by the test; its own minimizing only takes time.
	go test -run '^$' -fuzz '^FuzzParity$' -fuzztime "$FUZZTIME" -fuzzminimizetime 1x -parallel 2 . </dev/null
fi
