#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Fairlead Authors
#
# Fails when something linked into fairlead has a licence that is not allowed; see
# tests/tools/licences. With -o FILE it also writes all their texts, which go with
# the program.
set -euo pipefail
cd "$(dirname "$0")/.."

tool=$(mktemp)
trap 'rm -f "$tool"' EXIT
go build -C tests/tools -o "$tool" ./licences
"$tool" "$@" ./cmd/fairlead
