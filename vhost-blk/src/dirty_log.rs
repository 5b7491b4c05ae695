//! The dirty log of a live migration: memory of the front end with one bit for each page of guest memory, in which a back end notes what
//! it has written there, so that the front end sends that page once more (vhost-user specification, "Migration").
//!
//! | bytes | field |
//! | --- | --- |
//! | n / 8 | bit n % 8, lowest first: the page at guest-physical address n * 4,096 was written |
//!
//! Mapped by the protocol handler, marked by the loop of each queue. Invariants:
//! - A page is marked **after** it was written. The front end clears a bit and then reads the page: a mark made before the write could be
//!   cleared, and the page be read, too early. The mark is a read-modify-write even if the bit is set already: a load of the bit could
//!   overtake the write.
//! - Everything that a back end writes is marked: data and status of each answer, and the used ring with the words for notifications at
//!   both its ends. The ring is marked as a whole, because it has at most four pages.
//! - The memory is only mapped when its file cannot shrink (sealed), so marking never raises SIGBUS. Its size is the front end's word: a log
//!   that does not cover guest memory is refused, and a page beyond its end is left out (only a guest that points outside of its memory,
//!   or a front end that said a false address of its ring, has such pages).
//! - Without a log nothing is allocated and no shared memory is touched.
//!
//! When a log takes effect: `queue_phase.rs`.

use ogee_common::limits::VHOST_LOG_BYTES_MAX;
use rustix::fs::{SealFlags, fcntl_get_seals};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use vhost::vhost_user::message::VhostUserLog;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion, VolatileMemory,
};

/// Bytes of guest memory for each bit (`VHOST_LOG_PAGE`), whatever pages the host has.
const LOG_PAGE_BYTES: u64 = 4096;
/// Pages for each byte of the log.
const PAGES_PER_BYTE: u64 = 8;

/// Why a dirty log cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogError {
    /// Larger than any guest needs.
    #[error("dirty log of {bytes} bytes: at most {VHOST_LOG_BYTES_MAX}")]
    TooLarge { bytes: u64 },
    /// It could shrink while mapped.
    #[error("dirty log is not sealed against shrinking")]
    NotSealed,
    /// The mapping would reach beyond the end of the file.
    #[error("dirty log of {bytes} bytes at {offset}: its file has {file_len}")]
    Short { bytes: u64, offset: u64, file_len: u64 },
    /// Pages of guest memory without a bit.
    #[error("dirty log of {bytes} bytes does not cover guest memory")]
    DoesNotCover { bytes: u64 },
    /// A system call on the memory's file.
    #[error("{verb} dirty log")]
    Io {
        verb: &'static str,
        #[source]
        source: io::Error,
    },
    /// The mapping.
    #[error("map dirty log")]
    Map(#[source] MmapRegionError),
}

/// A mapped log.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    mapping: MmapRegion,
}

impl DirtyLog {
    /// Maps the memory of SET_LOG_BASE.
    ///
    /// # Errors
    /// It could shrink, is shorter than promised or larger than any guest needs, or cannot be mapped.
    pub(crate) fn map(message: &VhostUserLog, file: File) -> Result<Self, LogError> {
        let (bytes, offset) = (message.mmap_size, message.mmap_offset);
        let len = usize::try_from(bytes).ok().filter(|_| bytes <= VHOST_LOG_BYTES_MAX);
        let len = len.ok_or(LogError::TooLarge { bytes })?;
        // A file that is no memfd has no seals and answers EINVAL.
        let seals = fcntl_get_seals(&file).map_err(|_| LogError::NotSealed)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(LogError::NotSealed);
        }
        // Mapping checks nothing of this, and access behind the end raises SIGBUS.
        let file_len = file.metadata().map_err(|source| LogError::Io { verb: "measure", source })?.len();
        if offset.checked_add(bytes).is_none_or(|end| end > file_len) {
            return Err(LogError::Short { bytes, offset, file_len });
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, offset), len).map_err(LogError::Map)?;
        Ok(Self { mapping })
    }

    /// What it is and its file, for another process.
    pub(crate) fn source(&self) -> Option<(VhostUserLog, &File)> {
        let at = self.mapping.file_offset()?;
        Some((VhostUserLog::new(self.mapping.size() as u64, at.start()), at.file()))
    }

    /// Checks that every page of guest memory has its bit.
    ///
    /// # Errors
    /// [`LogError::DoesNotCover`].
    pub(crate) fn check_covers(&self, memory: &GuestMemoryMmap) -> Result<(), LogError> {
        let bytes = self.mapping.size() as u64;
        let covered = |region: &vm_memory::GuestRegionMmap| region.last_addr().0 / LOG_PAGE_BYTES / PAGES_PER_BYTE < bytes;
        if memory.iter().all(covered) { Ok(()) } else { Err(LogError::DoesNotCover { bytes }) }
    }

    /// Marks the pages of `len` bytes from `start` on, which were written.
    pub(crate) fn mark(&self, start: GuestAddress, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|rest| start.0.checked_add(rest)) else { return };
        let log = self.mapping.as_volatile_slice();
        for page in start.0 / LOG_PAGE_BYTES..=last / LOG_PAGE_BYTES {
            let byte = usize::try_from(page / PAGES_PER_BYTE).ok().and_then(|at| log.get_atomic_ref::<AtomicU8>(at).ok());
            let Some(byte) = byte else { return };
            byte.fetch_or(1 << (page % PAGES_PER_BYTE), Ordering::SeqCst);
        }
    }
}

/// What one queue marks, and where.
#[derive(Debug, Clone)]
pub(crate) struct QueueLog {
    pub(crate) log: Arc<DirtyLog>,
    /// Where the log has the used ring; `None`: the front end does not want it marked.
    pub(crate) used: Option<GuestAddress>,
}

impl QueueLog {
    /// The used ring, of so many entries, was written (virtio 1.2, 2.7.8: flags, index, entries, available event).
    pub(crate) fn mark_used(&self, entries: u16) {
        if let Some(used) = self.used {
            self.log.mark(used, 6 + 8 * u64::from(entries));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
    use std::os::unix::fs::FileExt;

    fn memfd(len: u64, seals: SealFlags) -> File {
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
        file.set_len(len).unwrap();
        fcntl_add_seals(&file, seals).unwrap();
        file
    }

    fn bytes(file: &File, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn bits_are_those_of_the_pages_touched_and_no_others() {
        let file = memfd(16, SealFlags::SHRINK);
        let log = DirtyLog::map(&VhostUserLog::new(16, 0), file.try_clone().unwrap()).unwrap();
        for (start, len) in [(0, 1), (4095, 2), (8 * 4096, 4096), (20 * 4096 + 5, 3 * 4096), (127 * 4096, 4096)] {
            log.mark(GuestAddress(start), len);
        }
        let mut expected = [0_u8; 16];
        for page in [0, 1, 8, 20, 21, 22, 23, 127] {
            expected[page / 8] |= 1 << (page % 8);
        }
        assert_eq!(bytes(&file, 16), expected);
        // Nothing, half outside, outside, around the end of all addresses.
        for (start, len) in [(40 * 4096, 0), (127 * 4096, 9 * 4096), (128 * 4096, 1), (u64::MAX, 2), (u64::MAX - 8, 8)] {
            log.mark(GuestAddress(start), len);
        }
        assert_eq!(bytes(&file, 16), expected);
    }

    #[test]
    fn the_used_ring_is_marked_where_the_front_end_has_it() {
        let file = memfd(16, SealFlags::SHRINK);
        let log = Arc::new(DirtyLog::map(&VhostUserLog::new(16, 0), file.try_clone().unwrap()).unwrap());
        QueueLog { log: Arc::clone(&log), used: None }.mark_used(1024);
        assert_eq!(bytes(&file, 16), [0; 16]);
        // 8,198 bytes from the last byte of page 7 on.
        QueueLog { log, used: Some(GuestAddress(8 * 4096 - 1)) }.mark_used(1024);
        let mut expected = [0_u8; 16];
        expected[0] = 0x80;
        expected[1] = 0x07;
        assert_eq!(bytes(&file, 16), expected);
    }

    #[test]
    fn what_could_raise_a_signal_or_miss_a_page_is_refused() {
        let refused = |message: (u64, u64), file: File| DirtyLog::map(&VhostUserLog::new(message.0, message.1), file).unwrap_err();
        assert!(matches!(refused((16, 0), memfd(16, SealFlags::GROW)), LogError::NotSealed));
        let plain = tempfile::tempfile().unwrap();
        plain.set_len(4096).unwrap();
        assert!(matches!(refused((16, 0), plain), LogError::NotSealed));
        for message in [(17, 0), (16, 4096), (16, u64::MAX - 8)] {
            assert!(matches!(refused(message, memfd(16, SealFlags::SHRINK)), LogError::Short { .. }), "{message:?}");
        }
        let large = refused((VHOST_LOG_BYTES_MAX + 1, 0), memfd(1 << 31, SealFlags::SHRINK));
        assert!(matches!(large, LogError::TooLarge { .. }));
        let log = DirtyLog::map(&VhostUserLog::new(16, 0), memfd(16, SealFlags::SHRINK)).unwrap();
        let memory = |len: usize| GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]).unwrap();
        log.check_covers(&memory(128 * 4096)).unwrap();
        assert!(matches!(log.check_covers(&memory(129 * 4096)), Err(LogError::DoesNotCover { bytes: 16 })));
    }
}
