#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Copyright The Fairlead Authors
#
# Fetches the Debian kernels that tests/vm boots and unpacks each, without
# installing it, to
#
#	${FAIRLEAD_CACHE:-.cache}/kernels/<series>/{vmlinuz,config,modules,package}
#
# where <series> is 6.1 or 6.12. A kernel that is there already is fetched again
# only when Debian has a newer point release and can be reached. Needs no root.
set -euo pipefail

die() {
	echo "vm-kernels: $*" >&2
	exit 1
}

# image_of META prints the package behind a metapackage: the one with the
# point release in its name.
image_of() {
	apt-cache depends "$1" | awk '$1 == "Depends:" && $2 ~ /^linux-image-[0-9]/ { print $2; exit }'
}

# candidate META prints "package=version" of the image behind META, nothing when
# apt does not know it.
candidate() {
	local image
	image=$(image_of "$1")
	[ -n "$image" ] || return 0
	apt-cache show --no-all-versions "$image" | awk -v p="$image" '$1 == "Version:" { print p "=" $2; exit }'
}

# download META DIR puts the image behind META into DIR as a .deb file and
# prints its "package=version". Package lists age: when the mirror has dropped
# what they name, refresh them once.
download() {
	local meta=$1 dir=$2 want attempt
	for attempt in 1 2; do
		want=$(candidate "$meta")
		if [ -n "$want" ] && (cd "$dir" && apt-get download -qq -o APT::Sandbox::User=root "$want" >&2); then
			echo "$want"
			return 0
		fi
		if [ "$attempt" = 1 ]; then
			apt-get update -qq >&2 || return 1
		fi
	done
	return 1
}

# unpack DEB DIR takes what tests/vm needs out of a kernel package.
unpack() {
	local deb=$1 dir=$2
	dpkg-deb -x "$deb" "$dir/root"
	mv "$dir"/root/boot/vmlinuz-* "$dir/vmlinuz"
	mv "$dir"/root/boot/config-* "$dir/config"
	if [ -d "$dir/root/usr/lib/modules" ]; then
		mv "$dir"/root/usr/lib/modules/* "$dir/modules"
	else
		mv "$dir"/root/lib/modules/* "$dir/modules"
	fi
	rm -rf "$dir/root" "$deb"
}

# fetch SERIES META makes $cache/SERIES hold the kernel behind META. The
# directory appears in one rename, so a run that is cut short leaves none or the
# one before.
fetch() {
	local series=$1 meta=$2 want have="" tmp
	[ -f "$cache/$series/package" ] && have=$(cat "$cache/$series/package")
	want=$(candidate "$meta")
	if [ -n "$have" ] && { [ -z "$want" ] || [ "$have" = "$want" ]; }; then
		return 0
	fi
	tmp=$(mktemp -d "$cache/tmp.XXXXXX")
	if ! want=$(download "$meta" "$tmp"); then
		rm -rf "$tmp"
		[ -n "$have" ] || die "cannot download $meta: see apt's message above"
		echo "vm-kernels: keeping $have: a newer $meta cannot be downloaded" >&2
		return 0
	fi
	unpack "$tmp"/*.deb "$tmp"
	echo "$want" >"$tmp/package"
	rm -rf "${cache:?}/$series"
	chmod 755 "$tmp"
	mv "$tmp" "$cache/$series"
	echo "vm-kernels: $want is in $cache/$series"
}

command -v apt-get >/dev/null || die "needs apt: the kernels are Debian's"
[ "$(dpkg --print-architecture)" = amd64 ] || die "only amd64 kernels are known here"

cd "$(dirname "$0")/.."
cache=${FAIRLEAD_CACHE:-.cache}/kernels
mkdir -p "$cache"
fetch 6.1 linux-image-cloud-amd64
fetch 6.12 linux-image-6.12-cloud-amd64
