//! `ogee snapshot`, `ogee clone` and `ogee rollback`: one metadata transaction each, whatever the size.

use crate::connect::Context;
use crate::error::CliError;
use crate::names::{self, SnapshotRef};
use crate::output::{Table, counted, date, elapsed_ms};
use crate::sdk_error::call_failed;
use crate::volume::VolumeView;
use clap::{Args, Subcommand};
use ogee_common::clock;
use ogee_common::name::{VolumePath, VolumeRef};
use ogee_common::size::ByteLen;
use ogee_proto::mds as m;
use serde::Serialize;

/// The commands of `ogee snapshot`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Take an exact snapshot, also of a volume that is being written; of several volumes as one cut
    #[command(after_help = "Examples:\n  ogee snapshot create tenant-a/web/disk0@before-upgrade\n  \
        ogee snapshot create tenant-a/db/data@nightly tenant-a/db/log@nightly\n\n\
        Several snapshots are made all or none, and are one moment: none of them has a write that was made after\n\
        another's was acknowledged without having that other one too.")]
    Create(SnapshotCreateArgs),
    /// List the snapshots of a volume
    #[command(after_help = "Example:\n  ogee snapshot ls tenant-a/web/disk0")]
    Ls(SnapshotLsArgs),
    /// Delete a snapshot that has no clones
    #[command(after_help = "Example:\n  ogee snapshot rm tenant-a/web/disk0@before-upgrade")]
    Rm(SnapshotArgs),
}

/// One snapshot.
#[derive(Debug, Clone, Args)]
pub(crate) struct SnapshotArgs {
    /// The snapshot
    #[arg(value_name = "VOLUME@SNAPSHOT", value_parser = names::snapshot)]
    snapshot: SnapshotRef,
}

/// Arguments of `snapshot create`.
#[derive(Debug, Clone, Args)]
pub(crate) struct SnapshotCreateArgs {
    /// The snapshot; several, of different volumes, are taken as one cut
    #[arg(value_name = "VOLUME@SNAPSHOT", value_parser = names::snapshot, required = true)]
    snapshots: Vec<SnapshotRef>,
}

/// Arguments of `snapshot ls`.
#[derive(Debug, Clone, Args)]
pub(crate) struct SnapshotLsArgs {
    /// The volume
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
}

/// Arguments of `ogee clone`.
#[derive(Debug, Clone, Args)]
pub(crate) struct CloneArgs {
    /// What to clone: a snapshot, or a volume as it is now (which takes a snapshot of its own)
    #[arg(value_name = "VOLUME[@SNAPSHOT]", value_parser = VolumeRef::parse)]
    source: VolumeRef,
    /// The new volume; missing folders are made
    #[arg(value_name = "NEW_VOLUME", value_parser = VolumePath::parse)]
    target: VolumePath,
    /// Who may delete the new volume
    #[arg(long, value_parser = names::plain)]
    owner: Option<String>,
}

/// Arguments of `ogee rollback`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RollbackArgs {
    /// The snapshot to go back to
    #[arg(value_name = "VOLUME@SNAPSHOT", value_parser = names::snapshot)]
    snapshot: SnapshotRef,
    /// Take the volume from the client that has it attached
    #[arg(long)]
    detach: bool,
}

/// A snapshot as programs see it.
#[derive(Debug, Clone, Serialize)]
struct SnapshotView {
    id: u64,
    name: String,
    volume: String,
    size_bytes: u64,
    created_unix_ms: u64,
    layer: u64,
    seq: u64,
    ready: bool,
    clones: u32,
    /// How exactness was got: `held`, `detached` or `bypassed`.
    hold: String,
    /// Snapshots with the same number were taken as one cut.
    group: Option<u64>,
}

/// Snapshots of one cut as programs see them.
#[derive(Debug, Serialize)]
struct GroupView {
    group: u64,
    snapshots: Vec<SnapshotView>,
}

impl From<m::Snapshot> for SnapshotView {
    fn from(s: m::Snapshot) -> Self {
        Self {
            id: s.id,
            name: s.name,
            volume: s.volume_path,
            size_bytes: s.size_bytes,
            created_unix_ms: s.created_unix_ms,
            layer: s.layer,
            seq: s.seq,
            ready: s.ready,
            clones: s.children,
            hold: s.hold,
            group: Some(s.group).filter(|g| *g != 0),
        }
    }
}

/// A result and how long the MDS took for it, as seen from here.
#[derive(Debug, Serialize)]
struct Timed<T> {
    #[serde(flatten)]
    result: T,
    elapsed_ms: f64,
}

/// Carries out a command of `ogee snapshot`.
///
/// # Errors
/// What the MDS refused, with the snapshot's name.
pub(crate) async fn run(context: &Context, command: SnapshotCommand) -> Result<(), CliError> {
    let (mds, out) = (context.connected_mds().await?, context.out);
    match command {
        SnapshotCommand::Create(SnapshotCreateArgs { snapshots }) => match &snapshots[..] {
            [snapshot] => {
                let start = clock::now();
                let reply = mds.create_snapshot(request_of(snapshot)).await;
                let reply = reply.map_err(|e| call_failed(&format!("create snapshot {snapshot}"), &e))?;
                let timed = Timed { result: SnapshotView::from(reply), elapsed_ms: elapsed_ms(start) };
                out.result(&timed, |t| format!("created {snapshot} in {:.1} ms ({})", t.elapsed_ms, t.result.hold))
            }
            several => {
                let request = m::CreateSnapshotGroupRequest { members: several.iter().map(request_of).collect() };
                let start = clock::now();
                let reply = mds.create_snapshot_group(request).await;
                let reply = reply.map_err(|e| call_failed(&format!("create snapshots {}", joined(several)), &e))?;
                let snapshots = reply.snapshots.into_iter().map(SnapshotView::from).collect();
                let result = GroupView { group: reply.group, snapshots };
                let timed = Timed { result, elapsed_ms: elapsed_ms(start) };
                out.result(&timed, |t| created(several, t))
            }
        },
        SnapshotCommand::Ls(SnapshotLsArgs { volume }) => {
            let reply = mds.list_snapshots(m::ListSnapshotsRequest { path: volume.to_string() }).await;
            let reply = reply.map_err(|e| call_failed(&format!("list snapshots of {volume}"), &e))?;
            let snapshots: Vec<SnapshotView> = reply.snapshots.into_iter().map(SnapshotView::from).collect();
            out.result(&snapshots, |s| listing(s))
        }
        SnapshotCommand::Rm(SnapshotArgs { snapshot }) => {
            let request = m::DeleteSnapshotRequest { path: snapshot.volume.to_string(), name: snapshot.name.clone() };
            let start = clock::now();
            let done = mds.delete_snapshot(request).await;
            done.map_err(|e| call_failed(&format!("delete snapshot {snapshot}"), &e))?;
            let result = serde_json::json!({"deleted": snapshot.to_string()});
            let timed = Timed { result, elapsed_ms: elapsed_ms(start) };
            out.result(&timed, |_| format!("deleted {snapshot}"))
        }
    }
}

fn request_of(snapshot: &SnapshotRef) -> m::CreateSnapshotRequest {
    m::CreateSnapshotRequest { path: snapshot.volume.to_string(), name: snapshot.name.clone() }
}

/// The first few names.
fn joined(snapshots: &[SnapshotRef]) -> String {
    const SHOWN: usize = 4;
    let names: Vec<String> = snapshots.iter().take(SHOWN).map(ToString::to_string).collect();
    let dots = if snapshots.len() > SHOWN { ", ..." } else { "" };
    format!("{}{dots}", names.join(", "))
}

/// One line per snapshot, and one about the cut.
fn created(snapshots: &[SnapshotRef], timed: &Timed<GroupView>) -> String {
    let GroupView { group, snapshots: made } = &timed.result;
    let line = |(name, made): (&SnapshotRef, &SnapshotView)| format!("created {name} ({})\n", made.hold);
    let lines: String = snapshots.iter().zip(made).map(line).collect();
    format!("{lines}{} as one cut, group {group}, in {:.1} ms", counted(made.len(), "snapshot"), timed.elapsed_ms)
}

/// Carries out `ogee clone`.
///
/// # Errors
/// What the MDS refused, with both names.
pub(crate) async fn clone_volume(context: &Context, args: CloneArgs) -> Result<(), CliError> {
    let mds = context.connected_mds().await?;
    let (source, target) = (args.source, args.target);
    let request = m::CloneVolumeRequest {
        path: source.path.to_string(),
        source_snapshot: source.snapshot.clone().unwrap_or_default(),
        new_path: target.to_string(),
        owner: args.owner.unwrap_or_default(),
        create_parents: true,
    };
    let start = clock::now();
    let reply = mds.clone_volume(request).await;
    let reply = reply.map_err(|e| call_failed(&format!("clone {source} to {target}"), &e))?;
    let timed = Timed { result: VolumeView::from(reply), elapsed_ms: elapsed_ms(start) };
    context.out.result(&timed, |t| format!("cloned {source} to {target} in {:.1} ms", t.elapsed_ms))
}

/// Carries out `ogee rollback`.
///
/// # Errors
/// What the MDS refused, with the snapshot's name.
pub(crate) async fn rollback(context: &Context, args: RollbackArgs) -> Result<(), CliError> {
    let mds = context.connected_mds().await?;
    let snapshot = args.snapshot;
    let request = m::RollbackVolumeRequest {
        path: snapshot.volume.to_string(),
        snapshot: snapshot.name.clone(),
        detach: args.detach,
    };
    let start = clock::now();
    let reply = mds.rollback_volume(request).await;
    let reply = reply.map_err(|e| {
        let error = call_failed(&format!("roll back to {snapshot}"), &e);
        if e.kind == ogee_proto::MdsErrorKind::Attached { error.with_advice("stop its user or add --detach") } else { error }
    })?;
    let timed = Timed { result: VolumeView::from(reply), elapsed_ms: elapsed_ms(start) };
    let (volume, name) = (&snapshot.volume, &snapshot.name);
    context.out.result(&timed, |t| format!("rolled {volume} back to {name} in {:.1} ms", t.elapsed_ms))
}

fn listing(snapshots: &[SnapshotView]) -> String {
    let mut table = Table::new(&["NAME", "SIZE", "CLONES", "STATE", "GROUP", "CREATED"]);
    for s in snapshots {
        let state = if s.ready { "ready" } else { "sealing" };
        table.row([
            s.name.clone(),
            ByteLen(s.size_bytes).to_string(),
            s.clones.to_string(),
            state.to_owned(),
            s.group.map_or_else(|| "-".to_owned(), |group| group.to_string()),
            date(s.created_unix_ms),
        ]);
    }
    format!("{table}{}", counted(snapshots.len(), "snapshot"))
}
