//! The metadata service (MDS): names, layers, snapshots, placement and topology of one cluster.
//!
//! A Raft group of 1, 3 or 5 nodes over a metadata store. [`run()`] is a whole node: the `ogee-mds` daemon and the
//! development cluster call it with a [`MdsConfig`]. Inside, `machine` is the replicated state machine (pure over rows),
//! `placement` and `segments` are its planners, `service` is gRPC, `hub` and `liveness` are the leader's memory of who is
//! there, `duties` what a leader does unasked, `log` the one seam to Raft. Invariants: everything a client was told
//! survives the loss of any minority of nodes; an answer is never stale (reads under the leader's lease); nothing that
//! safety rests on is kept only in a leader's memory. Deliberately absent: data of volumes, chunk storage, any import of
//! the chunkserver.

mod balance;
mod config;
mod door;
mod duties;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod hub;
mod identity;
mod liveness;
mod log;
mod machine;
mod metrics;
mod placement;
mod rebuild;
mod refusal;
mod run;
mod seeded;
mod segments;
mod service;

pub use config::{ConfigError, ConfigProblem, MdsConfig, PeerConfig};
pub use error::{MdsError, MdsErrorStage};
pub use run::{run, run_on};
