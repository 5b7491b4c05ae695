//! [`DataDir`]: a directory with one owner. Used by the chunkserver and the MDS for everything they keep.
//!
//! Invariants: at most one live `DataDir` per directory in the machine (a lock on the file `LOCK`); a small file is
//! either its old or its new content, whole, whatever happens ([`DataDir::write_small`]); every name that was created,
//! renamed or removed is durable when the function returns. Deliberately absent: what the files mean.

use crate::data_file::{DataCounters, DataFile};
use crate::error::{DiskError, DiskErrorKind};
use crate::fault::{self, DiskOp, FaultPlan, Faults};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Name of the lock file.
const LOCK_NAME: &str = "LOCK";

/// How long [`DataDir::open`] waits for a former owner: 300 times 10 ms. A killed process lets go when the kernel has taken it apart.
const LOCK_ATTEMPTS: u32 = 300;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

fn take(lock: &File, op: &'static str, path: &Path) -> Result<(), DiskError> {
    for _ in 0..LOCK_ATTEMPTS {
        match lock.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_PAUSE),
            Err(TryLockError::Error(e)) => return Err(DiskError::new(op, path, e)),
        }
    }
    Err(DiskError::with_kind(DiskErrorKind::Locked, op, path, io::Error::from(io::ErrorKind::WouldBlock)))
}

/// Size and room of a file system, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskUsage {
    /// Size of the file system.
    pub total_bytes: u64,
    /// What an unprivileged process may still allocate.
    pub free_bytes: u64,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    _lock: File,
    counters: Arc<DataCounters>,
}

/// A locked directory. Clones share the lock; the last one dropped releases it.
#[derive(Debug, Clone)]
pub struct DataDir {
    inner: Arc<Inner>,
    faults: Faults,
}

impl DataDir {
    /// Opens a directory, creating it and its parents, and takes its lock.
    ///
    /// # Errors
    /// `Locked` when another owner lives; `NoSpace`, `Io`.
    pub fn open(root: &Path) -> Result<Self, DiskError> {
        Self::open_with_faults(root, crate::simulated::faults())
    }

    /// As [`DataDir::open`], with a plan of failures for tests.
    ///
    /// # Errors
    /// As [`DataDir::open`].
    pub fn open_with_faults(root: &Path, plan: Option<Arc<FaultPlan>>) -> Result<Self, DiskError> {
        let op = "open data directory";
        create_dirs(root).map_err(|e| DiskError::new(op, root, e))?;
        let path = root.join(LOCK_NAME);
        let options = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let lock = options.map_err(|e| DiskError::new(op, &path, e))?;
        take(&lock, op, &path)?;
        Ok(Self { inner: Arc::new(Inner { root: root.to_owned(), _lock: lock, counters: Arc::default() }), faults: plan })
    }

    /// The absolute or given path of a name in the directory; an empty name is the directory itself.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.inner.root.clone() } else { self.inner.root.join(name) }
    }

    /// What was done to its data files, for metrics.
    #[must_use]
    pub fn data_counters(&self) -> &DataCounters {
        &self.inner.counters
    }

    pub(crate) const fn faults(&self) -> &Faults {
        &self.faults
    }

    /// Creates a subdirectory and its parents if missing, durably.
    ///
    /// # Errors
    /// `NoSpace`, `Io`.
    pub fn create_dir(&self, name: &str) -> Result<(), DiskError> {
        let path = self.path(name);
        let op = "create directory";
        fault::check(&self.faults, DiskOp::Create, op, &path)?;
        create_dirs(&path).map_err(|e| DiskError::new(op, &path, e))
    }

    /// Names in a subdirectory (empty: the directory itself), sorted; the lock file is left out.
    ///
    /// # Errors
    /// `NotFound`, `Io`.
    pub fn list(&self, name: &str) -> Result<Vec<String>, DiskError> {
        let path = self.path(name);
        let fail = |e| DiskError::new("list directory", &path, e);
        let mut names = vec![];
        for entry in fs::read_dir(&path).map_err(fail)? {
            let file_name = entry.map_err(fail)?.file_name();
            if let Some(n) = file_name.to_str()
                && n != LOCK_NAME
            {
                names.push(n.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Replaces a small file whole: temporary file, flush, rename, flush of the directory. Blocks for two flushes.
    ///
    /// # Errors
    /// `NoSpace`, `Io`. The old content is then still there, or (after a failed directory flush) one of both.
    pub fn write_small(&self, name: &str, bytes: &[u8]) -> Result<(), DiskError> {
        let path = self.path(name);
        let temp = self.path(&format!("{name}.new"));
        let op = "replace file";
        fault::check(&self.faults, DiskOp::Write, op, &path)?;
        let write = || {
            let mut file = File::create(&temp)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(|e| DiskError::new(op, &path, e))?;
        fault::check(&self.faults, DiskOp::Rename, op, &path)?;
        fs::rename(&temp, &path).map_err(|e| DiskError::new(op, &path, e))?;
        self.sync_dir_of(name)
    }

    /// The content of a small file, `None` when there is none.
    ///
    /// # Errors
    /// `Corrupt` when it is longer than `max_bytes`; `Io`.
    pub fn read_small(&self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>, DiskError> {
        let path = self.path(name);
        let op = "read file";
        fault::check(&self.faults, DiskOp::Read, op, &path)?;
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(DiskError::new(op, &path, e)),
        };
        let mut bytes = vec![];
        file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(|e| DiskError::new(op, &path, e))?;
        if bytes.len() as u64 > max_bytes {
            let source = io::Error::from(io::ErrorKind::InvalidData);
            return Err(DiskError::with_kind(DiskErrorKind::Corrupt, op, &path, source));
        }
        Ok(Some(bytes))
    }

    /// Renames a file over `to`, durably. Both names lie in the same subdirectory.
    ///
    /// # Errors
    /// `NotFound`, `Io`.
    pub fn rename(&self, from: &str, to: &str) -> Result<(), DiskError> {
        let path = self.path(from);
        fault::check(&self.faults, DiskOp::Rename, "rename file", &path)?;
        fs::rename(&path, self.path(to)).map_err(|e| DiskError::new("rename file", &path, e))?;
        self.sync_dir_of(to)
    }

    /// Removes a file; a missing one is no error. The removal is durable after the next flush of the directory
    /// ([`DataDir::sync_dir_of`]), so that many can share one.
    ///
    /// # Errors
    /// `Io`.
    pub fn unlink(&self, name: &str) -> Result<(), DiskError> {
        let path = self.path(name);
        fault::check(&self.faults, DiskOp::Unlink, "remove file", &path)?;
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(DiskError::new("remove file", &path, e)),
            _ => Ok(()),
        }
    }

    /// Makes creations, renames and removals in the directory that holds `name` durable. Blocks for a flush.
    ///
    /// # Errors
    /// `Io`.
    pub fn sync_dir_of(&self, name: &str) -> Result<(), DiskError> {
        let path = self.path(name);
        let dir = path.parent().unwrap_or(&path);
        fault::check(&self.faults, DiskOp::Sync, "flush directory", dir)?;
        sync_dir(dir).map_err(|e| DiskError::new("flush directory", dir, e))
    }

    /// Creates a data file; its name is durable only after [`DataDir::sync_dir_of`].
    ///
    /// # Errors
    /// `AlreadyExists`, `NoSpace`, `Io`.
    pub fn create_data(&self, name: &str) -> Result<DataFile, DiskError> {
        let path = self.path(name);
        let op = "create data file";
        fault::check(&self.faults, DiskOp::Create, op, &path)?;
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(|e| DiskError::new(op, &path, e))?;
        Ok(DataFile::new(file, path, self.faults.clone(), self.inner.counters.clone()))
    }

    /// Opens a data file.
    ///
    /// # Errors
    /// `NotFound`, `Io`.
    pub fn open_data(&self, name: &str) -> Result<DataFile, DiskError> {
        let path = self.path(name);
        let file = OpenOptions::new().read(true).write(true).open(&path);
        let file = file.map_err(|e| DiskError::new("open data file", &path, e))?;
        Ok(DataFile::new(file, path, self.faults.clone(), self.inner.counters.clone()))
    }

    /// Whether a file or folder is where it was: a directory that somebody deleted under a running process still takes writes,
    /// into files that nobody will find again.
    #[must_use]
    pub fn holds(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// Size and room of the file system.
    ///
    /// # Errors
    /// `Io`.
    pub fn usage(&self) -> Result<DiskUsage, DiskError> {
        if ogee_common::sim::running() {
            return Ok(DiskUsage { total_bytes: 1 << 40, free_bytes: 1 << 39 });
        }
        let root = &self.inner.root;
        let (total_bytes, free_bytes) =
            crate::io::file_system_bytes(root).map_err(|e| DiskError::new("stat file system", root, e))?;
        Ok(DiskUsage { total_bytes, free_bytes })
    }
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Creates missing directories from the top down, each made durable in its parent.
fn create_dirs(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    if let Some(parent) = parent {
        create_dirs(parent)?;
    }
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    sync_dir(parent.unwrap_or(Path::new(".")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Fault, FaultRule};

    #[test]
    fn a_directory_has_one_owner() {
        let temp = tempfile::tempdir().expect("temp dir");
        let root = temp.path().join("a/b");
        let first = DataDir::open(&root).expect("open");
        assert_eq!(DataDir::open(&root).expect_err("second owner").kind(), DiskErrorKind::Locked);
        drop(first);
        DataDir::open(&root).expect("open after release");
    }

    #[test]
    fn small_files_are_replaced_whole() {
        let temp = tempfile::tempdir().expect("temp dir");
        let plan = FaultPlan::new();
        let dir = DataDir::open_with_faults(temp.path(), Some(plan.clone())).expect("open");
        assert_eq!(dir.read_small("superblock", 100).expect("read"), None);
        dir.write_small("superblock", b"one").expect("write");
        let rule = |op, errno| FaultRule {
            op,
            path_contains: "superblock".into(),
            skip: 0,
            times: 1,
            fault: Fault::Errno(errno),
        };
        plan.add(rule(DiskOp::Rename, libc::EIO));
        assert_eq!(dir.write_small("superblock", b"two").expect_err("fault").kind(), DiskErrorKind::Io);
        plan.add(rule(DiskOp::Write, libc::ENOSPC));
        assert_eq!(dir.write_small("superblock", b"two").expect_err("fault").kind(), DiskErrorKind::NoSpace);
        assert_eq!(dir.read_small("superblock", 100).expect("read").as_deref(), Some(&b"one"[..]));
        dir.write_small("superblock", b"three").expect("write");
        assert_eq!(dir.read_small("superblock", 5).expect("read").as_deref(), Some(&b"three"[..]));
        assert_eq!(dir.read_small("superblock", 4).expect_err("too long").kind(), DiskErrorKind::Corrupt);
        assert_eq!(plan.struck(), 2);
    }

    #[test]
    fn names_come_and_go() {
        let temp = tempfile::tempdir().expect("temp dir");
        let dir = DataDir::open(temp.path()).expect("open");
        dir.create_dir("chunks/00").expect("mkdir");
        dir.create_data("chunks/00/x").expect("create");
        assert_eq!(dir.create_data("chunks/00/x").expect_err("exists").kind(), DiskErrorKind::AlreadyExists);
        assert_eq!(dir.open_data("chunks/00/y").expect_err("missing").kind(), DiskErrorKind::NotFound);
        dir.rename("chunks/00/x", "chunks/00/z").expect("rename");
        assert_eq!(dir.list("chunks/00").expect("list"), vec!["z"]);
        dir.unlink("chunks/00/z").expect("unlink");
        dir.unlink("chunks/00/z").expect("unlink is idempotent");
        assert!(dir.list("chunks/00").expect("list").is_empty());
        let usage = dir.usage().expect("usage");
        assert!(usage.free_bytes > 0 && usage.free_bytes <= usage.total_bytes);
    }
}
