//! One virtqueue of a vhost-user-blk device, from the driver's side, and the guest memory that it lies in.
//!
//! A request has a slot: its header, status, indirect table and data have fixed places, and its head is the descriptor of the
//! same number, so nothing is allocated and no free list is kept. It behaves like Linux's virtio-blk driver: one indirect
//! descriptor per request, event index, a kick only if the device asks for one.
//!
//! | bytes of a queue's part | what |
//! | --- | --- |
//! | 0.. | descriptor table, 16 bytes an entry |
//! | then | available ring: flags, index, entries, used event |
//! | then, 4-aligned | used ring: flags, index, entries, available event |
//! | then, page-aligned | slots of 256 bytes: header at 0, status at 64, indirect table at 128 |
//! | then, page-aligned | data of the slots |
//!
//! Invariants: a slot is in flight at most once; what a device writes is checked before it is used as a number of a slot.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const PAGE: u64 = 4096;
const SLOT_BYTES: u64 = 256;
const STATUS_AT: u64 = 64;
const TABLE_AT: u64 = 128;
const HEADER_BYTES: u32 = 16;
/// Entries of the smallest ring, as with QEMU's default.
const ENTRIES_MIN: u16 = 128;
/// Entries of the largest ring that every device takes (virtio 1.2 allows 32,768; vhost-user devices 1,024).
pub(super) const ENTRIES_MAX: u16 = 1024;
/// Where the front end says it sees guest memory; only ring addresses are told in these terms.
const USER_BASE: u64 = 0x7000_0000_0000;

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
/// Status that no device writes; a request that is answered without one has failed.
const NO_STATUS: u8 = 0xff;

/// How much each queue can have in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueShape {
    /// Requests; at most [`ENTRIES_MAX`].
    pub(super) slots: u16,
    /// Data of one request, a multiple of the page.
    pub(super) data_bytes: u64,
}

impl QueueShape {
    fn entries(self) -> u16 {
        self.slots.next_power_of_two().max(ENTRIES_MIN)
    }

    fn avail(self) -> u64 {
        u64::from(self.entries()) * 16
    }

    fn used(self) -> u64 {
        (self.avail() + 6 + u64::from(self.entries()) * 2).next_multiple_of(4)
    }

    fn first_slot(self) -> u64 {
        (self.used() + 6 + u64::from(self.entries()) * 8).next_multiple_of(PAGE)
    }

    fn first_data(self) -> u64 {
        (self.first_slot() + u64::from(self.slots) * SLOT_BYTES).next_multiple_of(PAGE)
    }

    /// Bytes of guest memory of one queue.
    pub(super) fn bytes(self) -> u64 {
        self.first_data() + u64::from(self.slots) * self.data_bytes
    }
}

/// Guest memory that is shared with the device.
#[derive(Debug)]
pub(super) struct SharedMemory {
    map: GuestMemoryMmap,
    file: File,
}

impl SharedMemory {
    /// So many bytes of zeros; pages that are never touched cost nothing.
    ///
    /// # Errors
    /// No memory file or no address space.
    pub(super) fn new(bytes: u64) -> std::io::Result<Self> {
        let fd = rustix::fs::memfd_create("ogee-bench", rustix::fs::MemfdFlags::CLOEXEC)?;
        let file = File::from(fd);
        file.set_len(bytes)?;
        let offset = FileOffset::new(file.try_clone()?, 0);
        let len = usize::try_from(bytes).map_err(std::io::Error::other)?;
        let map = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), len, Some(offset))]);
        Ok(Self { map: map.map_err(std::io::Error::other)?, file })
    }

    /// The one region, as the front end tells it.
    pub(super) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: self.map.iter().map(GuestMemoryRegion::len).sum(),
            userspace_addr: USER_BASE,
            mmap_offset: 0,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    /// Copies out of guest memory.
    ///
    /// # Errors
    /// The range is not in it.
    pub(super) fn get(&self, at: u64, to: &mut [u8]) -> Result<(), GuestMemoryError> {
        self.map.read_slice(to, GuestAddress(at))
    }

    /// Copies into guest memory.
    ///
    /// # Errors
    /// The range is not in it.
    pub(super) fn put(&self, at: u64, from: &[u8]) -> Result<(), GuestMemoryError> {
        self.map.write_slice(from, GuestAddress(at))
    }
}

/// What a request does, with the data's length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// VIRTIO_BLK_T_IN.
    Read(u32),
    /// VIRTIO_BLK_T_OUT.
    Write(u32),
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_DISCARD; the range is the request's data.
    Discard,
}

impl Request {
    const fn kind(self) -> u32 {
        match self {
            Self::Read(_) => 0,
            Self::Write(_) => 1,
            Self::Flush => 4,
            Self::Discard => 11,
        }
    }

    /// Length and flags of the data descriptor.
    const fn data(self) -> Option<(u32, u16)> {
        match self {
            Self::Read(len) => Some((len, F_WRITE)),
            Self::Write(len) => Some((len, 0)),
            Self::Flush => None,
            Self::Discard => Some((16, 0)),
        }
    }
}

/// A device that does not keep to the protocol, or memory that is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingError {
    /// A place outside of guest memory.
    #[error("access guest memory")]
    Memory(#[from] GuestMemoryError),
    /// The device answered a request that was not sent.
    #[error("the device answered head {head}, which is not in flight")]
    Head {
        /// As in the used ring.
        head: u32,
    },
    /// The device could not be woken.
    #[error("kick the device")]
    Kick(#[source] std::io::Error),
}

/// One queue.
#[derive(Debug)]
pub(super) struct Ring {
    memory: Arc<SharedMemory>,
    shape: QueueShape,
    base: u64,
    /// The device's doorbell.
    pub(super) kick: EventFd,
    /// The driver's.
    pub(super) call: EventFd,
    avail_idx: u16,
    kicked_idx: u16,
    seen_used: u16,
    in_flight: Vec<bool>,
}

impl Ring {
    /// Queue `index` of several of the same shape in one memory.
    ///
    /// # Errors
    /// No file descriptors.
    pub(super) fn new(memory: Arc<SharedMemory>, shape: QueueShape, index: u16) -> std::io::Result<Self> {
        Ok(Self {
            memory,
            shape,
            base: u64::from(index) * shape.bytes(),
            kick: EventFd::new(EFD_NONBLOCK)?,
            call: EventFd::new(EFD_NONBLOCK)?,
            avail_idx: 0,
            kicked_idx: 0,
            seen_used: 0,
            in_flight: vec![false; usize::from(shape.slots)],
        })
    }

    /// Ring addresses as the front end tells them.
    pub(super) fn config(&self) -> VringConfigData {
        let user = USER_BASE + self.base;
        VringConfigData {
            queue_max_size: self.shape.entries(),
            queue_size: self.shape.entries(),
            flags: 0,
            desc_table_addr: user,
            used_ring_addr: user + self.shape.used(),
            avail_ring_addr: user + self.shape.avail(),
            log_addr: None,
        }
    }

    /// Requests that this queue can have in flight.
    pub(super) const fn slots(&self) -> u16 {
        self.shape.slots
    }

    /// Data bytes of a slot.
    pub(super) const fn data_bytes(&self) -> u64 {
        self.shape.data_bytes
    }

    /// The memory, and where in it the data of a slot lies.
    pub(super) fn data(&self, slot: u16) -> (Arc<SharedMemory>, u64) {
        (Arc::clone(&self.memory), self.data_at(slot))
    }

    fn data_at(&self, slot: u16) -> u64 {
        self.base + self.shape.first_data() + u64::from(slot) * self.shape.data_bytes
    }

    fn slot_at(&self, slot: u16) -> u64 {
        self.base + self.shape.first_slot() + u64::from(slot) * SLOT_BYTES
    }

    /// Whether nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        !self.in_flight.contains(&true)
    }

    /// Makes a request available to the device; it is not kicked.
    ///
    /// # Errors
    /// [`RingError::Memory`].
    ///
    /// # Panics
    /// The slot is in flight: the caller's mistake.
    pub(super) fn submit(&mut self, slot: u16, request: Request, sector: u64) -> Result<(), RingError> {
        let busy = std::mem::replace(&mut self.in_flight[usize::from(slot)], true);
        assert!(!busy, "slot {slot} is in flight");
        let at = self.slot_at(slot);
        let mut header = [0; HEADER_BYTES as usize];
        header[..4].copy_from_slice(&request.kind().to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory.put(at, &header)?;
        self.memory.put(at + STATUS_AT, &[NO_STATUS])?;
        let table = self.table(slot, request);
        let table_at = at + TABLE_AT;
        self.memory.put(table_at, &table)?;
        let len = u32::try_from(table.len()).unwrap_or(u32::MAX);
        self.memory.put(self.base + u64::from(slot) * 16, &descriptor(table_at, len, F_INDIRECT, 0))?;
        let avail = self.base + self.shape.avail();
        let entry = avail + 4 + u64::from(self.avail_idx % self.shape.entries()) * 2;
        self.memory.put(entry, &slot.to_le_bytes())?;
        self.avail_idx = self.avail_idx.wrapping_add(1);
        self.memory.map.store(self.avail_idx.to_le(), GuestAddress(avail + 2), Ordering::Release)?;
        Ok(())
    }

    /// The indirect table of a request: header, data if there is any, status.
    fn table(&self, slot: u16, request: Request) -> smallvec::SmallVec<[u8; 48]> {
        let at = self.slot_at(slot);
        let mut table = smallvec::SmallVec::new();
        table.extend_from_slice(&descriptor(at, HEADER_BYTES, F_NEXT, 1));
        if let Some((len, flags)) = request.data() {
            table.extend_from_slice(&descriptor(self.data_at(slot), len, flags | F_NEXT, 2));
        }
        table.extend_from_slice(&descriptor(at + STATUS_AT, 1, F_WRITE, 0));
        table
    }

    /// Kicks the device if something was submitted since the last call and the device asked to be told
    /// (virtio 1.2, 2.7.10.1).
    ///
    /// # Errors
    /// [`RingError`].
    pub(super) fn kick_if_wanted(&mut self) -> Result<(), RingError> {
        if self.kicked_idx == self.avail_idx {
            return Ok(());
        }
        // The device stores its event before it looks at our index; we stored the index before we look at its event.
        fence(Ordering::SeqCst);
        let event_at = self.base + self.shape.used() + 4 + u64::from(self.shape.entries()) * 8;
        let event = u16::from_le(self.memory.map.load(GuestAddress(event_at), Ordering::Relaxed)?);
        let wanted =
            self.avail_idx.wrapping_sub(event).wrapping_sub(1) < self.avail_idx.wrapping_sub(self.kicked_idx);
        self.kicked_idx = self.avail_idx;
        if wanted { self.kick.write(1).map_err(RingError::Kick) } else { Ok(()) }
    }

    /// The next answer: slot and status.
    ///
    /// # Errors
    /// [`RingError`]; the queue is of no use any more.
    pub(super) fn next_used(&mut self) -> Result<Option<(u16, u8)>, RingError> {
        let used = self.base + self.shape.used();
        if u16::from_le(self.memory.map.load(GuestAddress(used + 2), Ordering::Acquire)?) == self.seen_used {
            return Ok(None);
        }
        let mut head = [0; 4];
        self.memory.get(used + 4 + u64::from(self.seen_used % self.shape.entries()) * 8, &mut head)?;
        let head = u32::from_le_bytes(head);
        let slot = u16::try_from(head).ok().filter(|slot| self.in_flight.get(usize::from(*slot)) == Some(&true));
        let Some(slot) = slot else { return Err(RingError::Head { head }) };
        let mut status = [NO_STATUS];
        self.memory.get(self.slot_at(slot) + STATUS_AT, &mut status)?;
        self.in_flight[usize::from(slot)] = false;
        self.seen_used = self.seen_used.wrapping_add(1);
        Ok(Some((slot, status[0])))
    }

    /// Asks for an interrupt at the next answer. True if there is one already: then there may be no interrupt for it.
    ///
    /// # Errors
    /// [`RingError::Memory`].
    pub(super) fn arm(&self) -> Result<bool, RingError> {
        let event_at = self.base + self.shape.avail() + 4 + u64::from(self.shape.entries()) * 2;
        self.memory.map.store(self.seen_used.to_le(), GuestAddress(event_at), Ordering::Relaxed)?;
        fence(Ordering::SeqCst);
        let used_idx = GuestAddress(self.base + self.shape.used() + 2);
        Ok(u16::from_le(self.memory.map.load(used_idx, Ordering::Acquire)?) != self.seen_used)
    }
}

/// A descriptor as it lies in memory (virtio 1.2, 2.7.5).
fn descriptor(at: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut out = [0; 16];
    out[..8].copy_from_slice(&at.to_le_bytes());
    out[8..12].copy_from_slice(&len.to_le_bytes());
    out[12..14].copy_from_slice(&flags.to_le_bytes());
    out[14..].copy_from_slice(&next.to_le_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: QueueShape = QueueShape { slots: 3, data_bytes: PAGE };

    fn ring() -> Ring {
        let memory = Arc::new(SharedMemory::new(2 * SHAPE.bytes()).expect("memory"));
        Ring::new(memory, SHAPE, 1).expect("a ring")
    }

    /// The device's side: answers a head.
    fn answer(ring: &Ring, nth: u16, head: u32) {
        let used = ring.base + SHAPE.used();
        ring.memory.put(used + 4 + u64::from(nth % SHAPE.entries()) * 8, &head.to_le_bytes()).expect("inside");
        ring.memory.map.store(nth.wrapping_add(1), GuestAddress(used + 2), Ordering::Release).expect("inside");
    }

    fn set_status(ring: &Ring, slot: u16, status: u8) {
        ring.memory.put(ring.slot_at(slot) + STATUS_AT, &[status]).expect("inside");
    }

    #[test]
    fn parts_of_a_queue_do_not_overlap() {
        for slots in [1, 3, 128, 129, ENTRIES_MAX] {
            let shape = QueueShape { slots, data_bytes: PAGE };
            let entries = u64::from(shape.entries());
            assert!(entries >= u64::from(slots) && entries <= u64::from(ENTRIES_MAX));
            assert!(shape.avail() >= 16 * entries && shape.used() >= shape.avail() + 6 + 2 * entries);
            assert!(shape.first_slot() >= shape.used() + 6 + 8 * entries);
            assert!(shape.first_data() >= shape.first_slot() + u64::from(slots) * SLOT_BYTES);
            assert_eq!((shape.used() % 4, shape.first_data() % PAGE, shape.bytes() % PAGE), (0, 0, 0));
        }
    }

    #[test]
    fn answers_come_in_the_devices_order_and_indices_wrap() {
        let mut ring = ring();
        for round in 0..40_000_u32 {
            let (first, second) = (0, 2);
            ring.submit(first, Request::Write(4096), 8).expect("submitted");
            ring.submit(second, Request::Read(512), 16).expect("submitted");
            assert!(ring.next_used().expect("well").is_none());
            let nth = u16::try_from(round * 2 % 0x1_0000).expect("16 bits");
            set_status(&ring, second, 0);
            answer(&ring, nth, 2);
            answer(&ring, nth.wrapping_add(1), 0);
            assert_eq!(ring.next_used().expect("well"), Some((second, 0)));
            assert_eq!(ring.next_used().expect("well"), Some((first, NO_STATUS)), "no status was written");
            assert!(ring.next_used().expect("well").is_none() && ring.is_idle());
        }
    }

    #[test]
    fn a_device_that_answers_what_was_not_asked_is_refused() {
        for head in [1, 3, 70_000] {
            let mut ring = ring();
            ring.submit(0, Request::Flush, 0).expect("submitted");
            answer(&ring, 0, head);
            assert!(matches!(ring.next_used(), Err(RingError::Head { head: found }) if found == head));
        }
    }

    #[test]
    fn a_kick_is_sent_once_and_only_if_the_device_asked() {
        let mut ring = ring();
        let event = GuestAddress(ring.base + SHAPE.used() + 4 + u64::from(SHAPE.entries()) * 8);
        ring.submit(0, Request::Flush, 0).expect("submitted");
        ring.kick_if_wanted().expect("kicked");
        assert_eq!(ring.kick.read().expect("kicked"), 1);
        ring.kick_if_wanted().expect("nothing new");
        // The device has seen one request and asks for no more notice until it has seen the second.
        ring.submit(1, Request::Flush, 0).expect("submitted");
        ring.memory.map.store(0_u16, event, Ordering::SeqCst).expect("inside");
        ring.kick_if_wanted().expect("not wanted");
        assert!(ring.kick.read().is_err());
        ring.memory.map.store(2_u16, event, Ordering::SeqCst).expect("inside");
        ring.submit(2, Request::Flush, 0).expect("submitted");
        ring.kick_if_wanted().expect("kicked");
        assert_eq!(ring.kick.read().expect("kicked"), 1);
    }

    #[test]
    fn arming_tells_of_an_answer_that_is_there() {
        let mut ring = ring();
        ring.submit(1, Request::Flush, 0).expect("submitted");
        assert!(!ring.arm().expect("inside"));
        answer(&ring, 0, 1);
        assert!(ring.arm().expect("inside"));
        assert!(ring.next_used().expect("well").is_some());
        assert!(!ring.arm().expect("inside"));
    }
}
