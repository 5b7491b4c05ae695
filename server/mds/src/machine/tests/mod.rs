//! Tests of the state machine: by rule (`rules`, `groups`, `backups`, `moves`, `options`, `service_tasks`, `schedules`), against an oracle of what volumes hold (`oracle`), of replay and
//! snapshots (`replay`), of formats (`golden`).

mod backups;
mod golden;
mod groups;
mod moves;
mod options;
mod oracle;
mod replay;
mod rules;
mod schedules;
mod service_tasks;

use super::command::{Command, Envelope, GroupPart, Outcome, Registration, SnapshotInfo, VolumeInfo, decode_answer};
use super::row::{Hold, TABLES, VolumeRow};
use super::tx::Tx;
use super::{MdsMachine, Shared, Step, attach, namespace};
use crate::refusal::Refusal;
use ogee_common::id::{AttachEpoch, ChunkserverId, CopysetId, LayerId, SegmentIndex, SnapshotGroupId, Term, VolumeId};
use ogee_disk::meta::{MemStore, MetaStore};
use ogee_raft::{ApplyEntry, EntryKind, LogPos};
use std::sync::Arc;

pub(crate) const GIB: u64 = 1 << 30;
pub(crate) const CLUSTER: [u8; 16] = *b"test cluster 123";

/// A state machine on a store in memory, and the log that it was given.
pub(crate) struct Bench {
    pub(crate) store: Arc<MemStore>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) machine: MdsMachine,
    pub(crate) log: Vec<ApplyEntry>,
}

impl Bench {
    pub(crate) fn empty() -> Self {
        let store = Arc::new(MemStore::new());
        let shared = Shared::new(store.clone());
        let machine = MdsMachine::new(shared.clone());
        Self { store, shared, machine, log: vec![] }
    }

    /// A formed cluster with a pool `p` of `copysets` copysets over three chunkservers in three zones.
    pub(crate) fn with_pool(copysets: u32) -> Self {
        let mut bench = Self::empty();
        bench.run(Command::FormCluster { cluster: CLUSTER }).expect("form");
        for n in 1..=3u8 {
            bench.run(Command::RegisterChunkserver(registration(n))).expect("register");
        }
        let hosts: Vec<ChunkserverId> = (1..=3).map(ChunkserverId).collect();
        let copysets = vec![hosts; copysets as usize];
        bench.run(Command::CreatePool { name: "p".into(), replicas: 3, copysets }).expect("pool");
        bench
    }

    pub(crate) fn apply(&mut self, envelope: &Envelope) -> Result<Outcome, Refusal> {
        let pos = LogPos { term: Term(1), index: self.log.len() as u64 };
        let entry = ApplyEntry { pos, kind: EntryKind::Command(envelope.encode().into()) };
        self.log.push(entry.clone());
        let reply = self.machine.apply_entry(&entry).expect("the store works");
        decode_answer(&reply).expect("an answer")
    }

    pub(crate) fn run(&mut self, command: Command) -> Result<Outcome, Refusal> {
        let now_unix_ms = 1000 + self.log.len() as u64;
        self.apply(&Envelope { now_unix_ms, request: None, command })
    }

    pub(crate) fn read<T>(&self, read: impl FnOnce(&Tx<'_>) -> Step<T>) -> T {
        self.shared.read(|tx| read(tx)).expect("read rows")
    }

    pub(crate) fn create(&mut self, path: &str, size_bytes: u64) -> Result<VolumeInfo, Refusal> {
        let (path, owner, pool) = (path.into(), String::new(), String::new());
        volume(self.run(Command::CreateVolume { path, size_bytes, owner, create_parents: true, pool }))
    }

    pub(crate) fn delete(&mut self, path: &str) -> Result<Outcome, Refusal> {
        self.run(Command::DeleteVolume { path: path.into(), owner: String::new() })
    }

    pub(crate) fn row(&self, path: &str) -> (VolumeId, VolumeRow) {
        self.read(|tx| namespace::volume(tx, path))
    }

    /// A snapshot with the hold that the volume's state asks for.
    pub(crate) fn snapshot(&mut self, path: &str, name: Option<&str>, attached: Hold) -> Result<SnapshotInfo, Refusal> {
        let (volume, row) = self.row(path);
        let expected = self.read(|tx| attach::expected(tx, &row));
        let hold = if row.attached.is_some() { attached } else { Hold::Detached };
        let name = name.map(str::to_owned);
        snapshot(self.run(Command::CreateSnapshot { volume, name, expected, hold }))
    }

    /// A group snapshot with these holds of the attached clients.
    pub(crate) fn group(&mut self, parts: &[(&str, &str, Hold)]) -> Result<Group, Refusal> {
        let part = |(path, name, attached): &(&str, &str, Hold)| {
            let (volume, row) = self.row(path);
            let expected = self.read(|tx| attach::expected(tx, &row));
            let hold = if row.attached.is_some() { *attached } else { Hold::Detached };
            GroupPart { volume, name: (*name).to_owned(), expected, hold }
        };
        let parts = parts.iter().map(part).collect();
        group(self.run(Command::CreateGroup { parts }))
    }

    pub(crate) fn clone_of(&mut self, info: &SnapshotInfo, path: &str) -> Result<VolumeInfo, Refusal> {
        let (snapshot, new_path, owner) = (info.id, path.into(), String::new());
        volume(self.run(Command::CloneVolume { snapshot, new_path, owner, create_parents: true }))
    }

    pub(crate) fn rollback(&mut self, path: &str, name: &str) -> Result<VolumeInfo, Refusal> {
        let ends = self.row(path).1.attached.map(|a| a.epoch);
        volume(self.run(Command::RollbackVolume { path: path.into(), snapshot: name.into(), ends }))
    }

    /// Attaches, taking over whatever is there.
    pub(crate) fn attach(&mut self, path: &str, client: u64) -> AttachEpoch {
        self.try_attach(path, client).expect("attach")
    }

    pub(crate) fn try_attach(&mut self, path: &str, client: u64) -> Result<AttachEpoch, Refusal> {
        let takes_over = self.row(path).1.attached.map(|a| a.epoch);
        let description = format!("client {client}");
        let attach = Command::AttachVolume { path: path.into(), client, description, takes_over };
        match self.run(attach)? {
            Outcome::Attached(grant) => Ok(grant.epoch),
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn allocate(&mut self, path: &str, index: u32, copyset: u32) -> Result<Outcome, Refusal> {
        let (volume, row) = self.row(path);
        let (layer, epoch) = (row.layer, row.epoch);
        self.allocate_as(volume, epoch, layer, index, copyset)
    }

    pub(crate) fn allocate_as(
        &mut self,
        volume: VolumeId,
        epoch: AttachEpoch,
        layer: LayerId,
        index: u32,
        copyset: u32,
    ) -> Result<Outcome, Refusal> {
        let (index, copysets) = (SegmentIndex(index), vec![CopysetId(copyset); 64]);
        self.run(Command::AllocateSegment { volume, epoch, layer, index, copysets })
    }

    pub(crate) fn rows(&self) -> Vec<(u8, Vec<u8>, Vec<u8>)> {
        let mut rows = vec![];
        let keep = &mut |table: u8, key: &[u8], value: &[u8]| {
            rows.push((table, key.to_vec(), value.to_vec()));
            true
        };
        self.store.dump(TABLES, keep).expect("dump");
        rows
    }

    pub(crate) fn count(&self, table: u8) -> usize {
        self.rows().iter().filter(|(t, _, _)| *t == table).count()
    }
}

pub(crate) fn registration(n: u8) -> Registration {
    Registration {
        uuid: [n; 16],
        id: ChunkserverId(0),
        cluster: None,
        addr: format!("127.0.0.1:{}", 9000 + u16::from(n)),
        pool: "p".into(),
        zone: format!("z{n}"),
        host: "h".into(),
        capacity_bytes: GIB,
    }
}

pub(crate) fn volume(answer: Result<Outcome, Refusal>) -> Result<VolumeInfo, Refusal> {
    match answer? {
        Outcome::Volume(info) => Ok(*info),
        other => panic!("{other:?}"),
    }
}

pub(crate) type Group = (SnapshotGroupId, Vec<SnapshotInfo>);

pub(crate) fn group(answer: Result<Outcome, Refusal>) -> Result<Group, Refusal> {
    match answer? {
        Outcome::Group { group, snapshots } => Ok((group, snapshots)),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn snapshot(answer: Result<Outcome, Refusal>) -> Result<SnapshotInfo, Refusal> {
    match answer? {
        Outcome::Snapshot(info) => Ok(*info),
        other => panic!("{other:?}"),
    }
}
