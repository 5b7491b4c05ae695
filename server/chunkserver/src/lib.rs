//! The chunkserver: chunk store and copyset replicas.
//!
//! [`store`] keeps chunk versions in sparse files with checksums and checkpoints; [`copyset`] is the Raft state machine
//! over it, with reads and Raft snapshots. Invariants are stated in those modules.

pub mod copyset;
pub mod daemon;
#[doc(hidden)]
pub mod fuzzing;
pub mod store;

pub use daemon::{ChunkserverConfig, run};
