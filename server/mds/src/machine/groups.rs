//! Group snapshots: snapshots of several volumes that are one cut.
//!
//! ```text
//!            CreateGroup               ConfirmGroup
//!   (none) ──────────────> under way ───────────────> its snapshots are ready, or become so by their seals
//!                              └────────────────────> its snapshots are gone
//!                               DropGroup
//! ```
//!
//! **Exactness (INV).** A cut that holds a write holds every write that was acknowledged before it began, on whichever
//! of the volumes. The commit alone is such a cut if every attached client held its writes while it was applied. If one
//! client was bypassed, its writes with the old seq are accepted until its layer is sealed, so the **others must hold
//! until then**: let go earlier, they could write what the cut lacks, and the bypassed client, seeing that, could write
//! what the cut still has. With two bypassed clients nobody can stop one while the other is being sealed: there is no
//! such group. For the same reason a volume that nobody had attached must not have been attached before that seal was
//! done; its `AttachEpoch` tells. Whether the clients held is what the leader knows (`service::groups`); seals and
//! epochs are checked here. Writers whose attach was taken over, and writes that were given up, promise no order even
//! within one volume: their seals are waited for by the single snapshots only.
//!
//! Until the group is confirmed its snapshots are in state `Confirming`: not listed, not readable, no segment is placed.

use super::command::{GroupPart, Outcome, SnapshotInfo};
use super::row::{
    Counter, GroupMember, GroupedRow, Hold, SnapshotGroupRow, SnapshotRow, SnapshotState, TaskRow, VolumeRow,
};
use super::snapshots::{self, Begun, NewSnapshot};
use super::tx::Tx;
use super::{Step, info, namespace};
use crate::refusal::Refusal;
use ogee_common::id::{SnapshotGroupId, VolumeSnapshotId};

/// Commits the snapshots of a group, all or none.
///
/// # Errors
/// As for one snapshot, of the first volume that refuses.
pub(crate) fn create(tx: &mut Tx<'_>, parts: &[GroupPart], now_unix_ms: u64) -> Step<Outcome> {
    let group = SnapshotGroupId(tx.next_id(Counter::SnapshotGroup)?);
    let mut members = vec![];
    for part in parts {
        let member = commit(tx, part, now_unix_ms)?;
        tx.put(&member.snapshot, &GroupedRow(group));
        members.push(member);
    }
    let snapshots = infos(tx, &members)?;
    tx.put(&group, &SnapshotGroupRow { members });
    Ok(Outcome::Group { group, snapshots })
}

fn commit(tx: &mut Tx<'_>, part: &GroupPart, now_unix_ms: u64) -> Step<GroupMember> {
    let GroupPart { volume, name, expected, hold } = part;
    let (volume, expected, hold) = (*volume, *expected, *hold);
    let new = NewSnapshot { volume, name: Some(name), expected, hold, now_unix_ms };
    let Begun { id, mut row, mut layer } = snapshots::begin(tx, &new)?;
    if snapshots::needs_seal(hold, &layer) {
        snapshots::seal_layer(tx, &mut layer, id, &mut row)?;
    }
    let sealing = match row.state {
        SnapshotState::Sealing(task) => Some(task),
        SnapshotState::Confirming | SnapshotState::Ready => None,
    };
    row.state = SnapshotState::Confirming;
    layer.confirming += 1;
    tx.put(&row.layer, &layer);
    put(tx, id, &row);
    let epoch = tx.expect::<VolumeRow>(&volume)?.epoch;
    Ok(GroupMember { snapshot: id, hold, epoch, sealing })
}

fn put(tx: &mut Tx<'_>, id: VolumeSnapshotId, row: &SnapshotRow) {
    snapshots::settle(tx, id, row);
    tx.put(&id, row);
}

fn infos(tx: &Tx<'_>, members: &[GroupMember]) -> Step<Vec<SnapshotInfo>> {
    members.iter().map(|m| info::snapshot(tx, m.snapshot, &tx.expect(&m.snapshot)?)).collect()
}

/// The group of a snapshot that is neither confirmed nor dropped.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn under_way(tx: &Tx<'_>, snapshot: VolumeSnapshotId) -> Step<Option<SnapshotGroupId>> {
    let Some(GroupedRow(group)) = tx.get(&snapshot)? else { return Ok(None) };
    Ok(tx.get::<SnapshotGroupRow>(&group)?.map(|_| group))
}

/// Whether the layers of a group's bypassed clients are sealed. A group that is gone has nothing to wait for.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn bypassed_are_sealed(tx: &Tx<'_>, group: SnapshotGroupId) -> Step<bool> {
    let Some(row) = tx.get::<SnapshotGroupRow>(&group)? else { return Ok(true) };
    for member in row.members.iter().filter(|m| m.hold == Hold::Bypassed) {
        if let Some(task) = member.sealing
            && tx.get::<TaskRow>(&task)?.is_some()
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The cut is exact: the snapshots are ready, except where the seal of an older attach is still under way.
///
/// # Errors
/// `NotFound` when the group or one of its snapshots is gone; `Unavailable` when a bypassed client is not sealed off, or
/// a volume was attached meanwhile. Then it is for the caller to drop the group.
pub(crate) fn confirm(tx: &mut Tx<'_>, group: SnapshotGroupId) -> Step<Outcome> {
    let row: SnapshotGroupRow = tx.get(&group)?.ok_or(Refusal::SnapshotGone)?;
    if !bypassed_are_sealed(tx, group)? {
        return Err(Refusal::SnapshotUnderWay.into());
    }
    let bypasses = row.members.iter().any(|m| m.hold == Hold::Bypassed);
    for member in &row.members {
        let mut snapshot: SnapshotRow = tx.get(&member.snapshot)?.ok_or(Refusal::SnapshotGone)?;
        let volume: VolumeRow = tx.get(&snapshot.volume)?.ok_or(Refusal::VolumeGone)?;
        if bypasses && member.hold == Hold::Detached && volume.epoch != member.epoch {
            let seq = namespace::head_seq(tx, &volume)?;
            return Err(Refusal::Moved { layer: volume.layer, seq }.into());
        }
        snapshots::end_confirming(tx, snapshot.layer)?;
        snapshot.state = match member.sealing {
            Some(task) if tx.get::<TaskRow>(&task)?.is_some() => SnapshotState::Sealing(task),
            _ => SnapshotState::Ready,
        };
        put(tx, member.snapshot, &snapshot);
    }
    tx.delete::<SnapshotGroupRow>(&group);
    let snapshots = infos(tx, &row.members)?;
    Ok(Outcome::Group { group, snapshots })
}

/// Removes a group that is under way, with its snapshots; layers whose clients may not know the new seq are sealed. Anything
/// else is left as it is.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn drop_group(tx: &mut Tx<'_>, group: SnapshotGroupId) -> Step<Outcome> {
    let Some(row) = tx.get::<SnapshotGroupRow>(&group)? else { return Ok(Outcome::Done) };
    tx.delete::<SnapshotGroupRow>(&group);
    for member in &row.members {
        if let Some(snapshot) = tx.get::<SnapshotRow>(&member.snapshot)? {
            snapshots::remove(tx, member.snapshot, &snapshot)?;
        }
    }
    Ok(Outcome::Done)
}
