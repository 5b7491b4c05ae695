//! `ogee backup create`.
//!
//! A volume without a snapshot gets one for the time of the copy: what is copied must not change. After `kill -9` that
//! snapshot stays (its name starts with `backup-`) until somebody deletes it.

use super::place::{IfMissing, RepoArgs, transfer_failed};
use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use crate::open::{close_volume, open_volume};
use crate::output::{Progress, elapsed_ms};
use crate::sdk_error::call_failed;
use crate::signals::StopSignals;
use crate::task;
use clap::Args;
use ogee_client::{BlockDevice, Cluster, OpenMode};
use ogee_common::name::VolumeRef;
use ogee_common::size::{ByteLen, parse_bytes};
use ogee_common::{clock, rng};
use ogee_proto::mds as m;
use ogee_snapclone::service::{BackupTask, Work};
use ogee_snapclone::{ExportReport, Repository, Source, Throttle, export};
use serde::Serialize;

/// Arguments of `backup create`.
#[derive(Debug, Clone, Args)]
pub(crate) struct CreateArgs {
    /// A snapshot, or a volume as it is now
    #[arg(value_name = "VOLUME[@SNAPSHOT]", value_parser = VolumeRef::parse)]
    source: VolumeRef,
    /// Bytes a second sent to the repository, at most: 50MiB
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES")]
    throttle: Option<u64>,
    /// Read everything that holds data, also what did not change since the last backup
    #[arg(long)]
    full: bool,
    /// Leave it to snapclone as a task: --repo is the repository's name in its configuration
    #[arg(long)]
    detach: bool,
    /// The repository; it is made if there is none
    #[command(flatten)]
    repo: RepoArgs,
}

/// What `backup create` reports.
#[derive(Debug, Serialize)]
struct Created {
    backup: String,
    volume: String,
    snapshot: String,
    generation: u64,
    size_bytes: u64,
    data_bytes: u64,
    new_bytes: u64,
    stored_bytes: u64,
    new_blocks: u64,
    read_bytes: u64,
    kept_bytes: u64,
    root: String,
    seconds: f64,
}

/// Carries out `backup create`.
///
/// # Errors
/// The volume cannot be read or the repository not written; then there is no backup.
pub(crate) async fn run(context: &Context, args: CreateArgs) -> Result<(), CliError> {
    let doing = format!("back up {}", args.source);
    create(context, args).await.map_err(|e| e.within(doing))
}

async fn create(context: &Context, args: CreateArgs) -> Result<(), CliError> {
    let mut signals = StopSignals::listen()?;
    let cluster = context.copying_cluster()?;
    if args.detach {
        return leave(context, &cluster, args).await;
    }
    let repo = args.repo.open(IfMissing::Make).await?;
    let start = clock::now();
    let (name, taken) = snapshot_of(&cluster, &args.source).await?;
    let throttle = Throttle::new(args.throttle.unwrap_or(0));
    let done = tokio::select! {
        done = copy(context, &cluster, &repo, &name, (&args, &throttle)) => done,
        () = signals.wait() => Err(CliError::new(ErrorKind::Failure, "interrupted; the next backup of the volume goes on from here")),
    };
    if taken {
        let (path, snapshot) = (name.path.to_string(), name.snapshot.clone().unwrap_or_default());
        let gone = cluster.mds().delete_snapshot(m::DeleteSnapshotRequest { path, name: snapshot }).await;
        if let Err(e) = gone {
            context.out.warn(&call_failed(&format!("delete snapshot {name}"), &e).chain());
        }
    }
    let ExportReport { index, new_blocks, read_bytes, kept_bytes } = done?;
    let report = Created {
        backup: index.id,
        volume: index.volume,
        snapshot: index.snapshot,
        generation: index.generation,
        size_bytes: index.size_bytes,
        data_bytes: index.data_bytes,
        new_bytes: index.new_bytes,
        stored_bytes: index.stored_bytes,
        new_blocks,
        read_bytes,
        kept_bytes,
        root: index.root,
        seconds: elapsed_ms(start) / 1000.0,
    };
    context.out.result(&report, |r| {
        let [size, data, read] = [r.size_bytes, r.data_bytes, r.read_bytes].map(ByteLen);
        let [new, stored] = [r.new_bytes, r.stored_bytes].map(ByteLen);
        let what = format!("{size}, {data} of data, {read} read, {new} new, {stored} stored, {:.1} s", r.seconds);
        format!("backed up {}@{} as {}: {what}", r.volume, r.snapshot, r.backup)
    })
}

/// Leaves the backup to snapclone; what does not exist is refused here.
async fn leave(context: &Context, cluster: &Cluster, args: CreateArgs) -> Result<(), CliError> {
    let (repository, volume) = (args.repo.name()?, args.source.path.to_string());
    let list = cluster.mds().list_snapshots(m::ListSnapshotsRequest { path: volume.clone() }).await;
    let list = list.map_err(|e| call_failed("look for the volume", &e))?;
    let snapshot = args.source.snapshot;
    if let Some(name) = snapshot.as_ref().filter(|name| list.snapshots.iter().all(|s| s.name != **name)) {
        return Err(CliError::new(ErrorKind::NotFound, format!("there is no snapshot {name:?} of volume {volume:?}")));
    }
    let work = Work::Backup(BackupTask { volume, snapshot, throttle: args.throttle.unwrap_or(0), full: args.full, keep: None });
    task::leave(context, &work, repository).await
}

/// The snapshot to copy, and whether it was taken for this.
async fn snapshot_of(cluster: &Cluster, source: &VolumeRef) -> Result<(VolumeRef, bool), CliError> {
    if source.snapshot.is_some() {
        return Ok((source.clone(), false));
    }
    let name = format!("backup-{:016x}", rng::nonzero_u64());
    let request = m::CreateSnapshotRequest { path: source.path.to_string(), name: name.clone() };
    let made = cluster.mds().create_snapshot(request).await;
    made.map_err(|e| call_failed(&format!("create snapshot {source}@{name}"), &e))?;
    Ok((VolumeRef { path: source.path.clone(), snapshot: Some(name) }, true))
}

async fn copy(
    context: &Context, cluster: &Cluster, repo: &Repository, name: &VolumeRef, (args, throttle): (&CreateArgs, &Throttle),
) -> Result<ExportReport, CliError> {
    let status = cluster.mds().cluster_status().await.map_err(|e| call_failed("ask for the cluster", &e))?;
    let snapshot = name.snapshot.clone().unwrap_or_default();
    let list = cluster.mds().list_snapshots(m::ListSnapshotsRequest { path: name.path.to_string() }).await;
    let list = list.map_err(|e| call_failed(&format!("list snapshots of {}", name.path), &e))?;
    let found = list.snapshots.iter().find(|s| s.name == snapshot);
    let volume = open_volume(cluster, name, OpenMode::ReadOnly).await?;
    let source = Source {
        cluster: status.cluster.iter().map(|b| format!("{b:02x}")).collect(),
        volume_id: volume.attach_info().volume.0,
        volume: name.path.to_string(),
        snapshot,
        snapshot_unix_ms: found.map_or(0, |s| s.created_unix_ms),
        moments: volume.moments(),
        full: args.full,
    };
    let progress = Progress::new("backup", volume.info().size_bytes, context.out.is_json());
    let copied = Box::pin(export(repo, &volume, source, throttle, |bytes| progress.advance(bytes))).await;
    progress.finish();
    if let Err(e) = close_volume(&volume).await {
        context.out.warn(&e.chain());
    }
    copied.map_err(transfer_failed)
}
