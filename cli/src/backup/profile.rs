//! `ogee backup profile`: the order in which a boot from a backup reads its pages, kept beside it for those who fill volumes.

use super::place::{IfMissing, RepoArgs, repo_failed};
use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use clap::{Args, Subcommand};
use ogee_common::size::ByteLen;
use ogee_snapclone::BootProfile;
use std::path::PathBuf;

/// The commands of `ogee backup profile`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ProfileCommand {
    /// Keep what was recorded with a backup; one that it has is replaced
    #[command(after_help = "Example:\n  ogee vhost-blk vm1 --socket /run/vm1.sock --record-profile vm1.profile\n  \
        ogee backup profile record golden --from vm1.profile --repo file:///srv/backup")]
    Record(RecordArgs),
    /// Show how much a backup's profile names
    #[command(after_help = "Example:\n  ogee backup profile show golden --repo file:///srv/backup")]
    Show(ShowArgs),
}

/// Arguments of `backup profile record`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RecordArgs {
    /// The first digits of its identity, or VOLUME or VOLUME@SNAPSHOT for the newest of that name
    backup: String,
    /// What `ogee vhost-blk --record-profile` wrote
    #[arg(long, value_name = "FILE")]
    from: PathBuf,
    #[command(flatten)]
    repo: RepoArgs,
}

/// Arguments of `backup profile show`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ShowArgs {
    /// The first digits of its identity, or VOLUME or VOLUME@SNAPSHOT for the newest of that name
    backup: String,
    #[command(flatten)]
    repo: RepoArgs,
}

/// Carries out a command of `ogee backup profile`.
///
/// # Errors
/// The file is no profile, there is no such backup, or the repository fails.
pub(crate) async fn run(context: &Context, command: ProfileCommand) -> Result<(), CliError> {
    match command {
        ProfileCommand::Record(args) => {
            let name = args.from.display().to_string();
            let read = std::fs::read(&args.from).map_err(|e| CliError::caused(ErrorKind::Usage, format!("read {name}"), e))?;
            let profile = BootProfile::parse(&name, &read).map_err(repo_failed)?;
            let repo = args.repo.open(IfMissing::Fail).await?;
            let index = repo.find(&args.backup).await.map_err(repo_failed)?;
            repo.set_profile(index.backup_id(), &profile).await.map_err(repo_failed)?;
            tell(context, &index.id, Some(&profile))
        }
        ProfileCommand::Show(args) => {
            let repo = args.repo.open(IfMissing::Fail).await?;
            let index = repo.find(&args.backup).await.map_err(repo_failed)?;
            let profile = repo.profile(index.backup_id()).await.map_err(repo_failed)?;
            tell(context, &index.id, profile.as_ref())
        }
    }
}

fn tell(context: &Context, backup: &str, profile: Option<&BootProfile>) -> Result<(), CliError> {
    let (bytes, runs) = profile.map_or((0, 0), |p| (p.bytes(), p.runs()));
    let view = serde_json::json!({"backup": backup, "profile": profile.is_some(), "bytes": bytes, "runs": runs});
    context.out.result(&view, |_| match profile {
        Some(_) => format!("backup {backup} has a boot profile: {} in {runs} runs", ByteLen(bytes)),
        None => format!("backup {backup} has no boot profile"),
    })
}
