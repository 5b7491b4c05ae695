//! The chunkserver process around the copysets: identity, configuration, data server, heartbeats, upkeep.
//!
//! Called by the `ogee chunkserver` command through [`run`]. Everything runs on one current-thread runtime: a request
//! stays on the thread that received it (ADR 0003). Invariants: a data directory has one identity for life
//! ([`superblock`]); a replica is made from nothing only when the MDS says that it never existed ([`copysets`]); a
//! request of an older connection is dropped once a newer connection of its session said hello ([`sessions`]).

pub mod config;
mod control;
mod copysets;
mod damage;
mod data_server;
mod error;
mod flatten;
mod mds_channel;
mod mender;
mod metrics;
mod moves;
mod run;
mod schedule;
mod scrub;
mod sessions;
mod superblock;
mod upkeep;

pub use config::ChunkserverConfig;
pub use error::{DaemonError, DaemonErrorKind};
pub use run::run;
pub(crate) use superblock::superblock_fuzz;
