//! The one Raft layer of chunkservers and MDS: openraft behind a small facade.
//!
//! [`RaftProcess`] is one per process and owns the shared write-ahead log, the connections to other processes and the
//! clock of all groups; [`RaftGroup`] is the handle of one replica. What is replicated is a [`StateMachine`]. Nothing
//! outside this crate names openraft, so that it can be replaced. Invariants: a proposal is acknowledged only after a
//! majority holds it durably and the leader has applied it; a read barrier succeeds only while no other leader can
//! exist. Everything of one process runs on one tokio runtime, usually a current-thread one. Absent: what commands mean,
//! where replicas are placed.

mod alias;
pub mod api;
mod append_stream;
mod beat;
mod beat_count;
mod budget;
mod codec;
#[doc(hidden)]
pub mod fuzzing;
mod group;
mod inbound;
mod lease;
mod links;
pub mod log_store;
mod machine;
mod network;
mod poll_once;
mod process;
mod promise;
mod repair;
mod replica;
mod snapshot;
mod state;
mod tail;
mod ticker;
mod tuning;
pub mod types;
pub mod wal;

pub use api::*;
pub use group::RaftGroup;
pub use links::Identity;
pub use process::{OpenError, PeerConnection, RaftProcess};
pub use snapshot::ReplicaSource;
pub use state::{GroupFailure, GroupState, GroupStatus, InitializeError, MembershipError};
pub use tuning::{RaftTuning, TuningError};
pub use wal::{Wal, WalError, WalErrorKind, WalOptions};
