//! [`DataFile`]: one sparse file of a chunk version. Used by the chunk store.
//!
//! Writes go to the page cache and are durable only after [`DataFile::sync_data`]; the caller holds the log that
//! repeats them until then. Every function blocks its thread for as long as the page cache makes it wait, except
//! [`DataFile::read_at_nowait`]. Deliberately absent: locking and checksums; both are the chunk store's.

use crate::error::DiskError;
use crate::fault::{self, DiskOp, Faults};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What was done to the data files of a directory since it was opened. The counters only grow.
#[derive(Debug, Default)]
pub struct DataCounters {
    /// Bytes written, to the page cache first.
    pub written_bytes: AtomicU64,
    /// Calls that made a file durable.
    pub syncs: AtomicU64,
}

/// An open data file.
#[derive(Debug)]
pub struct DataFile {
    file: File,
    path: PathBuf,
    faults: Faults,
    counters: Arc<DataCounters>,
}

impl DataFile {
    pub(crate) const fn new(file: File, path: PathBuf, faults: Faults, counters: Arc<DataCounters>) -> Self {
        Self { file, path, faults, counters }
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn fail(&self, op: &'static str) -> impl Fn(io::Error) -> DiskError + '_ {
        move |e| DiskError::new(op, &self.path, e)
    }

    /// Fills `buf` from `offset`, bytes. Holes read as zeros.
    ///
    /// # Errors
    /// `Corrupt` beyond the end of the file; `Io`.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), DiskError> {
        let op = "read data file";
        fault::check(&self.faults, DiskOp::Read, op, &self.path)?;
        self.file.read_exact_at(buf, offset).map_err(self.fail(op))
    }

    /// As [`DataFile::read_at`], but never waits for the device: `Ok(false)` when a part of the range is not in the
    /// page cache; `buf` then holds anything.
    ///
    /// # Errors
    /// `Io`.
    pub fn read_at_nowait(&self, buf: &mut [u8], offset: u64) -> Result<bool, DiskError> {
        let op = "read data file";
        fault::check(&self.faults, DiskOp::Read, op, &self.path)?;
        match crate::io::read_at_nowait(&self.file, buf, offset) {
            Ok(n) => Ok(n == buf.len()),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Unsupported) => Ok(false),
            Err(e) => Err(self.fail(op)(e)),
        }
    }

    /// Writes `buf` at `offset` to the page cache.
    ///
    /// # Errors
    /// `NoSpace`, `Io`. A part of `buf` may have been written.
    pub fn write_at(&self, buf: &[u8], offset: u64) -> Result<(), DiskError> {
        let op = "write data file";
        fault::before_change(&self.faults, &self.file, &self.path, offset, buf.len() as u64).map_err(self.fail(op))?;
        if let Some(torn) = fault::check_write(&self.faults, op, &self.path)? {
            self.file.write_all_at(&buf[..torn.min(buf.len())], offset).map_err(self.fail(op))?;
            return Err(fault::short_write(op, &self.path));
        }
        self.file.write_all_at(buf, offset).map_err(self.fail(op))?;
        self.counters.written_bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Frees the blocks of a range; it reads as zeros afterwards.
    ///
    /// # Errors
    /// `Io`.
    pub fn punch_hole(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let op = "punch data file";
        fault::check(&self.faults, DiskOp::Punch, op, &self.path)?;
        fault::before_change(&self.faults, &self.file, &self.path, offset, len).map_err(self.fail(op))?;
        crate::io::punch_hole(&self.file, offset, len).map_err(self.fail(op))
    }

    /// Sets the size, bytes; what is added is a hole.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub fn set_size(&self, bytes: u64) -> Result<(), DiskError> {
        fault::check(&self.faults, DiskOp::Create, "size data file", &self.path)?;
        self.file.set_len(bytes).map_err(self.fail("size data file"))
    }

    /// Size, bytes.
    ///
    /// # Errors
    /// `Io`.
    pub fn size(&self) -> Result<u64, DiskError> {
        Ok(self.file.metadata().map_err(self.fail("stat data file"))?.len())
    }

    /// Bytes the file system has allocated for it.
    ///
    /// # Errors
    /// `Io`.
    pub fn allocated_bytes(&self) -> Result<u64, DiskError> {
        // st_blocks counts 512-byte units whatever the block size of the file system (stat(2)).
        Ok(self.file.metadata().map_err(self.fail("stat data file"))?.blocks() * 512)
    }

    /// Makes every earlier write, hole and size durable. Blocks for a flush.
    ///
    /// # Errors
    /// `Io`, `NoSpace`. What is durable is then unknown and stays so: a second call proves nothing, the caller poisons.
    pub fn sync_data(&self) -> Result<(), DiskError> {
        let op = "flush data file";
        fault::check(&self.faults, DiskOp::Sync, op, &self.path)?;
        self.file.sync_data().map_err(self.fail(op))?;
        self.counters.syncs.fetch_add(1, Ordering::Relaxed);
        fault::flushed(&self.faults, &self.path);
        Ok(())
    }

    /// Starts writing back a range and does not wait; makes nothing durable.
    ///
    /// # Errors
    /// `Io`.
    pub fn start_writeback(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        crate::io::start_writeback(&self.file, offset, len).map_err(self.fail("write back data file"))
    }
}

#[cfg(test)]
mod tests {
    use crate::error::DiskErrorKind;
    use crate::fault::{DiskOp, Fault, FaultPlan, FaultRule};
    use crate::{DataDir, DataFile};
    use std::sync::Arc;

    fn file(plan: Option<Arc<FaultPlan>>) -> (tempfile::TempDir, DataFile) {
        let temp = tempfile::tempdir().expect("temp dir");
        let dir = DataDir::open_with_faults(temp.path(), plan).expect("open");
        let file = dir.create_data("x").expect("create");
        (temp, file)
    }

    #[test]
    fn sparse_write_punch_and_read() {
        let (_temp, f) = file(None);
        f.set_size(16 << 20).expect("size");
        assert_eq!(f.size().expect("size"), 16 << 20);
        f.write_at(&[7; 16384], 8192).expect("write");
        f.start_writeback(8192, 16384).expect("write back");
        f.sync_data().expect("flush");
        assert_eq!(f.allocated_bytes().expect("stat"), 16384);
        let mut buf = [1u8; 4096];
        assert!(f.read_at_nowait(&mut buf, 8192).expect("read"), "a page just written is cached");
        assert_eq!(buf, [7; 4096]);
        f.punch_hole(8192, 8192).expect("punch");
        f.sync_data().expect("flush");
        assert_eq!(f.allocated_bytes().expect("stat"), 8192);
        f.read_at(&mut buf, 12288).expect("read");
        assert_eq!(buf, [0; 4096]);
        f.read_at(&mut buf, 16384).expect("read");
        assert_eq!(buf, [7; 4096]);
        assert_eq!(f.read_at(&mut buf, 16 << 20).expect_err("beyond the end").kind(), DiskErrorKind::Corrupt);
    }

    #[test]
    fn faults_strike_by_operation() {
        let plan = FaultPlan::new();
        let (_temp, f) = file(Some(plan.clone()));
        let rule = |op, fault| FaultRule { op, path_contains: String::new(), skip: 1, times: 1, fault };
        plan.add(rule(DiskOp::Write, Fault::Torn { bytes: 512 }));
        f.write_at(&[1; 4096], 0).expect("skipped");
        assert_eq!(f.write_at(&[2; 4096], 0).expect_err("torn").kind(), DiskErrorKind::Io);
        f.write_at(&[9; 1], 4096).expect("struck once");
        let mut buf = [0u8; 4096];
        f.read_at(&mut buf, 0).expect("read");
        assert_eq!((buf[511], buf[512]), (2, 1));
        plan.clear();
        plan.add(FaultRule { skip: 0, ..rule(DiskOp::Sync, Fault::Errno(libc::EIO)) });
        assert_eq!(f.sync_data().expect_err("fault").kind(), DiskErrorKind::Io);
        plan.add(FaultRule { skip: 0, ..rule(DiskOp::Write, Fault::Errno(libc::ENOSPC)) });
        assert_eq!(f.write_at(&[1; 1], 0).expect_err("fault").kind(), DiskErrorKind::NoSpace);
    }

    #[test]
    fn a_power_cut_keeps_some_unflushed_writes_of_each_page() {
        let plan = FaultPlan::new();
        plan.watch_power();
        let (temp, f) = file(Some(plan.clone()));
        f.set_size(1 << 20).expect("size");
        f.write_at(&[1; 8192], 0).expect("write");
        f.sync_data().expect("flush");
        f.write_at(&[2; 8192], 0).expect("write");
        f.write_at(&[3; 10], 4090).expect("write over a page bound");
        f.punch_hole(4096, 4096).expect("punch");
        // Page 0: of two writes one survives; page 1: of three none.
        let mut survive = |n: usize| if n == 2 { 1 } else { 0 };
        plan.power_cut(&mut survive).expect("cut");
        assert_eq!(f.write_at(&[9; 1], 0).expect_err("no power").kind(), DiskErrorKind::Io);
        drop(f);
        let dir = DataDir::open(temp.path()).expect("open");
        let mut buf = [0u8; 8192];
        dir.open_data("x").expect("open").read_at(&mut buf, 0).expect("read");
        assert_eq!(buf[..4096], [2; 4096]);
        assert_eq!(buf[4096..], [1; 4096]);
    }
}
