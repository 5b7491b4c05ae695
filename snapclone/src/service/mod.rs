//! The service: a daemon that takes tasks from the MDS and does them. Any number of instances; they keep nothing.
//!
//! | file | what |
//! | --- | --- |
//! | `config.rs` | `snapclone.toml` |
//! | `task.rs` | what a task says: kinds, arguments, the note for the next owner |
//! | `daemon.rs` | takes tasks, has them done, ends them |
//! | `lease.rs` | an owner's hold of a task |
//! | `failure.rs` | why work ended: the task is lost, it failed for a while, it failed |
//! | `backup.rs`, `restore.rs`, `hydrate.rs`, `upkeep.rs` | the work itself, and undoing it |
//! | `retention.rs` | which backups of a schedule stay |
//! | `doors.rs`, `listen.rs` | what an instance listens on; serving HTTP there |
//! | `api/`, `curve/` | the REST API; Curve's API |
//! | `metrics.rs` | figures |
//!
//! Invariants: an owner that lost its task stops at once, and asks the MDS whether it still owns it before each step that others see; what a step
//! makes has a name that follows from the task, or is noted in the MDS first, so that the next owner finds it, goes on with it or undoes
//! it; steps that two owners could do at the same time are decided by one create-if-absent or by an attach epoch, so the end is the same
//! whoever does them. Absent: when scheduled
//! tasks are due (the MDS's); making volumes that stand on backups, which is one call to the MDS.

mod api;
mod backup;
mod config;
mod curve;
mod daemon;
mod doors;
mod failure;
mod hydrate;
mod lease;
mod listen;
mod metrics;
mod restore;
mod retention;
mod task;
mod upkeep;

pub use api::{TokensError, openapi_json};
pub use config::{ApiConfig, ConfigError, ConfigProblem, CurveConfig, RepositoryConfig, SnapcloneConfig};
pub use daemon::{ServiceError, run};
pub use doors::DoorError;
pub use listen::{ListenAddr, ListenError};
pub use retention::Keep;
pub use task::{BackupTask, GcTask, HydrateTask, KINDS, OneTask, RestoreTask, TaskError, VerifyTask, Work};

/// Ends the process as `kill -9` would when the environment asks for it at this step: for tests of takeovers.
fn step(name: &str) {
    if std::env::var_os("OGEE_SNAPCLONE_DIE_AT").is_some_and(|at| at == name) {
        // There is nobody left to act on an error.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
    }
}
