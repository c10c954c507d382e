#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Fairlead Authors
#
# Installs what the tests and `make generate` need on Debian 12, as root. Does
# nothing, quickly, when all of it is there. Starts no service.
set -euo pipefail

packages=(
	busybox-static   # user space of the virtual machines (tests/vm)
	ca-certificates  # go mod download
	clang-19         # bpf/*.c; the version is part of the generated code
	clang-format-19  # make fmt
	etcd-server      # end-to-end tests
	git              # make verify
	iproute2         # looking at what a failed test left
	libbpf-dev       # bpf/bpf_helpers.h
	linux-libc-dev   # linux/bpf.h
	llvm-19          # llvm-strip
	make
	nftables         # kube-proxy's nftables mode (tests/bench), other people's rules in tests
	qemu-system-x86  # tests/vm
	xz-utils         # kernel modules of Debian's 6.12
)

die() {
	echo "setup: $*" >&2
	exit 1
}

# check_go fails unless the installed Go can build the module as it is, without
# fetching another toolchain.
check_go() {
	local want have
	want=$(awk '$1 == "go" { print $2; exit }' go.mod)
	command -v go >/dev/null || die "needs Go $want or later in PATH: https://go.dev/dl/"
	have=$(cd / && GOTOOLCHAIN=local go env GOVERSION)
	have=${have#go}
	[ "$(printf '%s\n' "$want" "$have" | sort -V | head -n 1)" = "$want" ] ||
		die "needs Go $want or later, found $have in $(command -v go): https://go.dev/dl/"
}

# missing prints the packages that are not installed.
missing() {
	local package
	for package in "${packages[@]}"; do
		[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
	done
}

# forbid_services keeps packages (etcd-server) from starting daemons while this
# script runs. A policy that is there already stays and is obeyed.
forbid_services() {
	local policy=/usr/sbin/policy-rc.d
	[ -e "$policy" ] && return
	trap "rm -f $policy" EXIT
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod 755 "$policy"
}

cd "$(dirname "$0")/.."
check_go
command -v dpkg-query >/dev/null || die "knows Debian only; elsewhere install the equivalents of: ${packages[*]}"
mapfile -t install < <(missing)
[ "${#install[@]}" -gt 0 ] || exit 0
[ "$(id -u)" = 0 ] || die "run as root to install: ${install[*]}"

forbid_services
echo "setup: installing ${install[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -qq --no-install-recommends "${install[@]}" </dev/null
