#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Fairlead Authors
#
# Fails when fairlead calls something with a known vulnerability. When the database
# cannot be reached it checks nothing, says so in one line and succeeds; it fails with
# VULNCHECK_REQUIRED=1, and when FAIRLEAD_VULNDB names a database, such as
# file:///mnt/vulndb, a copy of https://vuln.go.dev.
set -euo pipefail
cd "$(dirname "$0")/.."

db=${FAIRLEAD_VULNDB:-https://vuln.go.dev}

govulncheck() {
	go tool -modfile=tests/tools/go.mod govulncheck -db "$db" "$@"
}

# A question that takes no more than the database: a run that fails tells not why.
if ! answer=$(govulncheck -mode=query -json stdlib@v1.26.0 2>&1 >/dev/null); then
	echo "vulncheck: SKIPPED, nothing is checked: the database $db cannot be used: ${answer//$'\n'/; }" >&2
	[ "${VULNCHECK_REQUIRED:-}" != 1 ] && [ -z "${FAIRLEAD_VULNDB:-}" ]
	exit
fi
govulncheck ./cmd/fairlead
