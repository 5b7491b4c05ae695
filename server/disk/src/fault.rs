//! The fault seam: a plan of failures that a test hands to a [`crate::DataDir`]; every operation on it asks the plan.
//!
//! In production there is no plan and the question is one test of an `Option`. A rule matches by operation and by a
//! part of the path, lets `skip` operations pass, then strikes `times` times. Rules are asked in the order they were
//! added and the first that strikes decides. A plan that watches power ([`FaultPlan::watch_power`]) can also lose what was
//! not flushed ([`FaultPlan::power_cut`]).

use crate::error::DiskError;
use crate::power::Unflushed;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Operations that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOp {
    /// Create a file or directory, or reserve its space.
    Create,
    /// Read from a file.
    Read,
    /// Write to a file.
    Write,
    /// Make data durable.
    Sync,
    /// Punch a hole.
    Punch,
    /// Rename a file.
    Rename,
    /// Remove a file.
    Unlink,
}

/// What happens instead of the operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Fails with this errno and has no effect.
    Errno(i32),
    /// A write stores only its first `bytes` bytes (rounded down to sectors in log files) and reports a short write.
    Torn {
        /// Bytes that reach the file.
        bytes: usize,
    },
    /// Succeeds, this much later. Writes to the page cache are never late: their flush is.
    Delay(Duration),
}

/// One planned failure.
#[derive(Debug, Clone)]
pub struct FaultRule {
    /// The operation that fails.
    pub op: DiskOp,
    /// A part of the path; empty matches all.
    pub path_contains: String,
    /// Matching operations that pass first.
    pub skip: u64,
    /// Matching operations that then fail; `u64::MAX` for all.
    pub times: u64,
    /// What happens.
    pub fault: Fault,
}

/// A set of planned failures, shared by the test and the disk.
#[derive(Debug, Default)]
pub struct FaultPlan {
    rules: Mutex<Vec<FaultRule>>,
    unflushed: Mutex<Option<Unflushed>>,
    dead: std::sync::atomic::AtomicBool,
    struck: std::sync::atomic::AtomicU64,
}

impl FaultPlan {
    /// A plan without rules.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Adds a rule behind the others.
    pub fn add(&self, rule: FaultRule) {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).push(rule);
    }

    /// Has these rules instead of those before.
    pub fn replace(&self, rules: Vec<FaultRule>) {
        *self.rules.lock().unwrap_or_else(PoisonError::into_inner) = rules;
    }

    /// All operations succeed again.
    pub fn clear(&self) {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Failures so far.
    #[must_use]
    pub fn struck(&self) -> u64 {
        self.struck.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// From now on, remembers what unflushed writes to data files replaced. Costs a read per write.
    pub fn watch_power(&self) {
        self.unflushed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default();
    }

    /// Cuts the power: of each page with `n` unflushed writes, the first `survive(n)` have reached the disk. From then on
    /// every operation under this plan fails with `Io`; the test opens the directory anew with another plan.
    ///
    /// # Errors
    /// When the files cannot be put back; the test is then void.
    pub fn power_cut(&self, survive: &mut dyn FnMut(usize) -> usize) -> io::Result<()> {
        self.dead.store(true, std::sync::atomic::Ordering::SeqCst);
        match self.unflushed.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            Some(unflushed) => unflushed.cut(survive),
            None => Ok(()),
        }
    }

    fn ask(&self, op: DiskOp, path: &Path) -> Option<Fault> {
        if self.dead.load(std::sync::atomic::Ordering::SeqCst) {
            return Some(Fault::Errno(libc::EIO));
        }
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let path = path.to_string_lossy();
        for rule in rules.iter_mut().filter(|r| r.op == op && path.contains(&r.path_contains)) {
            if rule.skip > 0 {
                rule.skip -= 1;
            } else if rule.times > 0 {
                rule.times -= 1;
                self.struck.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if !matches!(rule.fault, Fault::Delay(_)) {
                    tracing::warn!(target: "controlpath", ?op, %path, fault = ?rule.fault, "planted disk fault");
                }
                return Some(rule.fault);
            }
        }
        None
    }
}

/// What each file and directory carries: usually nothing.
pub(crate) type Faults = Option<Arc<FaultPlan>>;

/// Asks the plan before an operation that cannot be torn. Blocks for as long as the plan makes it late.
pub(crate) fn check(faults: &Faults, op: DiskOp, what: &'static str, path: &Path) -> Result<(), DiskError> {
    if let Some(late) = check_late(faults, op, what, path)? {
        std::thread::sleep(late);
    }
    Ok(())
}

/// As [`check`], but leaves it to the caller to wait.
pub(crate) fn check_late(faults: &Faults, op: DiskOp, what: &'static str, path: &Path) -> Result<Option<Duration>, DiskError> {
    let errno = match faults.as_ref().and_then(|plan| plan.ask(op, path)) {
        None => return Ok(None),
        Some(Fault::Delay(late)) => return Ok(Some(late)),
        Some(Fault::Errno(errno)) => errno,
        Some(Fault::Torn { .. }) => libc::EIO,
    };
    Err(DiskError::new(what, path, io::Error::from_raw_os_error(errno)))
}

/// Asks the plan before a write; `Ok(Some(n))` says that only `n` bytes may reach the file.
pub(crate) fn check_write(faults: &Faults, what: &'static str, path: &Path) -> Result<Option<usize>, DiskError> {
    match faults.as_ref().and_then(|plan| plan.ask(DiskOp::Write, path)) {
        None | Some(Fault::Delay(_)) => Ok(None),
        Some(Fault::Errno(errno)) => Err(DiskError::new(what, path, io::Error::from_raw_os_error(errno))),
        Some(Fault::Torn { bytes }) => Ok(Some(bytes)),
    }
}

/// Tells the plan that a range of a data file is about to change.
pub(crate) fn before_change(faults: &Faults, file: &File, path: &Path, offset: u64, len: u64) -> io::Result<()> {
    let Some(plan) = faults else { return Ok(()) };
    match plan.unflushed.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        Some(unflushed) => unflushed.before_change(file, path, offset, len),
        None => Ok(()),
    }
}

/// Tells the plan that a data file is durable.
pub(crate) fn flushed(faults: &Faults, path: &Path) {
    let Some(plan) = faults else { return };
    if let Some(unflushed) = plan.unflushed.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
        unflushed.flushed(path);
    }
}

/// The error of a write that stored less than it was given.
pub(crate) fn short_write(what: &'static str, path: &Path) -> DiskError {
    DiskError::new(what, path, io::Error::from(io::ErrorKind::WriteZero))
}
