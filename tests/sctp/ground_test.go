// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sctp

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/sandbox"
	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// TestReceiverLooksAtChecksums: without that the other tests would prove little.
func TestReceiverLooksAtChecksums(t *testing.T) {
	for _, k := range []kind{veth, wire} {
		t.Run(string(k), func(t *testing.T) {
			needSCTP(t)
			node := testutil.Node(t).Namespace()
			network, err := sandbox.NewNetwork("fairlead-test")
			must(t, err)
			t.Cleanup(func() { must(t, network.Close()) })
			client, err := network.AddNamespace("client")
			must(t, err)
			k.connect(t, node, "uplink0", nodeAddrs, client, outsideAddrs)
			var fd int
			must(t, client.Do(func() (err error) {
				fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
				return err
			}))
			defer unix.Close(fd)
			packet := randomPacket(100)
			packet[checksumOffset]++
			testutil.Eventually(t, testutil.Patience(), "the node notices a wrong checksum", func() error {
				if err := unix.Sendto(fd, packet, 0, sockaddr(nodeAddrs.port(0, 0))); err != nil {
					return err
				}
				n, err := checksumErrors(node)
				if err == nil && n == 0 {
					err = errors.New("it counts none")
				}
				return err
			})
		})
	}
}
