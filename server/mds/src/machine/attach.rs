//! Attaching for writing: the epochs that fence older writers off, and the placement of segments on first write.
//!
//! ```text
//!              AttachVolume(takes_over: none)           DetachVolume(epoch)
//!   detached ────────────────────────────────> attached ──────────────────> detached    DetachUnclean: the same, unclean
//!                                               │    ^
//!                                               └────┘ AttachVolume(takes_over: epoch): epoch + 1, unclean
//! ```
//!
//! Invariants: an epoch is given out once and is higher than every one before (INV); only the current epoch places
//! segments; an attach that did not end by a detach, or by one that gave up writes, leaves its layer unclean: some of
//! its writes may still land, see [`super::snapshots`].

use super::command::{Expected, Grant, Outcome};
use super::row::{
    AttachRow, BackupRow, ClusterRow, CopysetRow, LayerRow, SegmentRow, SnapshotRow, SnapshotState, TaskEffect, TaskKind, VolumeRow,
};
use super::tx::Tx;
use super::{Step, info, layers, namespace, snapshots, tasks};
use crate::refusal::Refusal;
use ogee_common::id::{AttachEpoch, CopysetId, LayerId, SegmentIndex, VolumeId, VolumeSeq};
use ogee_common::limits::{CHUNKS_PER_SEGMENT, SEGMENT_BYTES};
use std::collections::BTreeSet;

/// Attaches a volume for writing. `takes_over` names the attach that the leader found dead or allowed to steal.
///
/// # Errors
/// `NotFound`; `Attached` when another attach than `takes_over` holds the volume; `Unavailable` while copysets fence the client
/// that a rollback took it from.
pub(crate) fn attach(
    tx: &mut Tx<'_>,
    path: &str,
    client: u64,
    description: &str,
    takes_over: Option<AttachEpoch>,
) -> Step<Outcome> {
    let (id, mut volume) = namespace::volume(tx, path)?;
    // Also after the death of the MDS leader that waited for it: what the old client is told was written must not follow ours.
    if !layers::is_fenced(tx, id)? {
        return Err(Refusal::MaybeAttached { by: "the client that a rollback took it from".to_owned() }.into());
    }
    if let Some(attached) = volume.attached.take() {
        if takes_over != Some(attached.epoch) {
            return Err(Refusal::Attached { by: attached.description, epoch: attached.epoch }.into());
        }
        mark_unclean(tx, volume.layer)?;
    }
    volume.epoch = AttachEpoch(volume.epoch.0 + 1);
    volume.attached = Some(AttachRow { epoch: volume.epoch, client, description: description.to_owned() });
    tx.put(&id, &volume);
    let seq = namespace::head_seq(tx, &volume)?;
    let grant = grant(tx, id, &volume, (volume.layer, seq), volume.size_bytes)?;
    Ok(Outcome::Attached(Box::new(Grant { epoch: volume.epoch, ..grant })))
}

/// Writes with a seq of the layer may still be on their way to its copysets.
fn mark_unclean(tx: &mut Tx<'_>, id: LayerId) -> Step<()> {
    let mut layer: LayerRow = tx.expect(&id)?;
    layer.unclean = true;
    tx.put(&id, &layer);
    Ok(())
}

/// What a read-only attach of the volume, or of one of its snapshots, may read. Nothing is recorded.
///
/// # Errors
/// `NotFound`; `Unavailable` while the snapshot is not ready.
pub(crate) fn read_only(tx: &Tx<'_>, path: &str, snapshot: Option<&str>) -> Step<Grant> {
    let (id, volume) = namespace::volume(tx, path)?;
    let Some(name) = snapshot else {
        let seq = namespace::head_seq(tx, &volume)?;
        return grant(tx, id, &volume, (volume.layer, seq), volume.size_bytes);
    };
    let (_, row): (_, SnapshotRow) = snapshots::named(tx, id, path, name)?;
    if row.state != SnapshotState::Ready {
        return Err(Refusal::NotReady { name: row.name }.into());
    }
    grant(tx, id, &volume, (row.layer, row.seq), row.size_bytes)
}

/// Ancestry and backup are of one state: a grant with the one and without the other would let zeros be read.
fn grant(
    tx: &Tx<'_>,
    id: VolumeId,
    volume: &VolumeRow,
    (layer, seq): (LayerId, VolumeSeq),
    size_bytes: u64,
) -> Step<Grant> {
    let chain = layers::ancestry(tx, &tx.expect(&layer)?)?;
    let bottom = chain.last().map_or(layer, |parent| parent.layer);
    let cluster: ClusterRow = tx.get(&())?.ok_or(Refusal::NotFormed)?;
    Ok(Grant {
        volume: info::volume(tx, id, volume)?,
        layer,
        seq,
        epoch: AttachEpoch(0),
        size_bytes,
        ancestry: chain.into_iter().map(|p| (p.layer, p.seq)).collect(),
        cluster: cluster.cluster,
        backup: tx.get::<BackupRow>(&bottom)?.map(|row| (bottom, row)),
    })
}

/// Ends an attach whose client has drained its writes; `unclean` when it gave some up without knowing their outcome.
/// Repeating it changes nothing.
///
/// # Errors
/// `NotFound`; `Fenced` when it is not the last attach.
pub(crate) fn detach(tx: &mut Tx<'_>, id: VolumeId, epoch: AttachEpoch, unclean: bool) -> Step<Outcome> {
    let mut volume: VolumeRow = tx.get(&id)?.ok_or(Refusal::VolumeGone)?;
    if epoch != volume.epoch {
        return Err(Refusal::Fenced { given: epoch, current: volume.epoch }.into());
    }
    if volume.attached.take().is_some() {
        tx.put(&id, &volume);
        if unclean {
            mark_unclean(tx, volume.layer)?;
        }
    }
    Ok(Outcome::Done)
}

/// Checks that an epoch is the volume's current attach.
///
/// # Errors
/// `NotFound`, `Fenced`.
pub(crate) fn current(tx: &Tx<'_>, id: VolumeId, epoch: AttachEpoch) -> Step<VolumeRow> {
    let volume: VolumeRow = tx.get(&id)?.ok_or(Refusal::VolumeGone)?;
    match &volume.attached {
        Some(attached) if attached.epoch == epoch => Ok(volume),
        _ => Err(Refusal::Fenced { given: epoch, current: volume.epoch }.into()),
    }
}

/// Checks that an epoch is the volume's current attach, and that what it writes to is `layer`.
///
/// # Errors
/// `NotFound`, `Fenced`.
pub(crate) fn writes_to(tx: &Tx<'_>, id: VolumeId, epoch: AttachEpoch, layer: LayerId) -> Step<VolumeRow> {
    let volume = current(tx, id, epoch)?;
    if volume.layer == layer { Ok(volume) } else { Err(Refusal::Fenced { given: epoch, current: volume.epoch }.into()) }
}

/// What a snapshot of the volume would have to assume now.
pub(crate) fn expected(tx: &Tx<'_>, volume: &VolumeRow) -> Step<Expected> {
    let seq = namespace::head_seq(tx, volume)?;
    Ok(Expected { layer: volume.layer, seq, attached: volume.attached.as_ref().map(|a| a.epoch) })
}

/// Which segment a writer wants placed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WantedSegment {
    pub(crate) volume: VolumeId,
    pub(crate) epoch: AttachEpoch,
    pub(crate) layer: LayerId,
    pub(crate) index: SegmentIndex,
}

/// The placement that a writer may use for a segment, if there is one yet. Read before anything is proposed.
///
/// # Errors
/// `NotFound`, `Fenced`, `InvalidArgument`; `Unavailable` while a snapshot is being made.
pub(crate) fn placed(tx: &Tx<'_>, wanted: WantedSegment) -> Step<Option<SegmentRow>> {
    let volume = writes_to(tx, wanted.volume, wanted.epoch, wanted.layer)?;
    if u64::from(wanted.index.0) * SEGMENT_BYTES >= volume.size_bytes {
        return Err(Refusal::BehindEnd(wanted.index).into());
    }
    let layer: LayerRow = tx.expect(&wanted.layer)?;
    let mut rows = layers::placement(tx, wanted.layer, &layer, wanted.index, 1)?;
    match rows.remove(&wanted.index) {
        Some(row) => Ok(Some(row)),
        None if layer.confirming > 0 => Err(Refusal::SnapshotUnderWay.into()),
        None => Ok(None),
    }
}

/// Places a segment in the copysets that the leader chose, unless it is placed already.
///
/// # Errors
/// As [`placed`], and `InvalidArgument` for copysets that are not 64 of the volume's pool.
pub(crate) fn allocate(tx: &mut Tx<'_>, wanted: WantedSegment, copysets: &[CopysetId]) -> Step<Outcome> {
    if let Some(row) = placed(tx, wanted)? {
        return Ok(Outcome::Segment { copysets: row.copysets, sealing: row.sealing });
    }
    let mut layer: LayerRow = tx.expect(&wanted.layer)?;
    let distinct: BTreeSet<CopysetId> = copysets.iter().copied().collect();
    for id in &distinct {
        let row: Option<CopysetRow> = tx.get(id)?;
        if row.is_none_or(|row| row.pool != layer.pool) {
            return Err(Refusal::ForeignCopyset(*id).into());
        }
    }
    if copysets.len() != CHUNKS_PER_SEGMENT as usize {
        return Err(Refusal::PlanOutdated.into());
    }
    layer.segments += 1;
    tx.put(&wanted.layer, &layer);
    let sealing = if layer.min_seq.0 == 0 {
        None
    } else {
        let effect = TaskEffect::SegmentOpen(wanted.index);
        tasks::create(tx, wanted.layer, TaskKind::Seal(layer.min_seq), effect, &distinct)?
    };
    let row = SegmentRow { copysets: copysets.to_vec(), seq: layer.seq, sealing };
    tx.put(&(wanted.layer, wanted.index), &row);
    Ok(Outcome::Segment { copysets: row.copysets, sealing })
}
