//! From the state machine's words to those of `mds.proto`. Pure.

use super::backups::message;
use crate::machine::command::{Grant, SnapshotInfo, VolumeInfo};
use crate::machine::info::Listed;
use crate::machine::flatten::Progress;
use crate::machine::row::{Hold, ParentRef, TaskKind, TaskRow, VolumeOptionsRow};
use ogee_common::id::{CopysetId, LayerId, SegmentIndex};
use ogee_proto::mds;

/// A volume together with its options and its flatten.
pub(crate) fn volume(v: VolumeInfo, options: VolumeOptionsRow, flatten: Progress) -> mds::Volume {
    mds::Volume {
        id: v.id.0,
        path: v.path,
        owner: v.owner,
        size_bytes: v.size_bytes,
        layer: v.layer.0,
        seq: v.seq.0,
        created_unix_ms: v.created_unix_ms,
        parent: v.parent,
        allocated_segments: v.allocated_segments,
        snapshots: v.snapshots,
        attach_epoch: v.epoch.0,
        attached: v.attached_by.is_some(),
        depth: v.depth,
        directory: false,
        attached_by: v.attached_by.unwrap_or_default(),
        pool: v.pool.0,
        flatten_done: flatten.done,
        flatten_total: flatten.total,
        limits: Some(options.limits.into()),
        sector_bytes: options.sector_bytes,
        backup: None,
    }
}

impl From<Listed> for mds::Volume {
    fn from(listed: Listed) -> Self {
        match listed {
            Listed::Volume(info, options) => volume(*info, options, Progress::default()),
            Listed::Folder(path) => Self { path, directory: true, ..Self::default() },
        }
    }
}

impl From<SnapshotInfo> for mds::Snapshot {
    fn from(s: SnapshotInfo) -> Self {
        let hold = match s.hold {
            Hold::Held => "held",
            Hold::Detached => "detached",
            Hold::Bypassed => "bypassed",
        };
        Self {
            id: s.id.0,
            name: s.name,
            volume: s.volume.0,
            volume_path: s.volume_path,
            layer: s.layer.0,
            seq: s.seq.0,
            size_bytes: s.size_bytes,
            created_unix_ms: s.created_unix_ms,
            ready: s.ready,
            children: s.children,
            hold: hold.to_owned(),
            group: s.group.map_or(0, |g| g.0),
        }
    }
}

/// An attach of a volume with these options.
pub(crate) fn grant(g: Grant, options: VolumeOptionsRow) -> mds::AttachGrant {
    mds::AttachGrant {
        volume: Some(volume(g.volume, options, Progress::default())),
        layer: g.layer.0,
        seq: g.seq.0,
        epoch: g.epoch.0,
        size_bytes: g.size_bytes,
        ancestry: g.ancestry.into_iter().map(|(l, s)| mds::Ancestor { layer: l.0, seq: s.0 }).collect(),
        cluster: g.cluster.to_vec().into(),
        backup: g.backup.map(|(layer, row)| message((layer, row, None))),
    }
}

/// A layout of segments and their copysets.
pub(crate) fn layout(
    layer: LayerId,
    segments: impl IntoIterator<Item = (SegmentIndex, Vec<CopysetId>)>,
) -> mds::Layout {
    let segment = |(index, copysets): (SegmentIndex, Vec<CopysetId>)| mds::Segment {
        index: index.0,
        copysets: copysets.into_iter().map(|c| c.0).collect(),
    };
    mds::Layout { layer: layer.0, segments: segments.into_iter().map(segment).collect() }
}

/// A task as a chunkserver gets it, with the ancestry of its layer now.
pub(crate) fn task(id: u64, row: &TaskRow, copysets: Vec<u32>, ancestry: &[ParentRef]) -> mds::LayerTask {
    use mds::layer_task::Kind;
    let kind = match row.kind {
        TaskKind::Seal(seq) => Kind::Seal(seq.0),
        TaskKind::DropLayer => Kind::DropLayer(mds::Empty {}),
        TaskKind::DropVersion { after, seq, next } => {
            Kind::DropVersion(mds::DropVersion { after: after.0, seq: seq.0, next: next.0 })
        }
        TaskKind::Flatten { needed } => {
            let chain = ancestry.iter().map(|p| mds::Ancestor { layer: p.layer.0, seq: p.seq.0 }).collect();
            Kind::Flatten(mds::Flatten { needed: needed.0, chain })
        }
    };
    mds::LayerTask { id, layer: row.layer.0, copysets, kind: Some(kind) }
}
