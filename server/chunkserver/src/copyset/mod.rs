//! A copyset replica: the Raft state machine over the chunk store ([`machine`]), client reads ([`reading`]) and
//! page maps ([`page_map`]), and the
//! Raft snapshot with its fetch of pages out of band ([`install`], [`serving`], [`fetch`]), which also mends damaged
//! pages ([`repair`]), also before anybody reads them ([`scrub`]).
//!
//! Called by the daemon, which opens a Raft group with a [`CopysetMachine`] and reads through the shared
//! [`crate::store::CopysetStore`]. Deliberately absent: the network, leases, and who the leader is.

pub mod compare;
pub mod fetch;
pub mod install;
pub mod machine;
pub mod page_map;
pub mod reading;
pub mod repair;
pub mod scrub;
pub mod serving;

pub use machine::CopysetMachine;
pub use reading::{ReadAnswer, ReadChain, ReadError, ReadOutcome, ReadRange};
pub use serving::CopysetFetch;
