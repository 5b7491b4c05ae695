//! Chunkservers, pools and copysets.
//!
//! Invariants: a disk's uuid has one chunkserver id for ever, and an id one uuid; replica ids come from one counter and
//! are never reused (INV); a replica that was seen once is never made from nothing again (INV: a wiped disk can only
//! join as a new learner); the replicas of a copyset lie in distinct zones, also if zones changed while it was planned.

use super::moves;
use super::Step;
use super::command::{Outcome, Registration};
use super::row::{
    ChunkserverRow, ChunkserverUuidRow, ClusterRow, CopysetRow, Counter, HostedRow, PoolNameRow, PoolRow, ReplicaRow,
};
use super::tx::Tx;
use crate::refusal::Refusal;
use ogee_common::id::{ChunkserverId, CopysetId, PoolId, ReplicaId};
use std::collections::BTreeSet;

/// Gives the cluster its identity; a second time changes nothing.
pub(crate) fn form(tx: &mut Tx<'_>, cluster: [u8; 16], now_unix_ms: u64) -> Step<Outcome> {
    if tx.get::<ClusterRow>(&())?.is_none() {
        tx.put(&(), &ClusterRow { cluster, created_unix_ms: now_unix_ms });
    }
    Ok(Outcome::Done)
}

/// Registers a disk or brings its row up to date.
///
/// # Errors
/// `WrongCluster` when the identities do not fit; `InvalidArgument` when a disk in use changes its zone or pool.
pub(crate) fn register(tx: &mut Tx<'_>, new: &Registration, now_unix_ms: u64) -> Step<Outcome> {
    let cluster: ClusterRow = tx.get(&())?.ok_or(Refusal::NotFormed)?;
    if new.cluster.is_some_and(|c| c != cluster.cluster) {
        return Err(Refusal::WrongCluster.into());
    }
    let known: Option<ChunkserverUuidRow> = tx.get(&new.uuid)?;
    let id = match known {
        // Id 0: the disk was registered and crashed before it wrote its superblock.
        Some(ChunkserverUuidRow(id)) if new.id == id || new.id.0 == 0 => id,
        None if new.id.0 == 0 => ChunkserverId(tx.next_id32(Counter::Chunkserver)?),
        _ => return Err(Refusal::WrongIdentity(new.id).into()),
    };
    let old: Option<ChunkserverRow> = tx.get(&id)?;
    if let Some(old) = &old
        && (old.zone != new.zone || old.pool != new.pool)
        && !tx.scan::<HostedRow>(&id, None, 1)?.is_empty()
    {
        return Err(Refusal::PlaceFixed(id).into());
    }
    let row = ChunkserverRow {
        uuid: new.uuid,
        addr: new.addr.clone(),
        pool: new.pool.clone(),
        zone: new.zone.clone(),
        host: new.host.clone(),
        capacity_bytes: new.capacity_bytes,
        registered_unix_ms: old.map_or(now_unix_ms, |old| old.registered_unix_ms),
    };
    tx.put(&new.uuid, &ChunkserverUuidRow(id));
    tx.put(&id, &row);
    Ok(Outcome::Registered { id, cluster: cluster.cluster })
}

/// The row of a chunkserver, if the uuid is its own.
///
/// # Errors
/// `NotFound`, `WrongCluster`.
pub(crate) fn identified(tx: &Tx<'_>, id: ChunkserverId, uuid: [u8; 16]) -> Step<ChunkserverRow> {
    let row: ChunkserverRow = tx.get(&id)?.ok_or(Refusal::NoSuchChunkserver(id))?;
    if row.uuid == uuid { Ok(row) } else { Err(Refusal::WrongIdentity(id).into()) }
}

/// The chunkservers that registered for a pool.
pub(crate) fn chunkservers_of(tx: &Tx<'_>, pool: &str) -> Step<Vec<(ChunkserverId, ChunkserverRow)>> {
    let mut rows = tx.scan::<ChunkserverRow>(&(), None, usize::MAX)?;
    rows.retain(|(_, row)| row.pool == pool);
    Ok(rows)
}

/// Makes a pool with planned copysets; the plan is checked again, because it was made before the command was ordered.
///
/// # Errors
/// `AlreadyExists`; `Unavailable` when the plan does not fit the chunkservers any more.
pub(crate) fn create_pool(
    tx: &mut Tx<'_>,
    name: &str,
    replicas: u32,
    copysets: &[Vec<ChunkserverId>],
) -> Step<Outcome> {
    if tx.get::<PoolNameRow>(&name.to_owned())?.is_some() {
        return Err(Refusal::PoolTaken { name: name.to_owned() }.into());
    }
    let pool = PoolId(tx.next_id32(Counter::Pool)?);
    for hosts in copysets {
        let mut zones = BTreeSet::new();
        let mut rows = vec![];
        for host in hosts {
            let row: ChunkserverRow = tx.get(host)?.ok_or(Refusal::PlanOutdated)?;
            if row.pool != name || !zones.insert(row.zone) {
                return Err(Refusal::PlanOutdated.into());
            }
            let replica = ReplicaId(tx.next_id(Counter::Replica)?);
            rows.push(ReplicaRow { replica, chunkserver: *host, created: false });
        }
        if rows.len() != replicas as usize {
            return Err(Refusal::PlanOutdated.into());
        }
        let id = CopysetId(tx.next_id32(Counter::Copyset)?);
        for host in hosts {
            tx.put(&(*host, id), &HostedRow);
        }
        tx.put(&id, &CopysetRow { pool, conf_epoch: 1, replicas: rows });
    }
    let copysets = u32::try_from(copysets.len()).expect("copyset ids have 32 bits");
    tx.put(&pool, &PoolRow { name: name.to_owned(), replicas, copysets });
    tx.put(&name.to_owned(), &PoolNameRow(pool));
    Ok(Outcome::Pool(pool))
}

/// Records that replicas exist.
pub(crate) fn created(tx: &mut Tx<'_>, replicas: &[(CopysetId, ReplicaId)]) -> Step<Outcome> {
    for (copyset, replica) in replicas {
        let Some(mut row) = tx.get::<CopysetRow>(copyset)? else { continue };
        for known in row.replicas.iter_mut().filter(|r| r.replica == *replica) {
            known.created = true;
        }
        tx.put(copyset, &row);
        moves::created(tx, *copyset, *replica)?;
    }
    Ok(Outcome::Done)
}

/// The copysets that a chunkserver has a replica of, or is to get one of.
pub(crate) fn hosted(tx: &Tx<'_>, id: ChunkserverId) -> Step<Vec<(CopysetId, CopysetRow)>> {
    let mut rows = vec![];
    for ((_, copyset), HostedRow) in tx.scan::<HostedRow>(&id, None, usize::MAX)? {
        rows.push((copyset, tx.expect(&copyset)?));
    }
    Ok(rows)
}
