//! The shared memory in which a back end notes which requests it has taken and not yet answered (vhost-user
//! specification, "Inflight I/O tracking", split virtqueue). The front end keeps it while the back end is dead.
//!
//! Called by the protocol handler (create, map) and by the loop of each queue (everything else). One record per queue:
//!
//! | bytes | field | meaning |
//! | --- | --- | --- |
//! | 0..8 | features | 0 |
//! | 8..10 | version | 1; 0 in memory that no back end has set up |
//! | 10..12 | desc_num | entries that follow |
//! | 12..14 | last_batch_head | the head that was answered last |
//! | 14..16 | used_idx | index of the used ring up to which the entries are right |
//! | 16 + 16 n | inflight (u8), 5 bytes free, next (u16), counter (u64) | entry of the chain with head n |
//!
//! Invariants:
//! - A chain is noted before its request runs, in the order of the available ring. So "used index plus entries noted" is
//!   how far the dead back end had got in the available ring, and chains that it had read but not noted were not run.
//! - Chains are answered one at a time: `next` and `last_batch_head`, used ring, `inflight = 0`, `used_idx`. A back end
//!   that dies between the second and the third step leaves `used_idx` behind the used ring; [`QueueRecord::recover`]
//!   then clears the one entry that is answered already.
//! - Each store is a release: who sees a later one sees the earlier ones. A killed process cannot undo any of them.
//! - The memory is only mapped when its file cannot shrink (sealed), so reading it never raises SIGBUS. What is in it is
//!   not believed: heads are below `desc_num`, and a list in it is followed for at most `desc_num` steps.

use ogee_common::limits::{VHOST_QUEUE_SIZE_MAX, VHOST_QUEUES_MAX};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vhost::vhost_user::message::VhostUserInflight;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{AtomicAccess, Bytes, FileOffset, MmapRegion, VolatileMemory};

/// Bytes of a record's header.
const HEADER_BYTES: usize = 16;
/// Bytes of one entry.
const ENTRY_BYTES: usize = 16;
/// Records start at multiples of this: each has cache lines of its own.
const RECORD_ALIGN: usize = 64;
/// The layout above.
const VERSION: u16 = 1;
const VERSION_AT: usize = 8;
const DESC_NUM_AT: usize = 10;
const LAST_BATCH_HEAD_AT: usize = 12;
const USED_IDX_AT: usize = 14;
const NEXT_AT: usize = 6;
const COUNTER_AT: usize = 8;

/// Why shared in-flight memory cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InflightError {
    /// Numbers that this back end cannot have.
    #[error("in-flight memory for {num_queues} queues of {queue_size} entries: at most {VHOST_QUEUES_MAX} of {VHOST_QUEUE_SIZE_MAX}")]
    Shape { num_queues: u16, queue_size: u16 },
    /// A size other than the layout has.
    #[error("in-flight memory of {mmap_size} bytes: must have {expected}")]
    Size { mmap_size: u64, expected: usize },
    /// Not made by this back end: it could shrink while mapped.
    #[error("in-flight memory is not sealed against shrinking")]
    NotSealed,
    /// The mapping would reach beyond the end of the file.
    #[error("in-flight memory of {expected} bytes at {mmap_offset}: its file has {file_len}")]
    Short { mmap_offset: u64, expected: usize, file_len: u64 },
    /// Another layout.
    #[error("in-flight memory has version {version} and {desc_num} entries a queue: version {VERSION} and {queue_size} wanted")]
    Layout { version: u16, desc_num: u16, queue_size: u16 },
    /// A system call on the memory's file.
    #[error("{verb} in-flight memory")]
    Io {
        verb: &'static str,
        #[source]
        source: io::Error,
    },
    /// The mapping.
    #[error("map in-flight memory")]
    Map(#[source] MmapRegionError),
}

fn failed(verb: &'static str) -> impl FnOnce(rustix::io::Errno) -> InflightError {
    move |errno| InflightError::Io { verb, source: errno.into() }
}

/// Bytes of one queue's record.
fn record_bytes(queue_size: u16) -> usize {
    (HEADER_BYTES + ENTRY_BYTES * usize::from(queue_size)).next_multiple_of(RECORD_ALIGN)
}

/// The records of all queues of a device.
#[derive(Debug, Clone)]
pub(crate) struct InflightArea {
    mapping: Arc<MmapRegion>,
    num_queues: u16,
    queue_size: u16,
}

impl InflightArea {
    /// New memory, all idle, for the front end to keep: the answer to GET_INFLIGHT_FD.
    ///
    /// # Errors
    /// Numbers out of range, or no memory or file descriptor.
    pub(crate) fn create(num_queues: u16, queue_size: u16) -> Result<(VhostUserInflight, File), InflightError> {
        let bytes = Self::bytes(num_queues, queue_size)?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("ogee-inflight", flags).map_err(failed("create"))?);
        file.set_len(bytes as u64).map_err(|source| InflightError::Io { verb: "size", source })?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).map_err(failed("seal"))?;
        let message = VhostUserInflight::new(bytes as u64, 0, num_queues, queue_size);
        let copy = file.try_clone().map_err(|source| InflightError::Io { verb: "duplicate", source })?;
        let area = Self::map_file(copy, &message, bytes)?;
        for index in 0..num_queues {
            let record = area.record_at(index);
            record.store(DESC_NUM_AT, queue_size);
            record.store(VERSION_AT, VERSION);
        }
        Ok((message, file))
    }

    /// Memory that the front end kept, perhaps from another process: SET_INFLIGHT_FD.
    ///
    /// # Errors
    /// It is not what [`InflightArea::create`] makes, or cannot be mapped.
    pub(crate) fn map(message: &VhostUserInflight, file: File) -> Result<Self, InflightError> {
        let (num_queues, queue_size) = (message.num_queues, message.queue_size);
        let expected = Self::bytes(num_queues, queue_size)?;
        if message.mmap_size != expected as u64 {
            return Err(InflightError::Size { mmap_size: message.mmap_size, expected });
        }
        if !fcntl_get_seals(&file).map_err(failed("check seals of"))?.contains(SealFlags::SHRINK) {
            return Err(InflightError::NotSealed);
        }
        // Mapping checks nothing of this, and access behind the end raises SIGBUS.
        let file_len = file.metadata().map_err(|source| InflightError::Io { verb: "measure", source })?.len();
        let mmap_offset = message.mmap_offset;
        if mmap_offset.checked_add(expected as u64).is_none_or(|end| end > file_len) {
            return Err(InflightError::Short { mmap_offset, expected, file_len });
        }
        let area = Self::map_file(file, message, expected)?;
        for index in 0..num_queues {
            let record = area.record_at(index);
            let (version, desc_num) = (record.load(VERSION_AT), record.load(DESC_NUM_AT));
            if version != VERSION || desc_num != queue_size {
                return Err(InflightError::Layout { version, desc_num, queue_size });
            }
        }
        Ok(area)
    }

    fn bytes(num_queues: u16, queue_size: u16) -> Result<usize, InflightError> {
        if !(1..=VHOST_QUEUES_MAX).contains(&num_queues) || !(1..=VHOST_QUEUE_SIZE_MAX).contains(&queue_size) {
            return Err(InflightError::Shape { num_queues, queue_size });
        }
        Ok(usize::from(num_queues) * record_bytes(queue_size))
    }

    fn map_file(file: File, message: &VhostUserInflight, bytes: usize) -> Result<Self, InflightError> {
        let mapping = MmapRegion::from_file(FileOffset::new(file, message.mmap_offset), bytes);
        let mapping = Arc::new(mapping.map_err(InflightError::Map)?);
        Ok(Self { mapping, num_queues: message.num_queues, queue_size: message.queue_size })
    }

    fn record_at(&self, index: u16) -> QueueRecord {
        let at = usize::from(index) * record_bytes(self.queue_size);
        QueueRecord { mapping: Arc::clone(&self.mapping), at, entries: self.queue_size, counter: 0 }
    }

    /// What it is and its file, for another process.
    pub(crate) fn source(&self) -> Option<(VhostUserInflight, &File)> {
        let at = self.mapping.file_offset()?;
        Some((VhostUserInflight::new(self.mapping.size() as u64, at.start(), self.num_queues, self.queue_size), at.file()))
    }

    /// The record of one queue; `None` if the memory was made for fewer.
    pub(crate) fn record(&self, index: usize) -> Option<QueueRecord> {
        u16::try_from(index).ok().filter(|index| *index < self.num_queues).map(|index| self.record_at(index))
    }
}

/// The record of one queue. At most one thread at a time writes it.
#[derive(Debug)]
pub(crate) struct QueueRecord {
    mapping: Arc<MmapRegion>,
    at: usize,
    entries: u16,
    /// Number that the next chain gets.
    counter: u64,
}

impl QueueRecord {
    /// Chains that can be noted.
    pub(crate) fn entries(&self) -> u16 {
        self.entries
    }

    /// What a back end before this one left, when the used ring stands at `used_idx`: the heads to be submitted again, in
    /// the order in which they were taken. Afterwards the record is in step with the ring; a second call gives the same.
    pub(crate) fn recover(&mut self, used_idx: u16) -> Vec<u16> {
        let mut answered = used_idx.wrapping_sub(self.load(USED_IDX_AT)).min(self.entries);
        let mut head: u16 = self.load(LAST_BATCH_HEAD_AT);
        while answered > 0 && head < self.entries {
            self.store(self.entry(head), 0_u8);
            head = self.load(self.entry(head) + NEXT_AT);
            answered -= 1;
        }
        self.store(USED_IDX_AT, used_idx);
        let noted = |head: &u16| self.load::<u8>(self.entry(*head)) != 0;
        let mut left: Vec<(u64, u16)> =
            (0..self.entries).filter(noted).map(|head| (self.load(self.entry(head) + COUNTER_AT), head)).collect();
        left.sort_unstable();
        self.counter = left.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        left.into_iter().map(|(_, head)| head).collect()
    }

    /// Notes that a chain was taken; before its request runs. A head that no ring has is left out: it cannot be answered.
    pub(crate) fn taken(&mut self, head: u16) {
        if head < self.entries {
            let entry = self.entry(head);
            self.store(entry + COUNTER_AT, self.counter);
            self.counter = self.counter.wrapping_add(1);
            self.store(entry, 1_u8);
        }
    }

    /// The chain is about to be put into the used ring.
    pub(crate) fn answering(&mut self, head: u16) {
        if head < self.entries {
            self.store(self.entry(head) + NEXT_AT, self.load::<u16>(LAST_BATCH_HEAD_AT));
            self.store(LAST_BATCH_HEAD_AT, head);
        }
    }

    /// The chain is in the used ring, which now stands at `used_idx`.
    pub(crate) fn answered(&mut self, head: u16, used_idx: u16) {
        if head < self.entries {
            self.store(self.entry(head), 0_u8);
        }
        self.store(USED_IDX_AT, used_idx);
    }

    fn entry(&self, head: u16) -> usize {
        HEADER_BYTES + ENTRY_BYTES * usize::from(head)
    }

    fn load<T: AtomicAccess>(&self, at: usize) -> T {
        let value = self.mapping.as_volatile_slice().load(self.at + at, Ordering::Acquire);
        value.expect("records are aligned and inside of the mapping, whose size was checked")
    }

    fn store<T: AtomicAccess>(&self, at: usize, value: T) {
        let stored = self.mapping.as_volatile_slice().store(value, self.at + at, Ordering::Release);
        stored.expect("records are aligned and inside of the mapping, whose size was checked");
    }
}

#[cfg(test)]
mod tests;
