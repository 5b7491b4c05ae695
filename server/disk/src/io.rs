//! System calls that std does not offer, and the io_uring ring: the one file of this crate with unsafe code.
//!
//! Called by `data_file`, `data_dir` and `log_file`. Invariant: memory handed to the kernel outlives the operation. The
//! ring therefore owns the buffer of the write in flight; dropping the ring waits for the kernel to let go of it.
//! Deliberately absent: more than one write in flight, because the log needs exactly one.
#![allow(unsafe_code)]

use crate::aligned::AlignedBuf;
use io_uring::{IoUring, opcode, types};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use tokio::io::unix::AsyncFd;

fn offset_of(value: u64) -> io::Result<libc::off64_t> {
    libc::off64_t::try_from(value).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// Frees the blocks of `[offset, offset + len)`; the range then reads as zeros and the file keeps its size.
pub(crate) fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: fallocate takes no pointers; the descriptor is open for the life of `file`.
    let rc = unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset_of(offset)?, offset_of(len)?) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Starts writing back the dirty pages of a range and does not wait. Says nothing about durability.
pub(crate) fn start_writeback(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let flags = libc::SYNC_FILE_RANGE_WRITE;
    // SAFETY: sync_file_range takes no pointers; the descriptor is open for the life of `file`.
    let rc = unsafe { libc::sync_file_range(file.as_raw_fd(), offset_of(offset)?, offset_of(len)?, flags) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads what the page cache holds; `WouldBlock` when the first byte is not there. May be short.
pub(crate) fn read_at_nowait(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: the iovec describes `buf`, which is borrowed exclusively until the call returns.
    let rc = unsafe { libc::preadv2(file.as_raw_fd(), &raw const iov, 1, offset_of(offset)?, libc::RWF_NOWAIT) };
    usize::try_from(rc).map_err(|_| io::Error::last_os_error())
}

/// `(total, available to us)` bytes of the file system that holds `path`.
pub(crate) fn file_system_bytes(path: &Path) -> io::Result<(u64, u64)> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut out = std::mem::MaybeUninit::<libc::statvfs64>::zeroed();
    // SAFETY: `path` is NUL-terminated and `out` is writable for the size of the struct.
    let rc = unsafe { libc::statvfs64(path.as_ptr(), out.as_mut_ptr()) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the struct holds integers only, was zeroed, and the call has succeeded.
    let stat = unsafe { out.assume_init() };
    Ok((stat.f_blocks.saturating_mul(stat.f_frsize), stat.f_bavail.saturating_mul(stat.f_frsize)))
}

/// One io_uring with an eventfd that tokio watches. Takes one write at a time.
pub(crate) struct Ring {
    ring: IoUring,
    event: AsyncFd<File>,
    /// The buffer the kernel may be reading from. `Some` while a write is in flight.
    in_flight: Option<AlignedBuf>,
}

impl Ring {
    /// Sets up a ring; must be called inside a tokio runtime with IO enabled.
    pub(crate) fn new() -> io::Result<Self> {
        let ring = IoUring::new(4)?;
        // SAFETY: eventfd takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just returned to us and nobody else owns it.
        let event = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        // SAFETY: the `File` owns a valid descriptor that is neither replaced nor closed while `AsyncFd` owns it.
        let event = unsafe { AsyncFd::register(event) }?;
        Ok(Self { ring, event, in_flight: None })
    }

    /// Writes `buf` at `offset` and makes it durable (`RWF_DSYNC`); gives the number of bytes written and the buffer back.
    ///
    /// Not cancellation-safe: when the future is dropped the write may or may not happen; the ring keeps the buffer and
    /// waits for the kernel in the next call or when dropped.
    pub(crate) async fn write(&mut self, file: &File, offset: u64, buf: AlignedBuf) -> (io::Result<usize>, AlignedBuf) {
        self.drain();
        let len = match u32::try_from(buf.len()) {
            Ok(len) => len,
            Err(_) => return (Err(io::Error::from(io::ErrorKind::InvalidInput)), buf),
        };
        let entry = opcode::Write::new(types::Fd(file.as_raw_fd()), buf.as_ptr(), len)
            .offset(offset)
            .rw_flags(libc::RWF_DSYNC)
            .build();
        self.in_flight = Some(buf);
        // SAFETY: the entry points into the heap memory of the buffer that `in_flight` now owns; it is neither moved
        // nor freed before its completion was seen, here or in `drain`. The kernel holds its own reference to the file.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        let submitted = match pushed {
            Ok(()) => self.ring.submit().map(|_| ()),
            Err(_) => Err(io::Error::other("submission queue is full")),
        };
        let result = match submitted {
            Ok(()) => self.completion().await,
            // Whether the kernel took the entry is unknown: the buffer stays with the ring and the file is poisoned.
            Err(e) => return (Err(e), AlignedBuf::with_capacity(0)),
        };
        match (result, self.in_flight.take()) {
            (Ok(rc), Some(buf)) if rc >= 0 => (Ok(usize::try_from(rc).unwrap_or(0)), buf),
            (Ok(rc), Some(buf)) => (Err(io::Error::from_raw_os_error(-rc)), buf),
            (Err(e), buf) => {
                self.in_flight = buf;
                (Err(e), AlignedBuf::with_capacity(0))
            }
            (Ok(_), None) => (Err(io::Error::other("completion without a write")), AlignedBuf::with_capacity(0)),
        }
    }

    async fn completion(&mut self) -> io::Result<i32> {
        loop {
            if let Some(done) = self.ring.completion().next() {
                return Ok(done.result());
            }
            let mut ready = self.event.readable().await?;
            // Empties the eventfd. A completion that comes from here on makes it readable anew, and one that came
            // before is found at the top of the loop.
            let _ = self.event.get_ref().read(&mut [0u8; 8]);
            ready.clear_ready();
        }
    }

    /// Waits for a write that was abandoned, so that its buffer may be freed.
    fn drain(&mut self) {
        while self.in_flight.is_some() {
            if self.ring.completion().next().is_some() {
                self.in_flight = None;
            } else if let Err(e) = self.ring.submit_and_wait(1)
                && e.kind() != io::ErrorKind::Interrupted
            {
                // The kernel may still use the memory and cannot be asked: it is leaked rather than freed.
                std::mem::forget(self.in_flight.take());
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.drain();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    fn direct_file(pages: usize) -> (tempfile::TempDir, File) {
        let temp = tempfile::tempdir().expect("temp dir");
        let path = temp.path().join("x");
        std::fs::write(&path, vec![0u8; pages * crate::ALIGN]).expect("create");
        let file = std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path);
        (temp, file.expect("direct IO"))
    }

    fn page(fill: u8, pages: usize) -> AlignedBuf {
        let mut buf = AlignedBuf::with_capacity(pages * crate::ALIGN);
        buf.extend(&vec![fill; pages * crate::ALIGN]);
        buf
    }

    #[tokio::test]
    async fn the_ring_writes_and_reports_errors() {
        let (_temp, file) = direct_file(8);
        let mut ring = Ring::new().expect("ring");
        for i in 0..8u8 {
            let (result, buf) = ring.write(&file, u64::from(i) * 4096, page(i + 1, 1)).await;
            assert_eq!(result.expect("write"), 4096);
            assert_eq!(buf[..], [i + 1; 4096]);
        }
        let mut found = page(0, 8);
        file.read_exact_at(&mut found, 0).expect("read");
        assert!((0..8u8).all(|i| found[usize::from(i) * 4096..][..4096] == [i + 1; 4096]));
        let read_only = File::open(_temp.path().join("x")).expect("open");
        let (result, buf) = ring.write(&read_only, 0, page(9, 1)).await;
        assert_eq!(result.expect_err("not writable").raw_os_error(), Some(libc::EBADF));
        assert_eq!(buf.len(), 4096, "the buffer comes back from a failed write");
    }

    #[tokio::test]
    async fn an_abandoned_write_is_waited_for() {
        let (_temp, file) = direct_file(256);
        let mut ring = Ring::new().expect("ring");
        for fill in 1..20u8 {
            {
                let mut write = std::pin::pin!(ring.write(&file, 0, page(fill, 256)));
                // One poll submits; then the future is dropped.
                std::future::poll_fn(|cx| {
                    let _ = write.as_mut().poll(cx);
                    std::task::Poll::Ready(())
                })
                .await;
            }
            // The next write must not meet the completion of the abandoned one.
            let (result, _) = ring.write(&file, 4096, page(fill + 100, 1)).await;
            assert_eq!(result.expect("write"), 4096);
            let mut found = page(0, 3);
            file.read_exact_at(&mut found, 0).expect("read");
            assert_eq!((found[0], found[4096], found[8192]), (fill, fill + 100, fill));
        }
        {
            let mut write = std::pin::pin!(ring.write(&file, 0, page(77, 256)));
            std::future::poll_fn(|cx| {
                let _ = write.as_mut().poll(cx);
                std::task::Poll::Ready(())
            })
            .await;
        }
        drop(ring);
        let mut found = page(0, 256);
        file.read_exact_at(&mut found, 0).expect("read");
        assert!(found.iter().all(|b| *b == 77), "dropping the ring waits for the kernel");
    }

    #[test]
    fn nowait_declines_what_is_not_cached() {
        let temp = tempfile::tempdir().expect("temp dir");
        let path = temp.path().join("x");
        std::fs::write(&path, vec![7u8; 1 << 20]).expect("create");
        let file = File::open(&path).expect("open");
        file.sync_all().expect("flush");
        let mut buf = [0u8; 4096];
        assert_eq!(read_at_nowait(&file, &mut buf, 8192).expect("cached"), 4096);
        assert_eq!(buf, [7; 4096]);
        // SAFETY: posix_fadvise takes no pointers.
        let rc = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        assert_eq!(rc, 0);
        let e = read_at_nowait(&file, &mut buf, 8192).expect_err("not cached");
        assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
    }
}
