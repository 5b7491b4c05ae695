//! `ogee volume`: the namespace of volumes.

use crate::connect::{COMMAND_IO_TIMEOUT, Context};
use crate::error::{CliError, ErrorKind};
use crate::names;
use crate::open::take_and_release;
use crate::output::{Output, Progress, Table, counted, date};
use crate::qos::{self, LimitArgs, LimitsView, SetArgs};
use crate::sdk_error::call_failed;
use crate::task;
use crate::volume_space::{InfoArgs, info};
use clap::{Args, Subcommand};
use ogee_client::MdsClient;
use ogee_common::limits::{PAGE_BYTES, SECTOR_BYTES, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};
use ogee_common::name::VolumePath;
use ogee_common::size::{ByteLen, parse_bytes};
use ogee_proto::{MdsErrorKind, volume_limits};
use ogee_proto::mds as m;
use serde::Serialize;
use std::time::Duration;

/// Volumes asked for at once in a listing.
const PAGE_VOLUMES: u32 = 1000;

/// How often `flatten --wait` looks.
const FLATTEN_LOOK: Duration = Duration::from_millis(500);

/// The commands.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Make an empty volume
    #[command(after_help = "Example:\n  ogee volume create tenant-a/web/disk0 --size 64G --owner tenant-a")]
    Create(CreateArgs),
    /// List the volumes of a folder
    #[command(after_help = "Examples:\n  ogee volume ls\n  ogee volume ls tenant-a -r --json")]
    Ls(LsArgs),
    /// Show one volume, and the space that it takes
    #[command(after_help = "Examples:\n  ogee volume info tenant-a/web/disk0\n  ogee volume info tenant-a/web/disk0 --json --space-timeout 300\n\n\
        data is what the volume holds, by pages of 4 KiB: it grows by writes and shrinks by discards (fstrim). Of a clone, and after a rollback,\n\
        its own is what was written since. What only snapshots keep is not in it.")]
    Info(InfoArgs),
    /// Delete a volume that is detached and has no snapshots and no clones
    #[command(after_help = "Examples:\n  ogee volume rm tenant-a/web/disk0\n  ogee volume rm golden.importing --force")]
    Rm(RmArgs),
    /// Grow a volume; a running guest sees the new size
    #[command(after_help = "Example:\n  ogee volume resize tenant-a/web/disk0 --size 128G")]
    Resize(ResizeArgs),
    /// Limit what a volume does in a second; whoever has it attached obeys at once
    #[command(after_help = "Examples:\n  ogee volume set tenant-a/web/disk0 --iops 500:2000:30 --write-mib 100\n  \
        ogee volume set tenant-a/web/disk0 --iops none\n\n\
        500:2000:30 is 500 a second, and after a rest 2000 a second for 30 s. Limits that are not named stay as they are.\n\
        A read-only attach keeps the limits it began with.")]
    Set(SetArgs),
    /// Move a volume to another name; who has it attached does not notice
    #[command(after_help = "Example:\n  ogee volume rename tenant-a/web/disk0 tenant-a/old/disk0")]
    Rename(RenameArgs),
    /// Copy what a clone reads from its parents into it, in the background, so that it stands on nothing
    #[command(after_help = "Examples:\n  ogee volume flatten tenant-a/web/disk0 --wait\n  ogee volume flatten tenant-a/web/disk0 --cancel\n\n\
        Guests go on meanwhile. When it is done the parent's snapshot can be deleted.\n\
        Pace: flatten_mib_per_second of the chunkservers.")]
    Flatten(FlattenArgs),
    /// Have a volume that stands on a backup filled by snapclone, so that it needs the backup no more
    #[command(after_help = "Example:\n  ogee volume hydrate tenant-a/web/disk0 --throttle 50MiB\n\n\
        ogee restore --lazy leaves such a task itself. One more does no harm.")]
    Hydrate(HydrateArgs),
}

/// Arguments of `volume create`.
#[derive(Debug, Clone, Args)]
pub(crate) struct CreateArgs {
    /// The new volume; missing folders are made
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
    /// Size, for example 64G; rounded up to 4 KiB
    #[arg(long, value_parser = volume_size)]
    size: u64,
    /// Who may delete it
    #[arg(long, value_parser = names::plain)]
    owner: Option<String>,
    /// The pool of chunkservers that holds it
    #[arg(long, value_parser = names::plain, default_value = "default")]
    pool: String,
    /// Bytes of a logical sector, 512 or 4096, for good; clones inherit it
    #[arg(long, value_name = "BYTES", value_parser = sector_size, default_value_t = SECTOR_BYTES)]
    sector_size: u32,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Arguments of `volume ls`.
#[derive(Debug, Clone, Args)]
pub(crate) struct LsArgs {
    /// The folder; none is the root
    #[arg(value_parser = names::folder, default_value = "", hide_default_value = true)]
    folder: String,
    /// Folders below it too
    #[arg(short, long)]
    recursive: bool,
}

/// Arguments of `volume rm`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RmArgs {
    /// The volume
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
    /// Take it first from the client that has it attached, also from one that is gone
    #[arg(long)]
    force: bool,
    /// Delete only if it belongs to this owner
    #[arg(long, value_parser = names::plain)]
    owner: Option<String>,
}

/// Arguments of `volume resize`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ResizeArgs {
    /// The volume
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
    /// The new size; not smaller than the old one
    #[arg(long, value_parser = volume_size)]
    size: u64,
}

/// Arguments of `volume rename`.
#[derive(Debug, Clone, Args)]
pub(crate) struct RenameArgs {
    /// The volume
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
    /// Its new path; missing folders are made
    #[arg(value_parser = VolumePath::parse)]
    new_name: VolumePath,
}

/// Arguments of `volume flatten`.
#[derive(Debug, Clone, Args)]
pub(crate) struct FlattenArgs {
    /// The volume
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
    /// Wait until it is done, with a bar
    #[arg(long, conflicts_with = "cancel")]
    wait: bool,
    /// Stop it; what was copied stays and is not copied again
    #[arg(long)]
    cancel: bool,
}

/// Arguments of `volume hydrate`.
#[derive(Debug, Clone, Args)]
pub(crate) struct HydrateArgs {
    /// The volume
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
    /// Bytes a second read from the repository, at most: 50MiB
    #[arg(long, value_parser = parse_bytes, value_name = "BYTES")]
    throttle: Option<u64>,
}

/// Parses the size of a volume and rounds it up to whole pages, for clap.
///
/// # Errors
/// Not a size, or outside what a volume may have.
pub(crate) fn volume_size(text: &str) -> Result<u64, Box<dyn std::error::Error + Send + Sync>> {
    let bytes = parse_bytes(text)?;
    let page = u64::from(PAGE_BYTES);
    let rounded = bytes.checked_next_multiple_of(page).unwrap_or(u64::MAX);
    if (VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&rounded) {
        return Ok(rounded);
    }
    let (min, max) = (ByteLen(VOLUME_BYTES_MIN), ByteLen(VOLUME_BYTES_MAX));
    Err(format!("a volume has {min} to {max}").into())
}

/// Parses the size of a logical sector, for clap.
///
/// # Errors
/// Neither 512 nor 4,096 bytes.
pub(crate) fn sector_size(text: &str) -> Result<u32, String> {
    match parse_bytes(text).ok().and_then(|bytes| u32::try_from(bytes).ok()) {
        Some(bytes @ (SECTOR_BYTES | PAGE_BYTES)) => Ok(bytes),
        _ => Err("a logical sector has 512 or 4096 bytes".to_owned()),
    }
}

/// A volume as programs see it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct VolumeView {
    id: u64,
    path: String,
    owner: String,
    size_bytes: u64,
    pool: u32,
    created_unix_ms: u64,
    /// `path@snapshot` as named at the time; empty for none.
    parent: String,
    /// Layers below its own.
    depth: u32,
    snapshots: u32,
    layer: u64,
    seq: u64,
    allocated_segments: u64,
    attached: bool,
    attached_by: String,
    attach_epoch: u64,
    /// A folder: only `path` means anything.
    folder: bool,
    /// Copysets that a flatten is done with, of how many; 0: none is under way, or not asked for.
    flatten_done: u32,
    flatten_total: u32,
    /// Bytes of a logical sector.
    sector_bytes: u32,
    limits: LimitsView,
    /// The backup that it stands on, 16 digits, and that one's repository; empty: none, or not asked for.
    backup: String,
    backup_repository: String,
}

impl VolumeView {
    /// Whether it may see what was written before it was made, or before a rollback.
    pub(crate) const fn is_on_others(&self) -> bool {
        self.depth > 0
    }
}

impl From<m::Volume> for VolumeView {
    fn from(v: m::Volume) -> Self {
        Self {
            id: v.id,
            path: v.path,
            owner: v.owner,
            size_bytes: v.size_bytes,
            pool: v.pool,
            created_unix_ms: v.created_unix_ms,
            parent: v.parent,
            depth: v.depth,
            snapshots: v.snapshots,
            layer: v.layer,
            seq: v.seq,
            allocated_segments: v.allocated_segments,
            attached: v.attached,
            attached_by: v.attached_by,
            attach_epoch: v.attach_epoch,
            folder: v.directory,
            flatten_done: v.flatten_done,
            flatten_total: v.flatten_total,
            // 0 of an MDS that knows no other.
            sector_bytes: if v.sector_bytes == 0 { SECTOR_BYTES } else { v.sector_bytes },
            limits: qos::view(volume_limits(v.limits.as_ref())),
            backup: v.backup.as_ref().map_or_else(String::new, |b| format!("{:016x}", b.backup)),
            backup_repository: v.backup.map_or_else(String::new, |b| b.repository),
        }
    }
}

/// Carries out a command.
///
/// # Errors
/// What the MDS refused, with the volume's name.
pub(crate) async fn run(context: &Context, command: VolumeCommand) -> Result<(), CliError> {
    let (mds, out) = (context.mds()?, context.out);
    match command {
        VolumeCommand::Create(args) => create(&mds, out, args).await,
        VolumeCommand::Ls(args) => ls(&mds, out, &args).await,
        VolumeCommand::Info(args) => info(context, &mds, &args).await,
        VolumeCommand::Rm(args) => remove(context, args).await,
        VolumeCommand::Resize(args) => {
            let path = args.volume.to_string();
            let request = m::ExtendVolumeRequest { path: path.clone(), size_bytes: args.size };
            let done = mds.extend_volume(request).await;
            let volume = done.map_err(|e| call_failed(&format!("resize volume {path}"), &e))?;
            out.result(&VolumeView::from(volume), |v| format!("{path} has {}", ByteLen(v.size_bytes)))
        }
        VolumeCommand::Set(args) => {
            let volume = qos::set(&mds, &args).await?;
            out.result(&VolumeView::from(volume), |v| format!("limits of {}: {}", v.path, qos::describe(&v.limits)))
        }
        VolumeCommand::Flatten(args) => flatten(&mds, out, &args).await,
        VolumeCommand::Hydrate(args) => hydrate(&mds, out, &args).await,
        VolumeCommand::Rename(args) => {
            let (path, new_path) = (args.volume.to_string(), args.new_name.to_string());
            let request = m::RenameVolumeRequest { path: path.clone(), new_path, create_parents: true };
            let done = mds.rename_volume(request).await;
            let volume = done.map_err(|e| call_failed(&format!("rename volume {path}"), &e))?;
            out.result(&VolumeView::from(volume), |v| format!("{path} is now {}", v.path))
        }
    }
}

/// Asks for one volume.
///
/// # Errors
/// What the MDS refused, with the volume's name.
pub(crate) async fn stat(mds: &MdsClient, path: &VolumePath) -> Result<m::Volume, CliError> {
    let reply = mds.stat_volume(m::StatVolumeRequest { path: path.to_string() }).await;
    reply.map_err(|e| call_failed(&format!("volume {path}"), &e))
}

async fn create(mds: &MdsClient, out: Output, args: CreateArgs) -> Result<(), CliError> {
    let path = args.volume.to_string();
    let request = m::CreateVolumeRequest {
        path: path.clone(),
        size_bytes: args.size,
        owner: args.owner.unwrap_or_default(),
        create_parents: true,
        pool: args.pool,
        sector_bytes: args.sector_size,
        limits: Some(args.limits.changes().into()),
    };
    let reply = mds.create_volume(request).await;
    let volume = reply.map_err(|e| call_failed(&format!("create volume {path}"), &e))?;
    out.result(&VolumeView::from(volume), |v| format!("created {} with {}", v.path, ByteLen(v.size_bytes)))
}

async fn remove(context: &Context, args: RmArgs) -> Result<(), CliError> {
    let path = args.volume.to_string();
    let cluster = context.cluster(Some(COMMAND_IO_TIMEOUT))?;
    if args.force && stat(cluster.mds(), &args.volume).await?.attached {
        take_and_release(&cluster, &args.volume).await?;
    }
    let request = m::DeleteVolumeRequest { path: path.clone(), owner: args.owner.unwrap_or_default() };
    let done = cluster.mds().delete_volume(request).await;
    done.map_err(|e| {
        let error = call_failed(&format!("delete volume {path}"), &e);
        if e.kind == MdsErrorKind::Attached { error.with_advice("stop that client, or if it is gone add --force") } else { error }
    })?;
    context.out.result(&serde_json::json!({"deleted": path}), |_| format!("deleted {path}"))
}

/// Starts, stops or waits for a flatten.
async fn flatten(mds: &MdsClient, out: Output, args: &FlattenArgs) -> Result<(), CliError> {
    let path = args.volume.to_string();
    let request = m::FlattenVolumeRequest { path: path.clone(), cancel: args.cancel };
    let reply = mds.flatten_volume(request).await;
    let mut volume = reply.map_err(|e| call_failed(&format!("flatten volume {path}"), &e))?;
    if args.wait && volume.flatten_total > 0 {
        let bar = Progress::items("flatten", u64::from(volume.flatten_total), out.is_json());
        let mut shown = 0;
        while volume.flatten_total > 0 {
            bar.advance(u64::from(volume.flatten_done.saturating_sub(shown)));
            shown = shown.max(volume.flatten_done);
            tokio::time::sleep(FLATTEN_LOOK).await;
            volume = stat(mds, &args.volume).await?;
        }
        bar.finish();
        if volume.depth > 0 {
            return Err(CliError::new(ErrorKind::Failure, format!("flatten of {path} was stopped: by --cancel or a rollback")));
        }
    }
    out.result(&VolumeView::from(volume), |v| match (args.cancel, v.flatten_total, v.depth) {
        (_, total, _) if total > 0 => format!("{path} is being flattened; see: ogee volume info {path}"),
        (true, ..) => format!("{path} is not being flattened"),
        (_, _, 0) => format!("{path} stands on nothing"),
        (..) => format!("{path} is not being flattened any more"),
    })
}

/// Leaves the filling of a volume to snapclone.
async fn hydrate(mds: &MdsClient, out: Output, args: &HydrateArgs) -> Result<(), CliError> {
    let path = args.volume.to_string();
    let Some(parent) = stat(mds, &args.volume).await?.backup else {
        return out.result(&serde_json::json!({"volume": path, "task": 0}), |_| format!("{path} stands on no backup"));
    };
    let task = task::leave_hydrate(mds, &path, &parent, args.throttle.unwrap_or(0)).await?;
    out.result(&serde_json::json!({"volume": path, "task": task}), |_| format!("task {task} fills {path}: ogee task watch {task}"))
}

async fn ls(mds: &MdsClient, out: Output, args: &LsArgs) -> Result<(), CliError> {
    let mut volumes: Vec<VolumeView> = Vec::new();
    loop {
        let request = m::ListVolumesRequest {
            directory: args.folder.clone(),
            recursive: args.recursive,
            start_after: volumes.last().map(|v| v.path.clone()).unwrap_or_default(),
            limit: PAGE_VOLUMES,
        };
        let reply = mds.list_volumes(request).await;
        let name = if args.folder.is_empty() { "/" } else { &args.folder };
        let reply = reply.map_err(|e| call_failed(&format!("list folder {name}"), &e))?;
        let more = reply.more && !reply.volumes.is_empty();
        volumes.extend(reply.volumes.into_iter().map(VolumeView::from));
        if !more {
            break;
        }
    }
    out.result(&volumes, |volumes| listing(volumes))
}

fn listing(volumes: &[VolumeView]) -> String {
    let mut table = Table::new(&["NAME", "SIZE", "OWNER", "SNAPSHOTS", "ATTACHED", "PARENT", "CREATED"]);
    for v in volumes {
        if v.folder {
            table.row([format!("{}/", v.path)]);
            continue;
        }
        table.row([
            v.path.clone(),
            ByteLen(v.size_bytes).to_string(),
            v.owner.clone(),
            v.snapshots.to_string(),
            if v.attached { "yes" } else { "no" }.to_owned(),
            v.parent.clone(),
            date(v.created_unix_ms),
        ]);
    }
    let count = volumes.iter().filter(|v| !v.folder).count();
    format!("{table}{}", counted(count, "volume"))
}

/// The lines of `volume info`.
pub(crate) fn describe(v: &VolumeView) -> String {
    let or_dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
    let attached = if v.attached { format!("yes, by {}", or_dash(&v.attached_by)) } else { "no".to_owned() };
    let flatten = match v.flatten_total {
        0 => "-".to_owned(),
        total => format!("under way, {} of {total} copysets done", v.flatten_done),
    };
    let backup = match v.backup.as_str() {
        "" => "-".to_owned(),
        id => format!("stands on {id} of {}, until its hydrate task is done", v.backup_repository),
    };
    let lines = [
        ("name", v.path.clone()),
        ("id", v.id.to_string()),
        ("size", format!("{} ({} bytes)", ByteLen(v.size_bytes), v.size_bytes)),
        ("sector size", format!("{} bytes", v.sector_bytes)),
        ("limits", qos::describe(&v.limits)),
        ("owner", or_dash(&v.owner)),
        ("created", date(v.created_unix_ms)),
        ("snapshots", v.snapshots.to_string()),
        ("parent", or_dash(&v.parent)),
        ("layers below", v.depth.to_string()),
        ("flatten", flatten),
        ("backup", backup),
        ("segments", format!("{} placed (1 GiB each)", v.allocated_segments)),
        ("attached", attached),
        ("attach epoch", v.attach_epoch.to_string()),
    ];
    lines.map(|(name, value)| format!("{name:<13} {value}")).join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_to_pages_and_bounded() {
        assert_eq!(volume_size("64G").expect("good"), 64 << 30);
        assert_eq!(volume_size("1048577").expect("good"), (1 << 20) + 4096);
        assert_eq!(volume_size("64T").expect("good"), 64 << 40);
        assert_eq!((sector_size("512"), sector_size("4096"), sector_size("4K")), (Ok(512), Ok(4096), Ok(4096)));
        assert!(["0", "1024", "8K", "x", ""].iter().all(|bad| sector_size(bad).is_err()));
        for bad in ["0", "1000K", "65T", "18446744073709551615", "x"] {
            assert!(volume_size(bad).is_err(), "{bad}");
        }
    }
}
