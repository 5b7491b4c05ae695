//! Raft snapshots: onto an empty and onto a lagging replica, while the sender goes on applying, with failures and crashes
//! in the middle; checked against the oracle.

mod support;

use bytes::Bytes;
use ogee_chunkserver::copyset::fetch::{FetchRequest, ListAnswer, RowsAnswer, decode_manifest, encode_manifest};
use ogee_chunkserver::store::{ChunkStoreErrorKind, LayerTable};
use ogee_common::id::ChunkIndex;
use ogee_raft::api::{RaftSnapshot, SnapshotSource, StateMachineError};
use proptest::prelude::*;
use std::sync::Arc;
use support::replica::{Replica, tiny};
use support::world::{Step, World};
use support::{Rng, run};
use tokio::sync::Mutex;

/// The sending replica as the receiver sees it: it applies entries between answers and fails when its budget is spent.
struct Sender {
    state: Mutex<(Replica, Rng, u64)>,
    log: Arc<Vec<Step>>,
    /// Entries applied between two answers, at most.
    pace: u64,
}

impl Sender {
    fn new(replica: Replica, log: &Arc<Vec<Step>>, seed: u64, pace: u64) -> Self {
        Self { state: Mutex::new((replica, Rng(seed), u64::MAX)), log: Arc::clone(log), pace }
    }

    async fn advance(&self, to: usize) {
        self.state.lock().await.0.catch_up(&self.log, to).await;
    }

    async fn snapshot(&self, budget: u64) -> RaftSnapshot {
        let mut state = self.state.lock().await;
        state.2 = budget;
        state.0.snapshot().await
    }
}

impl SnapshotSource for Sender {
    async fn fetch(&self, request: Bytes) -> Result<Bytes, StateMachineError> {
        let mut state = self.state.lock().await;
        let (replica, rng, budget) = &mut *state;
        let broken = || StateMachineError { verb: "fetch", source: Box::new(std::io::Error::other("link down")) };
        *budget = budget.checked_sub(1).ok_or_else(broken)?;
        let at = replica.next_index();
        let more = usize::try_from(rng.below(self.pace + 1)).expect("small");
        replica.catch_up(&self.log, (at + more).min(self.log.len())).await;
        if rng.chance(8) {
            replica.checkpoint().await;
        }
        let answer = replica.store().serve_fetch(&request).await;
        answer.map_err(|e| StateMachineError { verb: "serve", source: Box::new(e) })
    }
}

fn part(rng: &mut Rng, n: usize) -> usize {
    usize::try_from(rng.below(n as u64 + 1)).expect("small")
}

/// A replica that applied a part of the log, with a checkpoint somewhere, perhaps killed since.
async fn lagging(world: &World, upto: usize, rng: &mut Rng) -> Replica {
    let mut replica = Replica::new(tiny()).await;
    replica.catch_up(&world.log, part(rng, upto)).await;
    if rng.chance(2) {
        replica.checkpoint().await;
    }
    replica.catch_up(&world.log, upto).await;
    if rng.chance(3) {
        replica.kill().await;
    }
    replica
}

/// Brings a replica to the end of the log by snapshots, giving up in the middle now and then.
async fn bring_up(receiver: &mut Replica, sender: &Sender, world: &World, rng: &mut Rng) {
    loop {
        let fails = rng.chance(2);
        let budget = if fails { rng.below(40) } else { u64::MAX };
        let snapshot = sender.snapshot(budget).await;
        let before = receiver.next_index();
        let position = usize::try_from(snapshot.applied.pos.expect("a position").index).expect("small") + 1;
        if position <= before {
            break;
        }
        match receiver.install(snapshot.clone(), sender).await {
            Ok(()) => {
                assert_eq!(receiver.next_index(), position);
                assert_eq!(receiver.store().applied(), snapshot.applied);
                if rng.chance(2) {
                    receiver.kill().await;
                    assert_eq!(receiver.next_index(), position, "an install is durable");
                }
                break;
            }
            Err(e) => {
                // A sender that merges faster than it is read from is the other legal reason.
                let chased = std::error::Error::source(&e).is_some_and(|s| format!("{s:?}").contains("keep going"));
                assert!(fails || chased, "{e}: {:?}", std::error::Error::source(&e));
                if rng.chance(2) {
                    receiver.kill().await;
                }
                assert!(receiver.next_index() <= before, "a broken install moves nothing");
                // The log may still be there: it is as good as another install.
                if rng.chance(3) {
                    break;
                }
            }
        }
    }
    if rng.chance(3) {
        receiver.catch_up(&world.log, receiver.next_index() + part(rng, world.log.len() - receiver.next_index())).await;
        if rng.chance(2) {
            receiver.checkpoint().await;
        }
        receiver.kill().await;
    }
    receiver.catch_up(&world.log, world.log.len()).await;
    assert!(receiver.store().servable(), "the log has overtaken every fetch");
    receiver.check(world).await;
}

async fn history(seed: u64, events: u32, mut world: World) {
    let mut rng = Rng(seed);
    (0..events).for_each(|_| world.event(&mut rng));
    let log = Arc::new(world.log.clone());
    let sent_at = part(&mut rng, log.len() - 1) + 1;
    let behind = if rng.chance(3) { 0 } else { part(&mut rng, sent_at) };
    let mut receiver = lagging(&world, behind, &mut rng).await;
    let sender = Sender::new(lagging(&world, sent_at, &mut rng).await, &log, seed ^ 1, rng.below(6));
    // A sender that was restarted has caught up with what it knew before it leads.
    sender.advance(sent_at).await;
    sender.state.lock().await.0.store().caught_up();
    bring_up(&mut receiver, &sender, &world, &mut rng).await;
    // The receiver's rows must tell its own changes: it is the sender now.
    receiver.checkpoint().await;
    let third_at = part(&mut rng, log.len() - 1);
    let mut third = lagging(&world, third_at, &mut rng).await;
    receiver.store().caught_up();
    let sender = Sender::new(receiver, &log, seed ^ 2, 0);
    bring_up(&mut third, &sender, &world, &mut rng).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn replicas_converge(seed in any::<u64>(), events in 1u32..100) {
        run(history(seed, events, World::default()));
    }

    #[test]
    fn replicas_of_layers_on_a_backup_converge(seed in any::<u64>(), events in 1u32..100) {
        run(history(seed, events, World::lazy()));
    }

    /// Whatever arrives from another replica, decoding ends in an answer or an error.
    #[test]
    fn decoders_are_total(mut bytes in prop::collection::vec(any::<u8>(), 0..200), sealed in any::<bool>()) {
        if sealed && bytes.len() > 4 {
            // A right checksum lets the fields be seen by the decoder.
            bytes[0] = 1;
            let at = bytes.len() - 4;
            let crc = ogee_common::checksum::crc32c(&bytes[..at]);
            bytes[at..].copy_from_slice(&crc.to_le_bytes());
        }
        let _ = FetchRequest::decode(&bytes);
        let _ = ListAnswer::decode(&bytes);
        let _ = RowsAnswer::decode(&Bytes::from(bytes.clone()));
        let _ = decode_manifest(&bytes);
    }
}

#[test]
fn a_damaged_answer_is_refused() {
    run(async {
        let mut rng = Rng(5);
        let mut world = World::default();
        (0..30).for_each(|_| world.event(&mut rng));
        let mut sender = Replica::new(tiny()).await;
        sender.catch_up(&world.log, world.log.len()).await;
        let list = FetchRequest::List { from: ChunkIndex(0), to: ChunkIndex(9) }.encode();
        let answer = sender.store().serve_fetch(&list).await.expect("list");
        let (version, _) = ListAnswer::decode(&answer).expect("list").columns.values().next().expect("a column").versions[0];
        let request = FetchRequest::Rows { version, from_index: 0, from_row: 0 }.encode();
        let rows = sender.store().serve_fetch(&request).await.expect("rows");
        RowsAnswer::decode(&rows).expect("undamaged");
        let mut bad = rows.to_vec();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        let error = RowsAnswer::decode(&bad.into()).expect_err("damaged");
        assert_eq!(error.kind(), ChunkStoreErrorKind::Fetch);
        let error = sender.store().serve_fetch(b"nonsense").await.expect_err("no request");
        assert_eq!(error.kind(), ChunkStoreErrorKind::Fetch);
        assert!(decode_manifest(&encode_manifest(&LayerTable::default())).expect("empty").is_empty());
    });
}

/// Rows that the receiver has are not sent again.
#[test]
fn a_lagging_replica_fetches_only_what_changed() {
    run(async {
        let mut rng = Rng(11);
        let mut world = World::default();
        (0..60).for_each(|_| world.event(&mut rng));
        let mut sender = Replica::new(tiny()).await;
        sender.catch_up(&world.log, world.log.len()).await;
        let mut receiver = Replica::new(tiny()).await;
        let end = world.log.len();
        receiver.catch_up(&world.log, end - 1).await;
        let log = Arc::new(world.log.clone());
        let sender = Sender::new(sender, &log, 1, 0);
        let snapshot = sender.snapshot(u64::MAX).await;
        receiver.install(snapshot, &sender).await.expect("install");
        let used = u64::MAX - sender.state.lock().await.2;
        // One list, and per column one check; rows only for the version that the last entry changed.
        assert!(used <= 1 + 2 + 2, "{used} requests");
        receiver.check(&world).await;
    });
}

/// While an install is unfinished the replica answers no read, across a restart, until the log has caught up.
#[test]
fn a_half_installed_replica_is_not_read() {
    run(async {
        let mut rng = Rng(3);
        let mut world = World::default();
        (0..60).for_each(|_| world.event(&mut rng));
        let log = Arc::new(world.log.clone());
        let mut sender = Replica::new(tiny()).await;
        sender.catch_up(&world.log, world.log.len()).await;
        let sender = Sender::new(sender, &log, 1, 0);
        let mut receiver = Replica::new(tiny()).await;
        receiver.catch_up(&world.log, 10).await;
        let snapshot = sender.snapshot(4).await;
        receiver.install(snapshot, &sender).await.expect_err("the link breaks");
        assert!(!receiver.store().servable());
        receiver.kill().await;
        assert!(!receiver.store().servable());
        let range = ogee_chunkserver::store::ReadRange {
            at: ogee_chunkserver::store::ChunkKey { layer: ogee_common::id::LayerId(1), chunk: ChunkIndex(0) },
            seq: ogee_common::id::VolumeSeq(1),
            chain: ogee_chunkserver::store::ReadChain::Known,
            offset: 0,
            len: 4096,
        };
        let error = receiver.read(&range).await.expect_err("not servable");
        assert_eq!(error.status(), ogee_proto::data::Status::NotReady);
        let list = FetchRequest::List { from: ChunkIndex(0), to: ChunkIndex(9) }.encode();
        let error = receiver.store().serve_fetch(&list).await.expect_err("not servable");
        assert_eq!(error.kind(), ChunkStoreErrorKind::Busy);
        receiver.catch_up(&world.log, world.log.len()).await;
        receiver.check(&world).await;
        receiver.checkpoint().await;
        receiver.kill().await;
        assert!(receiver.store().servable(), "the checkpoint has ended the install");
    });
}

/// The install breaks after a file got ahead of its row, and the same process goes on from its log: the partial write that
/// made the file newer is replayed onto it.
#[test]
fn a_broken_install_is_followed_by_the_log_in_the_same_process() {
    run(async {
        use support::ops::{entry, open, write};
        let commands =
            [open(), write(1, 0, vec![7; 8192]), write(1, 1024, vec![8; 512]), write(1, 4096 + 512, vec![9; 1024])];
        let step = |(i, command)| Step { entry: entry(i, command), status: ogee_proto::data::Status::Ok };
        let log: Arc<Vec<Step>> = Arc::new(commands.iter().enumerate().map(step).collect());
        let mut sender = Replica::new(tiny()).await;
        sender.catch_up(&log, 4).await;
        let sender = Sender::new(sender, &log, 1, 0);
        let mut receiver = Replica::new(tiny()).await;
        receiver.catch_up(&log, 2).await;
        // One list, one answer with rows; the check of the column fails.
        let snapshot = sender.snapshot(2).await;
        receiver.install(snapshot, &sender).await.expect_err("the link breaks");
        receiver.catch_up(&log, 4).await;
        let mut expected = vec![7; 8192];
        expected[1024..1536].fill(8);
        expected[4608..5632].fill(9);
        assert_eq!(receiver.read_at(1, 0, 8192).await.expect("read"), expected);
    });
}
