//! Backups of volumes: the repository, making backups, restoring them, collecting garbage.
//!
//! Used by the command line and by the service that does tasks which the MDS keeps ([`service`]). The format, and why its garbage collection is safe, is `docs/backup-format.md`.
//!
//! | file | what |
//! | --- | --- |
//! | `backend.rs`, `dir.rs`, `s3.rs` | where objects lie: a local directory, S3 |
//! | `seal.rs`, `key_file.rs` | an object's bytes: compression, encryption, content addresses |
//! | `layout.rs`, `index.rs` | names of objects; the index of a backup, its leaves and its Merkle root |
//! | `repository.rs` | opening, listing and reading |
//! | `removal.rs` | removing, beside lazy restores |
//! | `run.rs` | a backup that is being made: its record, deduplication, publishing |
//! | `base.rs` | the backup on which the next one is built |
//! | `succession.rs` | several runs of which one makes the backup, because owners die |
//! | `place.rs` | a repository's place as people write it |
//! | `service/` | the daemon: takes tasks from the MDS and does them |
//! | `lazy.rs` | backups as what volumes stand on |
//! | `profile.rs` | boot profiles |
//! | `export.rs`, `restore.rs`, `verify.rs`, `gc.rs` | what is done with all of it |
//!
//! Invariants: nothing that was read is returned unless it has the content it is addressed by; an index is written last,
//! once, under a name of its own; an object that an index or an open run refers to is never deleted. Deliberately
//! absent: placement (the MDS's), policy (the caller's); names of volumes, but in the service.

mod backend;
mod base;
mod dir;
mod error;
mod export;
#[doc(hidden)]
pub mod fuzzing;
mod gc;
mod index;
mod key_file;
mod layout;
mod lazy;
mod place;
mod profile;
mod removal;
mod repository;
mod restore;
mod run;
mod s3;
mod seal;
pub mod service;
mod succession;
mod throttle;
mod verify;

pub use backend::Backend;
pub use error::{RepoError, RepoErrorKind, TransferError};
pub use export::{ExportReport, Source, export, export_guarded};
pub use gc::{GcReport, collect};
pub use index::{BackupId, Index};
pub use key_file::KeyFile;
pub use lazy::{Repositories, RepositoryBackup, parent_of};
pub use place::Place;
pub use profile::BootProfile;
pub use removal::{Removal, standing_on};
pub use repository::{OpenOptions, Repository};
pub use restore::{RestoreReport, restore};
pub use s3::S3Options;
pub use succession::{NoRunName, RunGuard, RunName, Unguarded, bury, forget, published};
pub use throttle::Throttle;
pub use verify::{VerifyReport, verify};
