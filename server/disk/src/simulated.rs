//! The disk of a simulated process: the fault plan and the metadata store that stand in for those of this thread's current process.
//!
//! Set by a simulation before it lets a process run. Invariants: without it, directories have no fault plan and metadata is in RocksDB;
//! a store in memory outlives the process that used it, as a disk does. Absent: time and order ([`ogee_common::sim`]).

use crate::fault::FaultPlan;
use crate::fault_file;
use crate::meta::{MemStore, MetaStore, RocksStore, StoreError};
use std::cell::RefCell;
use std::path::Path;
use std::sync::Arc;

/// What a simulated process has for a disk.
#[derive(Debug, Clone)]
pub struct SimulatedDisk {
    /// Failures and power of its files.
    pub faults: Arc<FaultPlan>,
    /// Its metadata.
    pub meta: Arc<MemStore>,
}

thread_local! {
    static DISK: RefCell<Option<SimulatedDisk>> = const { RefCell::new(None) };
}

/// The disk of what this thread does from now on; `None`: a real one.
pub fn simulate(disk: Option<SimulatedDisk>) {
    DISK.set(disk);
}

/// The plan of the current process: that of its simulated disk, or one from a file ([`crate::fault_file`]).
pub(crate) fn faults() -> Option<Arc<FaultPlan>> {
    DISK.with_borrow(|disk| disk.as_ref().map(|d| d.faults.clone())).or_else(fault_file::of_process)
}

/// Opens the metadata store of a process. Blocks for its recovery.
///
/// # Errors
/// As [`RocksStore::open`].
pub fn open_meta(path: &Path) -> Result<Arc<dyn MetaStore>, StoreError> {
    match DISK.with_borrow(|disk| disk.as_ref().map(|d| d.meta.clone())) {
        Some(meta) => Ok(meta),
        None => Ok(Arc::new(RocksStore::open(path)?)),
    }
}
