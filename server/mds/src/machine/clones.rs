//! Clones and rollbacks: a new layer on a snapshot. The rows written do not depend on the size of the volume, because a
//! layer refers to its parent's placement (see [`super::layers`]).
//!
//! Invariants: a parent is a ready snapshot, so it never changes under its children; a rollback keeps every visible
//! snapshot of the volume and only moves its head; no layer has more than [`ANCESTRY_DEPTH_MAX`] layers below it.

use super::command::Outcome;
use super::namespace::{self, NewVolume};
use super::row::{Counter, LayerRow, ParentRef, SnapshotRow, SnapshotState, VolumeOptionsRow, VolumeRow};
use super::tx::Tx;
use super::{Step, info, layers, options, snapshots};
use crate::refusal::Refusal;
use ogee_common::id::{AttachEpoch, LayerId, VolumeId, VolumeSnapshotId};
use ogee_common::limits::ANCESTRY_DEPTH_MAX;

/// A layer on a snapshot.
fn layer_on(tx: &Tx<'_>, volume: VolumeId, snapshot: &SnapshotRow) -> Step<LayerRow> {
    if snapshot.state != SnapshotState::Ready {
        return Err(Refusal::NotReady { name: snapshot.name.clone() }.into());
    }
    let below: LayerRow = tx.expect(&snapshot.layer)?;
    // Counted, not taken from the row: an ancestor may have let go of its parent since.
    let depth = layers::depth(tx, &below)? + 1;
    if depth as usize > ANCESTRY_DEPTH_MAX {
        return Err(Refusal::TooDeep { depth }.into());
    }
    let parent = Some(ParentRef { layer: snapshot.layer, seq: snapshot.seq });
    Ok(LayerRow { parent, depth, inherited: snapshot.segments, ..layers::first(volume, below.pool) })
}

/// Where the clone shall stand in the namespace.
pub(crate) struct NewClone<'a> {
    pub(crate) path: &'a str,
    /// Empty: the source's.
    pub(crate) owner: &'a str,
    pub(crate) create_parents: bool,
    pub(crate) now_unix_ms: u64,
}

/// Makes a volume on a snapshot.
///
/// # Errors
/// `NotFound`, `AlreadyExists`, `Limit`, `Unavailable` while the snapshot is not ready.
pub(crate) fn clone_volume(tx: &mut Tx<'_>, id: VolumeSnapshotId, new: &NewClone<'_>) -> Step<Outcome> {
    let snapshot: SnapshotRow = tx.get(&id)?.ok_or(Refusal::SnapshotGone)?;
    let source: VolumeRow = tx.expect(&snapshot.volume)?;
    let source_path = namespace::path_of(tx, source.directory, &source.name)?;
    let parent = if snapshot.hidden { source_path } else { format!("{source_path}@{}", snapshot.name) };
    let owner = if new.owner.is_empty() { source.owner } else { new.owner.to_owned() };
    let layer = layer_on(tx, VolumeId(0), &snapshot)?;
    let sector_bytes = options::of(tx, snapshot.volume)?.sector_bytes;
    let volume = NewVolume {
        path: new.path,
        create_parents: new.create_parents,
        owner,
        size_bytes: snapshot.size_bytes,
        pool: source.pool,
        parent,
        now_unix_ms: new.now_unix_ms,
        options: VolumeOptionsRow { sector_bytes, ..VolumeOptionsRow::default() },
    };
    let (volume, child) = namespace::insert(tx, volume, |volume| LayerRow { volume, ..layer })?;
    layers::join_parent(tx, child, volume, ParentRef { layer: snapshot.layer, seq: snapshot.seq })?;
    Ok(Outcome::Volume(Box::new(info::volume(tx, volume, &tx.expect(&volume)?)?)))
}

/// Puts a volume back to one of its snapshots. `ends` names the attach that the caller agreed to end.
///
/// # Errors
/// `NotFound`, `Attached`, `Limit`, `Unavailable` while the snapshot is not ready.
pub(crate) fn rollback(tx: &mut Tx<'_>, path: &str, name: &str, ends: Option<AttachEpoch>) -> Step<Outcome> {
    let (volume_id, mut volume) = namespace::volume(tx, path)?;
    let (_, snapshot) = snapshots::named(tx, volume_id, path, name)?;
    if let Some(attached) = volume.attached.take() {
        if ends != Some(attached.epoch) {
            return Err(Refusal::Attached { by: attached.description, epoch: attached.epoch }.into());
        }
        volume.epoch = AttachEpoch(volume.epoch.0 + 1);
    }
    let layer = layer_on(tx, volume_id, &snapshot)?;
    let child = LayerId(tx.next_id(Counter::Layer)?);
    tx.put(&child, &layer);
    let old = std::mem::replace(&mut volume.layer, child);
    volume.size_bytes = snapshot.size_bytes;
    tx.put(&volume_id, &volume);
    // First the new child, then the old head, which may stand on the same snapshot and would take it along.
    layers::join_parent(tx, child, volume_id, ParentRef { layer: snapshot.layer, seq: snapshot.seq })?;
    if ends.is_some() {
        layers::fence_head(tx, old)?;
    }
    layers::retire_head(tx, old)?;
    Ok(Outcome::Volume(Box::new(info::volume(tx, volume_id, &tx.expect(&volume_id)?)?)))
}
