// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"bytes"
	"math/rand"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"testing/quick"
	"time"
	"unsafe"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// bytesOf returns the memory of a row, as the kernel gets it.
func bytesOf[T any](row *T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(row)), unsafe.Sizeof(*row))
}

func backend(s string) lb.Backend {
	ap := netip.MustParseAddrPort(s)
	return lb.Backend{Addr: ap.Addr(), Port: ap.Port()}
}

// mapped is what comes before the four bytes of an IPv4 address.
var mapped = []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff}

var v6Bytes = []byte{0xfd, 0, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x0a}

func TestRowsHaveTheBytesOfTheABI(t *testing.T) {
	frontend4 := encodeFrontendKey(lb.FrontendKey{VIP: netip.MustParseAddr("10.96.0.10"), Port: 53, Protocol: lb.UDP})
	frontend6 := encodeFrontendKey(lb.FrontendKey{VIP: netip.MustParseAddr("fd00:96::a"), Port: 8080, Protocol: lb.TCP})
	wildcard := encodeFrontendKey(lb.FrontendKey{VIP: netip.MustParseAddr("10.96.0.10")})
	frontend := encodeFrontend(lb.Frontend{Service: 0x01020304, Kind: lb.KindClusterIP})
	word := encodeRange(lb.Range{Base: 0x010203, Count: 0x0405, Generation: 0x060708})
	slot := encodeSlot(backend("10.244.1.2:80"))
	options := encodeOptions(lb.ServiceRow{Affinity: 0x01020304, Restricted: true})
	allowed := encodeOptions(lb.ServiceRow{Affinity: 1, NodeAllowed: true})
	outsideLocal := encodeOptions(lb.ServiceRow{Affinity: 1, OutsideLocal: true})
	member := encodeMember(lb.Member{Service: 7, Backend: backend("[fd00:96::a]:443")})
	sticky := encodeMember(lb.Member{Service: 7, Backend: backend("10.244.1.2:80"), Use: lb.UseOn(lb.SideOutside)})
	source4 := encodeSource(lb.Source{Service: 7, Prefix: netip.MustParsePrefix("192.0.2.0/24")})
	source6 := encodeSource(lb.Source{Service: 7, Prefix: netip.MustParsePrefix("fd00::/8")})
	cidr4 := encodeCIDR(netip.MustParsePrefix("10.96.0.0/12"))
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for _, tc := range []struct {
		name      string
		got, want []byte
	}{
		{"an IPv4 VIP is mapped and ports are in network order", bytesOf(&frontend4),
			join(mapped, []byte{10, 96, 0, 10, 0, 53, 17, 0, 0, 0, 0, 0})},
		{"an IPv6 VIP is as it is", bytesOf(&frontend6), join(v6Bytes, []byte{0x1f, 0x90, 6, 0, 0, 0, 0, 0})},
		{"a wildcard has no port and no protocol", bytesOf(&wildcard), join(mapped, []byte{10, 96, 0, 10, 0, 0, 0, 0, 0, 0, 0, 0})},
		{"numbers are in host order", bytesOf(&frontend), []byte{4, 3, 2, 1, 1, 0, 0, 0}},
		{"a range is base, count and generation from the lowest bit up", bytesOf(&word), []byte{3, 2, 1, 5, 4, 8, 7, 6}},
		{"a slot ends in zeros", bytesOf(&slot), join(mapped, []byte{10, 244, 1, 2, 0, 80, 0, 0, 0, 0, 0, 0})},
		{"options are the timeout, then flags", bytesOf(&options), []byte{4, 3, 2, 1, 1, 0, 0, 0}},
		{"each flag has its bit", bytesOf(&allowed), []byte{1, 0, 0, 0, 2, 0, 0, 0}},
		{"also that outside clients keep their address", bytesOf(&outsideLocal), []byte{1, 0, 0, 0, 4, 0, 0, 0}},
		{"a member that serves has use 0 and its padding is zero", bytesOf(&member), join(v6Bytes, []byte{7, 0, 0, 0, 1, 0xbb, 0, 0})},
		{"a member of a side has one more than the side's number", bytesOf(&sticky),
			join(mapped, []byte{10, 244, 1, 2, 7, 0, 0, 0, 0, 80, 3, 0})},
		{"the prefix of an IPv4 source counts service ID and mapping", bytesOf(&source4),
			join([]byte{32 + 96 + 24, 0, 0, 0, 7, 0, 0, 0}, mapped, []byte{192, 0, 2, 0})},
		{"the prefix of an IPv6 source counts the service ID", bytesOf(&source6),
			join([]byte{32 + 8, 0, 0, 0, 7, 0, 0, 0, 0xfd}, make([]byte, 15))},
		{"the prefix of an IPv4 range counts the mapping", bytesOf(&cidr4),
			join([]byte{96 + 12, 0, 0, 0}, mapped, []byte{10, 96, 0, 0})},
	} {
		if !bytes.Equal(tc.got, tc.want) {
			t.Errorf("%s:\n got %x\nwant %x", tc.name, tc.got, tc.want)
		}
	}
}

// row makes random values of the types that lb's tables hold.
type row struct{ *rand.Rand }

func (r row) addr() netip.Addr {
	b := make([]byte, 4+12*r.Intn(2))
	r.Read(b)
	a, _ := netip.AddrFromSlice(b)
	return a.Unmap()
}

func (r row) port() uint16 { return uint16(1 + r.Intn(1<<16-1)) }

func (r row) protocol() lb.Protocol { return []lb.Protocol{lb.TCP, lb.UDP, lb.SCTP}[r.Intn(3)] }

func (r row) family() lb.Family { return []lb.Family{lb.IPv4, lb.IPv6}[r.Intn(2)] }

// prefix returns a masked one of any length.
func (r row) prefix() netip.Prefix {
	a := r.addr()
	return netip.PrefixFrom(a, r.Intn(a.BitLen()+1)).Masked()
}

func (r row) service() lb.ServiceRow {
	flag := func() bool { return r.Intn(2) == 0 }
	row := lb.ServiceRow{Affinity: r.Uint32(), Restricted: flag(), NodeAllowed: flag(), OutsideLocal: flag()}
	for side := range row.Sides {
		row.Sides[side] = r.slots()
	}
	return row
}

func (r row) slots() lb.Range {
	return lb.Range{
		Base: uint32(r.Intn(lb.MaxSlots)), Count: uint16(r.Intn(lb.MaxBackends + 1)),
		Generation: uint32(r.Intn(lb.MaxGeneration + 1)),
	}
}

func (r row) backend() lb.Backend { return lb.Backend{Addr: r.addr(), Port: r.port()} }

// label returns up to n characters.
func (r row) label(n int) string {
	b := make([]byte, r.Intn(n+1))
	for i := range b {
		b[i] = byte('!' + r.Intn('~'-'!'))
	}
	return string(b)
}

func (r row) name() lb.Name { return lb.Name{Namespace: r.label(63), Name: r.label(63)} }

// roundTrip fails the test when a value that random makes is not what the codec
// gives back for it.
func roundTrip[T comparable](t *testing.T, random func(row) T, codec func(T) T) {
	t.Helper()
	same := func(in T) bool {
		out := codec(in)
		if out != in {
			t.Errorf("%T %v came back as %v", in, in, out)
		}
		return out == in
	}
	config := &quick.Config{
		MaxCount: 2000,
		Rand:     rand.New(rand.NewSource(1)),
		Values:   func(v []reflect.Value, r *rand.Rand) { v[0] = reflect.ValueOf(random(row{r})) },
	}
	if err := quick.Check(same, config); err != nil {
		t.Error(err)
	}
}

func TestEveryRowDecodesToItself(t *testing.T) {
	t.Run("frontend key", func(t *testing.T) {
		roundTrip(t, func(r row) lb.FrontendKey {
			if r.Intn(4) == 0 {
				return lb.FrontendKey{VIP: r.addr()}
			}
			return lb.FrontendKey{VIP: r.addr(), Port: r.port(), Protocol: r.protocol()}
		}, func(k lb.FrontendKey) lb.FrontendKey { return decodeFrontendKey(encodeFrontendKey(k)) })
	})
	t.Run("frontend", func(t *testing.T) {
		roundTrip(t, func(r row) lb.Frontend {
			return lb.Frontend{Service: lb.ServiceID(r.Uint32()), Kind: lb.KindClusterIP + lb.FrontendKind(r.Intn(5))}
		}, func(f lb.Frontend) lb.Frontend { return decodeFrontend(encodeFrontend(f)) })
	})
	t.Run("range", func(t *testing.T) {
		roundTrip(t, row.slots, func(v lb.Range) lb.Range { return decodeRange(encodeRange(v)) })
	})
	t.Run("service", func(t *testing.T) {
		roundTrip(t, row.service, func(row lb.ServiceRow) lb.ServiceRow {
			words := bpfService{Options: encodeOptions(row)}
			for side, r := range row.Sides {
				words.Range[side] = encodeRange(r)
			}
			return decodeService(words)
		})
	})
	t.Run("slot", func(t *testing.T) {
		roundTrip(t, row.backend, func(b lb.Backend) lb.Backend { return decodeSlot(encodeSlot(b)) })
	})
	t.Run("member", func(t *testing.T) {
		roundTrip(t, func(r row) lb.Member {
			return lb.Member{Service: lb.ServiceID(r.Uint32()), Backend: r.backend(), Use: lb.Use(r.Intn(1 + lb.Sides))}
		}, func(m lb.Member) lb.Member { return decodeMember(encodeMember(m)) })
	})
	t.Run("source", func(t *testing.T) {
		roundTrip(t, func(r row) lb.Source {
			return lb.Source{Service: lb.ServiceID(r.Uint32()), Prefix: r.prefix()}
		}, func(s lb.Source) lb.Source { return decodeSource(encodeSource(s)) })
	})
	t.Run("service CIDR", func(t *testing.T) {
		roundTrip(t, row.prefix, func(p netip.Prefix) netip.Prefix { return decodeCIDR(encodeCIDR(p)) })
	})
	t.Run("node address", func(t *testing.T) {
		roundTrip(t, row.addr, func(a netip.Addr) netip.Addr { return decodeAddr(encodeAddr(a)) })
	})
	t.Run("service name", func(t *testing.T) {
		roundTrip(t, func(r row) lb.ServicePort {
			return lb.ServicePort{Service: r.name(), Port: r.label(63), Protocol: r.protocol(), Family: r.family()}
		}, func(s lb.ServicePort) lb.ServicePort {
			n, err := encodeServiceName(s)
			if err != nil {
				t.Error(err)
			}
			return decodeServiceName(&n)
		})
	})
	t.Run("object name", func(t *testing.T) {
		roundTrip(t, row.name, func(name lb.Name) lb.Name {
			n, err := encodeObjectName(name)
			if err != nil {
				t.Error(err)
			}
			return decodeObjectName(&n)
		})
	})
	t.Run("problem", func(t *testing.T) {
		roundTrip(t, func(r row) lb.Problem { return lb.Problem(r.label(255)) }, func(p lb.Problem) lb.Problem {
			text := encodeProblem(p)
			return lb.Problem(decodeString(text.Text[:]))
		})
	})
}

// FuzzRange shows that each bit of the kernel's word has one meaning.
func FuzzRange(f *testing.F) {
	for _, word := range []uint64{0, 1, 1<<24 - 1, 1 << 24, 1<<40 - 1, 1 << 40, ^uint64(0)} {
		f.Add(word)
	}
	f.Fuzz(func(t *testing.T, word uint64) {
		r := decodeRange(word)
		if r.Base >= lb.MaxSlots || r.Generation > lb.MaxGeneration {
			t.Errorf("%#x decodes to %+v, beyond the limits of package lb", word, r)
		}
		if got := encodeRange(r); got != word {
			t.Errorf("%#x → %+v → %#x", word, r, got)
		}
	})
}

func TestRangeAtItsLimits(t *testing.T) {
	full := lb.Range{Base: lb.MaxSlots - 1, Count: lb.MaxBackends, Generation: lb.MaxGeneration}
	if got := encodeRange(full); got != ^uint64(0) {
		t.Errorf("%+v is %#x, want all bits set", full, got)
	}
	next := full.Next(0, 0)
	if got := encodeRange(next); got != 0 {
		t.Errorf("the range after %+v is %+v, %#x; want all bits clear", full, next, got)
	}
}

// TestPrefixesAtTheSeam is about what lies between the two families in the
// kernel's trie.
func TestPrefixesAtTheSeam(t *testing.T) {
	for _, tc := range []struct{ name, in, want string }{
		{"all of IPv4", "0.0.0.0/0", "0.0.0.0/0"},
		{"all of IPv6", "::/0", "::/0"},
		{"IPv6 that holds all of IPv4 and more", "::/80", "::/80"},
		{"IPv4 in the notation of IPv6", "::ffff:192.0.2.0/120", "192.0.2.0/24"},
		{"bits beyond the length", "192.0.2.1/24", "192.0.2.0/24"},
		{"a single address", "192.0.2.1/32", "192.0.2.1/32"},
	} {
		if got := decodeCIDR(encodeCIDR(netip.MustParsePrefix(tc.in))); got.String() != tc.want {
			t.Errorf("%s: %s comes back as %s, want %s", tc.name, tc.in, got, tc.want)
		}
	}
}

func TestAffinityEntries(t *testing.T) {
	pod, chosen := netip.MustParseAddr("10.244.1.2"), backend("[fd00:244::2]:8080")
	for _, tc := range []struct {
		name  string
		key   bpfAffinityKey
		value bpfAffinity
		now   uint32
		want  AffinityEntry
	}{
		{
			"a pod shows the address that was noted for people",
			bpfAffinityKey{Netns: 1 << 40, ServiceId: 7}, bpfAffinity{Client: encodeAddr(pod), LastSec: 100}, 160,
			AffinityEntry{Netns: 1 << 40, Client: pod, Service: 7, Age: time.Minute},
		},
		{
			"a client without namespace is its address",
			bpfAffinityKey{Client: encodeAddr(pod), ServiceId: 7}, bpfAffinity{LastSec: 100}, 100,
			AffinityEntry{Client: pod, Service: 7},
		},
		{
			"a client without any address has none",
			bpfAffinityKey{Netns: 1, ServiceId: 7}, bpfAffinity{LastSec: 100}, 100,
			AffinityEntry{Netns: 1, Service: 7},
		},
		{
			"an entry from after the clock was read is new",
			bpfAffinityKey{Netns: 1, ServiceId: 7}, bpfAffinity{LastSec: 101}, 100,
			AffinityEntry{Netns: 1, Service: 7},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.value.Backend, tc.value.Port, tc.want.Backend = encodeAddr(chosen.Addr), networkPort(chosen.Port), chosen
			if got := decodeAffinity(&tc.key, &tc.value, tc.now); got != tc.want {
				t.Errorf("got %+v, want %+v", got, tc.want)
			}
		})
	}
}

func TestTextThatDoesNotFit(t *testing.T) {
	long := strings.Repeat("x", 64)
	for _, sp := range []lb.ServicePort{
		{Service: lb.Name{Namespace: long, Name: "name"}},
		{Service: lb.Name{Namespace: "default", Name: long}},
		{Service: lb.Name{Namespace: "default", Name: "name"}, Port: long},
	} {
		if _, err := encodeServiceName(sp); err == nil || !strings.Contains(err.Error(), "has 64 characters, the kernel's tables hold 63") {
			t.Errorf("%v: error %v does not say how long it is and may be", sp, err)
		}
	}
	if _, err := encodeObjectName(lb.Name{Namespace: "default", Name: long}); err == nil {
		t.Error("a name of 64 characters is taken for an object")
	}

	cut := encodeProblem(lb.Problem(strings.Repeat("x", 300)))
	if got := decodeString(cut.Text[:]); got != strings.Repeat("x", lb.MaxProblem) {
		t.Errorf("a problem of 300 characters is cut to %d, want 255", len(got))
	}
}
