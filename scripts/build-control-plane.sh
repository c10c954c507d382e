#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Copyright The Fairlead Authors
#
# Builds the control plane of the end-to-end tests into ${FAIRLEAD_CACHE:-.cache}/bin:
# kube-apiserver and kube-controller-manager, or the commands named as arguments
# (kube-proxy, for comparisons). The first run compiles for about five minutes;
# after that Go's build cache makes it a matter of seconds.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
cache=${FAIRLEAD_CACHE:-$root/.cache}
mkdir -p "$cache/bin"
bin=$(cd "$cache/bin" && pwd)

cd "$root/tests/controlplane"
version=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)
[ $# -gt 0 ] || set -- kube-apiserver kube-controller-manager
for command; do
	shift
	set -- "$@" "k8s.io/kubernetes/cmd/$command"
done

# The version is stamped in as the release build does it; without it the API
# server would call itself v0.0.0.
CGO_ENABLED=0 go build -p 2 -trimpath -o "$bin/" \
	-ldflags "-s -w -X k8s.io/component-base/version.gitVersion=$version" "$@"
