//! The disk seams: data directory, chunk files, log files over io_uring, and the metadata store (RocksDB).
//!
//! Called by the Raft log (`ogee-raft`), the chunk store and the MDS; nothing outside this crate names `std::fs`,
//! io_uring or RocksDB. It keeps three invariants: a failure always carries its kind, its operation and its path; a
//! directory has at most one owner ([`DataDir`] holds a lock); unsafe code lives in `io.rs` alone. Every operation
//! consults an optional [`FaultPlan`], so that a test disk can fail, tear or fill up; in production that is one test
//! of a `None`. Deliberately absent: formats. What the bytes mean is the caller's.

pub mod aligned;
pub mod data_dir;
pub mod data_file;
pub mod error;
pub mod fault;
pub mod fault_file;
mod io;
pub mod log_file;
pub mod meta;
mod power;
mod simulated;

pub use aligned::{ALIGN, AlignedBuf};
pub use data_dir::{DataDir, DiskUsage};
pub use data_file::{DataCounters, DataFile};
pub use error::{DiskError, DiskErrorKind};
pub use fault::{DiskOp, Fault, FaultPlan, FaultRule};
pub use log_file::{LogEngine, LogFile, LogWriter};
pub use simulated::{SimulatedDisk, open_meta, simulate};
pub use meta::{Batch, Durability, KeyValue, MemStore, MetaCounters, MetaStore, RocksStore, Row, RowSink, StoreError, StoreErrorKind, Table};
