#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
# Copyright The Fairlead Authors
#
# The first process of a test machine: prepares it, runs the test binaries one
# after the other and powers off. The kernel logs to ttyS0; what is said here
# and by the tests goes to ttyS1. vm_test.go reads the lines that begin with
# "fairlead-vm:".

/bin/busybox --install -s /bin
export PATH=/usr/sbin:/bin HOME=/root TMPDIR=/tmp
mkdir -p /dev /proc /sys /run /tmp /root

mount -t devtmpfs dev /dev
exec </dev/null >/dev/ttyS1 2>&1
stty -F /dev/ttyS1 raw -echo
echo 'fairlead-vm: up'

# fail WHAT ends the machine; the missing "done" makes the test fail.
fail() {
	echo "fairlead-vm: failed: $*"
	poweroff -f
}

mount -t proc proc /proc || fail mount /proc
mount -t sysfs sysfs /sys || fail mount /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup || fail mount cgroup2
mount -t bpf bpf /sys/fs/bpf || fail mount bpffs
mount -t tmpfs run /run || fail mount /run
mount -t tmpfs -o mode=1777 tmp /tmp || fail mount /tmp

# The files are named in the order in which they depend on each other.
for module in /modules/*; do
	case $module in
	*-dummy.ko) insmod "$module" numdummies=0 ;;
	*-ifb.ko) insmod "$module" numifbs=0 ;;
	*) insmod "$module" ;;
	esac || fail "insmod $module"
done
ip link set lo up || fail set lo up

# Each directory holds a package's test binary and its testdata. The variables
# FAIRLEAD_* come from the kernel's command line.
while read -r package run; do
	echo "fairlead-vm: begin $package"
	cd "/tests/$package" || fail "cd /tests/$package"
	./test -test.v=test2json -test.short -test.timeout=15m -test.run="${FAIRLEAD_VM_RUN:-$run}"
	code=$?
	# A test may leave its last line open.
	echo
	echo "fairlead-vm: end $package $code"
done </packages

echo 'fairlead-vm: done'
poweroff -f
