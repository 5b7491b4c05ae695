//! Calls about chunkservers, pools and copysets, and the heartbeats by which chunkservers learn what to do.

use super::status::CallError;
use super::{Core, convert, names};
use crate::liveness::{Health, ReportedLeader, Vitals};
use crate::machine::command::{Command, Outcome, Registration};
use crate::machine::row::{
    ChunkserverRow, ClusterRow, CopysetRow, OutRow, ParentRef, PoolNameRow, PoolRow, TaskKind, TaskRow, TaskTodoRow, VolumeRow,
};
use crate::machine::{layers, tasks, topology};
use crate::placement::{self, Disk};
use crate::refusal::Refusal;
use crate::segments::Candidate;
use ogee_common::id::{ChunkserverId, CopysetId, LayerId, ReplicaId, Term};
use ogee_common::limits::{COPYSETS_PER_CHUNKSERVER_MAX, SPACE_RESERVE_BYTES};
use ogee_common::rng;
use ogee_proto::mds;
use std::collections::{BTreeMap, HashMap};

/// Copysets asked for in one call: as many as one segment has, many times over.
const COPYSETS_ASKED_MAX: usize = 4096;
/// Reports of done tasks taken from one heartbeat; a chunkserver repeats what was not taken.
const DONE_PER_HEARTBEAT_MAX: usize = 4096;
/// Copysets reported in one heartbeat.
const REPORTS_MAX: usize = 4 * COPYSETS_PER_CHUNKSERVER_MAX as usize;

/// A disk as segment placement sees it.
pub(crate) struct DiskState {
    up: bool,
    free_bytes: u64,
}

/// A copyset as a candidate for new chunks: its weight is the room on its fullest disk. `None` when no majority of its
/// disks is up.
pub(crate) fn weigh(
    id: CopysetId,
    row: &CopysetRow,
    disks: &HashMap<ChunkserverId, DiskState>,
) -> Option<Candidate> {
    let states = row.replicas.iter().filter_map(|r| disks.get(&r.chunkserver));
    let (mut up, mut weight) = (0, u64::MAX);
    for disk in states {
        up += usize::from(disk.up);
        weight = weight.min(disk.free_bytes.saturating_sub(SPACE_RESERVE_BYTES));
    }
    (2 * up > row.replicas.len()).then_some(Candidate { id, weight })
}

impl Core {
    /// Every chunkserver's state as known now.
    pub(crate) fn disks(&self) -> Result<HashMap<ChunkserverId, DiskState>, CallError> {
        let rows = self.read(|tx| Ok(tx.scan::<ChunkserverRow>(&(), None, usize::MAX)?))?;
        let state = |(id, row): (ChunkserverId, ChunkserverRow)| {
            let free_bytes = self.live.vitals(id).0.map_or(row.capacity_bytes, |v| v.free_bytes);
            (id, DiskState { up: self.live.health(id) == Health::Up, free_bytes })
        };
        Ok(rows.into_iter().map(state).collect())
    }

    pub(crate) async fn register_chunkserver(
        &self,
        r: mds::RegisterChunkserverRequest,
    ) -> Result<mds::RegisterChunkserverReply, CallError> {
        let registration = Registration {
            uuid: names::uuid("uuid", &r.uuid)?,
            id: ChunkserverId(r.id),
            cluster: if r.cluster.is_empty() { None } else { Some(names::uuid("cluster", &r.cluster)?) },
            addr: names::addr(&r.addr)?,
            pool: names::name("pool", &r.pool)?,
            zone: names::name("zone", &r.zone)?,
            host: names::name("host", &r.host)?,
            capacity_bytes: r.capacity_bytes,
        };
        match self.propose(None, Command::RegisterChunkserver(registration)).await? {
            Outcome::Registered { id, cluster } => {
                self.displace_others(id)?;
                Ok(mds::RegisterChunkserverReply { id: id.0, cluster: cluster.to_vec().into() })
            }
            _ => Err(CallError::Answer(crate::machine::command::DecodeError::Trailing)),
        }
    }

    /// Whoever had the address of a chunkserver that registers is gone: a disk was replaced, or its directory.
    fn displace_others(&self, id: ChunkserverId) -> Result<(), CallError> {
        let rows = self.read(|tx| Ok(tx.scan::<ChunkserverRow>(&(), None, usize::MAX)?))?;
        let addr = rows.iter().find(|(other, _)| *other == id).map(|(_, row)| &row.addr);
        let others = rows.iter().filter(|(other, row)| *other != id && Some(&row.addr) == addr);
        others.for_each(|(other, _)| self.live.displace(*other));
        Ok(())
    }

    pub(crate) async fn heartbeat(&self, r: mds::HeartbeatRequest) -> Result<mds::HeartbeatReply, CallError> {
        let id = ChunkserverId(names::id("chunkserver", r.chunkserver)?);
        let uuid = names::uuid("uuid", &r.uuid)?;
        if r.copysets.len().max(r.failed.len()) > REPORTS_MAX {
            return Err(CallError::TooMany { what: "copyset reports", max: REPORTS_MAX });
        }
        self.lead().await?;
        let row = self.read(|tx| topology::identified(tx, id, uuid))?;
        let vitals = Vitals {
            capacity_bytes: r.capacity_bytes,
            free_bytes: r.free_bytes,
            disk_error: r.disk_error.clone(),
            failed: r.failed.iter().map(|f| ReplicaId(f.replica)).collect(),
            scrub: r.scrub.unwrap_or_default(),
            verify: r.verify.unwrap_or_default(),
            protocol: r.protocol,
        };
        self.live.heard(id, vitals);
        for report in &r.copysets {
            let leader = ReportedLeader { chunkserver: ChunkserverId(report.leader), term: Term(report.term) };
            self.live.leads(CopysetId(report.copyset), leader);
            self.live.applies(CopysetId(report.copyset), id, report.applied);
        }
        self.take_reports(id, &row, &r).await?;
        self.orders(id, &row, &r)
    }

    /// Has the log record what a heartbeat brings that is new.
    async fn take_reports(
        &self,
        id: ChunkserverId,
        row: &ChunkserverRow,
        r: &mds::HeartbeatRequest,
    ) -> Result<(), CallError> {
        let hosted = self.read(|tx| topology::hosted(tx, id))?;
        let reported: HashMap<u32, u64> = r.copysets.iter().map(|c| (c.copyset, c.replica)).collect();
        let replicas: Vec<(CopysetId, ReplicaId)> = hosted
            .iter()
            .flat_map(|(copyset, row)| row.replicas.iter().map(|replica| (*copyset, replica)))
            .filter(|(_, replica)| replica.chunkserver == id && !replica.created)
            .filter(|(copyset, replica)| reported.get(&copyset.0) == Some(&replica.replica.0))
            .map(|(copyset, replica)| (copyset, replica.replica))
            .chain(self.joined(id, &hosted, &reported)?)
            .collect();
        if !replicas.is_empty() {
            self.propose(None, Command::ReplicasCreated { replicas }).await?;
        }
        self.settle_moves(id, &r.copysets).await?;
        let done = r.done.iter().take(DONE_PER_HEARTBEAT_MAX).map(|d| (d.task, CopysetId(d.copyset)));
        let done = self.read(|tx| {
            let mut known = vec![];
            for (task, copyset) in done {
                let is_hosted = hosted.iter().any(|(c, _)| *c == copyset);
                if is_hosted && tx.get::<TaskTodoRow>(&(copyset, task))?.is_some() {
                    known.push((task, copyset));
                }
            }
            Ok(known)
        })?;
        if !done.is_empty() {
            self.propose(None, Command::TasksDone { done }).await?;
            self.progress.send_modify(|n| *n += 1);
        }
        if !r.addr.is_empty() && r.addr != row.addr {
            self.moved(id, row, &r.addr).await?;
        }
        Ok(())
    }

    /// A chunkserver listens elsewhere now.
    async fn moved(&self, id: ChunkserverId, row: &ChunkserverRow, addr: &str) -> Result<(), CallError> {
        let registration = Registration {
            uuid: row.uuid,
            id,
            cluster: None,
            addr: names::addr(addr)?,
            pool: row.pool.clone(),
            zone: row.zone.clone(),
            host: row.host.clone(),
            capacity_bytes: row.capacity_bytes,
        };
        self.propose(None, Command::RegisterChunkserver(registration)).await.map(|_| ())
    }

    /// What a chunkserver shall have and do.
    fn orders(
        &self,
        id: ChunkserverId,
        row: &ChunkserverRow,
        r: &mds::HeartbeatRequest,
    ) -> Result<mds::HeartbeatReply, CallError> {
        self.read(|tx| {
            let hosted = topology::hosted(tx, id)?;
            let of_pool = topology::chunkservers_of(tx, &row.pool)?;
            let addrs: HashMap<ChunkserverId, String> =
                of_pool.into_iter().map(|(id, row)| (id, row.addr)).collect();
            let mut work: BTreeMap<u64, (TaskRow, Vec<u32>)> = BTreeMap::new();
            let mut ancestries: HashMap<LayerId, Vec<ParentRef>> = HashMap::new();
            for report in r.copysets.iter().filter(|c| c.leader == id.0) {
                for (task, row) in tasks::of_copyset(tx, CopysetId(report.copyset))? {
                    if matches!(row.kind, TaskKind::Flatten { .. }) && !ancestries.contains_key(&row.layer) {
                        ancestries.insert(row.layer, layers::ancestry(tx, &tx.expect(&row.layer)?)?);
                    }
                    work.entry(task).or_insert_with(|| (row, vec![])).1.push(report.copyset);
                }
            }
            let create = hosted
                .iter()
                .flat_map(|(_, row)| &row.replicas)
                .filter(|replica| replica.chunkserver == id && !replica.created)
                .map(|replica| replica.replica.0)
                .collect();
            let orders = self.move_orders(tx, id, &hosted, r, &addrs)?;
            Ok(mds::HeartbeatReply {
                hand_over: self
                    .live
                    .hand_overs_of(id)
                    .into_iter()
                    .map(|o| mds::HandOver { copyset: o.copyset.0, replica: o.to.0 })
                    .collect(),
                join: orders.join,
                moves: orders.moves,
                drop: orders.drop,
                scrub: self.live.scrub_order(id),
                verify: self.live.verify_order(id),
                host: hosted
                    .iter()
                    .filter(|(_, row)| row.replicas.iter().any(|r| r.chunkserver == id))
                    .map(|(id, row)| self.copyset(*id, row, &addrs))
                    .collect(),
                create,
                tasks: work
                    .into_iter()
                    .map(|(id, (row, copysets))| {
                        let ancestry = ancestries.get(&row.layer).map_or(&[][..], Vec::as_slice);
                        convert::task(id, &row, copysets, ancestry)
                    })
                    .collect(),
                peers: addrs.iter().map(|(id, addr)| mds::Peer { chunkserver: id.0, addr: addr.clone() }).collect(),
            })
        })
    }

    fn copyset(&self, id: CopysetId, row: &CopysetRow, addrs: &HashMap<ChunkserverId, String>) -> mds::Copyset {
        let leader = self.live.leader(id);
        let replica = |r: &crate::machine::row::ReplicaRow| mds::Replica {
            replica: r.replica.0,
            chunkserver: r.chunkserver.0,
            addr: addrs.get(&r.chunkserver).cloned().unwrap_or_default(),
        };
        mds::Copyset {
            id: id.0,
            pool: row.pool.0,
            replicas: row.replicas.iter().map(replica).collect(),
            leader: leader.chunkserver.0,
            term: leader.term.0,
            conf_epoch: row.conf_epoch,
        }
    }

    fn copysets(&self, rows: &[(CopysetId, CopysetRow)]) -> Result<mds::CopysetList, CallError> {
        let servers = self.read(|tx| Ok(tx.scan::<ChunkserverRow>(&(), None, usize::MAX)?))?;
        let addrs = servers.into_iter().map(|(id, row)| (id, row.addr)).collect();
        Ok(mds::CopysetList { copysets: rows.iter().map(|(id, row)| self.copyset(*id, row, &addrs)).collect() })
    }

    pub(crate) async fn get_copysets(&self, r: mds::GetCopysetsRequest) -> Result<mds::CopysetList, CallError> {
        if r.ids.len() > COPYSETS_ASKED_MAX {
            return Err(CallError::TooMany { what: "copysets", max: COPYSETS_ASKED_MAX });
        }
        self.lead().await?;
        let rows = self.read(|tx| {
            let mut rows = vec![];
            for id in r.ids.iter().map(|id| CopysetId(*id)) {
                if let Some(row) = tx.get::<CopysetRow>(&id)? {
                    rows.push((id, row));
                }
            }
            Ok(rows)
        })?;
        self.copysets(&rows)
    }

    pub(crate) async fn list_copysets(&self) -> Result<mds::CopysetList, CallError> {
        self.lead().await?;
        let rows = self.read(|tx| Ok(tx.scan::<CopysetRow>(&(), None, usize::MAX)?))?;
        self.copysets(&rows)
    }

    pub(crate) async fn list_chunkservers(&self) -> Result<mds::ChunkserverList, CallError> {
        self.lead().await?;
        let rows = self.read(|tx| {
            let mut rows = vec![];
            for (id, row) in tx.scan::<ChunkserverRow>(&(), None, usize::MAX)? {
                let out = tx.get::<OutRow>(&id)?.map_or("", |out| out.reason.as_str()).to_owned();
                rows.push((id, row, topology::hosted(tx, id)?.len(), out));
            }
            Ok(rows)
        })?;
        let show = |(id, row, copysets, out): (ChunkserverId, ChunkserverRow, usize, String)| {
            let (vitals, silent) = self.live.vitals(id);
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            mds::Chunkserver {
                id: id.0,
                addr: row.addr,
                pool: row.pool,
                zone: row.zone,
                host: row.host,
                capacity_bytes: vitals.as_ref().map_or(row.capacity_bytes, |v| v.capacity_bytes),
                free_bytes: vitals.as_ref().map_or(0, |v| v.free_bytes),
                state: self.live.health(id).as_str().to_owned(),
                copysets: count(copysets),
                leaders: count(self.live.led_by(id)),
                silent_ms: u64::try_from(silent.as_millis()).unwrap_or(u64::MAX),
                disk_error: vitals.map_or_else(String::new, |v| v.trouble()),
                out,
            }
        };
        Ok(mds::ChunkserverList { chunkservers: rows.into_iter().map(show).collect() })
    }

    pub(crate) async fn create_pool(
        &self,
        id: Option<[u8; 16]>,
        r: mds::CreatePoolRequest,
    ) -> Result<mds::Pool, CallError> {
        let name = names::name("pool", &r.name)?;
        self.lead().await?;
        let servers = self.read(|tx| {
            if tx.get::<PoolNameRow>(&name)?.is_some() {
                return Err(Refusal::PoolTaken { name: name.clone() }.into());
            }
            let mut servers = topology::chunkservers_of(tx, &name)?;
            let out: HashMap<ChunkserverId, OutRow> = tx.scan::<OutRow>(&(), None, usize::MAX)?.into_iter().collect();
            servers.retain(|(id, _)| !out.contains_key(id));
            Ok(servers)
        })?;
        let disks: Vec<Disk> = servers.into_iter().map(|(id, row)| Disk { id, zone: row.zone }).collect();
        let wanted = match r.copysets {
            0 => placement::default_copysets(disks.len(), r.replicas),
            n if n as usize > disks.len() * COPYSETS_PER_CHUNKSERVER_MAX as usize => {
                let needed = n as usize / disks.len().max(1);
                return Err(CallError::Placement(placement::PlacementError::TooManyCopysets { needed }));
            }
            n => n,
        };
        let plan = placement::plan(&disks, r.replicas, wanted, rng::nonzero_u64()).map_err(CallError::Placement)?;
        self.propose(id, Command::CreatePool { name: name.clone(), replicas: r.replicas, copysets: plan }).await?;
        let pools = self.pools()?;
        pools.into_iter().find(|p| p.name == name).ok_or_else(|| Refusal::NoSuchPool { name }.into())
    }

    fn pools(&self) -> Result<Vec<mds::Pool>, CallError> {
        self.read(|tx| {
            let mut pools = vec![];
            for (id, row) in tx.scan::<PoolRow>(&(), None, usize::MAX)? {
                let servers = topology::chunkservers_of(tx, &row.name)?;
                let zones: std::collections::BTreeSet<&str> = servers.iter().map(|(_, s)| &s.zone[..]).collect();
                let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
                let (chunkservers, zones) = (count(servers.len()), count(zones.len()));
                let PoolRow { name, replicas, copysets } = row;
                pools.push(mds::Pool { id: id.0, name, replicas, copysets, chunkservers, zones });
            }
            Ok(pools)
        })
    }

    pub(crate) async fn list_pools(&self) -> Result<mds::PoolList, CallError> {
        self.lead().await?;
        Ok(mds::PoolList { pools: self.pools()? })
    }

    pub(crate) async fn cluster_status(&self) -> Result<mds::ClusterStatusReply, CallError> {
        self.lead().await?;
        let lead = *self.log.lead().borrow();
        let (cluster, volumes, copysets, servers, tasks) = self.read(|tx| {
            let cluster: ClusterRow = tx.get(&())?.ok_or(Refusal::NotFormed)?;
            let volumes = tx.scan::<VolumeRow>(&(), None, usize::MAX)?.len();
            let copysets = tx.scan::<CopysetRow>(&(), None, usize::MAX)?;
            let servers = tx.scan::<ChunkserverRow>(&(), None, usize::MAX)?;
            let tasks = tx.scan::<TaskRow>(&(), None, usize::MAX)?.len();
            Ok((cluster, volumes, copysets, servers, tasks))
        })?;
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let is_up = |id: ChunkserverId| self.live.health(id) == Health::Up;
        let scene = self.scene()?;
        let degraded = |row: &CopysetRow| {
            scene.to_replace(row).next().is_some() || row.replicas.iter().any(|r| !is_up(r.chunkserver))
        };
        let led = |id: CopysetId| {
            let leader = self.live.leader(id).chunkserver;
            leader.0 != 0 && is_up(leader)
        };
        let node = |n: &super::NodeAddr| mds::MdsPeer { id: n.id, addr: n.addr.clone(), leader: n.id == lead.node };
        Ok(mds::ClusterStatusReply {
            cluster: cluster.cluster.to_vec().into(),
            mds: self.nodes.iter().map(node).collect(),
            applied: self.log.applied(),
            term: lead.term.0,
            volumes: count(volumes),
            copysets: count(copysets.len()),
            copysets_with_leader: count(copysets.iter().filter(|(id, _)| led(*id)).count()),
            chunkservers: count(servers.len()),
            chunkservers_up: count(servers.iter().filter(|(id, _)| is_up(*id)).count()),
            tasks: count(tasks),
            copysets_degraded: count(copysets.iter().filter(|(_, row)| degraded(row)).count()),
            moves: count(scene.moves.len()),
            moves_waiting: count(scene.waiting()),
        })
    }
}
