// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package sctp

//go:generate go tool bpf2go -cc clang-19 -strip llvm-strip-19 -target amd64,arm64 -no-global-types -type sctp_io bpfsctp ../../bpf/tests/sctp_test.bpf.c -- -O2 -mcpu=v3 -Wall -Werror -idirafter /usr/include/x86_64-linux-gnu

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"math/rand/v2"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/fairlead-lb/fairlead/internal/testutil"
)

// Offsets in the header, and its size.
const (
	checksumOffset = 8
	headerSize     = 12
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum of a packet in whose place for it anything may stand.
func checksum(packet []byte) uint32 {
	sum := crc32.Update(0, castagnoli, packet[:checksumOffset])
	sum = crc32.Update(sum, castagnoli, make([]byte, 4))
	return crc32.Update(sum, castagnoli, packet[headerSize:])
}

// seal puts a packet's checksum into it.
func seal(packet []byte) {
	binary.LittleEndian.PutUint32(packet[checksumOffset:], checksum(packet))
}

// loadProgram loads the test program; types, unless nil, stands for the kernel's.
func loadProgram(t *testing.T, types *btf.Spec) *ebpf.Program {
	t.Helper()
	testutil.RequireRoot(t)
	spec, err := loadBpfsctp()
	if err != nil {
		t.Fatal(err)
	}
	var objects struct {
		Program *ebpf.Program `ebpf:"test_sctp"`
	}
	err = spec.LoadAndAssign(&objects, &ebpf.CollectionOptions{Programs: ebpf.ProgramOptions{KernelTypes: types}})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() { objects.Program.Close() })
	return objects.Program
}

// noTypes are those of a kernel that does not describe its types.
func noTypes(t *testing.T) *btf.Spec {
	t.Helper()
	var none btf.Builder
	raw, err := none.Marshal(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	types, err := btf.LoadSpecFromReader(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	return types
}

// translate has the program change the ports of a packet to those given, and returns
// the checksum that it then has and whether the program says that it is right.
func translate(t *testing.T, program *ebpf.Program, packet []byte, to [4]byte, fragment bool) (uint32, bool) {
	t.Helper()
	io := bpfsctpSctpIo{Length: uint32(len(packet))}
	if fragment {
		io.Fragment = 1
	}
	in := make([]byte, 14, 64)
	in, err := binary.Append(in, binary.LittleEndian, io)
	if err != nil {
		t.Fatal(err)
	}
	copy(in[14:], packet[:headerSize])
	copy(in[14+headerSize:], to[:])
	out := make([]byte, len(in))
	code, err := program.Run(&ebpf.RunOptions{Data: in, DataOut: out})
	if err != nil || code != 0 {
		t.Fatalf("program returns %d, %v", code, err)
	}
	if _, err := binary.Decode(out[14:], binary.LittleEndian, &io); err != nil {
		t.Fatal(err)
	}
	return io.Checksum, io.Right != 0
}

func randomBytes(b []byte) []byte {
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

// randomPacket returns a packet of a length with its checksum.
func randomPacket(length int) []byte {
	packet := randomBytes(make([]byte, length))
	seal(packet)
	return packet
}

func TestChecksumAfterAChangeOfPorts(t *testing.T) {
	for _, tc := range []struct {
		name  string
		types *btf.Spec
	}{
		{name: "where the kernel tells whether it is there"},
		{name: "where that has to be found out", types: noTypes(t)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			program := loadProgram(t, tc.types)
			lengths, step := []int{65515, 65535}, 1
			if testing.Short() {
				step = 17
			}
			for length := headerSize; length <= 9000; length += step {
				lengths = append(lengths, length)
			}
			for _, length := range lengths {
				packet := randomPacket(length)
				to := [4]byte(randomBytes(make([]byte, 4)))
				got, right := translate(t, program, packet, to, false)
				copy(packet, to[:])
				if want := checksum(packet); got != want || !right {
					t.Fatalf("a packet of %d bytes has checksum %#x, want %#x; right = %v, want true", length, got, want, right)
				}
			}
		})
	}
}

// TestChecksumThatIsNotTouched: nor is one that waits for the device, but no such
// packet can be made here; TestAssociations has them.
func TestChecksumThatIsNotTouched(t *testing.T) {
	program, packet := loadProgram(t, nil), randomPacket(1000)
	had := binary.LittleEndian.Uint32(packet[checksumOffset:])
	same, other := [4]byte(packet[:4]), [4]byte{packet[0] + 1, packet[1], packet[2], packet[3] - 1}
	for _, tc := range []struct {
		name     string
		to       [4]byte
		fragment bool
		right    bool
	}{
		{name: "the ports stay", to: same, right: true},
		{name: "the ports of a first fragment stay", to: same, fragment: true, right: true},
		{name: "the ports of a first fragment change", to: other, fragment: true, right: false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, right := translate(t, program, packet, tc.to, tc.fragment)
			if got != had || right != tc.right {
				t.Errorf("checksum %#x, right = %v; want %#x, %v", got, right, had, tc.right)
			}
		})
	}
}
