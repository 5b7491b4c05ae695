//! The copyset replicas that this process hosts.
//!
//! Invariants: a replica is made from nothing only when the MDS lists it as to be created, and its row in the table
//! `replica` is durable before its Raft group opens; a replica that the MDS believes to exist but that is not in the
//! table is **not** made again: it was lost with its disk, and is reported as an error (INV: a replica id is never
//! reused). A replica is reported to the MDS only once its group has been initialised, because the report takes away
//! the permission to create it. A replica whose own records are damaged, or that is missing, is *failed*: it takes part no
//! more, everything else of the disk goes on, and the MDS has it deleted and rebuilt under a new id.

use super::error::{DaemonError, DaemonErrorKind};
use crate::copyset::{CopysetFetch, CopysetMachine};
use crate::store::{ChunkStore, ChunkStoreError, ChunkStoreErrorKind, CopysetStore, Fault};
use ogee_common::id::{CopysetId, ReplicaId};
use ogee_disk::{Batch, Durability, MetaStore, Table};
use ogee_proto::mds;
use ogee_raft::{GroupStatus, Members, OpenError, RaftGroup, RaftProcess, WalError, WalErrorKind};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Replicas of this process: key copyset id (4 bytes, big endian), value format version (1 byte) and replica id (8
/// bytes, little endian).
const TABLE_REPLICA: Table = Table::new(32, "replica");
/// Replicas that are being deleted, rows as in [`TABLE_REPLICA`]: what a crash leaves is deleted at the next start.
const TABLE_DROPPING: Table = Table::new(34, "dropping");
/// Format version of a row.
const ROW_VERSION: u8 = 1;
/// How often a closing replica is looked at.
const CLOSE_POLL: std::time::Duration = std::time::Duration::from_millis(20);
/// More rows than a chunkserver may ever have.
const ROWS_MAX: usize = 65_536;

/// One hosted replica.
#[derive(Clone)]
pub(super) struct Hosted {
    pub(super) copyset: CopysetId,
    pub(super) replica: ReplicaId,
    pub(super) group: RaftGroup,
    pub(super) store: Arc<CopysetStore>,
}

impl Hosted {
    /// Whether the replica's log or state machine failed.
    pub(super) fn has_failed(&self) -> bool {
        self.store.fault().is_some() || matches!(self.group.state().borrow().status, GroupStatus::Failed(_))
    }

    /// Ends a replica that has failed in a way that Raft does not know of.
    pub(super) async fn end_if_failed(&self) {
        let running = self.group.state().borrow().status == GroupStatus::Running;
        if running && self.store.fault().is_some() {
            tracing::error!(copyset = %self.copyset, replica = %self.replica, "a failed replica is stopped");
            self.group.shutdown().await;
        }
    }
}

/// A replica that could not be opened because its records are damaged.
struct Broken {
    replica: ReplicaId,
    why: String,
}

#[derive(Default)]
struct Replicas {
    open: BTreeMap<CopysetId, Hosted>,
    /// Initialised since the start or before it: may be reported.
    ready: HashSet<CopysetId>,
    /// Here, but they could not be opened.
    broken: BTreeMap<CopysetId, Broken>,
    /// Listed by the MDS as existing, but not here.
    lost: HashMap<CopysetId, ReplicaId>,
    /// Being deleted.
    dropping: HashSet<CopysetId>,
}

/// All hosted replicas.
pub(super) struct Copysets {
    process: Arc<RaftProcess>,
    store: Arc<ChunkStore>,
    meta: Arc<dyn MetaStore>,
    path: PathBuf,
    table: Mutex<Replicas>,
}

impl Copysets {
    pub(super) fn new(process: Arc<RaftProcess>, store: Arc<ChunkStore>, meta: Arc<dyn MetaStore>, path: PathBuf) -> Self {
        Self { process, store, meta, path, table: Mutex::default() }
    }

    fn table(&self) -> MutexGuard<'_, Replicas> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, verb: &'static str, source: Box<dyn std::error::Error + Send + Sync>) -> DaemonError {
        DaemonError { kind: DaemonErrorKind::Disk, verb, path: self.path.clone(), source }
    }

    /// The replica of a copyset, if it is hosted and open.
    pub(super) fn get(&self, copyset: CopysetId) -> Option<Hosted> {
        self.table().open.get(&copyset).cloned()
    }

    /// Every open replica, in order.
    pub(super) fn all(&self) -> Vec<Hosted> {
        self.table().open.values().cloned().collect()
    }

    /// Replicas that stopped for another reason than damage; when it is the disk, the process is about to end.
    pub(super) fn stopped(&self) -> usize {
        self.table().open.values().filter(|h| h.has_failed() && !self.is_damaged(h)).count()
    }

    /// Replicas that are damaged or missing while the disk works: the MDS has them rebuilt.
    pub(super) fn damaged(&self) -> Vec<mds::FailedReplica> {
        let table = self.table();
        let failed = |copyset: &CopysetId, replica: ReplicaId, why: &str| mds::FailedReplica {
            copyset: copyset.0,
            replica: replica.0,
            why: why.to_owned(),
        };
        let open = table.open.values().filter(|h| self.is_damaged(h));
        let open = open.map(|h| failed(&h.copyset, h.replica, "its log or its metadata is damaged"));
        let broken = table.broken.iter().map(|(id, b)| failed(id, b.replica, &b.why));
        let lost = table.lost.iter().map(|(id, replica)| failed(id, *replica, "missing from the disk"));
        open.chain(broken).chain(lost).collect()
    }

    fn is_damaged(&self, hosted: &Hosted) -> bool {
        hosted.store.fault() == Some(Fault::Damaged) || self.process.wal().group(u64::from(hosted.copyset.0)).damaged
    }

    /// Opens every replica that the table names.
    ///
    /// # Errors
    /// [`DaemonErrorKind::Disk`].
    pub(super) async fn open_all(&self) -> Result<(), DaemonError> {
        let left = self.meta.scan_prefix(TABLE_DROPPING, &[], ROWS_MAX);
        for (key, value) in left.map_err(|e| self.fail("list deleted replicas in", e.into()))? {
            let (copyset, replica) =
                decode_row(&key, &value).ok_or_else(|| self.fail("decode replica row in", BadRow.into()))?;
            self.delete(copyset, replica).await?;
        }
        let rows = self
            .meta
            .scan_prefix(TABLE_REPLICA, &[], ROWS_MAX)
            .map_err(|e| self.fail("list replicas in", e.into()))?;
        for (key, value) in rows {
            let (copyset, replica) =
                decode_row(&key, &value).ok_or_else(|| self.fail("decode replica row in", BadRow.into()))?;
            if let Err(error) = self.open(copyset, replica).await {
                self.set_aside(copyset, replica, error)?;
            }
        }
        Ok(())
    }

    /// Goes on without a replica whose records are damaged. A disk that fails, or a damaged metadata store, is the end of all.
    fn set_aside(&self, copyset: CopysetId, replica: ReplicaId, error: DaemonError) -> Result<(), DaemonError> {
        if self.store.damage().borrow().is_some() || !is_damage(&error) {
            return Err(error);
        }
        let why = chain(&error);
        tracing::error!(%copyset, %replica, why, "a replica cannot be opened; the others go on");
        self.table().broken.insert(copyset, Broken { replica, why });
        Ok(())
    }

    async fn open(&self, copyset: CopysetId, replica: ReplicaId) -> Result<Hosted, DaemonError> {
        let store = self.store.copyset(copyset);
        let machine = CopysetMachine::new(store.clone());
        let fetch = Arc::new(CopysetFetch::new(store.clone()));
        let group = self
            .process
            .open_group(u64::from(copyset.0), replica, machine, fetch)
            .await
            .map_err(|e| self.fail("open copyset replica in", e.into()))?;
        let hosted = Hosted { copyset, replica, group, store };
        self.table().open.insert(copyset, hosted.clone());
        Ok(hosted)
    }

    /// Makes what the MDS wants here and is not yet.
    ///
    /// # Errors
    /// [`DaemonErrorKind::Disk`].
    pub(super) async fn follow(&self, own: u32, reply: &mds::HeartbeatReply) -> Result<(), DaemonError> {
        // A replica that is rebuilt in its place: the row still names the old one.
        let joining: HashSet<u32> = reply.join.iter().map(|j| j.copyset).collect();
        let wanted: Vec<&mds::Copyset> = reply.host.iter().filter(|c| !joining.contains(&c.id)).collect();
        self.table().lost.retain(|id, _| wanted.iter().any(|c| c.id == id.0));
        for copyset in wanted {
            let id = CopysetId(copyset.id);
            let Some(mine) = copyset.replicas.iter().find(|r| r.chunkserver == own) else { continue };
            let may_create = reply.create.contains(&mine.replica);
            if self.is_going(id) {
                continue;
            }
            let hosted = match self.get(id) {
                Some(hosted) if hosted.replica.0 == mine.replica => hosted,
                Some(hosted) => {
                    tracing::error!(copyset = %id, have = %hosted.replica, wanted = mine.replica, "another replica of the copyset is here");
                    continue;
                }
                None if may_create => self.create(id, ReplicaId(mine.replica)).await?,
                None => {
                    if self.table().lost.insert(id, ReplicaId(mine.replica)).is_none() {
                        tracing::error!(copyset = %id, replica = mine.replica, "the MDS expects a replica that is not on this disk");
                    }
                    continue;
                }
            };
            if may_create {
                let members: Members =
                    copyset.replicas.iter().map(|r| (ReplicaId(r.replica), r.chunkserver)).collect();
                if let Err(error) = hosted.group.initialize(members).await {
                    tracing::warn!(copyset = %id, %error, "initialise copyset");
                    continue;
                }
            }
            self.table().ready.insert(id);
        }
        Ok(())
    }

    /// Whether a replica is being deleted, or waits for that.
    fn is_going(&self, copyset: CopysetId) -> bool {
        let table = self.table();
        table.dropping.contains(&copyset) || table.broken.contains_key(&copyset)
    }

    /// Makes replicas that join groups which exist, and makes them known.
    ///
    /// # Errors
    /// [`DaemonErrorKind::Disk`].
    pub(super) async fn join(&self, wanted: &[mds::Join]) -> Result<(), DaemonError> {
        for join in wanted {
            let id = CopysetId(join.copyset);
            if self.is_going(id) {
                continue;
            }
            match self.get(id) {
                Some(hosted) if hosted.replica.0 == join.replica => {}
                Some(hosted) => {
                    tracing::info!(copyset = %id, have = %hosted.replica, wanted = join.replica, "an old replica has to go first");
                    continue;
                }
                None if join.create => {
                    self.create(id, ReplicaId(join.replica)).await?;
                }
                None => {
                    tracing::error!(copyset = %id, replica = join.replica, "the MDS expects a replica that is not on this disk");
                    continue;
                }
            }
            self.table().ready.insert(id);
        }
        Ok(())
    }

    /// Everything on the disk: copysets and replicas.
    pub(super) fn held(&self) -> Vec<mds::HeldReplica> {
        let held = |copyset: CopysetId, replica: ReplicaId| mds::HeldReplica { copyset: copyset.0, replica: replica.0 };
        let table = self.table();
        let open = table.open.values().map(|h| held(h.copyset, h.replica));
        open.chain(table.broken.iter().map(|(copyset, b)| held(*copyset, b.replica))).collect()
    }

    /// Deletes a replica that is nobody's any more. Until its data is gone, no other replica of its copyset is made here.
    pub(super) async fn drop_replica(self: Arc<Self>, copyset: CopysetId, replica: ReplicaId) {
        let hosted = {
            let mut table = self.table();
            let is_open = table.open.get(&copyset).is_some_and(|h| h.replica == replica);
            if !is_open && table.broken.remove(&copyset).is_none_or(|b| b.replica != replica) {
                return;
            }
            table.dropping.insert(copyset);
            table.ready.remove(&copyset);
            table.open.remove(&copyset)
        };
        tracing::warn!(%copyset, %replica, "the MDS has this replica deleted: its group lives on without it");
        if let Err(error) = self.take_down(copyset, replica, hosted).await {
            let error = &error as &dyn std::error::Error;
            tracing::error!(%copyset, %replica, error, "delete replica; tried again at the next start");
            return;
        }
        self.table().dropping.remove(&copyset);
        tracing::info!(%copyset, %replica, "replica deleted");
    }

    async fn take_down(&self, copyset: CopysetId, replica: ReplicaId, hosted: Option<Hosted>) -> Result<(), DaemonError> {
        // From here on a restart deletes it instead of opening it.
        let (key, value) = encode_row(copyset, replica);
        let mut batch = Batch::new();
        batch.delete(TABLE_REPLICA, &key);
        batch.put(TABLE_DROPPING, &key, &value);
        self.meta.write(batch, Durability::Synced).map_err(|e| self.fail("record deleted replica in", e.into()))?;
        self.process.close_group(u64::from(copyset.0)).await;
        if let Some(hosted) = hosted {
            let store = Arc::downgrade(&hosted.store);
            drop(hosted);
            // Requests that are under way hold the store; they end by themselves.
            while store.strong_count() > 0 {
                tokio::time::sleep(CLOSE_POLL).await;
            }
        }
        self.delete(copyset, replica).await
    }

    /// Deletes what a replica left, log and data. Its group is not open.
    async fn delete(&self, copyset: CopysetId, replica: ReplicaId) -> Result<(), DaemonError> {
        let removed = self.process.wal().remove_group(u64::from(copyset.0)).await;
        removed.map_err(|e| self.fail("delete the log of a replica in", e.into()))?;
        let store = self.store.clone();
        let removed = ogee_common::sim::spawn_blocking(move || store.remove_copyset(copyset)).await;
        let removed = removed.map_err(|e| self.fail("delete the data of a replica in", e.into()))?;
        removed.map_err(|e| self.fail("delete the data of a replica in", e.into()))?;
        let (key, _) = encode_row(copyset, replica);
        let mut batch = Batch::new();
        batch.delete(TABLE_DROPPING, &key);
        self.meta.write(batch, Durability::Synced).map_err(|e| self.fail("record deleted replica in", e.into()))
    }

    async fn create(&self, copyset: CopysetId, replica: ReplicaId) -> Result<Hosted, DaemonError> {
        let mut batch = Batch::new();
        let (key, value) = encode_row(copyset, replica);
        batch.put(TABLE_REPLICA, &key, &value);
        self.meta
            .write(batch, Durability::Synced)
            .map_err(|e| self.fail("record new replica in", e.into()))?;
        tracing::info!(%copyset, %replica, "new copyset replica");
        self.open(copyset, replica).await
    }

    /// What a heartbeat says of the replicas.
    pub(super) fn reports(&self) -> Vec<mds::CopysetReport> {
        let table = self.table();
        let ready = table.open.values().filter(|h| table.ready.contains(&h.copyset));
        ready
            .map(|h| {
                let leader = h.group.leader();
                let settled = if h.group.is_leader() { h.group.settled_members() } else { None };
                let (voters, learners) = settled.unwrap_or_default();
                let ids = |members: Members| members.into_keys().map(|replica| replica.0).collect();
                mds::CopysetReport {
                    voters: ids(voters),
                    learners: ids(learners),
                    copyset: h.copyset.0,
                    replica: h.replica.0,
                    leader: leader.process,
                    term: leader.term.0,
                    applied: h.group.applied_index(),
                    conf_epoch: 0,
                }
            })
            .collect()
    }
}

/// Whether the records of the replica are what is wrong.
fn is_damage(error: &DaemonError) -> bool {
    let sources = std::iter::successors(std::error::Error::source(error), |e| e.source());
    sources.into_iter().any(|e| {
        let store = e.downcast_ref::<ChunkStoreError>().is_some_and(|e| e.kind() == ChunkStoreErrorKind::Corrupt);
        let log = e.downcast_ref::<WalError>().is_some_and(|e| e.kind() == WalErrorKind::Corrupt);
        store || log || e.downcast_ref::<OpenError>().is_some_and(OpenError::is_gap)
    })
}

fn chain(error: &DaemonError) -> String {
    let all = std::iter::successors(Some(error as &dyn std::error::Error), |e| e.source());
    all.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

#[derive(Debug, thiserror::Error)]
#[error("a row of the table `replica` has an unknown form")]
struct BadRow;

fn encode_row(copyset: CopysetId, replica: ReplicaId) -> ([u8; 4], [u8; 9]) {
    let mut value = [ROW_VERSION; 9];
    value[1..].copy_from_slice(&replica.0.to_le_bytes());
    (copyset.0.to_be_bytes(), value)
}

fn decode_row(key: &[u8], value: &[u8]) -> Option<(CopysetId, ReplicaId)> {
    let copyset = u32::from_be_bytes(key.try_into().ok()?);
    let (version, replica) = value.split_first()?;
    let replica = u64::from_le_bytes(replica.try_into().ok()?);
    (*version == ROW_VERSION).then_some((CopysetId(copyset), ReplicaId(replica)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_row() {
        let (key, value) = encode_row(CopysetId(0x0102_0304), ReplicaId(0x1112_1314_1516_1718));
        assert_eq!(key, [1, 2, 3, 4]);
        assert_eq!(value, [1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11]);
        assert_eq!(decode_row(&key, &value), Some((CopysetId(0x0102_0304), ReplicaId(0x1112_1314_1516_1718))));
        assert_eq!(decode_row(&key, &value[..8]), None);
        assert_eq!(decode_row(&key, &[9; 9]), None);
    }
}
