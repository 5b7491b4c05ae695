//! The machine against an oracle of what volumes and snapshots hold, with simulated copysets.
//!
//! Clients write through the placements that the machine gives them into copysets that know fences, minimum seqs and
//! layer tasks, as chunkservers do. The oracle keeps the content of every volume and snapshot as a plain copy. Writers
//! that lost their attach go on writing as long as the copysets let them, and learn newer seqs from refusals. Checked
//! after every step: each volume reads as the oracle says; each ready snapshot reads as it did when it became ready.
//! At the end everything is deleted, and then no row and no data of any layer may be left.

use super::super::command::{Command, Outcome};
use super::super::row::{
    ChildRow, FlattenRow, GroupedRow, Hold, LayerRow, LayerSnapshotRow, SegmentRow, SnapshotGroupRow, SnapshotNameRow, SnapshotRow, SnapshotState, TaskKind,
    TaskRow, TaskTodoRow, UnsettledRow, VolumeRow,
};
use super::super::{flatten, groups, layers, namespace, tasks};
use super::{Bench, GIB};
use crate::refusal::Refusal;
use ogee_common::id::{AttachEpoch, CopysetId, LayerId, SegmentIndex, SnapshotGroupId, VolumeId, VolumeSeq, VolumeSnapshotId};
use ogee_proto::data::SEALED_FOR_GOOD;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

const PATHS: [&str; 4] = ["a", "f/b", "f/g/c", "d"];
const NAMES: [&str; 3] = ["s0", "s1", "s2"];
const SEGMENTS: u32 = 3;
const COPYSETS: u32 = 12;

type Content = BTreeMap<u32, u32>;

#[derive(Debug, Clone)]
enum Op {
    Create(usize),
    Delete(usize),
    Rename(usize, usize),
    Snapshot { volume: usize, name: usize, holds: bool },
    /// The volumes of the mask; the attached clients of the second one hold, the first that does not is bypassed.
    Group { volumes: u8, name: usize, holds: u8, end: GroupEnd },
    DeleteSnapshot { volume: usize, name: usize },
    CloneSnapshot { volume: usize, name: usize, to: usize },
    CloneLive { volume: usize, to: usize, holds: bool },
    Rollback { volume: usize, name: usize },
    /// Or stops it.
    Flatten { volume: usize, cancels: bool },
    Attach(usize),
    Detach(usize),
    Write { volume: usize, segment: u32, copyset: u32 },
    /// A writer that lost its attach writes where it knows a placement.
    Stray { which: usize, segment: u32 },
    /// It asks for the layout of its layer, as a reader may.
    StrayLooks(usize),
    /// Copysets do some of their tasks.
    Tasks { from: u32, count: u32 },
    Reap,
}

/// What becomes of a group.
#[derive(Debug, Clone, Copy)]
enum GroupEnd {
    /// Its seals are waited for, then it is confirmed.
    Confirm,
    /// Its leader dies: its clients learn the new seq later, or by refusals, and the next leader drops it.
    Drop,
}

fn op() -> impl Strategy<Value = Op> {
    let (v, n, s) = (0..PATHS.len(), 0..NAMES.len(), 0..SEGMENTS);
    prop_oneof![
        3 => v.clone().prop_map(Op::Create),
        1 => v.clone().prop_map(Op::Delete),
        1 => (v.clone(), v.clone()).prop_map(|(a, b)| Op::Rename(a, b)),
        4 => (v.clone(), n.clone(), any::<bool>())
            .prop_map(|(volume, name, holds)| Op::Snapshot { volume, name, holds }),
        3 => (1u8..16, n.clone(), any::<u8>(), prop_oneof![Just(GroupEnd::Confirm), Just(GroupEnd::Drop)])
            .prop_map(|(volumes, name, holds, end)| Op::Group { volumes, name, holds, end }),
        2 => (v.clone(), n.clone()).prop_map(|(volume, name)| Op::DeleteSnapshot { volume, name }),
        3 => (v.clone(), n.clone(), v.clone()).prop_map(|(volume, name, to)| Op::CloneSnapshot { volume, name, to }),
        1 => (v.clone(), v.clone(), any::<bool>()).prop_map(|(volume, to, holds)| Op::CloneLive { volume, to, holds }),
        2 => (v.clone(), n).prop_map(|(volume, name)| Op::Rollback { volume, name }),
        3 => (v.clone(), prop::bool::weighted(0.2)).prop_map(|(volume, cancels)| Op::Flatten { volume, cancels }),
        4 => v.clone().prop_map(Op::Attach),
        2 => v.clone().prop_map(Op::Detach),
        9 => (v, s.clone(), 1..=COPYSETS)
            .prop_map(|(volume, segment, copyset)| Op::Write { volume, segment, copyset }),
        4 => (0usize..8, s).prop_map(|(which, segment)| Op::Stray { which, segment }),
        1 => (0usize..8).prop_map(Op::StrayLooks),
        4 => (1..=COPYSETS, 1u32..20).prop_map(|(from, count)| Op::Tasks { from, count }),
        1 => Just(Op::Reap),
    ]
}

/// A writing client, present or past.
#[derive(Debug, Clone)]
struct Writer {
    volume: VolumeId,
    epoch: AttachEpoch,
    layer: LayerId,
    seq: u64,
    layout: BTreeMap<u32, u32>,
}

/// What a chunkserver's state machine keeps of a layer in one copyset.
#[derive(Debug, Default)]
struct Replica {
    fence: u64,
    min_seq: u64,
    gone: bool,
    /// By segment (one chunk stands for it) and seq.
    data: BTreeMap<(u32, u64), u32>,
}

impl Replica {
    fn newest(&self, segment: u32, seq: u64) -> Option<u32> {
        self.data.range((segment, 0)..=(segment, seq)).next_back().map(|(_, v)| *v)
    }

    /// A write with the OpenLayer before it; the refusal for a low seq names the lowest that is accepted.
    fn write(&mut self, writer: &Writer, segment: u32, value: u32) -> Result<(), Option<u64>> {
        if self.gone || writer.epoch.0 < self.fence {
            return Err(None);
        }
        self.fence = writer.epoch.0;
        if writer.seq < self.min_seq {
            return Err(Some(self.min_seq));
        }
        self.min_seq = writer.seq;
        self.data.insert((segment, writer.seq), value);
        Ok(())
    }

    fn carry_out(&mut self, kind: TaskKind) {
        match kind {
            TaskKind::Seal(SEALED_FOR_GOOD) => self.fence = u64::MAX,
            TaskKind::Seal(seq) => self.min_seq = self.min_seq.max(seq.0),
            TaskKind::DropLayer => {
                self.gone = true;
                self.data.clear();
            }
            // Not a matter of one layer alone: see `World::flatten_copyset`.
            TaskKind::Flatten { .. } => {}
            TaskKind::DropVersion { after, seq, next } => {
                for segment in 0..SEGMENTS {
                    let dropped = (segment, after.0 + 1)..=(segment, seq.0);
                    let keys: Vec<_> = self.data.range(dropped).map(|(k, v)| (*k, *v)).collect();
                    let Some((_, value)) = keys.last().copied() else { continue };
                    for (key, _) in &keys {
                        self.data.remove(key);
                    }
                    let kept = (segment, seq.0 + 1)..=(segment, next.0);
                    if self.data.range(kept).next().is_none() {
                        self.data.insert((segment, next.0), value);
                    }
                }
            }
        }
    }
}

/// What the oracle knows of a snapshot.
#[derive(Debug, Clone)]
struct Known {
    content: Content,
    layer: LayerId,
    seq: u64,
    ready: bool,
}

struct World {
    bench: Bench,
    replicas: BTreeMap<(u32, LayerId), Replica>,
    live: BTreeMap<VolumeId, Content>,
    snapshots: BTreeMap<VolumeSnapshotId, Known>,
    writers: BTreeMap<VolumeId, Writer>,
    strays: Vec<Writer>,
    value: u32,
}

impl World {
    fn new() -> Self {
        Self {
            bench: Bench::with_pool(COPYSETS),
            replicas: BTreeMap::new(),
            live: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            writers: BTreeMap::new(),
            strays: vec![],
            value: 0,
        }
    }

    fn find(&self, path: &str) -> Option<(VolumeId, VolumeRow)> {
        self.bench.shared.read(|tx| namespace::volume(tx, path)).ok()
    }

    fn rows(&self) -> Vec<(VolumeSnapshotId, SnapshotRow)> {
        self.bench.read(|tx| Ok(tx.scan::<SnapshotRow>(&(), None, 1000)?))
    }

    fn named(&self, volume: VolumeId, name: &str) -> Option<(VolumeSnapshotId, SnapshotRow)> {
        self.rows().into_iter().find(|(_, r)| r.volume == volume && r.name == name)
    }

    /// Reads a layer at a seq through its placement and its ancestry, in one copyset per segment.
    fn content(&self, layer: LayerId, seq: u64) -> Content {
        let (placement, chain) = self.bench.read(|tx| {
            let row: LayerRow = tx.expect(&layer)?;
            let placement = layers::placement(tx, layer, &row, SegmentIndex(0), SEGMENTS)?;
            Ok((placement, layers::ancestry(tx, &row)?))
        });
        let mut content = Content::new();
        for (index, row) in placement.into_iter().filter(|(_, row)| row.sealing.is_none()) {
            let copyset = row.copysets[0].0;
            let levels = std::iter::once((layer, seq)).chain(chain.iter().map(|p| (p.layer, p.seq.0)));
            let read = |(layer, seq)| self.replicas.get(&(copyset, layer))?.newest(index.0, seq);
            if let Some(value) = levels.map(read).find_map(|v| v) {
                content.insert(index.0, value);
            }
        }
        content
    }

    fn check(&mut self) {
        for (id, known) in &mut self.snapshots {
            let row = self.bench.read(|tx| Ok(tx.get::<SnapshotRow>(id)?));
            known.ready |= row.is_some_and(|r| r.state == SnapshotState::Ready);
        }
        let rows: BTreeSet<_> = self.rows().into_iter().map(|(id, _)| id).collect();
        self.snapshots.retain(|id, _| rows.contains(id));
        for (id, known) in &self.snapshots {
            if known.ready {
                assert_eq!(self.content(known.layer, known.seq), known.content, "snapshot {id}");
            }
        }
        let volumes = self.bench.read(|tx| Ok(tx.scan::<VolumeRow>(&(), None, 1000)?));
        assert_eq!(volumes.len(), self.live.len());
        for (id, row) in volumes {
            let layer: LayerRow = self.bench.read(|tx| tx.expect(&row.layer).map_err(Into::into));
            assert_eq!(self.content(row.layer, layer.seq.0), self.live[&id], "volume {id}");
        }
    }

    /// A copyset accepted a write.
    fn written(&mut self, writer: &Writer, segment: u32) {
        let head = self.bench.read(|tx| Ok(tx.get::<VolumeRow>(&writer.volume)?));
        if head.is_some_and(|row| row.layer == writer.layer) {
            self.live.get_mut(&writer.volume).expect("a volume").insert(segment, self.value);
        }
        for known in self.snapshots.values_mut() {
            if known.layer == writer.layer && known.seq >= writer.seq {
                assert!(!known.ready, "a write below a ready snapshot was accepted");
                known.content.insert(segment, self.value);
            }
        }
    }

    /// Writes where the writer knows a placement; a low seq is raised as the refusal says, once.
    fn write(&mut self, mut writer: Writer, segment: u32) -> Writer {
        let Some(copyset) = writer.layout.get(&segment).copied() else { return writer };
        self.value += 1;
        let value = self.value;
        let replica = self.replicas.entry((copyset, writer.layer)).or_default();
        let mut result = replica.write(&writer, segment, value);
        if let Err(Some(seq)) = result {
            writer.seq = seq;
            result = replica.write(&writer, segment, value);
        }
        if result.is_ok() {
            self.written(&writer, segment);
        }
        writer
    }

    fn lose(&mut self, volume: VolumeId) {
        self.strays.extend(self.writers.remove(&volume));
    }

    fn attach(&mut self, path: &str) {
        let Some((id, row)) = self.find(path) else { return };
        let before = row.epoch;
        if !self.bench.read(|tx| layers::is_fenced(tx, id)) {
            // A rollback took it from its client, and some copyset has not fenced that yet.
            assert!(matches!(self.bench.try_attach(path, 1), Err(Refusal::MaybeAttached { .. })));
            return;
        }
        let epoch = self.bench.attach(path, 1);
        assert!(epoch > before, "epochs only rise");
        self.lose(id);
        let seq = self.bench.read(|tx| namespace::head_seq(tx, &row)).0;
        let writer = Writer { volume: id, epoch, layer: row.layer, seq, layout: BTreeMap::new() };
        self.writers.insert(id, writer);
    }

    fn snapshot(&mut self, path: &str, name: Option<&str>, holds: bool) -> Option<VolumeSnapshotId> {
        let (id, row) = self.find(path)?;
        let taken = name.is_some_and(|n| self.named(id, n).is_some());
        let hold = if holds { Hold::Held } else { Hold::Bypassed };
        match self.bench.snapshot(path, name, hold) {
            Err(Refusal::SnapshotTaken { .. }) => {
                assert!(taken);
                None
            }
            Err(other) => panic!("{other}"),
            Ok(info) => {
                assert!(!taken);
                let content = self.live[&id].clone();
                let known = Known { content, layer: row.layer, seq: info.seq.0, ready: false };
                self.snapshots.insert(info.id, known);
                if holds && let Some(writer) = self.writers.get_mut(&id) {
                    // It held, and was told the new seq.
                    writer.seq = info.seq.0 + 1;
                }
                if info.confirming {
                    let early = self.writers.get(&id).cloned().expect("a held writer");
                    let refused = self.bench.allocate_as(id, early.epoch, early.layer, SEGMENTS - 1, 1);
                    let placed = early.layout.contains_key(&(SEGMENTS - 1));
                    assert!(placed || !matches!(refused, Ok(Outcome::Segment { sealing: None, .. })) || {
                        // Placed by an earlier attach or an ancestor.
                        self.content_placed(early.layer, SEGMENTS - 1)
                    });
                    let command = if self.value % 4 == 3 {
                        Command::SealSnapshot { snapshot: info.id }
                    } else {
                        Command::ConfirmSnapshot { snapshot: info.id }
                    };
                    self.bench.run(command).expect("settled");
                }
                Some(info.id)
            }
        }
    }

    fn group(&mut self, volumes: u8, name: &str, holds: u8, end: GroupEnd) {
        let mut parts = vec![];
        for (n, path) in PATHS.iter().enumerate().filter(|(n, _)| volumes >> n & 1 == 1) {
            if self.find(path).is_some() {
                let hold = if holds >> n & 1 == 1 { Hold::Held } else { Hold::Bypassed };
                parts.push((*path, name, hold));
            }
        }
        let found: Vec<_> = parts.iter().filter_map(|(path, _, _)| self.find(path)).collect();
        let taken = found.iter().any(|(id, _)| self.named(*id, name).is_some());
        let before = self.rows().len();
        let (group, made) = match self.bench.group(&parts) {
            Ok(made) => made,
            Err(Refusal::SnapshotTaken { .. }) => {
                assert!(taken);
                assert_eq!(self.rows().len(), before, "all or none");
                return;
            }
            Err(other) => panic!("{other}"),
        };
        assert!(!taken);
        for info in &made {
            let content = self.live[&info.volume].clone();
            let known = Known { content, layer: info.layer, seq: info.seq.0, ready: false };
            self.snapshots.insert(info.id, known);
        }
        match end {
            GroupEnd::Drop => {
                self.bench.run(Command::DropGroup { group }).expect("dropped");
                assert_eq!(self.rows().len(), before);
            }
            GroupEnd::Confirm => self.confirm_group(group, &made),
        }
    }

    fn confirm_group(&mut self, group: SnapshotGroupId, made: &[super::SnapshotInfo]) {
        while !self.bench.read(|tx| groups::bypassed_are_sealed(tx, group)) {
            // A bypassed client goes on until it meets a seal.
            for info in made.iter().filter(|i| i.hold == Hold::Bypassed) {
                if let Some(writer) = self.writers.remove(&info.volume) {
                    let writer = self.write(writer, 0);
                    self.writers.insert(info.volume, writer);
                }
            }
            assert!(self.do_tasks(1, 1), "the seals can be done");
        }
        for info in made {
            if let Some(writer) = self.writers.get_mut(&info.volume).filter(|_| info.hold == Hold::Held) {
                writer.seq = info.seq.0 + 1;
            }
        }
        self.bench.run(Command::ConfirmGroup { group }).expect("confirmed");
    }

    fn content_placed(&self, layer: LayerId, segment: u32) -> bool {
        self.bench.read(|tx| {
            let row: LayerRow = tx.expect(&layer)?;
            Ok(!layers::placement(tx, layer, &row, SegmentIndex(segment), 1)?.is_empty())
        })
    }

    fn clone_of(&mut self, id: VolumeSnapshotId, to: &str) {
        let row: SnapshotRow = self.bench.read(|tx| tx.expect(&id).map_err(Into::into));
        let taken = self.find(to).is_some();
        let info = super::SnapshotInfo { id, ..info_of(&row) };
        match self.bench.clone_of(&info, to) {
            Ok(volume) => {
                assert!(!taken && row.state == SnapshotState::Ready);
                let content = self.snapshots[&id].content.clone();
                self.live.insert(volume.id, content);
            }
            Err(Refusal::PathTaken { .. }) => assert!(taken),
            Err(Refusal::NotReady { .. }) => assert_ne!(row.state, SnapshotState::Ready),
            Err(other) => panic!("{other}"),
        }
    }

    fn delete(&mut self, path: &str) {
        let Some((id, row)) = self.find(path) else {
            assert!(matches!(self.bench.delete(path), Err(Refusal::NoSuchVolume { .. })));
            return;
        };
        let snapshots: Vec<_> = self.rows().into_iter().map(|(_, r)| r).filter(|r| r.volume == id).collect();
        match self.bench.delete(path) {
            Ok(_) => {
                assert!(row.attached.is_none() && snapshots.iter().all(|r| r.hidden && r.clones == 0));
                self.live.remove(&id);
            }
            Err(Refusal::Attached { .. }) => assert!(row.attached.is_some()),
            Err(Refusal::HasSnapshots { .. }) => assert!(snapshots.iter().any(|r| !r.hidden)),
            Err(Refusal::HasClones { .. }) => assert!(snapshots.iter().any(|r| r.clones > 0)),
            Err(other) => panic!("{other}"),
        }
    }

    fn delete_snapshot(&mut self, path: &str, name: &str) {
        let Some((id, _)) = self.find(path) else { return };
        let known = self.named(id, name);
        match self.bench.run(Command::DeleteSnapshot { path: path.into(), name: name.into() }) {
            Ok(_) => assert!(known.is_some_and(|(_, r)| r.clones == 0)),
            Err(Refusal::HasClones { .. }) => assert!(known.is_some_and(|(_, r)| r.clones > 0)),
            Err(Refusal::NoSuchSnapshot { .. }) => assert!(known.is_none()),
            Err(other) => panic!("{other}"),
        }
    }

    fn rollback(&mut self, path: &str, name: &str) {
        let Some((id, _)) = self.find(path) else { return };
        let known = self.named(id, name);
        match self.bench.rollback(path, name) {
            Ok(_) => {
                let (snapshot, row) = known.expect("a snapshot");
                assert_eq!(row.state, SnapshotState::Ready);
                self.lose(id);
                let content = self.snapshots[&snapshot].content.clone();
                self.live.insert(id, content);
            }
            Err(Refusal::NoSuchSnapshot { .. }) => assert!(known.is_none()),
            Err(Refusal::NotReady { .. }) => assert!(known.is_some_and(|(_, r)| r.state != SnapshotState::Ready)),
            Err(other) => panic!("{other}"),
        }
    }

    fn place_and_write(&mut self, path: &str, segment: u32, copyset: u32) {
        let Some((id, _)) = self.find(path) else { return };
        let Some(mut writer) = self.writers.remove(&id) else { return };
        if !writer.layout.contains_key(&segment)
            && let Ok(Outcome::Segment { copysets, sealing: None }) =
                self.bench.allocate_as(id, writer.epoch, writer.layer, segment, copyset)
        {
            writer.layout.insert(segment, copysets[0].0);
        }
        let writer = self.write(writer, segment);
        self.writers.insert(id, writer);
    }

    /// What the leader of a copyset does: the layer gets what its ancestors show, below everything that it has.
    fn flatten_copyset(&mut self, copyset: u32, layer: LayerId, needed: u64) {
        let chain = self.bench.read(|tx| layers::ancestry(tx, &tx.expect(&layer)?));
        for segment in 0..SEGMENTS {
            let shown = chain.iter().find_map(|p| self.replicas.get(&(copyset, p.layer))?.newest(segment, p.seq.0));
            let replica = self.replicas.get_mut(&(copyset, layer)).expect("a replica");
            if let (Some(value), None) = (shown, replica.newest(segment, needed)) {
                replica.data.insert((segment, 0), value);
            }
        }
    }

    /// Starts or stops a flatten; its end is checked by what is read then.
    fn flatten(&mut self, path: &str, cancels: bool) {
        let before = self.find(path);
        let command = Command::FlattenVolume { path: path.into(), cancels };
        let Ok(answer) = self.bench.run(command.clone()) else {
            assert!(before.is_none());
            return;
        };
        let (id, row) = before.expect("a volume");
        let layer: LayerRow = self.bench.read(|tx| tx.expect(&row.layer).map_err(Into::into));
        let under_way = self.bench.read(|tx| Ok(tx.get::<FlattenRow>(&row.layer)?));
        assert_eq!(under_way.is_some(), !cancels && layer.parent.is_some());
        let progress = self.bench.read(|tx| flatten::progress(tx, id));
        assert_eq!(progress.total > 0, under_way.is_some());
        let tasks = self.bench.read(|tx| Ok(tx.scan::<TaskRow>(&(), None, 1000)?));
        assert_eq!(self.bench.run(command), Ok(answer), "asking again changes nothing");
        assert_eq!(self.bench.read(|tx| Ok(tx.scan::<TaskRow>(&(), None, 1000)?)), tasks);
    }

    fn do_tasks(&mut self, from: u32, mut count: u32) -> bool {
        let mut any = false;
        for n in 0..COPYSETS {
            let copyset = (from + n - 1) % COPYSETS + 1;
            for (id, task) in self.bench.read(|tx| tasks::of_copyset(tx, CopysetId(copyset))) {
                if count == 0 {
                    return any;
                }
                self.replicas.entry((copyset, task.layer)).or_default().carry_out(task.kind);
                if let TaskKind::Flatten { needed } = task.kind {
                    self.flatten_copyset(copyset, task.layer, needed.0);
                }
                let done = vec![(id, CopysetId(copyset)), (id, CopysetId(copyset)), (id + 1000, CopysetId(copyset))];
                self.bench.run(Command::TasksDone { done }).expect("done");
                (count, any) = (count - 1, true);
            }
        }
        any
    }

    fn reap(&mut self) {
        for (id, row) in self.rows() {
            let unsettled = self.bench.read(|tx| Ok(tx.get::<UnsettledRow>(&id)?.is_some()));
            let childless = row.hidden && row.clones + row.rollbacks == 0;
            assert_eq!(unsettled, childless || row.state == SnapshotState::Confirming);
            self.bench.run(Command::ReapSnapshot { snapshot: id }).expect("reap");
        }
    }

    #[allow(clippy::needless_pass_by_value)] // a step uses its operation up
    fn step(&mut self, op: Op) {
        match op {
            Op::Create(v) => {
                let taken = self.find(PATHS[v]).is_some();
                match self.bench.create(PATHS[v], u64::from(SEGMENTS) * GIB) {
                    Ok(info) => {
                        assert!(!taken);
                        self.live.insert(info.id, Content::new());
                    }
                    Err(e) => assert!(taken && matches!(e, Refusal::PathTaken { .. })),
                }
            }
            Op::Delete(v) => self.delete(PATHS[v]),
            Op::Rename(a, b) => {
                let (path, new_path) = (PATHS[a].into(), PATHS[b].into());
                let possible = self.find(PATHS[a]).is_some() && self.find(PATHS[b]).is_none();
                let renamed = self.bench.run(Command::RenameVolume { path, new_path, create_parents: true });
                assert_eq!(renamed.is_ok(), possible);
            }
            Op::Snapshot { volume, name, holds } => drop(self.snapshot(PATHS[volume], Some(NAMES[name]), holds)),
            Op::Group { volumes, name, holds, end } => self.group(volumes, NAMES[name], holds, end),
            Op::DeleteSnapshot { volume, name } => self.delete_snapshot(PATHS[volume], NAMES[name]),
            Op::CloneSnapshot { volume, name, to } => {
                let found = self.find(PATHS[volume]).and_then(|(id, _)| self.named(id, NAMES[name]));
                if let Some((id, _)) = found {
                    self.clone_of(id, PATHS[to]);
                }
            }
            Op::CloneLive { volume, to, holds } => {
                if let Some(id) = self.snapshot(PATHS[volume], None, holds) {
                    self.clone_of(id, PATHS[to]);
                }
            }
            Op::Rollback { volume, name } => self.rollback(PATHS[volume], NAMES[name]),
            Op::Flatten { volume, cancels } => self.flatten(PATHS[volume], cancels),
            Op::Attach(v) => self.attach(PATHS[v]),
            Op::Detach(v) => self.detach(PATHS[v]),
            Op::Write { volume, segment, copyset } => self.place_and_write(PATHS[volume], segment, copyset),
            Op::Stray { which, segment } => {
                if which < self.strays.len() {
                    let writer = self.strays.swap_remove(which);
                    let writer = self.write(writer, segment);
                    self.strays.push(writer);
                }
            }
            Op::StrayLooks(which) => self.stray_looks(which),
            Op::Tasks { from, count } => drop(self.do_tasks(from, count)),
            Op::Reap => self.reap(),
        }
    }

    fn detach(&mut self, path: &str) {
        let Some((id, row)) = self.find(path) else { return };
        if let Some(writer) = self.writers.remove(&id) {
            assert_eq!(row.attached.map(|a| a.epoch), Some(writer.epoch));
            let detach = Command::DetachVolume { volume: id, epoch: writer.epoch };
            self.bench.run(detach.clone()).expect("detach");
            self.bench.run(detach).expect("detach again");
        }
    }

    fn stray_looks(&mut self, which: usize) {
        let Some(writer) = self.strays.get_mut(which) else { return };
        let layer = writer.layer;
        let rows = self.bench.read(|tx| match tx.get::<LayerRow>(&layer)? {
            Some(row) => layers::placement(tx, layer, &row, SegmentIndex(0), SEGMENTS),
            None => Ok(BTreeMap::new()),
        });
        for (index, row) in rows.into_iter().filter(|(_, row)| row.sealing.is_none()) {
            writer.layout.insert(index.0, row.copysets[0].0);
        }
    }

    /// Deletes everything that can be deleted until nothing is left.
    fn empty(&mut self) {
        for _ in 0..PATHS.len() * 4 {
            for path in PATHS {
                self.detach(path);
                for name in NAMES {
                    self.delete_snapshot(path, name);
                }
                self.delete(path);
            }
            self.reap();
            self.check();
        }
        assert!(self.live.is_empty(), "volumes are left: {:?}", self.live);
        while self.do_tasks(1, u32::MAX) {}
        let left = self.bench.read(|tx| {
            Ok([
                tx.scan::<LayerRow>(&(), None, 9)?.len(),
                tx.scan::<SegmentRow>(&(), None, 9)?.len(),
                tx.scan::<SnapshotRow>(&(), None, 9)?.len(),
                tx.scan::<SnapshotNameRow>(&(), None, 9)?.len(),
                tx.scan::<LayerSnapshotRow>(&(), None, 9)?.len(),
                tx.scan::<ChildRow>(&(), None, 9)?.len(),
                tx.scan::<UnsettledRow>(&(), None, 9)?.len(),
                tx.scan::<TaskRow>(&(), None, 9)?.len(),
                tx.scan::<TaskTodoRow>(&(), None, 9)?.len(),
                tx.scan::<SnapshotGroupRow>(&(), None, 9)?.len(),
                tx.scan::<GroupedRow>(&(), None, 9)?.len(),
                tx.scan::<FlattenRow>(&(), None, 9)?.len(),
            ])
        });
        assert_eq!(left, [0; 12], "rows are left");
        assert!(self.replicas.values().all(|r| r.data.is_empty()), "data of deleted layers is left");
    }
}

fn info_of(row: &SnapshotRow) -> super::SnapshotInfo {
    super::SnapshotInfo {
        id: VolumeSnapshotId(0),
        name: row.name.clone(),
        volume: row.volume,
        volume_path: String::new(),
        layer: row.layer,
        seq: VolumeSeq(row.seq.0),
        size_bytes: row.size_bytes,
        created_unix_ms: 0,
        ready: true,
        confirming: false,
        children: 0,
        hold: row.hold,
        group: None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn volumes_and_snapshots_hold_what_the_oracle_says(ops in prop::collection::vec(op(), 1..90)) {
        let mut world = World::new();
        for op in ops {
            world.step(op);
            world.check();
        }
        world.empty();
    }
}
