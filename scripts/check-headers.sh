#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Fairlead Authors
#
# Fails, naming them, when source files lack their licence header: Apache-2.0
# for Go and shell, GPL-2.0-only OR BSD-2-Clause for what runs in the kernel.
set -euo pipefail
cd "$(dirname "$0")/.."

# lacking HEADER PATTERN... prints the files that match PATTERN and do not have
# HEADER near their start. Generated files carry their generator's.
lacking() {
	local header=$1 file top
	shift
	git ls-files --cached --others --exclude-standard -- "$@" | while read -r file; do
		[ -f "$file" ] || continue
		top=$(head -n 4 "$file")
		case $top in
		*"Code generated "*" DO NOT EDIT."* | *"$header"*) ;;
		*) echo "$file" ;;
		esac
	done
}

apache='SPDX-License-Identifier: Apache-2.0'
bad=$(
	lacking "// $apache"$'\n// Copyright The Fairlead Authors' '*.go'
	lacking "# $apache"$'\n# Copyright The Fairlead Authors' '*.sh' .ci/run
	lacking 'SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause' 'bpf/*.c' 'bpf/*.h'
)
if [ -n "$bad" ]; then
	printf 'no licence header:\n%s\n' "$bad" >&2
	exit 1
fi
