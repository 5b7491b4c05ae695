//! The service on a log without a network: what a leader finds half-made, and what a node does that does not lead.

use super::Core;
use super::status::CallError;
use crate::duties;
use crate::log::{Lead, ReplicatedLog};
use crate::machine::command::{Command, Outcome};
use crate::machine::row::{ClusterRow, Hold, SnapshotRow, SnapshotState};
use crate::machine::tests::{Bench, GIB};
use crate::machine::{MdsMachine, Shared, attach, namespace};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use ogee_common::id::Term;
use ogee_disk::meta::MemStore;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds::{CreateSnapshotGroupRequest, CreateSnapshotRequest, StatVolumeRequest};
use ogee_raft::{ApplyEntry, EntryKind, LeaderHint, LogPos, RaftError, StateMachine as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{Mutex, watch};

/// A log of one node that applies at once.
struct LocalLog {
    machine: Arc<Mutex<MdsMachine>>,
    next: AtomicU64,
    lead: watch::Sender<Lead>,
}

impl LocalLog {
    fn refusal(&self) -> Option<RaftError> {
        let lead = *self.lead.borrow();
        (!lead.here).then_some(RaftError::NotLeader(LeaderHint { process: lead.node, term: lead.term }))
    }
}

impl ReplicatedLog for LocalLog {
    fn propose(&self, command: Bytes) -> BoxFuture<'static, Result<Bytes, RaftError>> {
        let refusal = self.refusal();
        let index = self.next.fetch_add(1, Ordering::SeqCst);
        let machine = self.machine.clone();
        async move {
            if let Some(refusal) = refusal {
                return Err(refusal);
            }
            let pos = LogPos { term: Term(1), index };
            let entry = ApplyEntry { pos, kind: EntryKind::Command(command) };
            let mut replies = machine.lock().await.apply(vec![entry]).await.expect("apply");
            Ok(replies.remove(0))
        }
        .boxed()
    }

    fn read_barrier(&self) -> BoxFuture<'static, Result<Term, RaftError>> {
        let result = self.refusal().map_or(Ok(self.lead.borrow().term), Err);
        async move { result }.boxed()
    }

    fn lead(&self) -> watch::Receiver<Lead> {
        self.lead.subscribe()
    }

    fn applied(&self) -> u64 {
        self.next.load(Ordering::SeqCst)
    }
}

fn leads() -> Lead {
    Lead { node: 1, term: Term(1), here: true, stopped: false }
}

/// A service over the rows of a bench.
fn service(bench: Bench) -> (Arc<Core>, Arc<LocalLog>) {
    let next = AtomicU64::new(bench.log.len() as u64);
    let machine = Arc::new(Mutex::new(bench.machine));
    let log = Arc::new(LocalLog { machine, next, lead: watch::Sender::new(leads()) });
    let nodes = vec![super::NodeAddr { id: 2, addr: "10.0.0.2:7000".into() }];
    (Core::new(bench.shared, log.clone(), nodes, std::time::Duration::from_secs(600)), log)
}

/// Lets the duties run until they wait for the next round.
async fn round(core: &Arc<Core>) {
    let task = tokio::spawn(duties::run(core.clone()));
    tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    task.abort();
}

fn states(core: &Core) -> Vec<(String, SnapshotState)> {
    let rows = core.read(|tx| Ok(tx.scan::<SnapshotRow>(&(), None, 9)?)).expect("rows");
    rows.into_iter().map(|(_, row)| (row.name, row.state)).collect()
}

#[tokio::test(start_paused = true)]
async fn a_leader_finishes_what_another_left_half_made() {
    let mut bench = Bench::with_pool(2);
    bench.create("a", GIB).expect("create");
    bench.attach("a", 1);
    bench.allocate("a", 0, 1).expect("placed");
    let held = bench.snapshot("a", Some("held"), Hold::Held).expect("snapshot");
    assert!(held.confirming);
    bench.create("b", GIB).expect("create");
    bench.snapshot("b", None, Hold::Held).expect("hidden, without a clone");
    let (core, _) = service(bench);
    {
        let _turn = core.ops.wait(held.volume).await;
        round(&core).await;
        let states = states(&core);
        assert_eq!(states, [("held".to_owned(), SnapshotState::Confirming)], "somebody is at it; the hidden one is gone");
    }
    round(&core).await;
    assert!(matches!(states(&core)[..], [(_, SnapshotState::Sealing(_))]));
    assert!(core.read(|tx| Ok(crate::machine::tasks::of_copyset(tx, ogee_common::id::CopysetId(1))?.len())).expect("tasks") == 1);
}

#[tokio::test(start_paused = true)]
async fn a_group_that_another_leader_left_is_dropped_whole() {
    let half_made = || {
        let mut bench = Bench::with_pool(2);
        for path in ["a", "b", "c"] {
            bench.create(path, GIB).expect("create");
        }
        bench.attach("a", 1);
        bench.group(&[("a", "s", Hold::Held), ("b", "s", Hold::Held)]).expect("group");
        let volume = bench.row("b").0;
        (service(bench).0, volume)
    };
    let (core, b) = half_made();
    {
        let _turns = (core.ops.wait(b).await, core.ops.wait(core.volume_at("a").expect("volume")).await);
        round(&core).await;
        assert_eq!(states(&core).len(), 2, "somebody is at it");
    }
    round(&core).await;
    assert!(states(&core).is_empty());
    // Who comes before the duty is not told of a name that nobody has.
    let (core, _) = half_made();
    let single = |path: &str| CreateSnapshotRequest { path: path.into(), name: "s".into() };
    let made = core.create_snapshot(single("b")).await.expect("snapshot");
    assert_eq!((made.group, states(&core).len()), (0, 1));
    let (core, _) = half_made();
    let request = CreateSnapshotGroupRequest { members: vec![single("c"), single("b")] };
    let made = core.create_snapshot_group(request).await.expect("group");
    assert!(made.group > 1 && states(&core).iter().all(|(_, state)| *state == SnapshotState::Ready));
}

#[tokio::test(start_paused = true)]
async fn the_first_leader_forms_the_cluster_once() {
    let store = Arc::new(MemStore::new());
    let shared = Shared::new(store.clone());
    let machine = MdsMachine::new(shared.clone());
    let (core, _) = service(Bench { store, shared, machine, log: vec![] });
    let cluster = || core.read(|tx| Ok(tx.get::<ClusterRow>(&())?)).expect("rows");
    assert_eq!(cluster(), None);
    round(&core).await;
    let formed = cluster().expect("formed");
    assert_ne!(formed.cluster, [0; 16]);
    round(&core).await;
    assert_eq!(cluster(), Some(formed));
}

#[tokio::test(start_paused = true)]
async fn a_node_that_does_not_lead_refuses_and_ends_streams() {
    let mut bench = Bench::with_pool(1);
    bench.create("a", GIB).expect("create");
    let epoch = bench.attach("a", 1);
    let (core, log) = service(bench);
    let (volume, _) = core.read(|tx| namespace::volume(tx, "a")).expect("volume");
    let mut stream = core
        .watch_attach(ogee_proto::mds::WatchAttachRequest { volume: volume.0, epoch: epoch.0, client: 1 })
        .await
        .expect("watch");
    let duties = tokio::spawn(duties::run(core.clone()));
    log.lead.send_replace(Lead { node: 2, term: Term(2), here: false, stopped: false });
    use tokio_stream::StreamExt as _;
    assert!(stream.next().await.is_some());
    assert!(stream.next().await.is_none(), "the stream ends with the lead");
    let error = core.stat_volume(StatVolumeRequest { path: "a".into() }).await.expect_err("not the leader");
    assert!(matches!(&error, CallError::NotLeader { leader } if leader == "10.0.0.2:7000"));
    assert_eq!(error.kind(), MdsErrorKind::NotLeader);
    let delete = Command::DeleteVolume { path: "a".into(), owner: String::new() };
    assert!(matches!(core.propose(None, delete).await, Err(CallError::NotLeader { .. })));
    log.lead.send_replace(Lead { stopped: true, ..Lead::default() });
    duties.await.expect("the duties end with the replica");
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_starts_again_when_the_volume_changes_under_it() {
    let mut bench = Bench::with_pool(1);
    bench.create("a", GIB).expect("create");
    let (core, _) = service(bench);
    core.lead().await.expect("leads");
    let (volume, row) = core.read(|tx| namespace::volume(tx, "a")).expect("volume");
    let expected = core.read(|tx| attach::expected(tx, &row)).expect("expected");
    // Somebody attaches between the look and the command.
    let attached = Command::AttachVolume { path: "a".into(), client: 9, description: String::new(), takes_over: None };
    assert!(matches!(core.propose(None, attached).await, Ok(Outcome::Attached(_))));
    let stale = Command::CreateSnapshot { volume, name: Some("s".into()), expected, hold: Hold::Detached };
    assert!(core.propose(None, stale).await.expect_err("moved").is_refusal(|r| r.kind() == MdsErrorKind::Unavailable));
    let info = core.snapshot_head(volume, Some("s")).await.expect("snapshot");
    assert_eq!(info.hold, Hold::Bypassed, "the client never opened a stream");
}
