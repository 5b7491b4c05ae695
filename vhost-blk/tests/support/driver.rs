//! A small virtio-blk driver over the `vhost` crate's front end. It drives each protocol step by itself, so that tests can
//! do what a well-behaved driver would not.

use super::PATIENCE;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::Ordering;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::poll::PollContext;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;
/// Where a front end sees guest memory; only the translation of ring addresses uses it.
const USER_BASE: u64 = 0x7000_0000_0000;
pub const MEMORY_BYTES: u64 = 16 << 20;
/// Each ring has a mebibyte: descriptors, available ring, used ring, then headers, tables and data.
const RING_BYTES: u64 = 1 << 20;
pub const AVAIL: u64 = 0x4000;
pub const USED: u64 = 0x6000;
const HEADERS: u64 = 0x8000;
const TABLES: u64 = 0x2_0000;
pub const DATA: u64 = 0x4_0000;
pub const QUEUE_SIZE: u16 = 128;
/// The status byte of a request that was not answered.
pub const UNANSWERED: u8 = 0xee;

/// Guest memory with a mapping of its own, that outlives connections.
pub struct Guest {
    pub memory: GuestMemoryMmap,
    file: File,
}

impl Guest {
    pub fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY_BYTES).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let len = usize::try_from(MEMORY_BYTES).unwrap();
        let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), len, Some(offset))]).unwrap();
        Self { memory, file }
    }

    pub fn get<T: vm_memory::ByteValued>(&self, at: u64) -> T {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.memory.read_slice(&mut out, GuestAddress(at)).unwrap();
        out
    }

    pub fn put_bytes(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
    }
}

/// A connection with negotiated features and shared memory, but no rings yet.
pub fn connect(path: &Path, guest: &Guest, features: u64) -> Frontend {
    connect_with(path, guest, features, VhostUserProtocolFeatures::empty())
}

/// The same with protocol features that not every test wants.
pub fn connect_with(path: &Path, guest: &Guest, features: u64, more: VhostUserProtocolFeatures) -> Frontend {
    let mut front = Frontend::connect(path, 64).unwrap();
    front.set_owner().unwrap();
    let offered = front.get_features().unwrap();
    // Bit 30, VHOST_USER_F_PROTOCOL_FEATURES, stays.
    front.set_features(offered & (features | 1 << 30)).unwrap();
    let protocol = front.get_protocol_features().unwrap();
    let wanted = VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | more;
    assert!(protocol.contains(wanted), "{protocol:?}");
    front.set_protocol_features(wanted).unwrap();
    front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    let region = guest.memory.iter().next().unwrap();
    let info = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: region.len(),
        userspace_addr: USER_BASE,
        mmap_offset: 0,
        mmap_handle: guest.file.as_raw_fd(),
    };
    front.set_mem_table(&[info]).unwrap();
    front
}

/// In-flight memory as a front end keeps it while no back end lives.
pub struct Inflight {
    pub message: VhostUserInflight,
    pub file: File,
}

impl Inflight {
    /// New memory from the back end, and at once in use, as QEMU does it.
    pub fn get(front: &mut Frontend, num_queues: u16) -> Self {
        let (message, file) = front.get_inflight_fd(&VhostUserInflight::new(0, 0, num_queues, QUEUE_SIZE)).unwrap();
        let inflight = Self { message, file };
        inflight.set(front).unwrap();
        inflight
    }

    /// Gives it to a back end.
    pub fn set(&self, front: &mut Frontend) -> vhost::Result<()> {
        front.set_inflight_fd(&self.message, self.file.as_raw_fd())
    }
}

/// Reads the configuration space.
pub fn config(front: &mut Frontend, offset: u32, len: u32) -> vhost::Result<Vec<u8>> {
    let buffer = vec![0; usize::try_from(len).unwrap()];
    let read = front.get_config(offset, len, VhostUserConfigFlags::WRITABLE, &buffer);
    read.map(|(_, payload)| payload)
}

/// One started ring.
pub struct Ring<'a> {
    guest: &'a Guest,
    pub index: usize,
    base: u64,
    pub kick: EventFd,
    pub call: EventFd,
    next_slot: u16,
    seen_used: u16,
    kicked_idx: u16,
    event_idx: bool,
    /// Whether the device is told to log its writes to the used ring.
    pub logged: bool,
}

impl<'a> Ring<'a> {
    /// Starts ring `index` from scratch.
    pub fn start(front: &mut Frontend, guest: &'a Guest, index: usize, features: u64) -> Self {
        let base = index as u64 * RING_BYTES;
        guest.put_bytes(base, &vec![0; usize::try_from(TABLES).unwrap()]);
        let mut ring = Self {
            guest,
            index,
            base,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            call: EventFd::new(EFD_NONBLOCK).unwrap(),
            next_slot: 0,
            seen_used: 0,
            kicked_idx: 0,
            event_idx: features & EVENT_IDX != 0,
            logged: false,
        };
        ring.restart(front, 0);
        ring
    }

    /// Starts the ring again where it was, as after a reconnect.
    pub fn restart(&mut self, front: &mut Frontend, avail_base: u16) {
        front.set_vring_num(self.index, QUEUE_SIZE).unwrap();
        self.say_addresses(front);
        front.set_vring_base(self.index, avail_base).unwrap();
        front.set_vring_call(self.index, &self.call).unwrap();
        front.set_vring_kick(self.index, &self.kick).unwrap();
        front.set_vring_enable(self.index, true).unwrap();
    }

    /// Says where the ring is, and whether it is logged: once more for a ring that runs, as a front end does when a migration starts.
    pub fn say_addresses(&self, front: &mut Frontend) {
        let user = USER_BASE + self.base;
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: u32::from(self.logged),
            desc_table_addr: user,
            used_ring_addr: user + USED,
            avail_ring_addr: user + AVAIL,
            log_addr: self.logged.then_some(self.base + USED),
        };
        front.set_vring_addr(self.index, &config).unwrap();
    }

    /// The next request goes to this slot, 0 to 15; nothing may be in flight there.
    pub fn choose_slot(&mut self, slot: u16) {
        assert!(slot < QUEUE_SIZE / 8);
        self.next_slot = slot;
    }

    /// The next entry of the used ring (head, bytes), if there is one.
    pub fn poll_used(&mut self) -> Option<(u32, u32)> {
        let none = self.used_idx() == self.seen_used;
        if none { None } else { Some(self.wait_used()) }
    }

    /// Guest-physical address of the ring's descriptors, from which everything else of it has a fixed distance.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Guest-physical address of this ring's data area.
    pub fn data(&self) -> u64 {
        self.base + DATA
    }

    /// Puts a chain of (address, bytes, flags) into the ring, directly from descriptor `slot * 8` on or through an
    /// indirect table; returns the head.
    pub fn push_chain(&mut self, chain: &[(u64, u32, u16)], indirect: bool) -> u16 {
        let slot = self.next_slot;
        self.next_slot = (self.next_slot + 1) % (QUEUE_SIZE / 8);
        let head = slot * 8;
        let table = if indirect { self.base + TABLES + u64::from(slot) * 0x400 } else { self.base };
        let first = if indirect { 0 } else { head };
        for (i, (at, len, flags)) in chain.iter().enumerate() {
            let i = u16::try_from(i).unwrap();
            let last = usize::from(i) + 1 == chain.len();
            let flags = if last { *flags } else { *flags | NEXT };
            let raw = RawDescriptor::from(Descriptor::new(*at, *len, flags, first + i + 1));
            self.guest.put(table + u64::from(first + i) * 16, raw);
        }
        if indirect {
            let len = u32::try_from(chain.len()).unwrap() * 16;
            self.guest.put(self.base + u64::from(head) * 16, RawDescriptor::from(Descriptor::new(table, len, INDIRECT, 0)));
        }
        self.publish(head);
        head
    }

    /// Makes a head available.
    pub fn publish(&self, head: u16) {
        let idx: u16 = self.guest.get(self.base + AVAIL + 2);
        self.guest.put(self.base + AVAIL + 4 + u64::from(idx % QUEUE_SIZE) * 2, head);
        self.set_avail_idx(idx.wrapping_add(1));
    }

    pub fn set_avail_idx(&self, idx: u16) {
        self.guest.memory.store(idx, GuestAddress(self.base + AVAIL + 2), Ordering::SeqCst).unwrap();
    }

    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    pub fn used_idx(&self) -> u16 {
        self.guest.memory.load(GuestAddress(self.base + USED + 2), Ordering::SeqCst).unwrap()
    }

    /// Kicks only if the device asked for it since the last call, as real drivers do (virtio 1.2, 2.7.13.3).
    pub fn kick_if_wanted(&mut self) {
        let new: u16 = self.guest.get(self.base + AVAIL + 2);
        std::sync::atomic::fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event: u16 = self.guest.get(self.base + USED + 4 + u64::from(QUEUE_SIZE) * 8);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(self.kicked_idx)
        } else {
            self.guest.get::<u16>(self.base + USED) & 1 == 0
        };
        self.kicked_idx = new;
        if wanted {
            self.kick();
        }
    }

    /// The next entry of the used ring (head, bytes); waits for interrupts.
    pub fn wait_used(&mut self) -> (u32, u32) {
        let deadline = ogee_common::clock::now() + PATIENCE;
        let poll = PollContext::<u32>::new().unwrap();
        poll.add(&self.call, 0).unwrap();
        while self.used_idx() == self.seen_used {
            if self.event_idx {
                self.guest.memory.store(self.seen_used, self.used_event_at(), Ordering::SeqCst).unwrap();
                if self.used_idx() != self.seen_used {
                    break;
                }
            }
            let left = deadline.saturating_duration_since(ogee_common::clock::now());
            assert!(!left.is_zero(), "ring {}: no answer in time", self.index);
            let _timed_out = poll.wait_timeout(left).unwrap();
            let _spurious = self.call.read();
        }
        let at = self.base + USED + 4 + u64::from(self.seen_used % QUEUE_SIZE) * 8;
        self.seen_used = self.seen_used.wrapping_add(1);
        (self.guest.get(at), self.guest.get(at + 4))
    }

    fn used_event_at(&self) -> GuestAddress {
        GuestAddress(self.base + AVAIL + 4 + u64::from(QUEUE_SIZE) * 2)
    }

    /// Writes a header and returns (its address, the address of the status) of a slot.
    pub fn header(&self, kind: u32, sector: u64) -> (u64, u64) {
        let at = self.base + HEADERS + u64::from(self.next_slot) * 64;
        self.guest.put(at, kind.to_le());
        self.guest.put(at + 4, 0_u32);
        self.guest.put(at + 8, sector.to_le());
        self.guest.put(at + 32, UNANSWERED);
        (at, at + 32)
    }

    /// One request to its end: status and bytes reported.
    pub fn call(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)], indirect: bool) -> (u8, u32) {
        let (status, head) = self.submit(kind, sector, data, indirect);
        self.kick_if_wanted();
        let (used, len) = self.wait_used();
        assert_eq!(used, u32::from(head));
        (self.guest.get(status), len)
    }

    /// Puts a request into the ring without a kick; returns (address of the status, head).
    pub fn submit(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)], indirect: bool) -> (u64, u16) {
        let (header, status) = self.header(kind, sector);
        let mut chain = vec![(header, 16, 0)];
        chain.extend_from_slice(data);
        chain.push((status, 1, WRITE));
        (status, self.push_chain(&chain, indirect))
    }
}
