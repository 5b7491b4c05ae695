//! Client SDK of Ogee: [`Cluster`] (the control plane), [`Volume`] (an open volume) and the [`BlockDevice`] trait that
//! front ends are written against.
//!
//! Used by vhost-blk, nbd, snapclone and the command line. Invariants: section 6 and 7 of `docs/ARCHITECTURE.md`; the
//! arguments for them are in the module docs of `session.rs` (order of retries), `gate.rs` (exact snapshots),
//! `fence.rs` (one writer) and `token_bucket.rs` (limits). Absent: virtio, NBD, files.

mod attachment;
mod attempt;
mod backup;
mod backup_layer;
mod below;
mod block_device;
mod cluster;
mod control;
mod extents;
mod fence;
mod gate;
mod incoming;
mod io;
mod layout;
mod lazy;
mod mds_calls;
mod mds_client;
mod memory;
mod profile;
mod resolve;
mod routing;
mod session;
mod space;
mod standby;
mod stats;
mod thin;
mod throttle;
mod token_bucket;
mod verdict;
mod volume;
mod watch;
mod write_order;

pub use attachment::AttachInfo;
pub use backup::{BackupError, BackupErrorKind, BackupOpener, BackupParent, BackupSource, UnknownRepository};
pub use backup_layer::BackupLayer;
pub use block_device::{Arrival, BlockDevice, DeviceInfo, Extent, ExtentKind, IoError, IoErrorKind, Moment, ReadData, ReadPiece};
pub use cluster::{Cluster, ClusterConfig, LimitsPolicy, NoSpacePolicy, Timing};
pub use incoming::{IncomingEnd, IncomingVolume};
pub use mds_client::{MdsCallError, MdsClient};
pub use memory::{MemoryCounters, MemoryDevice};
pub use profile::PageRun;
pub use space::VolumeSpace;
pub use standby::StandbyVolume;
pub use stats::{LATENCY_BUCKETS, OpStats, VolumeStats};
pub use volume::{DetachError, OpenError, OpenMode, Volume};
pub use write_order::{WriteOrder, WritePlace};
