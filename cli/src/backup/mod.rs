//! `ogee backup` and `ogee restore`: volumes to a repository and back.
//!
//! | file | what |
//! | --- | --- |
//! | `place.rs` | `--repo` and what belongs to it; how failures of a repository are told |
//! | `create.rs` | `backup create` |
//! | `list.rs` | `backup ls`, `show`, `verify`, `rm`, `gc` |
//! | `restore.rs` | `restore` |
//! | `profile.rs` | `backup profile` |
//! | `schedule.rs` | `backup schedule` |

mod create;
mod list;
mod place;
mod profile;
mod restore;
mod schedule;

pub(crate) use restore::{RestoreArgs, run as run_restore};

use crate::connect::Context;
use crate::error::CliError;
use clap::Subcommand;

/// The commands of `ogee backup`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum BackupCommand {
    /// Back a snapshot up, or a volume as it is now; only what the repository does not have is sent
    #[command(after_help = "Examples:\n  ogee backup create vm1@nightly --repo file:///srv/backup\n  \
        ogee backup create vm1 --repo s3://backup/cluster-a --endpoint http://10.0.0.9:9000 --key-file /etc/ogee/backup.key\n\n\
        A volume without a snapshot is backed up from a snapshot that is taken for it and deleted again. A backup that was\n\
        interrupted is gone on with by the next one of the same volume.")]
    Create(create::CreateArgs),
    /// List the backups
    #[command(after_help = "Example:\n  ogee backup ls --repo file:///srv/backup")]
    Ls(list::LsArgs),
    /// Show one backup
    #[command(after_help = "Example:\n  ogee backup show vm1@nightly --repo file:///srv/backup")]
    Show(list::OneArgs),
    /// Read a backup as a restore would and check every byte of it
    #[command(after_help = "Example:\n  ogee backup verify vm1@nightly --repo file:///srv/backup")]
    Verify(list::VerifyArgs),
    /// Remove a backup; its space comes back with the next gc
    #[command(after_help = "Example:\n  ogee backup rm 5f3a09c2 --repo file:///srv/backup")]
    Rm(list::RmArgs),
    /// Delete what no backup refers to; may run at any time, beside backups too
    #[command(after_help = "Example:\n  ogee backup gc --repo file:///srv/backup")]
    Gc(list::GcArgs),
    /// In which order a boot reads a backup, for those who fill volumes that stand on it
    #[command(subcommand)]
    Profile(profile::ProfileCommand),
    /// Backups that snapclone makes every so often, and how many of them stay
    #[command(subcommand)]
    Schedule(schedule::ScheduleCommand),
}

/// Carries out a command of `ogee backup`.
///
/// # Errors
/// What the repository or the cluster says.
pub(crate) async fn run(context: &Context, command: BackupCommand) -> Result<(), CliError> {
    match command {
        BackupCommand::Create(args) => create::run(context, args).await,
        BackupCommand::Ls(args) => list::ls(context, &args).await,
        BackupCommand::Show(args) => list::show(context, &args).await,
        BackupCommand::Verify(args) => list::verify(context, &args).await,
        BackupCommand::Rm(args) => list::rm(context, &args).await,
        BackupCommand::Gc(args) => list::gc(context, &args).await,
        BackupCommand::Profile(command) => profile::run(context, command).await,
        BackupCommand::Schedule(command) => schedule::run(context, command).await,
    }
}
