//! Volume snapshots: a seq of a layer that is kept.
//!
//! **Exactness (INV).** After the snapshot at seq `s` is ready, no write with a seq up to `s` is accepted in any copyset
//! of the layer. Who could still send one: the attached client, unless it held its writes until the commit; and every
//! client whose attach of this head ended without a detach, with any seq (it may learn newer ones from refusals), or whose
//! detach said that it gave writes up. If
//! there is none, the snapshot is ready at once (nobody attached) or when the leader confirms that the hold lasted. Else
//! every copyset of the layer is sealed at `s + 1` first, which cuts each client's writes at a point between its own
//! earlier and later ones. **A layer that was sealed at `m` stays sealed at `m`**: segments placed later are sealed
//! before a writer may see them (`attach::allocate`). While a snapshot waits for its confirmation no segment is placed:
//! its data could belong to either side.
//!
//! **Deletion.** A snapshot on which clones stand is refused. One that only its own volume stands on (it was rolled back) becomes hidden and goes
//! with the last such layer. Else its versions are merged into the next seq that is needed: the next snapshot's or
//! the layer's own.

use super::command::{Expected, Outcome};
use super::row::{
    Counter, GroupedRow, Hold, LayerRow, LayerSnapshotRow, SnapshotNameRow, SnapshotRow, SnapshotState, TaskEffect, TaskKind,
    UnsettledRow, VolumeRow,
};
use super::tx::Tx;
use super::{Step, groups, info, layers, namespace, tasks};
use crate::refusal::{Refusal, SNAPSHOTS_PER_VOLUME_MAX};
use ogee_common::id::{LayerId, VolumeId, VolumeSeq, VolumeSnapshotId};

/// What a new snapshot shall be.
pub(crate) struct NewSnapshot<'a> {
    pub(crate) volume: VolumeId,
    /// `None`: hidden.
    pub(crate) name: Option<&'a str>,
    pub(crate) expected: Expected,
    pub(crate) hold: Hold,
    pub(crate) now_unix_ms: u64,
}

/// A snapshot whose row is not written yet.
pub(crate) struct Begun {
    pub(crate) id: VolumeSnapshotId,
    pub(crate) row: SnapshotRow,
    /// Of the row; to be written after it is settled how exactness is got.
    pub(crate) layer: LayerRow,
}

/// Commits a snapshot of a volume's head.
///
/// # Errors
/// `NotFound`, `AlreadyExists`, `Limit`; `Unavailable` when the volume is not as the leader expected.
pub(crate) fn create(tx: &mut Tx<'_>, new: &NewSnapshot<'_>) -> Step<Outcome> {
    let Begun { id, mut row, mut layer } = begin(tx, new)?;
    if needs_seal(new.hold, &layer) {
        seal_layer(tx, &mut layer, id, &mut row)?;
    } else if new.hold == Hold::Held {
        row.state = SnapshotState::Confirming;
        layer.confirming += 1;
    }
    tx.put(&row.layer, &layer);
    finish(tx, id, &row)
}

/// Whether somebody may still send writes with the seq of a snapshot.
pub(crate) const fn needs_seal(hold: Hold, layer: &LayerRow) -> bool {
    matches!(hold, Hold::Bypassed) || layer.unclean || layer.seals > 0
}

/// Checks that the snapshot can be made, gives it its name and raises the layer's seq.
///
/// # Errors
/// As [`create`].
pub(crate) fn begin(tx: &mut Tx<'_>, new: &NewSnapshot<'_>) -> Step<Begun> {
    let mut volume: VolumeRow = tx.get(&new.volume)?.ok_or(Refusal::VolumeGone)?;
    let mut layer: LayerRow = tx.expect(&volume.layer)?;
    let attached = volume.attached.as_ref().map(|a| a.epoch);
    let hold_fits = (new.hold == Hold::Detached) == attached.is_none();
    if new.expected != (Expected { layer: volume.layer, seq: layer.seq, attached }) || !hold_fits {
        return Err(Refusal::Moved { layer: volume.layer, seq: layer.seq }.into());
    }
    if layer.snapshots >= SNAPSHOTS_PER_VOLUME_MAX || volume.snapshots >= SNAPSHOTS_PER_VOLUME_MAX {
        return Err(Refusal::TooManySnapshots.into());
    }
    let id = VolumeSnapshotId(tx.next_id(Counter::Snapshot)?);
    let name = new.name.map_or_else(|| format!(".clone-{}", id.0), str::to_owned);
    if tx.get::<SnapshotNameRow>(&(new.volume, name.clone()))?.is_some() {
        let path = namespace::path_of(tx, volume.directory, &volume.name)?;
        return Err(Refusal::SnapshotTaken { path, name }.into());
    }
    let seq = layer.seq;
    layer.seq = VolumeSeq(seq.0 + 1);
    layer.snapshots += 1;
    if new.name.is_some() {
        volume.snapshots += 1;
        tx.put(&new.volume, &volume);
    }
    let row = SnapshotRow {
        volume: new.volume,
        name: name.clone(),
        layer: volume.layer,
        seq,
        size_bytes: volume.size_bytes,
        segments: layer.segments + layer.inherited,
        created_unix_ms: new.now_unix_ms,
        state: SnapshotState::Ready,
        hold: new.hold,
        hidden: new.name.is_none(),
        clones: 0,
        rollbacks: 0,
    };
    tx.put(&(new.volume, name), &SnapshotNameRow(id));
    tx.put(&(volume.layer, seq), &LayerSnapshotRow(id));
    Ok(Begun { id, row, layer })
}

/// Starts to seal every copyset of the snapshot's layer behind the snapshot.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn seal_layer(
    tx: &mut Tx<'_>,
    layer: &mut LayerRow,
    id: VolumeSnapshotId,
    row: &mut SnapshotRow,
) -> Step<()> {
    let bound = VolumeSeq(row.seq.0 + 1);
    layer.min_seq = layer.min_seq.max(bound);
    row.hold = Hold::Bypassed;
    let copysets = layers::copysets(tx, row.layer, layer)?;
    let effect = TaskEffect::SnapshotReady(id);
    row.state = match tasks::create(tx, row.layer, TaskKind::Seal(bound), effect, &copysets)? {
        Some(task) => {
            layer.seals += 1;
            SnapshotState::Sealing(task)
        }
        None => SnapshotState::Ready,
    };
    Ok(())
}

fn finish(tx: &mut Tx<'_>, id: VolumeSnapshotId, row: &SnapshotRow) -> Step<Outcome> {
    settle(tx, id, row);
    tx.put(&id, row);
    Ok(Outcome::Snapshot(Box::new(info::snapshot(tx, id, row)?)))
}

/// Keeps the list of snapshots that the leader must look after.
pub(crate) fn settle(tx: &mut Tx<'_>, id: VolumeSnapshotId, row: &SnapshotRow) {
    let childless = row.hidden && row.clones + row.rollbacks == 0;
    if childless || row.state == SnapshotState::Confirming {
        tx.put(&id, &UnsettledRow);
    } else {
        tx.delete::<UnsettledRow>(&id);
    }
}

/// The snapshot of a row does not wait for its confirmation any more.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn end_confirming(tx: &mut Tx<'_>, layer: LayerId) -> Step<LayerRow> {
    let mut row: LayerRow = tx.expect(&layer)?;
    row.confirming -= 1;
    tx.put(&layer, &row);
    Ok(row)
}

/// The hold lasted: the snapshot is ready. Repeating it changes nothing, nor does it concern a group's snapshots.
///
/// # Errors
/// `NotFound`.
pub(crate) fn confirm(tx: &mut Tx<'_>, id: VolumeSnapshotId) -> Step<Outcome> {
    let mut row: SnapshotRow = tx.get(&id)?.ok_or(Refusal::SnapshotGone)?;
    if row.state == SnapshotState::Confirming && groups::under_way(tx, id)?.is_none() {
        end_confirming(tx, row.layer)?;
        row.state = SnapshotState::Ready;
    }
    finish(tx, id, &row)
}

/// The hold may not have lasted: the layer is sealed. Repeating it changes nothing, nor does it concern a group's.
///
/// # Errors
/// `NotFound`.
pub(crate) fn seal(tx: &mut Tx<'_>, id: VolumeSnapshotId) -> Step<Outcome> {
    let mut row: SnapshotRow = tx.get(&id)?.ok_or(Refusal::SnapshotGone)?;
    if row.state == SnapshotState::Confirming && groups::under_way(tx, id)?.is_none() {
        let mut layer = end_confirming(tx, row.layer)?;
        seal_layer(tx, &mut layer, id, &mut row)?;
        tx.put(&row.layer, &layer);
    }
    finish(tx, id, &row)
}

/// The visible snapshot with a name.
///
/// # Errors
/// `NotFound`.
pub(crate) fn named(
    tx: &Tx<'_>,
    volume: VolumeId,
    path: &str,
    name: &str,
) -> Step<(VolumeSnapshotId, SnapshotRow)> {
    let missing = || Refusal::NoSuchSnapshot { path: path.to_owned(), name: name.to_owned() };
    let SnapshotNameRow(id) = tx.get(&(volume, name.to_owned()))?.ok_or_else(missing)?;
    let row: SnapshotRow = tx.expect(&id)?;
    if row.hidden { Err(missing().into()) } else { Ok((id, row)) }
}

/// Deletes a snapshot.
///
/// # Errors
/// `NotFound`; `InUse` with the clones that stand on it.
pub(crate) fn delete(tx: &mut Tx<'_>, path: &str, name: &str) -> Step<Outcome> {
    let (volume_id, mut volume) = namespace::volume(tx, path)?;
    let (id, mut row) = named(tx, volume_id, path, name)?;
    if row.clones > 0 {
        let (volumes, more) = info::users(tx, &row)?;
        return Err(Refusal::HasClones { volumes, more }.into());
    }
    if row.rollbacks == 0 {
        remove(tx, id, &row)?;
        return Ok(Outcome::Done);
    }
    volume.snapshots -= 1;
    tx.put(&volume_id, &volume);
    tx.delete::<SnapshotNameRow>(&(volume_id, row.name));
    row.name = format!(".rollback-{}", id.0);
    row.hidden = true;
    tx.put(&(volume_id, row.name.clone()), &SnapshotNameRow(id));
    settle(tx, id, &row);
    tx.put(&id, &row);
    Ok(Outcome::Done)
}

/// Removes a hidden snapshot that nothing stands on; anything else is left as it is.
pub(crate) fn reap(tx: &mut Tx<'_>, id: VolumeSnapshotId) -> Step<Outcome> {
    if let Some(row) = tx.get::<SnapshotRow>(&id)?
        && row.hidden
        && row.clones + row.rollbacks == 0
    {
        remove(tx, id, &row)?;
    }
    Ok(Outcome::Done)
}

/// Removes a snapshot on which nothing stands, and whatever only it kept.
pub(crate) fn remove(tx: &mut Tx<'_>, id: VolumeSnapshotId, row: &SnapshotRow) -> Step<()> {
    tx.delete::<SnapshotRow>(&id);
    tx.delete::<SnapshotNameRow>(&(row.volume, row.name.clone()));
    tx.delete::<LayerSnapshotRow>(&(row.layer, row.seq));
    tx.delete::<UnsettledRow>(&id);
    tx.delete::<GroupedRow>(&id);
    if !row.hidden && let Some(mut volume) = tx.get::<VolumeRow>(&row.volume)? {
        volume.snapshots -= 1;
        tx.put(&row.volume, &volume);
    }
    let mut layer: LayerRow = tx.expect(&row.layer)?;
    layer.snapshots -= 1;
    if row.state == SnapshotState::Confirming {
        layer.confirming -= 1;
        if row.hold == Hold::Held {
            // Whether the client heard the new seq is not known. What it writes with the old one after its versions were
            // merged into newer ones would be hidden by those.
            seal_layer(tx, &mut layer, id, &mut row.clone())?;
        }
    }
    tx.put(&row.layer, &layer);
    if !layer.head && layer.snapshots == 0 {
        return layers::drop_unused(tx, row.layer, layer);
    }
    let (after, next) = neighbours(tx, row.layer, &layer, row.seq)?;
    let kind = TaskKind::DropVersion { after, seq: row.seq, next };
    let copysets = layers::copysets(tx, row.layer, &layer)?;
    tasks::create(tx, row.layer, kind, TaskEffect::None, &copysets)?;
    Ok(())
}

/// The seqs still needed around one that is not: the snapshot before (0: none), and the snapshot behind or the layer's
/// own seq.
fn neighbours(tx: &Tx<'_>, id: LayerId, layer: &LayerRow, seq: VolumeSeq) -> Step<(VolumeSeq, VolumeSeq)> {
    let behind = tx.scan::<LayerSnapshotRow>(&id, Some(&(id, seq)), 1)?;
    let next = behind.first().map_or(layer.seq, |((_, s), _)| *s);
    let before = tx.scan_range::<LayerSnapshotRow>(&(id, VolumeSeq(0)), &(id, seq), usize::MAX)?;
    let after = before.last().map_or(VolumeSeq(0), |((_, s), _)| *s);
    Ok((after, next))
}
