//! Replicas that move: chunkservers that are given up, and copysets that get a replica elsewhere instead.
//!
//! ```text
//!              StartMove                       the leader reports the new members
//!   (no move) ───────────> Adding ───────────────────────────────────────────────> FinishMove: (no move), members replaced
//!                             │ CancelMove
//!                             └──────────> Cancelling ── the leader reports the old members ──> EndMove: (no move)
//! ```
//! Invariants: a copyset has at most one move; the new replica has an id of its own that was never used (INV), and is made
//! from nothing once; the row of a copyset changes only after its Raft group has committed the new members, so a chunkserver
//! that is not in the row and not in the move holds nothing that anybody needs; replicas stay in distinct zones. Every
//! command names what it was decided on and changes nothing if that does not hold any more. Who moves where is decided by
//! [`crate::rebuild`].

use super::Step;
use super::command::Outcome;
use super::row::{ChunkserverRow, CopysetRow, Counter, HostedRow, MoveRow, MoveState, OutReason, OutRow, ReplicaRow};
use super::tx::Tx;
use crate::refusal::Refusal;
use ogee_common::id::{ChunkserverId, CopysetId, ReplicaId};

/// Gives a chunkserver up, or takes it back. A reason given by a person is not overwritten by a machine.
///
/// # Errors
/// `NotFound`.
pub(crate) fn set_out(
    tx: &mut Tx<'_>,
    id: ChunkserverId,
    reason: Option<OutReason>,
    now_unix_ms: u64,
) -> Step<Outcome> {
    tx.get::<ChunkserverRow>(&id)?.ok_or(Refusal::NoSuchChunkserver(id))?;
    let known: Option<OutRow> = tx.get(&id)?;
    match (reason, known) {
        (None, _) => tx.delete::<OutRow>(&id),
        (Some(OutReason::Silent), Some(_)) => {}
        (Some(reason), Some(known)) if known.reason == reason => {}
        (Some(reason), _) => tx.put(&id, &OutRow { reason, since_unix_ms: now_unix_ms }),
    }
    Ok(Outcome::Done)
}

/// Forgets a chunkserver. Its disk keeps its id: should it come back, it is the same chunkserver.
///
/// # Errors
/// `NotFound`; `InUse` when it is not out, or has or gets replicas.
pub(crate) fn remove_chunkserver(tx: &mut Tx<'_>, id: ChunkserverId) -> Step<Outcome> {
    tx.get::<ChunkserverRow>(&id)?.ok_or(Refusal::NoSuchChunkserver(id))?;
    let copysets = tx.scan::<HostedRow>(&id, None, usize::MAX)?.len();
    if tx.get::<OutRow>(&id)?.is_none() || copysets > 0 {
        let copysets = u32::try_from(copysets).unwrap_or(u32::MAX);
        return Err(Refusal::ChunkserverInUse { id, copysets }.into());
    }
    tx.delete::<OutRow>(&id);
    tx.delete::<ChunkserverRow>(&id);
    Ok(Outcome::Done)
}

/// What a move was decided on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewMove {
    /// The copyset.
    pub(crate) copyset: CopysetId,
    /// Its `conf_epoch` then.
    pub(crate) conf_epoch: u64,
    /// The replica that goes.
    pub(crate) removed: ReplicaId,
    /// Who gets a new one.
    pub(crate) to: ChunkserverId,
    /// For people.
    pub(crate) now_unix_ms: u64,
}

/// Begins a move.
///
/// # Errors
/// `Unavailable` when the copyset or the chunkservers changed meanwhile.
pub(crate) fn start(tx: &mut Tx<'_>, new: &NewMove) -> Step<Outcome> {
    let row: CopysetRow = tx.get(&new.copyset)?.ok_or(Refusal::PlanOutdated)?;
    let target: ChunkserverRow = tx.get(&new.to)?.ok_or(Refusal::NoSuchChunkserver(new.to))?;
    let busy = tx.get::<MoveRow>(&new.copyset)?.is_some() || tx.get::<OutRow>(&new.to)?.is_some();
    let outdated = row.conf_epoch != new.conf_epoch || row.replicas.iter().all(|r| r.replica != new.removed);
    let mut zones = vec![target.zone];
    for stays in row.replicas.iter().filter(|r| r.replica != new.removed) {
        zones.push(tx.expect::<ChunkserverRow>(&stays.chunkserver)?.zone);
    }
    zones.sort_unstable();
    let together = zones.windows(2).any(|pair| pair[0] == pair[1]);
    // In its own place a replica may be rebuilt.
    let hosts_already = row.replicas.iter().any(|r| r.chunkserver == new.to && r.replica != new.removed);
    if busy || outdated || together || hosts_already {
        return Err(Refusal::PlanOutdated.into());
    }
    let replica = ReplicaId(tx.next_id(Counter::Replica)?);
    let added = ReplicaRow { replica, chunkserver: new.to, created: false };
    let (removed, started_unix_ms) = (new.removed, new.now_unix_ms);
    tx.put(&new.copyset, &MoveRow { removed, added, state: MoveState::Adding, started_unix_ms });
    tx.put(&(new.to, new.copyset), &HostedRow);
    Ok(Outcome::Done)
}

/// The new replica exists on its disk.
pub(crate) fn created(tx: &mut Tx<'_>, copyset: CopysetId, replica: ReplicaId) -> Step<()> {
    if let Some(mut row) = tx.get::<MoveRow>(&copyset)?
        && row.added.replica == replica
    {
        row.added.created = true;
        tx.put(&copyset, &row);
    }
    Ok(())
}

/// Gives a move up. Nothing if it has ended.
pub(crate) fn cancel(tx: &mut Tx<'_>, copyset: CopysetId, added: ReplicaId) -> Step<Outcome> {
    if let Some(row) = of(tx, copyset, added)? {
        tx.put(&copyset, &MoveRow { state: MoveState::Cancelling, ..row });
    }
    Ok(Outcome::Done)
}

/// The group has the new members: the old replica is nobody's any more. Nothing if the move has ended.
pub(crate) fn finish(tx: &mut Tx<'_>, copyset: CopysetId, added: ReplicaId) -> Step<Outcome> {
    let Some(ended) = of(tx, copyset, added)? else { return Ok(Outcome::Done) };
    let mut row: CopysetRow = tx.expect(&copyset)?;
    for replica in row.replicas.iter_mut().filter(|r| r.replica == ended.removed) {
        tx.delete::<HostedRow>(&(replica.chunkserver, copyset));
        // It is in the group, so it was made.
        *replica = ReplicaRow { created: true, ..ended.added };
    }
    tx.put(&(ended.added.chunkserver, copyset), &HostedRow);
    row.conf_epoch += 1;
    tx.put(&copyset, &row);
    tx.delete::<MoveRow>(&copyset);
    Ok(Outcome::Done)
}

/// The group has the old members alone: the new replica is nobody's any more. Nothing if the move has ended.
pub(crate) fn end_cancelled(tx: &mut Tx<'_>, copyset: CopysetId, added: ReplicaId) -> Step<Outcome> {
    if let Some(ended) = of(tx, copyset, added)?
        && ended.state == MoveState::Cancelling
    {
        let row: CopysetRow = tx.expect(&copyset)?;
        if row.replicas.iter().all(|r| r.chunkserver != ended.added.chunkserver) {
            tx.delete::<HostedRow>(&(ended.added.chunkserver, copyset));
        }
        tx.delete::<MoveRow>(&copyset);
    }
    Ok(Outcome::Done)
}

fn of(tx: &Tx<'_>, copyset: CopysetId, added: ReplicaId) -> Step<Option<MoveRow>> {
    Ok(tx.get::<MoveRow>(&copyset)?.filter(|row| row.added.replica == added))
}

/// Replicas of a copyset when its move is through.
pub(crate) fn members_after(row: &CopysetRow, moving: &MoveRow) -> Vec<ReplicaId> {
    let after = |r: &ReplicaRow| if r.replica == moving.removed { moving.added.replica } else { r.replica };
    row.replicas.iter().map(after).collect()
}
