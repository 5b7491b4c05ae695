//! Flattening: the head layer of a volume gets everything that it reads from its ancestors as its own, and stands on
//! nothing then.
//!
//! ```text
//!              FlattenVolume                      last copyset is done
//!   (parent) ──────────────────> flattening ─────────────────────────────> no parent
//!      ^                             │
//!      └──── CancelFlatten, or the layer is head no more (what was copied stays, and is used by the next one)
//! ```
//!
//! A layer task of kind Flatten has every copyset in which the layer or an ancestor may have chunks copy what is missing
//! (`ogee_chunkserver::store::flatten` has the argument why every seq of the layer reads the same all the time).
//! Invariants: such a task holds up no other task of its layer, nor is it held up, because it may take hours; the parent is
//! held until the last copyset has reported, in the same transaction in which the layer takes over the placement of
//! its ancestors' segments as its own; copysets of a segment are never others than before; a layer has at most one flatten,
//! and only while it is a head; at most [`FLATTENS_MAX`] are under way. Asking again for what is under way or done is no error.

use super::command::Outcome;
use super::row::{
    FlattenRow, LayerRow, LayerSnapshotRow, SegmentRow, TaskEffect, TaskKind, TaskRow, TaskTodoRow, VolumeRow,
};
use super::tx::Tx;
use super::{Step, backups, info, layers, namespace, tasks};
use crate::refusal::Refusal;
use ogee_common::id::{LayerId, SegmentIndex, VolumeId, VolumeSeq};

/// Flattens under way at once: a heartbeat looks at a bounded number of a copyset's tasks, and other tasks must not starve.
pub(crate) const FLATTENS_MAX: usize = 16;

/// Starts to flatten the head of a volume, or stops it.
///
/// # Errors
/// `NotFound`; `Limit` when too many are under way; `InUse` while it stands on a backup.
pub(crate) fn volume(tx: &mut Tx<'_>, path: &str, cancels: bool, now_unix_ms: u64) -> Step<Outcome> {
    let (id, row) = namespace::volume(tx, path)?;
    if cancels {
        cancel(tx, row.layer)?;
    } else {
        start(tx, row.layer, now_unix_ms)?;
    }
    let row: VolumeRow = tx.expect(&id)?;
    Ok(Outcome::Volume(Box::new(info::volume(tx, id, &row)?)))
}

fn start(tx: &mut Tx<'_>, id: LayerId, now_unix_ms: u64) -> Step<()> {
    let layer: LayerRow = tx.expect(&id)?;
    if layer.parent.is_none() || tx.get::<FlattenRow>(&id)?.is_some() {
        return Ok(());
    }
    backups::refuse_hydrating(tx, id)?;
    if tx.scan::<FlattenRow>(&(), None, FLATTENS_MAX)?.len() >= FLATTENS_MAX {
        return Err(Refusal::TooManyFlattens.into());
    }
    let copysets = layers::copysets(tx, id, &layer)?;
    let total = u32::try_from(copysets.len()).expect("copyset ids have 32 bits");
    let oldest = tx.scan_range::<LayerSnapshotRow>(&(id, VolumeSeq(0)), &(id, VolumeSeq(u64::MAX)), 1)?;
    let needed = oldest.first().map_or(layer.seq, |((_, seq), _)| *seq);
    let kind = TaskKind::Flatten { needed };
    if let Some(task) = tasks::create(tx, id, kind, TaskEffect::Flattened, &copysets)? {
        tx.put(&id, &FlattenRow { task, total, started_unix_ms: now_unix_ms });
    }
    Ok(())
}

/// Gives the flatten of a layer up, if there is one.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn cancel(tx: &mut Tx<'_>, id: LayerId) -> Step<()> {
    let Some(row) = tx.get::<FlattenRow>(&id)? else { return Ok(()) };
    // Placements only grow: those of the start are among them.
    for copyset in layers::copysets(tx, id, &tx.expect(&id)?)? {
        tx.delete::<TaskTodoRow>(&(copyset, row.task));
    }
    tx.delete::<TaskRow>(&row.task);
    tx.delete::<FlattenRow>(&id);
    Ok(())
}

/// Every copyset has copied what the layer needs: it lets go of its parent.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn finish(tx: &mut Tx<'_>, id: LayerId) -> Step<()> {
    tx.delete::<FlattenRow>(&id);
    let mut layer: LayerRow = tx.expect(&id)?;
    let Some(parent) = layer.parent else { return Ok(()) };
    for (index, row) in layers::placement(tx, id, &layer, SegmentIndex(0), u32::MAX)? {
        if tx.get::<SegmentRow>(&(id, index))?.is_none() {
            // Seq 0: it is seen by whoever stands on any seq of the layer, as before.
            tx.put(&(id, index), &SegmentRow { copysets: row.copysets, seq: VolumeSeq(0), sealing: None });
            layer.segments += 1;
        }
    }
    (layer.parent, layer.depth, layer.inherited) = (None, 0, 0);
    tx.put(&id, &layer);
    if let Some(mut volume) = tx.get::<VolumeRow>(&layer.volume)?
        && volume.layer == id
    {
        volume.parent.clear();
        tx.put(&layer.volume, &volume);
    }
    layers::leave_parent(tx, id, layer.volume, parent)
}

/// How far the flatten of a volume's head is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Progress {
    /// Copysets that have done it.
    pub(crate) done: u32,
    /// Copysets in all; 0: none is under way.
    pub(crate) total: u32,
}

/// How far the flatten of a volume's head is.
///
/// # Errors
/// `NotFound`.
pub(crate) fn progress(tx: &Tx<'_>, id: VolumeId) -> Step<Progress> {
    let volume: VolumeRow = tx.get(&id)?.ok_or(Refusal::VolumeGone)?;
    let Some(row) = tx.get::<FlattenRow>(&volume.layer)? else { return Ok(Progress::default()) };
    let remaining = tx.get::<TaskRow>(&row.task)?.map_or(0, |t| t.remaining);
    Ok(Progress { done: row.total.saturating_sub(remaining), total: row.total })
}
