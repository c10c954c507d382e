// SPDX-License-Identifier: Apache-2.0
// Copyright The Fairlead Authors

package datapath

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/rlimit"
	"golang.org/x/sys/unix"

	"github.com/fairlead-lb/fairlead/internal/lb"
)

// ABI is the version of the tables' layout, bpf/types.h and bpf/maps.h. It is part
// of the pin directory's name, so a build never touches maps it does not know. See
// StateABI for the maps that are not tables.
const ABI = 3

// Sizes are the capacities of the maps, in rows. A zero keeps the default of
// bpf/maps.h.
type Sizes struct {
	Frontends    uint32 // addresses and ports clients dial, one more for each ClusterIP
	Services     uint32 // service ports in one family, and one
	Slots        uint32 // backends of all services, twice over while they change
	Members      uint32 // backends of UDP services, and of services with an affinity once for each side
	SourceRanges uint32 // ranges of clients that may use load-balancer IPs
	Affinity     uint32 // pairs of a client and a service with an affinity; the oldest make room
	Peers        uint32 // TCP sockets that getpeername is right for; a power of two
	Flows        uint32 // entries of the packet path, two for each flow; who is silent longest makes room
}

// PortRange is the ports from First to Last.
type PortRange struct{ First, Last uint16 }

// Config says what Open loads.
type Config struct {
	// Root is the directory on a BPF file system below which everything is
	// pinned. It is created if its parent exists.
	Root  string
	Sizes Sizes
	// Grow makes maps that can grow begin small: Sizes are what Grow may make of them.
	// Without it they are made as large.
	Grow bool
	// CgroupID is the inode of the cgroup that the hooks will be on.
	CgroupID uint64
	// HostNetnsCookie is the cookie of the network namespace that processes on
	// the node are in (SO_NETNS_COOKIE of a socket there).
	HostNetnsCookie uint64
	// PacketPath says whether the tc programs are loaded. The maps are there in
	// any case.
	PacketPath bool
	// SNATPorts are the source ports of flows that get an address of the node.
	// The zero value keeps the default of bpf/config.h.
	SNATPorts PortRange
	// ReplyRate is how many RSTs and ICMP errors a second each processor may send
	// in answer to packets, ReplyBurst how many at once. A zero keeps the default
	// of bpf/config.h.
	ReplyRate, ReplyBurst uint32
}

// Datapath is the agent's hold on the kernel: the tables and the programs. Close
// leaves everything that is pinned in place.
type Datapath struct {
	*Tables
	// Switching tells that programs of another version may serve the node: see
	// Serve. Tables and hooks of ours may be in use already, by one that was stopped
	// on its way.
	Switching bool
	// Resized names the maps whose pinned size differs from the one asked for
	// and stays.
	Resized []string
	// NoIterators says why stale UDP sockets cannot be found on this kernel;
	// nil where they can.
	NoIterators error
	// NoPacketPath says why the tc programs cannot be loaded on this kernel; nil
	// where they are, and where Config does not ask for them. All else works
	// without.
	NoPacketPath error
	// NoClientAddress says why programs cannot see at which address a pod is: the
	// kernel has no type information, or lets no program read its memory. It is
	// nil where they can. Restricted load-balancer IPs are then denied to pods'
	// sockets that are not bound to an address.
	NoClientAddress error

	config    Config
	programs  map[string]*ebpf.Program
	iterators map[string]*ebpf.Program
	ceilings  map[string]uint32 // rows that maps that can grow may have
	lock      *os.File
	pins      []pin // nil until KeepPins
}

// ErrNotBPFFS says that a root is not on a BPF file system.
var ErrNotBPFFS = errors.New("not on a BPF file system (mount one: mount -t bpf bpf /sys/fs/bpf)")

// ErrNoDatapath says that nothing of this ABI is pinned below a root.
var ErrNoDatapath = errors.New("no fairlead datapath is pinned there")

func versionName(abi int) string { return "v" + strconv.Itoa(abi) }

func versionDir(root string) string { return filepath.Join(root, versionName(ABI)) }

// LinkPath returns where the link of a hook is pinned.
func LinkPath(root, hook string) string { return filepath.Join(versionDir(root), "links", hook) }

const devicesDir = "devices"

// DevicesPath returns the directory in which the links of network devices are
// pinned; Open makes it.
func DevicesPath(root string) string { return filepath.Join(versionDir(root), devicesDir) }

// Open creates the maps below cfg.Root or takes up those that are pinned there,
// and loads the programs with them. It fails with one line that says what is
// missing: a privilege, a BPF file system, a kernel feature; and when another
// agent holds the same root. The caller closes the Datapath.
func Open(cfg Config) (*Datapath, error) {
	if err := checkRoot(cfg.Root); err != nil {
		return nil, err
	}
	lock, err := Lock(cfg.Root)
	if err != nil {
		return nil, err
	}
	d, err := open(cfg)
	if err != nil {
		_ = lock.Close()
		return nil, explainLoad(err)
	}
	d.lock = lock
	return d, nil
}

func open(cfg Config) (*Datapath, error) {
	// Before Linux 5.11 maps count against the memory lock limit.
	if err := rlimit.RemoveMemlock(); err != nil {
		return nil, fmt.Errorf("raise the memory lock limit: %w", err)
	}
	switching, err := makeDirs(cfg.Root)
	if err != nil {
		return nil, err
	}
	spec, resized, err := buildSpec(cfg)
	if err != nil {
		return nil, err
	}
	opened, err := openMaps(cfg.Root, spec)
	if err != nil {
		return nil, err
	}
	d := &Datapath{Resized: resized, Switching: switching, config: cfg}
	if d.ceilings, err = ceilings(cfg.Sizes); err != nil {
		closeMaps(opened)
		return nil, err
	}
	if err := d.load(cfg, split(spec), opened); err != nil {
		closePrograms(d.programs)
		closeMaps(opened)
		return nil, err
	}
	return d, nil
}

// load makes d of maps and programs.
func (d *Datapath) load(cfg Config, parts parts, opened map[string]*ebpf.Map) (err error) {
	d.programs, d.NoClientAddress, err = loadHooks(func(types *btf.Spec) (map[string]*ebpf.Program, error) {
		return loadPrograms(parts.hooks, opened, types)
	})
	if err != nil {
		return err
	}
	if d.Tables, err = newTables(opened, unix.PROT_READ|unix.PROT_WRITE); err != nil {
		return err
	}
	if err := d.openForWriting(); err != nil {
		d.unmap()
		return err
	}
	d.iterators, d.NoIterators = loadPrograms(parts.iterators, opened, nil)
	if cfg.PacketPath {
		packets, err := loadPrograms(parts.packets, opened, nil)
		d.NoPacketPath = explainPacketPath(err)
		maps.Copy(d.programs, packets)
	}
	return nil
}

// Serve notes that service IDs mean from now on what our tables say. The caller has
// filled them, if Switching, and puts our programs on hooks next.
func (d *Datapath) Serve() error { return setServing(d.config.Root) }

// parts are a specification for each kind of program: what every kernel must load,
// and what helps where it does.
type parts struct{ hooks, iterators, packets *ebpf.CollectionSpec }

// split makes the parts of one specification.
func split(spec *ebpf.CollectionSpec) parts {
	p := parts{hooks: spec.Copy(), iterators: spec.Copy(), packets: spec.Copy()}
	for name, prog := range spec.Programs {
		for part, kind := range map[*ebpf.CollectionSpec]ebpf.ProgramType{
			p.hooks: ebpf.CGroupSockAddr, p.iterators: ebpf.Tracing, p.packets: ebpf.SchedCLS,
		} {
			if prog.Type != kind {
				delete(part.Programs, name)
			}
		}
	}
	return p
}

// byMap returns the capacities by the name of a map.
func (s Sizes) byMap() map[string]uint32 {
	return map[string]uint32{
		bpfMapFrontends:    s.Frontends,
		bpfMapServices:     s.Services,
		bpfMapNames:        s.Services,
		mapGenerations:     s.Services,
		bpfMapSlots:        s.Slots,
		bpfMapMembers:      s.Members,
		bpfMapSourceRanges: s.SourceRanges,
		bpfMapAffinity:     s.Affinity,
		bpfMapPeers:        s.Peers,
		bpfMapFlows:        s.Flows,
	}
}

// buildSpec reads the embedded object and sets sizes, options and pins.
func buildSpec(cfg Config) (spec *ebpf.CollectionSpec, resized []string, err error) {
	if cfg.Sizes.Slots > lb.MaxSlots {
		return nil, nil, fmt.Errorf("%d slots are too many: a service's range can name %d", cfg.Sizes.Slots, lb.MaxSlots)
	}
	if spec, err = loadSpec(); err != nil {
		return nil, nil, err
	}
	for name, size := range cfg.Sizes.byMap() {
		if size != 0 {
			spec.Maps[name].MaxEntries = size
		}
	}
	for name, m := range spec.Maps {
		if !isPinned(name) {
			continue
		}
		changed, err := keepPinnedSize(cfg, m)
		if err != nil {
			return nil, nil, err
		}
		if changed {
			resized = append(resized, name)
		}
	}
	// Whoever has made the names may have handed out IDs that tables of first size have
	// no rows for.
	if _, err := os.Lstat(MapPath(cfg.Root, bpfMapServices)); errors.Is(err, fs.ErrNotExist) {
		services := spec.Maps[bpfMapServices]
		services.MaxEntries = max(services.MaxEntries, spec.Maps[bpfMapNames].MaxEntries)
	}
	return spec, resized, setOptions(spec, cfg)
}

// setOptions sets what bpf/config.h declares.
func setOptions(spec *ebpf.CollectionSpec, cfg Config) error {
	errs := []error{
		spec.Variables[bpfVarPeersMask].Set(spec.Maps[bpfMapPeers].MaxEntries - 1),
		spec.Variables[bpfVarCgroupId].Set(cfg.CgroupID),
		spec.Variables[bpfVarHostNetnsCookie].Set(cfg.HostNetnsCookie),
		spec.Variables[bpfVarHasConntrack].Set(hasConntrack()),
	}
	if ports := cfg.SNATPorts; ports != (PortRange{}) {
		if ports.First == 0 || ports.First > ports.Last {
			return fmt.Errorf("SNAT ports %d-%d: no such range", ports.First, ports.Last)
		}
		errs = append(errs, spec.Variables[bpfVarSnatPortFirst].Set(ports.First),
			spec.Variables[bpfVarSnatPortLast].Set(ports.Last))
	}
	if cfg.ReplyRate != 0 {
		errs = append(errs, spec.Variables[bpfVarReplyRate].Set(cfg.ReplyRate))
	}
	if cfg.ReplyBurst != 0 {
		errs = append(errs, spec.Variables[bpfVarReplyBurst].Set(cfg.ReplyBurst))
	}
	return errors.Join(errs...)
}

// hasConntrack says whether programs can ask the kernel's connection tracking, which
// is part of the kernel or a module that is loaded now.
func hasConntrack() bool {
	var lookup *btf.Func
	if types, err := btf.LoadKernelSpec(); err == nil && types.TypeByName("bpf_skb_ct_lookup", &lookup) == nil {
		return true
	}
	types, err := btf.LoadKernelModuleSpec("nf_conntrack")
	return err == nil && types.TypeByName("bpf_skb_ct_lookup", &lookup) == nil
}

// keepPinnedSize makes the spec, whose size is the ceiling of a map that can grow, as
// large as the map that is pinned, if one is: running with another size than asked for
// beats losing what the map holds. changed tells that this is not as it should be.
func keepPinnedSize(cfg Config, spec *ebpf.MapSpec) (changed bool, err error) {
	ceiling := spec.MaxEntries
	first, grows := firstSizes[spec.Name]
	if grows = grows && cfg.Grow; grows {
		spec.MaxEntries = min(first, ceiling)
	}
	m, err := ebpf.LoadPinnedMap(MapPath(cfg.Root, spec.Name), nil)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open pinned map %s: %w", spec.Name, err)
	}
	defer m.Close()
	spec.MaxEntries = m.MaxEntries()
	return m.MaxEntries() > ceiling || m.MaxEntries() < ceiling && !grows, nil
}

// loadHooks loads the programs of the socket path. noTypes says why they could not
// be loaded as they are but could for a kernel whose types are unknown; see
// bpf/client.h for what they do without. load is loadPrograms with the types it is
// given.
func loadHooks(load func(types *btf.Spec) (map[string]*ebpf.Program, error)) (programs map[string]*ebpf.Program, noTypes, err error) {
	programs, err = load(nil)
	if err == nil || hasOtherCause(err) {
		return programs, nil, err
	}
	// Trying is the only way to know: a kernel that lets no program read its
	// memory answers like one that finds fault with the program.
	types, typesErr := emptyTypes()
	if typesErr != nil {
		return nil, nil, errors.Join(err, typesErr)
	}
	programs, again := load(types)
	if again != nil {
		return nil, nil, err
	}
	return programs, explainNoTypes(err), nil
}

// hasOtherCause tells whether a failed load surely has nothing to do with the
// kernel's types. Among these are failures that pass: programs that know less
// would stay.
func hasOtherCause(err error) bool {
	return slices.ContainsFunc([]error{
		ebpf.ErrMapIncompatible, unix.ENOMEM, unix.EAGAIN, unix.EMFILE, unix.ENFILE,
	}, func(cause error) bool { return errors.Is(err, cause) })
}

// explainNoTypes adds what programs were missing that load without the kernel's
// types.
func explainNoTypes(err error) error {
	if _, btfErr := btf.LoadKernelSpec(); btfErr != nil {
		return fmt.Errorf("%w (this kernel does not describe its types; CONFIG_DEBUG_INFO_BTF is needed)", err)
	}
	return fmt.Errorf("%w (this kernel may not let programs read its memory, as under lockdown=confidentiality)", err)
}

// emptyTypes returns the type information of a kernel that has none.
func emptyTypes() (*btf.Spec, error) {
	var none btf.Builder
	raw, err := none.Marshal(nil, nil)
	if err != nil {
		return nil, fmt.Errorf("make empty type information: %w", err)
	}
	return btf.LoadSpecFromReader(bytes.NewReader(raw))
}

// loadPrograms loads the programs of a specification with maps that are open. types,
// unless nil, stands for the kernel's own.
func loadPrograms(spec *ebpf.CollectionSpec, opened map[string]*ebpf.Map, types *btf.Spec) (map[string]*ebpf.Program, error) {
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		MapReplacements: opened,
		Programs:        ebpf.ProgramOptions{KernelTypes: types},
	})
	if err != nil {
		return nil, fmt.Errorf("load BPF programs: %w", err)
	}
	closeMaps(coll.Maps) // programs hold theirs
	return coll.Programs, nil
}

// explainLoad adds what a failed load most likely means. It looks at the kernel
// only now, to explain and not to guess.
func explainLoad(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w (run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON)", err)
	case errors.Is(err, ebpf.ErrMapIncompatible):
		return fmt.Errorf("%w (another program owns this pin; run fairlead cleanup or choose another --bpf-root)", err)
	case errors.Is(features.HaveProgramType(ebpf.CGroupSockAddr), ebpf.ErrNotSupported):
		return fmt.Errorf("%w (this kernel has no cgroup/sock_addr programs; CONFIG_CGROUP_BPF is needed)", err)
	case errors.Is(features.HaveProgramHelper(ebpf.CGroupSockAddr, asm.FnSetRetval), ebpf.ErrNotSupported):
		return fmt.Errorf("%w (this kernel lacks bpf_set_retval; Linux 5.18 or newer is needed)", err)
	case errors.Is(features.HaveMapType(ebpf.SkStorage), ebpf.ErrNotSupported):
		return fmt.Errorf("%w (this kernel lacks socket storage maps; Linux 5.18 or newer with BTF is needed)", err)
	}
	return err
}

// explainPacketPath adds what it most likely means that the tc programs cannot be
// loaded. It returns nil for nil.
func explainPacketPath(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(features.HaveProgramType(ebpf.SchedCLS), ebpf.ErrNotSupported):
		return fmt.Errorf("%w (this kernel has no tc programs; CONFIG_NET is needed)", err)
	case errors.Is(features.HaveProgramHelper(ebpf.SchedCLS, asm.FnSkcLookupTcp), ebpf.ErrNotSupported):
		return fmt.Errorf("%w (tc programs cannot find sockets on this kernel; CONFIG_INET is needed)", err)
	}
	return explainLoad(err)
}

// Program returns a loaded program by its name in bpf/datapath.bpf.c, such as
// "sock_connect4", or nil. It stays the Datapath's.
func (d *Datapath) Program(name string) *ebpf.Program { return d.programs[name] }

// Close lets go of maps and programs. What is pinned goes on working.
func (d *Datapath) Close() error {
	d.unmap()
	errs := []error{d.grace.Close(), d.inner.Close()}
	for _, m := range d.maps {
		errs = append(errs, m.Close())
	}
	closePrograms(d.programs)
	closePrograms(d.iterators)
	return errors.Join(append(errs, d.lock.Close())...)
}

func closePrograms(programs map[string]*ebpf.Program) {
	for _, p := range programs {
		_ = p.Close() // only a descriptor
	}
}

// checkRoot makes the root directory and tells whether it can hold pins.
func checkRoot(root string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(root), &st); err != nil {
		return fmt.Errorf("bpf root %s: its parent directory: %w", root, err)
	}
	if st.Type != unix.BPF_FS_MAGIC {
		// The root may itself be where the file system is mounted.
		if err := unix.Statfs(root, &st); err != nil || st.Type != unix.BPF_FS_MAGIC {
			return fmt.Errorf("bpf root %s: %w", root, ErrNotBPFFS)
		}
	}
	if err := os.Mkdir(root, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("bpf root: %w", err)
	}
	return nil
}

// lockWait bounds the wait for somebody who only looks: Locked holds the lock
// for a moment.
const lockWait = time.Second

// Lock makes sure that one process at a time writes below root, which must
// exist: the error wraps fs.ErrNotExist when it does not, and names the agent
// that has the lock when one does. The caller closes the file to let go; the
// kernel does when the process ends, however it ends.
func Lock(root string) (*os.File, error) {
	dir, err := os.Open(root)
	if err != nil {
		return nil, fmt.Errorf("open bpf root: %w", err)
	}
	for deadline := time.Now().Add(lockWait); ; time.Sleep(lockWait / 20) {
		err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			break
		}
		if errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(deadline) {
			continue
		}
		_ = dir.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock bpf root %s: %w", root, err)
		}
		return nil, fmt.Errorf("bpf root %s: a running fairlead agent%s is using it; stop it first or choose another --bpf-root",
			root, holder(root))
	}
	if !sameFile(dir, root) {
		_ = dir.Close()
		return nil, fmt.Errorf("bpf root %s was removed by a cleanup just now; try again", root)
	}
	return dir, nil
}

// sameFile tells whether path still leads to the open file.
func sameFile(f *os.File, path string) bool {
	ours, err1 := f.Stat()
	theirs, err2 := os.Stat(path)
	return err1 == nil && err2 == nil && os.SameFile(ours, theirs)
}

// holder names the process that the agent state speaks of, if it can be read.
func holder(root string) string {
	view, err := OpenView(root)
	if err != nil {
		return ""
	}
	defer view.Close()
	state, err := view.AgentState()
	if err != nil || state.PID == 0 {
		return ""
	}
	return " (pid " + strconv.Itoa(state.PID) + ")"
}

// Locked tells whether an agent is running on root.
func Locked(root string) (bool, error) {
	dir, err := os.Open(root)
	if err != nil {
		return false, fmt.Errorf("open bpf root: %w", err)
	}
	defer dir.Close()
	err = unix.Flock(int(dir.Fd()), unix.LOCK_SH|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	return false, err
}
