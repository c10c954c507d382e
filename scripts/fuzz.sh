#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Fairlead Authors
#
# Runs every fuzz target for FUZZTIME, one after the other. The second each that
# is the default shows that they work; to look for something, FUZZTIME=10m.
set -euo pipefail
cd "$(dirname "$0")/.."

grep -rEo --include='*_test.go' '^func Fuzz[A-Za-z0-9_]+' internal tests/packets | while IFS=: read -r file func; do
	target=${func#func }
	# Asks the kernel, a few inputs a second: go test tries its seeds, and the
	# rest needs time.
	if [[ $target == FuzzLoad && -z ${FUZZTIME:-} ]]; then
		continue
	fi
	echo "fuzz: $target in $(dirname "$file")"
	go test -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZTIME:-1s}" -fuzzminimizetime 10x -parallel 2 "./$(dirname "$file")" </dev/null
done
