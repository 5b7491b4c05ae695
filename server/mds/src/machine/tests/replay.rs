//! The same log gives the same rows: on two stores, after power cuts at any point, and through a Raft snapshot.

use super::super::command::{Command, Envelope};
use super::super::row::Hold;
use super::super::{MdsMachine, Shared};
use super::{Bench, GIB};
use bytes::Bytes;
use ogee_common::id::Term;
use ogee_disk::meta::MemStore;
use ogee_raft::{ApplyEntry, EntryKind, FetchHandler, LogPos, SnapshotSource, StateMachine, StateMachineError};
use proptest::prelude::*;
use std::sync::Arc;

/// A log with a bit of everything.
fn log(seed: u64) -> Vec<ApplyEntry> {
    let mut b = Bench::with_pool(6);
    let mut random = crate::seeded::Seeded::new(seed);
    let mut pick = |n: u32| u32::try_from(random.below(n.into())).expect("below n");
    for step in 0..60 {
        let path = ["a", "f/b", "f/c"][pick(3) as usize];
        let exists = b.shared.read(|tx| super::namespace::volume(tx, path)).is_ok();
        if !exists {
            drop(b.create(path, 4 * GIB));
            continue;
        }
        match pick(9) {
            0 => drop(b.delete(path)),
            1 => drop(b.snapshot(path, Some(&format!("s{step}")), Hold::Bypassed)),
            2 => {
                if let Ok(info) = b.snapshot(path, None, Hold::Held) {
                    drop(b.run(Command::SealSnapshot { snapshot: info.id }));
                    drop(b.clone_of(&info, &format!("f/g/c{step}")));
                }
            }
            3 => drop(b.rollback(path, &format!("s{}", pick(60)))),
            4 => drop(b.try_attach(path, 1)),
            5 => {
                let done = (1..30).flat_map(|t| (1..=6).map(move |c| (t, ogee_common::id::CopysetId(c)))).collect();
                drop(b.run(Command::TasksDone { done }));
            }
            _ => drop(b.allocate(path, pick(4), pick(6) + 1)),
        }
    }
    b.log
}

fn restart(store: &Arc<MemStore>) -> Bench {
    let shared = Shared::new(store.clone());
    Bench { store: store.clone(), shared: shared.clone(), machine: MdsMachine::new(shared), log: vec![] }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("runtime").block_on(future)
}

/// Applies a log from where the machine says it stands.
async fn catch_up(b: &mut Bench, log: &[ApplyEntry]) {
    let applied = b.machine.load().await.expect("load");
    let from = applied.pos.map_or(0, |p| p.index + 1);
    let rest = log.iter().filter(|e| e.pos.index >= from).cloned().collect();
    b.machine.apply(rest).await.expect("apply");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn replay_after_power_cuts_gives_the_same_rows(
        seed: u64, cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>()), 0..4),
    ) {
        let log = log(seed);
        block_on(async {
            let mut whole = Bench::empty();
            catch_up(&mut whole, &log).await;
            let store = Arc::new(MemStore::new());
            for (upto, keep, checkpoint) in cuts {
                let mut b = restart(&store);
                catch_up(&mut b, &log[..upto.index(log.len())]).await;
                if checkpoint {
                    b.machine.checkpoint().await.expect("checkpoint");
                }
                store.power_cut(keep.index(store.deferred() + 1));
            }
            let mut b = restart(&store);
            catch_up(&mut b, &log).await;
            // An entry that is given once more changes nothing.
            b.machine.apply(log[log.len() - 1..].to_vec()).await.expect("apply");
            prop_assert_eq!(b.rows(), whole.rows());
            Ok(())
        })?;
    }
}

struct Sender(Arc<Shared>);

impl SnapshotSource for Sender {
    async fn fetch(&self, request: Bytes) -> Result<Bytes, StateMachineError> {
        self.0.fetch(request).await
    }
}

#[tokio::test]
async fn a_snapshot_replaces_everything_and_the_log_goes_on_from_there() {
    let log = log(7);
    let (first, rest) = log.split_at(log.len() / 2);
    let mut sender = Bench::empty();
    catch_up(&mut sender, first).await;
    let snapshot = sender.machine.snapshot().await.expect("snapshot");
    assert_eq!(snapshot.applied.pos.map(|p| p.index), Some(first.len() as u64 - 1));
    let mut receiver = Bench::with_pool(1);
    receiver.create("old", GIB).expect("create");
    receiver.machine.install(snapshot, &Sender(sender.shared.clone())).await.expect("install");
    assert_eq!(receiver.rows(), sender.rows());
    receiver.store.power_cut(0);
    let mut again = restart(&receiver.store);
    catch_up(&mut again, &log).await;
    sender.machine.apply(rest.to_vec()).await.expect("apply");
    assert_eq!(again.rows(), sender.rows());
}

#[tokio::test]
async fn blanks_and_memberships_move_the_position() {
    let mut b = Bench::empty();
    let pos = |index| LogPos { term: Term(3), index };
    let entries = vec![
        ApplyEntry { pos: pos(0), kind: EntryKind::Membership(Bytes::from_static(b"members")) },
        ApplyEntry { pos: pos(1), kind: EntryKind::Blank },
    ];
    assert_eq!(b.machine.apply(entries).await.expect("apply"), [Bytes::new(), Bytes::new()]);
    let applied = restart(&b.store).machine.load().await.expect("load");
    assert_eq!((applied.pos, &applied.membership[..]), (Some(pos(1)), &b"members"[..]));
}

#[tokio::test]
async fn a_command_of_a_newer_build_stops_the_replica() {
    let mut b = Bench::empty();
    let envelope = Envelope { now_unix_ms: 0, request: None, command: Command::FormCluster { cluster: [1; 16] } };
    let mut bytes = envelope.encode();
    bytes[0] = 2;
    let entry = ApplyEntry { pos: LogPos { term: Term(1), index: 0 }, kind: EntryKind::Command(bytes.into()) };
    assert!(b.machine.apply(vec![entry]).await.is_err());
    assert!(b.rows().is_empty());
}
