//! `ogee restore`: a backup becomes a new volume, in the cluster it came from or another.
//!
//! The volume is filled as `VOLUME.restoring` and gets its name when everything was proved and flushed; with `--lazy` when it stands on a backup that is
//! not being removed.

use super::place::{IfMissing, RepoArgs, repo_failed, transfer_failed};
use crate::connect::{COMMAND_IO_TIMEOUT, Context};
use crate::error::{CliError, ErrorKind};
use crate::half_made::{Wish, create, create_on, refuse_taken, rename, take_back};
use crate::names;
use crate::open::{close_volume, open_volume};
use crate::output::{Progress, elapsed_ms};
use crate::signals::StopSignals;
use crate::task;
use crate::volume::sector_size;
use clap::Args;
use ogee_client::{Cluster, OpenMode};
use ogee_common::clock;
use ogee_common::limits::{PAGE_BYTES, SECTOR_BYTES, VOLUME_BYTES_MIN};
use ogee_common::name::{VolumePath, VolumeRef};
use ogee_common::size::{ByteLen, parse_bytes};
use ogee_snapclone::service::{RestoreTask, Work};
use ogee_snapclone::{Index, Repository, RestoreReport, Throttle, parent_of, restore};
use serde::Serialize;

/// What the volume's name ends in until it is complete.
const SUFFIX: &str = ".restoring";

/// Arguments of `ogee restore`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RestoreArgs {
    /// The first digits of its identity, or VOLUME or VOLUME@SNAPSHOT for the newest of that name
    backup: String,
    /// The new volume; missing folders are made
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
    /// Who may delete the volume
    #[arg(long, value_parser = names::plain)]
    owner: Option<String>,
    /// The pool of chunkservers that holds it
    #[arg(long, value_parser = names::plain, default_value = "default")]
    pool: String,
    /// Bytes of a logical sector, 512 or 4096, for good
    #[arg(long, value_name = "BYTES", value_parser = sector_size, default_value_t = SECTOR_BYTES)]
    sector_size: u32,
    /// Bytes a second read from the repository, at most: 50MiB
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES")]
    throttle: Option<u64>,
    /// Make the volume at once, standing on the backup: what is read is fetched, and a task fills the rest. --repo is the repository's name in
    /// --repo-config, and in that of all who open the volume until it is complete
    #[arg(long, conflicts_with = "detach")]
    lazy: bool,
    /// With --lazy: leave no task; see ogee volume hydrate
    #[arg(long, requires = "lazy")]
    no_hydrate: bool,
    /// Leave it to snapclone as a task: --repo is the repository's name in its configuration
    #[arg(long)]
    detach: bool,
    #[command(flatten)]
    repo: RepoArgs,
}

/// What `ogee restore` reports.
#[derive(Debug, Serialize)]
struct Restored {
    volume: String,
    backup: String,
    size_bytes: u64,
    read_bytes: u64,
    seconds: f64,
}

/// Carries out `ogee restore`.
///
/// # Errors
/// The backup is damaged, the name is taken, or the cluster fails; nothing is left but, at worst, a volume whose name
/// ends in `.restoring`, and the message says so.
pub(crate) async fn run(context: &Context, args: RestoreArgs) -> Result<(), CliError> {
    let doing = format!("restore {} as {}", args.backup, args.volume);
    act(context, args).await.map_err(|e| e.within(doing))
}

async fn act(context: &Context, args: RestoreArgs) -> Result<(), CliError> {
    if args.detach {
        return leave(context, args).await;
    }
    if args.lazy {
        return lazily(context, args).await;
    }
    let mut signals = StopSignals::listen()?;
    let repo = args.repo.open(IfMissing::Fail).await?;
    let index = repo.find(&args.backup).await.map_err(repo_failed)?;
    let cluster = context.copying_cluster()?;
    refuse_taken(&cluster, &args.volume).await?;
    let start = clock::now();
    let size_bytes = index.size_bytes.next_multiple_of(u64::from(PAGE_BYTES)).max(VOLUME_BYTES_MIN);
    let wish = Wish {
        path: &args.volume,
        suffix: SUFFIX,
        size_bytes,
        owner: args.owner.as_deref(),
        pool: &args.pool,
        sector_bytes: args.sector_size,
    };
    let temporary = create(&cluster, &wish).await?;
    let throttle = Throttle::new(args.throttle.unwrap_or(0));
    let progress = Progress::new("restore", index.size_bytes, context.out.is_json());
    let filled = tokio::select! {
        filled = fill(&cluster, &temporary, (&repo, &index), &throttle, &progress) => filled,
        () = signals.wait() => Err(CliError::new(ErrorKind::Failure, "interrupted")),
    };
    progress.finish();
    let named = match filled {
        Ok(report) => rename(&cluster, &temporary, &args.volume).await.map(|()| report),
        Err(e) => Err(e),
    };
    let report = match named {
        Ok(report) => report,
        Err(e) => return Err(take_back(&cluster, &temporary, e).await),
    };
    let report = Restored {
        volume: args.volume.to_string(),
        backup: index.id,
        size_bytes,
        read_bytes: report.read_bytes,
        seconds: elapsed_ms(start) / 1000.0,
    };
    context.out.result(&report, |r| {
        format!("restored {} as {}: {}, {} read, {:.1} s", r.backup, r.volume, ByteLen(r.size_bytes), ByteLen(r.read_bytes), r.seconds)
    })
}

/// What `ogee restore --lazy` reports.
#[derive(Debug, Serialize)]
struct Standing {
    volume: String,
    backup: String,
    size_bytes: u64,
    /// The task that fills it; 0: none.
    task: u64,
}

/// Makes the volume on the backup, and leaves its filling to snapclone.
async fn lazily(context: &Context, args: RestoreArgs) -> Result<(), CliError> {
    let name = args.repo.name()?;
    let usage = |text: String| CliError::new(ErrorKind::Usage, text);
    let all = context.repositories()?;
    let all = all.ok_or_else(|| usage("with --lazy name the configuration of the repositories: --repo-config FILE".to_owned()))?;
    let place = all.place(&name).ok_or_else(|| {
        let names = all.names().collect::<Vec<_>>().join(", ");
        usage(format!("with --lazy --repo is the name of a repository in the configuration, which has: {names}"))
    })?;
    let repo = place.open(false).await.map_err(|e| repo_failed(e).within(format!("open repository {name}")))?;
    let index = repo.find(&args.backup).await.map_err(repo_failed)?;
    let cluster = context.cluster(Some(COMMAND_IO_TIMEOUT))?;
    refuse_taken(&cluster, &args.volume).await?;
    let size_bytes = index.size_bytes.next_multiple_of(u64::from(PAGE_BYTES)).max(VOLUME_BYTES_MIN);
    let wish = Wish {
        path: &args.volume,
        suffix: SUFFIX,
        size_bytes,
        owner: args.owner.as_deref(),
        pool: &args.pool,
        sector_bytes: args.sector_size,
    };
    let parent = parent_of(&index, &name).map_err(repo_failed)?;
    let (temporary, volume) = create_on(&cluster, &wish, parent).await?;
    // The removal of a backup asks what stands on it; one that asked before the volume was there has left a record or a mark.
    let kept = repo.refuse_removed(index.backup_id()).await.map_err(repo_failed);
    let named = match kept {
        Ok(()) => rename(&cluster, &temporary, &args.volume).await,
        refused => refused,
    };
    if let Err(e) = named {
        return Err(take_back(&cluster, &temporary, e).await);
    }
    let path = args.volume.to_string();
    let task = match volume.backup.as_ref().filter(|_| !args.no_hydrate) {
        Some(parent) => task::leave_hydrate(cluster.mds(), &path, parent, args.throttle.unwrap_or(0)).await.map_err(|e| {
            e.with_advice(&format!("the volume is there; have it filled: ogee volume hydrate {path}"))
        })?,
        None => 0,
    };
    let report = Standing { volume: path, backup: index.id, size_bytes, task };
    context.out.result(&report, |r| {
        let rest = if r.task == 0 { "nobody fills it".to_owned() } else { format!("task {} fills it", r.task) };
        format!("{} stands on backup {}: {}; {rest}", r.volume, r.backup, ByteLen(r.size_bytes))
    })
}

/// Leaves the restore to snapclone.
async fn leave(context: &Context, args: RestoreArgs) -> Result<(), CliError> {
    let repository = args.repo.name()?;
    refuse_taken(&context.cluster(Some(COMMAND_IO_TIMEOUT))?, &args.volume).await?;
    let work = Work::Restore(RestoreTask {
        backup: args.backup,
        volume: args.volume.to_string(),
        owner: args.owner.unwrap_or_default(),
        pool: args.pool,
        sector_bytes: args.sector_size,
        throttle: args.throttle.unwrap_or(0),
    });
    task::leave(context, &work, repository).await
}

/// Attaches, copies, flushes and detaches.
async fn fill(
    cluster: &Cluster, path: &VolumePath, (repo, index): (&Repository, &Index), throttle: &Throttle, progress: &Progress,
) -> Result<RestoreReport, CliError> {
    let name = VolumeRef { path: path.clone(), snapshot: None };
    let volume = open_volume(cluster, &name, OpenMode::ReadWrite { steal: false }).await?;
    let copied = Box::pin(restore(repo, index, &volume, throttle, |bytes| progress.advance(bytes))).await;
    let closed = close_volume(&volume).await;
    let report = copied.map_err(transfer_failed)?;
    closed?;
    Ok(report)
}
