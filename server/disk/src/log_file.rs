//! Log files: preallocated files that are overwritten in place with direct, durable writes. Used by the write-ahead log.
//!
//! [`LogWriter`] writes through io_uring from the calling tokio loop; where the kernel refuses io_uring, or the file
//! system refuses direct IO (tmpfs), it falls back to `pwrite` + `fdatasync` on the blocking pool, and says so once.
//! Invariants: a write is durable when it returns `Ok`, but for [`LogWriter::write_unflushed`]; a short write is an error; a file is locked while it is open,
//! and the lock lives until the kernel has finished its last write, so that a new process cannot read a log that an
//! old one is still writing. Deliberately absent: growing files; space is written once, by [`LogFile::create_zeroed`].

use crate::aligned::{ALIGN, AlignedBuf};
use crate::data_dir::DataDir;
use crate::error::{DiskError, DiskErrorKind};
use crate::fault::{self, DiskOp, Faults};
use crate::io::Ring;
use ogee_common::sim::{self, Canary};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long [`LogFile::open`] waits for a former owner: 1,000 times 10 ms. A killed process lets go as soon as the
/// device has answered its last write.
const LOCK_ATTEMPTS: u32 = 1000;
const LOCK_PAUSE: Duration = Duration::from_millis(10);
/// Bytes written at a time when a file is created.
const ZERO_STEP: usize = 1 << 20;

/// An open log file. Its size never changes.
#[derive(Debug)]
pub struct LogFile {
    file: File,
    direct: bool,
    bytes: u64,
    path: PathBuf,
    faults: Faults,
}

impl LogFile {
    /// Creates a file of `bytes` zeros (a multiple of [`ALIGN`]) and makes it and its name durable. Blocks for the
    /// time the device takes to write it. On failure nothing of the name is left.
    ///
    /// # Errors
    /// `NoSpace`, `AlreadyExists`, `Io`.
    pub fn create_zeroed(dir: &DataDir, name: &str, bytes: u64) -> Result<(), DiskError> {
        let path = dir.path(name);
        let op = "create log file";
        fault::check(dir.faults(), DiskOp::Create, op, &path)?;
        let file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(|e| DiskError::new(op, &path, e))?;
        let written = write_zeros(&file, bytes).map_err(|e| DiskError::new(op, &path, e));
        if written.is_err() {
            drop(file);
            // Best effort: the caller sees the first error, and an unfinished file is not a log file by its name.
            let _ = std::fs::remove_file(&path);
        }
        written?;
        dir.sync_dir_of(name)
    }

    /// Opens a file made by [`LogFile::create_zeroed`] and locks it, waiting up to ten seconds for a former owner.
    ///
    /// # Errors
    /// `NotFound`, `Locked`, `Io`.
    pub fn open(dir: &DataDir, name: &str) -> Result<Self, DiskError> {
        let path = dir.path(name);
        let op = "open log file";
        let fail = |e| DiskError::new(op, &path, e);
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let direct = options.clone().custom_flags(libc::O_DIRECT).open(&path);
        let (file, direct) = match direct {
            Ok(file) => (file, true),
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => (options.open(&path).map_err(fail)?, false),
            Err(e) => return Err(fail(e)),
        };
        lock(&file, &path)?;
        let bytes = file.metadata().map_err(fail)?.len();
        Ok(Self { file, direct, bytes, path, faults: dir.faults().clone() })
    }

    /// Size, bytes.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether writes bypass the page cache.
    #[must_use]
    pub const fn is_direct(&self) -> bool {
        self.direct
    }

    /// The path it was opened by; renaming does not change it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads `len` bytes at `offset`, both multiples of [`ALIGN`] and inside the file. Blocks.
    ///
    /// # Errors
    /// `Io`; `Corrupt` when the file is shorter.
    pub fn read(&self, offset: u64, len: usize) -> Result<AlignedBuf, DiskError> {
        let op = "read log file";
        fault::check(&self.faults, DiskOp::Read, op, &self.path)?;
        let mut buf = AlignedBuf::with_capacity(len);
        buf.set_len(len);
        self.file.read_exact_at(&mut buf, offset).map_err(|e| DiskError::new(op, &self.path, e))?;
        Ok(buf)
    }

    fn write_blocking(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.file.write_all_at(buf, offset)?;
        self.file.sync_data()
    }
}

fn lock(file: &File, path: &Path) -> Result<(), DiskError> {
    for _ in 0..LOCK_ATTEMPTS {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_PAUSE),
            Err(TryLockError::Error(e)) => return Err(DiskError::new("lock log file", path, e)),
        }
    }
    let source = io::Error::from(io::ErrorKind::WouldBlock);
    Err(DiskError::with_kind(DiskErrorKind::Locked, "lock log file", path, source))
}

fn write_zeros(file: &File, bytes: u64) -> io::Result<()> {
    let zeros = vec![0u8; ZERO_STEP];
    let mut at = 0;
    while at < bytes {
        let step = usize::try_from(bytes - at).unwrap_or(ZERO_STEP).min(ZERO_STEP);
        file.write_all_at(&zeros[..step], at)?;
        at += step as u64;
    }
    file.sync_all()
}

/// How log writes reach the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogEngine {
    /// io_uring with `RWF_DSYNC`; where it is refused, as `Blocking`.
    Auto,
    /// `pwrite` and `fdatasync` on the blocking pool.
    Blocking,
}

/// Writes log files, one write at a time.
pub struct LogWriter {
    ring: Option<Ring>,
    told: bool,
}

impl LogWriter {
    /// A writer for the calling tokio runtime, which must have IO enabled.
    #[must_use]
    pub fn new(engine: LogEngine) -> Self {
        let ring = match engine {
            LogEngine::Blocking => None,
            LogEngine::Auto if sim::running() => None,
            LogEngine::Auto => match Ring::new() {
                Ok(ring) => Some(ring),
                Err(e) => {
                    tracing::warn!(target: "controlpath", error = %e, "io_uring refused: the log uses pwrite and fdatasync");
                    None
                }
            },
        };
        Self { ring, told: false }
    }

    /// Whether writes to `file` go through io_uring.
    #[must_use]
    pub fn uses_ring(&self, file: &LogFile) -> bool {
        self.ring.is_some() && file.is_direct()
    }

    /// Writes `buf` (whole [`ALIGN`] units, at such an offset) and makes it durable; gives the buffer back, or a new
    /// one when the old one is lost to a failure. Not cancellation-safe: a dropped future leaves it unknown whether the
    /// bytes were written, but never frees memory the kernel uses.
    ///
    /// # Errors
    /// `Io` or `NoSpace`. Whatever the kind: what the file holds in this range is unknown, and the caller poisons the log.
    pub async fn write(&mut self, file: &Arc<LogFile>, offset: u64, buf: AlignedBuf) -> (Result<(), DiskError>, AlignedBuf) {
        let op = "write log file";
        assert!(buf.len().is_multiple_of(ALIGN) && offset.is_multiple_of(ALIGN as u64), "log writes are whole pages");
        assert!(offset + buf.len() as u64 <= file.bytes, "log files do not grow");
        match fault::check_write(&file.faults, op, &file.path) {
            Ok(None) => {}
            Ok(Some(torn)) => return (Err(write_torn(file, offset, &buf, torn)), buf),
            Err(e) => return (Err(e), buf),
        }
        match fault::check_late(&file.faults, DiskOp::Sync, op, &file.path) {
            Ok(None) => {}
            Ok(Some(late)) => tokio::time::sleep(late).await,
            Err(e) => return (Err(e), buf),
        }
        if !self.told {
            self.told = true;
            tracing::info!(target: "controlpath", path = %file.path.display(), ring = self.uses_ring(file), direct = file.direct, "log writer");
        }
        if sim::running() {
            return write_simulated(file, offset, buf).await;
        }
        match &mut self.ring {
            Some(ring) if file.direct => {
                let want = buf.len();
                let (result, buf) = ring.write(&file.file, offset, buf).await;
                let result = match result {
                    Ok(n) if n == want => Ok(()),
                    Ok(_) => Err(fault::short_write(op, &file.path)),
                    Err(e) => Err(DiskError::new(op, &file.path, e)),
                };
                (result, buf)
            }
            _ => write_on_pool(file, offset, buf).await,
        }
    }

    /// Writes `buf` as [`LogWriter::write`] does, but does not make it durable: a killed process leaves it, a power cut may take it or tear it.
    ///
    /// # Errors
    /// As for [`LogWriter::write`].
    pub async fn write_unflushed(&self, file: &Arc<LogFile>, offset: u64, buf: AlignedBuf) -> (Result<(), DiskError>, AlignedBuf) {
        let op = "write log file";
        assert!(buf.len().is_multiple_of(ALIGN) && offset.is_multiple_of(ALIGN as u64), "log writes are whole pages");
        assert!(offset + buf.len() as u64 <= file.bytes, "log files do not grow");
        match fault::check_write(&file.faults, op, &file.path) {
            Ok(None) => on_pool(file, buf, move |file, buf| file.file.write_all_at(buf, offset)).await,
            Ok(Some(torn)) => (Err(write_torn(file, offset, &buf, torn)), buf),
            Err(e) => (Err(e), buf),
        }
    }
}

/// A write takes time. Whoever is killed or loses power in between leaves the first part of it.
async fn write_simulated(file: &Arc<LogFile>, offset: u64, buf: AlignedBuf) -> (Result<(), DiskError>, AlignedBuf) {
    let fail = |e| DiskError::new("write log file", &file.path, e);
    let (time, share) = sim::log_write();
    if sim::planted(Canary::AckBeforeFlush) {
        let (late, copy) = (Arc::clone(file), buf.to_vec());
        tokio::spawn(async move {
            tokio::time::sleep(time).await;
            if let Err(error) = late.write_blocking(offset, &copy) {
                tracing::error!(%error, "write log file");
            }
        });
        return (Ok(()), buf);
    }
    let sectors = (0..buf.len() / 512).take_while(|i| (*i as f64) < share * (buf.len() / 512) as f64).count();
    let begun = file.file.write_all_at(&buf[..sectors * 512], offset);
    tokio::time::sleep(time).await;
    let result = begun.and_then(|()| file.write_blocking(offset, &buf)).map_err(fail);
    (result, buf)
}

async fn write_on_pool(file: &Arc<LogFile>, offset: u64, buf: AlignedBuf) -> (Result<(), DiskError>, AlignedBuf) {
    on_pool(file, buf, move |file, buf| file.write_blocking(offset, buf)).await
}

async fn on_pool(
    file: &Arc<LogFile>,
    buf: AlignedBuf,
    write: impl FnOnce(&LogFile, &[u8]) -> io::Result<()> + Send + 'static,
) -> (Result<(), DiskError>, AlignedBuf) {
    let owned = Arc::clone(file);
    let task = sim::spawn_blocking(move || (write(&owned, &buf), buf));
    match task.await {
        Ok((result, buf)) => (result.map_err(|e| DiskError::new("write log file", &file.path, e)), buf),
        Err(e) => {
            let e = DiskError::new("write log file", &file.path, io::Error::other(e));
            (Err(e), AlignedBuf::with_capacity(0))
        }
    }
}

fn write_torn(file: &LogFile, offset: u64, buf: &AlignedBuf, bytes: usize) -> DiskError {
    // Whole pages and then the rest, by sectors, as a device would tear it.
    let keep = (bytes.min(buf.len()) / 512) * 512;
    let mut torn = AlignedBuf::with_capacity(buf.len());
    torn.extend(&buf[..keep]);
    if keep > 0
        && let Err(e) = file.write_blocking(offset, &torn)
    {
        return DiskError::new("write log file", &file.path, e);
    }
    fault::short_write("write log file", &file.path)
}
