//! The bytes of rows and commands are pinned: `tests/golden/*.txt` hold them as hex, one per line. A difference means
//! that data on disk or in logs would be read wrongly; a new version of the row or command is needed then.

use super::super::command::{Command, Envelope, Expected, GroupPart, Outcome, decode_answer, encode_answer};
use super::super::key::KeyPart;
use super::super::row::*;
use super::super::schedules::ScheduleCommand;
use super::super::service_tasks::{Holder, ServiceTaskCommand, TaskEnd};
use super::super::tx::{decode_row, encode_row};
use super::registration;
use crate::refusal::Refusal;
use ogee_common::id::{
    AttachEpoch, ChunkserverId, CopysetId, DirectoryId, LayerId, PoolId, ReplicaId, SegmentIndex, ServiceTaskId, SnapshotGroupId,
    VolumeId, VolumeSeq, VolumeSnapshotId,
};
use ogee_common::qos::{LimitChanges, LimitKind, RateLimit, VolumeLimits};
use proptest::prelude::*;
use std::fmt::{Debug, Write as _};

const ROWS: &str = include_str!("../../../tests/golden/rows.txt");
const COMMANDS: &str = include_str!("../../../tests/golden/commands.txt");

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, b| {
        write!(text, "{b:02x}").expect("a string takes everything");
        text
    })
}

struct Lines(String);

impl Lines {
    fn row<R: Row + PartialEq + Debug>(&mut self, key: &R::Key, row: &R) {
        let (key_bytes, value) = (key.to_key(), encode_row(row));
        assert!(R::Key::from_key(&key_bytes).is_some_and(|k| k.to_key() == key_bytes));
        assert_eq!(&decode_row::<R>(&value).expect("a row"), row);
        let (number, name) = (R::TABLE.number, R::TABLE.name);
        writeln!(self.0, "{number} {} | {} | {}", name.replace(' ', "-"), hex(&key_bytes), hex(&value)).expect("text");
    }
}

fn layer_row() -> LayerRow {
    LayerRow {
        volume: VolumeId(2),
        pool: PoolId(1),
        seq: VolumeSeq(300),
        parent: Some(ParentRef { layer: LayerId(4), seq: VolumeSeq(5) }),
        depth: 6,
        head: true,
        snapshots: 7,
        segments: 8,
        inherited: 9,
        unclean: true,
        min_seq: VolumeSeq(10),
        seals: 11,
        confirming: 12,
        dropping: false,
    }
}

fn volume_row() -> VolumeRow {
    VolumeRow {
        directory: DirectoryId(1),
        name: "disk0".into(),
        owner: "ann".into(),
        size_bytes: 64 << 30,
        pool: PoolId(1),
        layer: LayerId(9),
        created_unix_ms: 1_700_000_000_000,
        parent: "golden@v1".into(),
        snapshots: 2,
        epoch: AttachEpoch(3),
        attached: Some(AttachRow { epoch: AttachEpoch(3), client: 77, description: "vm host".into() }),
    }
}

fn burst() -> RateLimit {
    RateLimit { rate: 1 << 20, burst: 4 << 20, burst_seconds: 30 }
}

fn options_row() -> VolumeOptionsRow {
    let iops = RateLimit { rate: 500, ..RateLimit::NONE };
    let limits = VolumeLimits::NONE.with(LimitKind::Iops, iops).with(LimitKind::WriteBytes, burst());
    VolumeOptionsRow { sector_bytes: 4096, limits }
}

fn backup_row() -> BackupRow {
    BackupRow {
        repository: "main".into(),
        backup: 300,
        root: [0xAB; 32],
        leaves: [0xCD; 32],
        size_bytes: 1 << 30,
        block_bytes: 256 << 10,
    }
}

fn snapshot_row() -> SnapshotRow {
    SnapshotRow {
        volume: VolumeId(2),
        name: "v1".into(),
        layer: LayerId(9),
        seq: VolumeSeq(4),
        size_bytes: 1 << 30,
        segments: 1,
        created_unix_ms: 5,
        state: SnapshotState::Sealing(6),
        hold: Hold::Bypassed,
        hidden: false,
        clones: 1,
        rollbacks: 2,
    }
}

fn namespace_rows(l: &mut Lines) {
    l.row(&(), &AppliedRow { pos: Some((3, 500)), membership: vec![1, 2] });
    l.row(&(), &ClusterRow { cluster: *b"0123456789abcdef", created_unix_ms: 9 });
    l.row(&(Counter::Replica as u8), &CounterRow { last: 1000 });
    l.row(&(DirectoryId(1), "f".into()), &EntryRow::Directory(DirectoryId(2)));
    l.row(&(DirectoryId(2), "disk0".into()), &EntryRow::Volume(VolumeId(2)));
    l.row(&DirectoryId(2), &DirectoryRow { parent: DirectoryId(1), name: "f".into() });
    l.row(&VolumeId(2), &volume_row());
    l.row(&LayerId(9), &layer_row());
    let copysets = (1..=64).map(CopysetId).collect();
    l.row(&(LayerId(9), SegmentIndex(3)), &SegmentRow { copysets, seq: VolumeSeq(2), sealing: Some(6) });
    l.row(&VolumeSnapshotId(8), &snapshot_row());
    l.row(&(VolumeId(2), "v1".into()), &SnapshotNameRow(VolumeSnapshotId(8)));
    l.row(&(LayerId(9), VolumeSeq(4)), &LayerSnapshotRow(VolumeSnapshotId(8)));
    l.row(&(LayerId(9), VolumeSeq(4), LayerId(10)), &ChildRow);
    l.row(&VolumeSnapshotId(8), &UnsettledRow);
}

fn other_rows(l: &mut Lines) {
    let task = |kind, effect| TaskRow { layer: LayerId(9), kind, effect, remaining: 3 };
    let (after, seq, next) = (VolumeSeq(1), VolumeSeq(2), VolumeSeq(3));
    l.row(&6, &task(TaskKind::Seal(VolumeSeq(5)), TaskEffect::SnapshotReady(VolumeSnapshotId(8))));
    l.row(&7, &task(TaskKind::Seal(VolumeSeq(5)), TaskEffect::SegmentOpen(SegmentIndex(3))));
    l.row(&8, &task(TaskKind::DropLayer, TaskEffect::LayerGone));
    l.row(&9, &task(TaskKind::DropVersion { after, seq, next }, TaskEffect::None));
    l.row(&10, &task(TaskKind::Flatten { needed: VolumeSeq(4) }, TaskEffect::Flattened));
    l.row(&(CopysetId(1), 6), &TaskTodoRow);
    let chunkserver = ChunkserverRow {
        uuid: *b"fedcba9876543210",
        addr: "10.0.0.1:9000".into(),
        pool: "p".into(),
        zone: "z1".into(),
        host: "h1".into(),
        capacity_bytes: 1 << 40,
        registered_unix_ms: 4,
    };
    l.row(&ChunkserverId(1), &chunkserver);
    l.row(b"fedcba9876543210", &ChunkserverUuidRow(ChunkserverId(1)));
    l.row(&PoolId(1), &PoolRow { name: "p".into(), replicas: 3, copysets: 24 });
    l.row(&"p".into(), &PoolNameRow(PoolId(1)));
    let replica = |n| ReplicaRow { replica: ReplicaId(n), chunkserver: ChunkserverId(1), created: n == 1 };
    l.row(&CopysetId(1), &CopysetRow { pool: PoolId(1), conf_epoch: 1, replicas: vec![replica(1), replica(2)] });
    l.row(&(ChunkserverId(1), CopysetId(1)), &HostedRow);
    l.row(&[7; 16], &RequestRow { reply: encode_answer(&Ok(Outcome::Done)) });
    l.row(&12, &RequestOrderRow([7; 16]));
    let member = |n, hold, sealing| GroupMember { snapshot: VolumeSnapshotId(n), hold, epoch: AttachEpoch(3), sealing };
    let members = vec![member(8, Hold::Held, None), member(9, Hold::Bypassed, Some(6))];
    l.row(&SnapshotGroupId(2), &SnapshotGroupRow { members });
    l.row(&VolumeSnapshotId(8), &GroupedRow(SnapshotGroupId(2)));
    let (removed, added) = (ReplicaId(2), replica(9));
    for (copyset, state) in [(1, MoveState::Adding), (2, MoveState::Cancelling)] {
        l.row(&CopysetId(copyset), &MoveRow { removed, added, state, started_unix_ms: 1000 });
    }
    for (id, reason) in [(1, OutReason::Silent), (2, OutReason::Asked)] {
        l.row(&ChunkserverId(id), &OutRow { reason, since_unix_ms: 1000 });
    }
    l.row(&LayerId(9), &FlattenRow { task: 10, total: 24, started_unix_ms: 1000 });
    l.row(&VolumeId(2), &options_row());
    service_task_rows(l);
    l.row(&LayerId(9), &backup_row());
}

fn service_task_rows(l: &mut Lines) {
    let row = |state| ServiceTaskRow {
        kind: "backup".into(),
        repository: "main".into(),
        arguments: "{}".into(),
        state,
        owner: 77,
        fence: 2,
        note: "n".into(),
        result: "r".into(),
        done: 3,
        total: 300,
        created_unix_ms: 1000,
        started_unix_ms: 1001,
        ended_unix_ms: 1002,
        key: Some([7; 16]),
    };
    use ServiceTaskState as S;
    for (id, state) in [S::Queued, S::Running, S::Cancelling, S::Done, S::Failed, S::Cancelled].into_iter().enumerate() {
        l.row(&ServiceTaskId(id as u64 + 1), &row(state));
    }
    l.row(&ServiceTaskId(4), &OpenServiceTaskRow);
    l.row(&12, &EndedServiceTaskRow(ServiceTaskId(4)));
    l.row(&[7; 16], &ServiceTaskKeyRow(ServiceTaskId(4)));
    let schedule = ScheduleRow {
        kind: "backup".into(),
        repository: "main".into(),
        arguments: "{}".into(),
        every_ms: 1000,
        last_due_unix_ms: 1001,
        last_task: ServiceTaskId(4),
        created_unix_ms: 1002,
    };
    l.row(&"f/a".into(), &schedule);
}

#[test]
fn rows_have_their_golden_bytes() {
    let mut lines = Lines(String::new());
    namespace_rows(&mut lines);
    other_rows(&mut lines);
    for table in TABLES {
        assert!(lines.0.lines().any(|l| l.starts_with(&format!("{} ", table.number))), "{}", table.name);
    }
    assert_eq!(lines.0, ROWS, "rows.txt would be:\n{}", lines.0);
}

fn commands() -> Vec<Command> {
    let (path, owner, name) = (String::from("f/a"), String::from("ann"), String::from("s"));
    let (volume, snapshot, epoch, layer) = (VolumeId(2), VolumeSnapshotId(8), AttachEpoch(3), LayerId(9));
    let expected = Expected { layer, seq: VolumeSeq(4), attached: Some(epoch) };
    let part = |volume, hold| GroupPart { volume: VolumeId(volume), name: "g".into(), expected, hold };
    let (parts, group) = (vec![part(2, Hold::Held), part(7, Hold::Bypassed)], SnapshotGroupId(300));
    vec![
        Command::FormCluster { cluster: [1; 16] },
        Command::CreateVolume {
            path: path.clone(),
            size_bytes: 1 << 30,
            owner: owner.clone(),
            create_parents: true,
            pool: "p".into(),
        },
        Command::DeleteVolume { path: path.clone(), owner: owner.clone() },
        Command::RenameVolume { path: path.clone(), new_path: "b".into(), create_parents: false },
        Command::ExtendVolume { path: path.clone(), size_bytes: 2 << 30 },
        Command::CreateSnapshot { volume, name: Some(name.clone()), expected, hold: Hold::Held },
        Command::ConfirmSnapshot { snapshot },
        Command::SealSnapshot { snapshot },
        Command::DeleteSnapshot { path: path.clone(), name: name.clone() },
        Command::ReapSnapshot { snapshot },
        Command::CloneVolume { snapshot, new_path: "c".into(), owner, create_parents: true },
        Command::RollbackVolume { path: path.clone(), snapshot: name, ends: Some(epoch) },
        Command::AttachVolume { path, client: 77, description: "vm".into(), takes_over: None },
        Command::DetachVolume { volume, epoch },
        Command::AllocateSegment { volume, epoch, layer, index: SegmentIndex(1), copysets: vec![CopysetId(300)] },
        Command::RegisterChunkserver(registration(1)),
        Command::ReplicasCreated { replicas: vec![(CopysetId(1), ReplicaId(2))] },
        Command::TasksDone { done: vec![(6, CopysetId(1))] },
        Command::CreatePool { name: "p".into(), replicas: 3, copysets: vec![vec![ChunkserverId(1)]] },
        Command::DetachUnclean { volume, epoch },
        Command::CreateGroup { parts },
        Command::ConfirmGroup { group },
        Command::DropGroup { group },
        Command::SetOut { chunkserver: ChunkserverId(4), reason: Some(OutReason::Asked) },
        Command::StartMove { copyset: CopysetId(1), conf_epoch: 2, removed: ReplicaId(3), to: ChunkserverId(4) },
        Command::CancelMove { copyset: CopysetId(1), added: ReplicaId(9) },
        Command::FinishMove { copyset: CopysetId(1), added: ReplicaId(9) },
        Command::EndMove { copyset: CopysetId(1), added: ReplicaId(9) },
        Command::RemoveChunkserver { chunkserver: ChunkserverId(4) },
        Command::FlattenVolume { path: "f/a".into(), cancels: true },
        Command::CreateVolumeWith {
            path: "f/a".into(),
            size_bytes: 1 << 30,
            owner: "ann".into(),
            create_parents: true,
            pool: "p".into(),
            options: options_row(),
        },
        Command::SetLimits {
            path: "f/a".into(),
            changes: LimitChanges::default().with(LimitKind::ReadIops, RateLimit::NONE).with(LimitKind::WriteBytes, burst()),
        },
    ]
    .into_iter()
    .chain(service_task_commands().map(Command::ServiceTask))
    .chain(schedule_commands().map(Command::Schedule))
    .chain(backup_commands())
    .collect()
}

fn backup_commands() -> [Command; 2] {
    let create = Command::CreateLazyVolume {
        path: "f/a".into(),
        size_bytes: 1 << 30,
        owner: "ann".into(),
        create_parents: true,
        pool: "p".into(),
        options: options_row(),
        backup: backup_row(),
        placements: vec![vec![CopysetId(1), CopysetId(300)], vec![CopysetId(2)]],
    };
    [create, Command::CompleteBackup { layer: LayerId(9) }]
}

fn schedule_commands() -> impl Iterator<Item = ScheduleCommand> {
    let text = || String::from("x");
    [
        ScheduleCommand::Set { name: text(), kind: text(), repository: text(), arguments: text(), every_ms: 300 },
        ScheduleCommand::Delete { name: text() },
        ScheduleCommand::Run { name: text(), due_unix_ms: 600 },
    ]
    .into_iter()
}

fn service_task_commands() -> impl Iterator<Item = ServiceTaskCommand> {
    use ServiceTaskCommand as C;
    let (task, text) = (ServiceTaskId(4), || String::from("x"));
    let holder = Holder { task, owner: 77, fence: 2 };
    let first = [
        C::Create { kind: text(), repository: text(), arguments: text(), key: Some([7; 16]) },
        C::Cancel { task },
        C::Take { task, owner: 77, fence: 1 },
        C::Note { holder, note: text(), done: 3, total: 300 },
    ];
    let ends = [TaskEnd::Done, TaskEnd::Failed, TaskEnd::Cancelled, TaskEnd::Released];
    first.into_iter().chain(ends.map(|end| C::End { holder, end, result: String::from("x") }))
}

#[test]
fn commands_have_their_golden_bytes() {
    let mut text = String::new();
    for (n, command) in commands().into_iter().enumerate() {
        let request = (n == 1).then_some([9; 16]);
        let envelope = Envelope { now_unix_ms: 1000, request, command };
        let bytes = envelope.encode();
        assert_eq!(Envelope::decode(&bytes).expect("a command"), envelope);
        assert!(Envelope::decode(&[&bytes[..], &[0]].concat()).is_err(), "trailing bytes");
        let debug = format!("{:?}", envelope.command);
        let word = debug.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
        writeln!(text, "{word} | {}", hex(&bytes)).expect("text");
    }
    assert_eq!(text, COMMANDS, "commands.txt would be:\n{text}");
}

proptest! {
    #[test]
    fn decoders_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let with_version = [&[1u8][..], &bytes].concat();
        for input in [&bytes, &with_version] {
            let _ = Envelope::decode(input);
            let _ = decode_answer(input);
            let _ = decode_row::<VolumeRow>(input);
            let _ = decode_row::<LayerRow>(input);
            let _ = decode_row::<SegmentRow>(input);
            let _ = decode_row::<CopysetRow>(input);
            let _ = decode_row::<TaskRow>(input);
            let _ = decode_row::<SnapshotGroupRow>(input);
            let _ = decode_row::<VolumeOptionsRow>(input);
            let _ = decode_row::<ServiceTaskRow>(input);
            let _ = decode_row::<BackupRow>(input);
            let _ = <(DirectoryId, String)>::from_key(input);
        }
    }
}

#[test]
fn answers_survive_the_log() {
    let refusal = Refusal::HasClones { volumes: vec!["a".into()], more: true };
    let answer = Err(refusal);
    assert_eq!(decode_answer(&encode_answer(&answer)).expect("an answer"), answer);
}
