//! `ogee backup ls`, `show`, `verify`, `rm` and `gc`.

use super::place::{IfMissing, RepoArgs, repo_failed};
use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use crate::output::{Progress, Table, counted, date, elapsed_ms};
use crate::sdk_error::call_failed;
use crate::task;
use clap::Args;
use ogee_client::MdsClient;
use ogee_common::clock;
use ogee_common::size::ByteLen;
use ogee_snapclone::service::{GcTask, OneTask, VerifyTask, Work};
use ogee_snapclone::{BackupId, Index, collect, standing_on};
use serde::Serialize;
use std::time::Duration;

/// A run that said nothing for an hour is dead; it says every half minute that it lives.
const ABANDON_AFTER_SECONDS: u64 = 3600;

/// Arguments of `backup ls`.
#[derive(Debug, Clone, Args)]
pub(crate) struct LsArgs {
    #[command(flatten)]
    repo: RepoArgs,
}

/// Arguments that name one backup.
#[derive(Debug, Clone, Args)]
pub(crate) struct OneArgs {
    /// The first digits of its identity, or VOLUME or VOLUME@SNAPSHOT for the newest of that name
    backup: String,
    #[command(flatten)]
    repo: RepoArgs,
}

/// Arguments of `backup rm`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RmArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Leave it to snapclone as a task: --repo is the repository's name in its configuration
    #[arg(long)]
    detach: bool,
    /// Do not ask the cluster whether a volume stands on the backup: such a volume loses what is not filled yet
    #[arg(long, conflicts_with = "detach")]
    force: bool,
}

/// Arguments of `backup verify`.
#[derive(Debug, Clone, Args)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Leave it to snapclone as a task: --repo is the repository's name in its configuration
    #[arg(long)]
    detach: bool,
    /// Check every Nth block only
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..), value_name = "N")]
    sample: u64,
}

/// Arguments of `backup gc`.
#[derive(Debug, Clone, Args)]
pub(crate) struct GcArgs {
    /// Give up backups that did not say for so long that they run; one that does run after all then fails, and harms nothing
    #[arg(long, default_value_t = ABANDON_AFTER_SECONDS, value_name = "SECONDS")]
    abandon_after: u64,
    /// Leave it to snapclone as a task: --repo is the repository's name in its configuration
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    repo: RepoArgs,
}

/// A backup as programs see it.
#[derive(Debug, Serialize)]
struct BackupView {
    backup: String,
    volume: String,
    snapshot: String,
    generation: u64,
    cluster: String,
    volume_id: u64,
    snapshot_unix_ms: u64,
    made_unix_ms: u64,
    size_bytes: u64,
    data_bytes: u64,
    new_bytes: u64,
    stored_bytes: u64,
    block_bytes: u32,
    root: String,
}

impl From<Index> for BackupView {
    fn from(i: Index) -> Self {
        Self {
            backup: i.id,
            volume: i.volume,
            snapshot: i.snapshot,
            generation: i.generation,
            cluster: i.cluster,
            volume_id: i.volume_id,
            snapshot_unix_ms: i.snapshot_unix_ms,
            made_unix_ms: i.made_unix_ms,
            size_bytes: i.size_bytes,
            data_bytes: i.data_bytes,
            new_bytes: i.new_bytes,
            stored_bytes: i.stored_bytes,
            block_bytes: i.block_bytes,
            root: i.root,
        }
    }
}

/// Carries out `backup ls`. A damaged index is a warning: the others are listed.
pub(crate) async fn ls(context: &Context, args: &LsArgs) -> Result<(), CliError> {
    let repo = args.repo.open(IfMissing::Fail).await?;
    let mut backups = Vec::new();
    for found in repo.backups().await.map_err(repo_failed)? {
        match found {
            Ok(index) => backups.push(BackupView::from(index)),
            Err(e) => context.out.warn(&repo_failed(e).chain()),
        }
    }
    context.out.result(&backups, |list| {
        let mut table = Table::new(&["BACKUP", "VOLUME", "SNAPSHOT", "MADE", "SIZE", "DATA", "STORED"]);
        for b in list {
            let bytes = |n: u64| ByteLen(n).to_string();
            let (size, data, stored) = (bytes(b.size_bytes), bytes(b.data_bytes), bytes(b.stored_bytes));
            table.row([b.backup.clone(), b.volume.clone(), b.snapshot.clone(), date(b.made_unix_ms), size, data, stored]);
        }
        format!("{table}{}", counted(list.len(), "backup"))
    })
}

/// Carries out `backup show`.
pub(crate) async fn show(context: &Context, args: &OneArgs) -> Result<(), CliError> {
    let repo = args.repo.open(IfMissing::Fail).await?;
    let view = BackupView::from(repo.find(&args.backup).await.map_err(repo_failed)?);
    context.out.result(&view, |v| {
        format!(
            "backup      {}\nvolume      {} ({} of cluster {})\nsnapshot    {}, {}\nmade        {}, generation {}\n\
             size        {}\ndata        {}, in blocks of {}\nadded       {}, {} as stored\nroot        {}",
            v.backup, v.volume, v.volume_id, v.cluster, v.snapshot, date(v.snapshot_unix_ms), date(v.made_unix_ms),
            v.generation, ByteLen(v.size_bytes), ByteLen(v.data_bytes), ByteLen(u64::from(v.block_bytes)),
            ByteLen(v.new_bytes), ByteLen(v.stored_bytes), v.root,
        )
    })
}

/// Carries out `backup verify`.
pub(crate) async fn verify(context: &Context, args: &VerifyArgs) -> Result<(), CliError> {
    if args.detach {
        let work = Work::Verify(VerifyTask { backup: args.one.backup.clone(), sample: args.sample });
        return task::leave(context, &work, args.one.repo.name()?).await;
    }
    let repo = args.one.repo.open(IfMissing::Fail).await?;
    let index = repo.find(&args.one.backup).await.map_err(repo_failed)?;
    let progress = Progress::new("verify", index.size_bytes, context.out.is_json());
    let start = clock::now();
    let report = ogee_snapclone::verify(&repo, &index, args.sample, |bytes| progress.advance(bytes)).await;
    progress.finish();
    let report = report.map_err(repo_failed)?;
    if report.damaged > 0 {
        let text = format!("backup {} is damaged: {} missing or damaged", index.id, counted(usize::try_from(report.damaged).unwrap_or(usize::MAX), "object"));
        let first = report.damage.into_iter().next();
        return Err(match first {
            Some(first) => repo_failed(first).within(text),
            None => CliError::new(ErrorKind::Failure, text),
        });
    }
    let result = serde_json::json!({
        "backup": index.id, "damaged": 0, "blocks": report.blocks, "bytes": report.bytes, "seconds": elapsed_ms(start) / 1000.0,
    });
    let whole = if args.sample == 1 { "is whole" } else { "shows no damage" };
    context.out.result(&result, |_| format!("backup {} {whole}: {} read", index.id, ByteLen(report.bytes)))
}

/// Carries out `backup rm`. A damaged backup is removed by its whole identity. The cluster that is named is asked whether a volume stands on the
/// backup; without one the backup is removed with a warning, as from a host of a repository only.
pub(crate) async fn rm(context: &Context, args: &RmArgs) -> Result<(), CliError> {
    let RmArgs { one: args, detach, force } = args;
    if *detach {
        let work = Work::Remove(OneTask { backup: args.backup.clone() });
        return task::leave(context, &work, args.repo.name()?).await;
    }
    let repo = args.repo.open(IfMissing::Fail).await?;
    let is_whole_id = args.backup.len() == 16 && args.backup.bytes().all(|b| b.is_ascii_hexdigit());
    let id = match u64::from_str_radix(&args.backup, 16) {
        Ok(id) if is_whole_id => BackupId(id),
        _ => repo.find(&args.backup).await.map_err(repo_failed)?.backup_id(),
    };
    // Before anything is begun: a connection that cannot be set up.
    let cluster = if *force || !context.names_cluster() { None } else { Some(context.mds()?) };
    let removal = repo.begin_removal(id).await.map_err(repo_failed)?;
    let refused = match &cluster {
        Some(mds) => refusal(mds, id).await,
        None => None,
    };
    if let Some(refused) = refused {
        return Err(match removal.take_back().await {
            Ok(()) => refused,
            Err(e) => {
                context.out.warn(&repo_failed(e).within("take the removal back; ogee backup gc does it after an hour").chain());
                refused
            }
        });
    }
    removal.carry_out().await.map_err(repo_failed)?;
    if cluster.is_none() && !*force {
        context.out.warn("no cluster is named, so none was asked whether a volume stands on the backup (--mds)");
    }
    context.out.result(&serde_json::json!({"removed": id.to_string()}), |_| format!("removed {id}"))
}

/// Why a cluster does not want a backup to be removed.
async fn refusal(mds: &MdsClient, id: BackupId) -> Option<CliError> {
    match standing_on(mds, id).await {
        Ok(None) => None,
        Ok(Some(what)) => {
            let text = format!("{what} stands on backup {id}");
            Some(CliError::new(ErrorKind::Conflict, text).with_advice("wait until its hydrate task is done: ogee task ls --open"))
        }
        Err(e) => {
            let error = call_failed("ask whether a volume stands on the backup", &e);
            Some(error.with_advice("nothing was removed; without asking: ogee backup rm --force"))
        }
    }
}

/// Carries out `backup gc`.
pub(crate) async fn gc(context: &Context, args: &GcArgs) -> Result<(), CliError> {
    if args.detach {
        let work = Work::Gc(GcTask { abandon_after_seconds: args.abandon_after });
        return task::leave(context, &work, args.repo.name()?).await;
    }
    let repo = args.repo.open(IfMissing::Fail).await?;
    let done = collect(&repo, Duration::from_secs(args.abandon_after)).await;
    let report = done.map_err(|e| repo_failed(e).within("collect garbage"))?;
    let result = serde_json::json!({
        "blocks_deleted": report.blocks, "blocks_kept": report.kept_blocks, "backups_deleted": report.backups,
        "runs_given_up": report.runs_given_up, "removals_given_up": report.removals_given_up, "temporary_deleted": report.temporary,
    });
    context.out.result(&result, |_| {
        format!("{} blocks deleted, {} kept; {} interrupted backups given up", report.blocks, report.kept_blocks, report.runs_given_up)
    })
}
