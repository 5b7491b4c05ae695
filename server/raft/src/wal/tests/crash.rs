//! The crash property. The log is one sequence of records over all groups, so after any crash the recovered state must
//! be the state after some prefix of what was queued, and the prefix must hold everything that was acknowledged.

use super::{SEGMENT, entry, open_with};
use crate::wal::{Completion, GroupView, LogEntry, LogPoint, SavedVote, Wal, WalOptions};
use ogee_disk::{DiskOp, Fault, FaultPlan, FaultRule, LogEngine};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[derive(Debug, Clone)]
enum Op {
    Append { group: u64, sizes: Vec<usize>, new_term: bool },
    Truncate { group: u64, keep: u64 },
    /// Purges up to `ahead - 5` behind the first live entry; may go beyond the last one.
    Purge { group: u64, ahead: u64 },
    Vote { group: u64, committed: bool },
    Remove { group: u64 },
    /// Lets the writer run this many turns.
    Turns(usize),
    /// Waits until all is durable.
    Flush,
    /// A later log write stores this many bytes only.
    Tear { skip: u64, bytes: usize },
    Crash,
    Close,
}

fn op() -> impl Strategy<Value = Op> {
    let group = 1u64..4;
    let size = prop_oneof![4 => 0usize..200, 2 => 200usize..6000, 1 => 6000usize..32_000];
    prop_oneof![
        10 => (group.clone(), proptest::collection::vec(size, 1..4), proptest::bool::weighted(0.2))
            .prop_map(|(group, sizes, new_term)| Op::Append { group, sizes, new_term }),
        2 => (group.clone(), 0u64..8).prop_map(|(group, keep)| Op::Truncate { group, keep }),
        4 => (group.clone(), 0u64..30).prop_map(|(group, ahead)| Op::Purge { group, ahead }),
        2 => (group.clone(), any::<bool>()).prop_map(|(group, committed)| Op::Vote { group, committed }),
        1 => group.prop_map(|group| Op::Remove { group }),
        4 => (1usize..6).prop_map(Op::Turns),
        4 => Just(Op::Flush),
        1 => (0u64..4, 0usize..20_000).prop_map(|(skip, bytes)| Op::Tear { skip, bytes }),
        2 => Just(Op::Crash),
        1 => Just(Op::Close),
    ]
}

/// What one group should hold.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    view: GroupView,
    entries: BTreeMap<u64, LogEntry>,
}

type State = BTreeMap<u64, Model>;

impl Model {
    fn refresh(&mut self) {
        self.view.last = self.entries.values().last().map(LogEntry::point).or(self.view.purged);
    }
}

/// The model and its history, one state per record.
struct History {
    states: Vec<State>,
    /// Records that were acknowledged: a prefix.
    acked: Arc<AtomicUsize>,
    term: u64,
}

impl History {
    fn new(state: State, term: u64) -> Self {
        Self { states: vec![state], acked: Arc::default(), term }
    }

    fn now(&self) -> &State {
        self.states.last().expect("never empty")
    }

    fn record(&mut self, group: u64, change: impl FnOnce(&mut Model)) {
        let mut next = self.now().clone();
        let model = next.entry(group).or_default();
        change(model);
        model.refresh();
        self.states.push(next);
    }

    fn ack(&self) -> Completion {
        let (acked, count) = (Arc::clone(&self.acked), self.states.len() - 1);
        Box::new(move |result| {
            if result.is_ok() {
                let before = acked.fetch_max(count, Ordering::SeqCst);
                assert!(before <= count, "callbacks come in order");
            }
        })
    }
}

/// One life of the process: runs operations until it crashes or closes; gives the operations used.
async fn live(wal: &Wal, plan: &FaultPlan, history: &mut History, ops: &[Op]) -> usize {
    for (i, op) in ops.iter().enumerate() {
        let alive = match op {
            Op::Append { group, sizes, new_term } => append(wal, history, *group, sizes, *new_term),
            Op::Truncate { group, keep } => truncate(wal, history, *group, *keep),
            Op::Purge { group, ahead } => purge(wal, history, *group, *ahead),
            Op::Vote { group, committed } => vote(wal, history, *group, *committed),
            Op::Remove { group } => remove(wal, history, *group).await,
            Op::Turns(n) => {
                for _ in 0..*n {
                    tokio::task::yield_now().await;
                }
                true
            }
            Op::Flush => flush(wal, history).await,
            Op::Tear { skip, bytes } => {
                let (op, fault) = (DiskOp::Write, Fault::Torn { bytes: *bytes });
                plan.add(FaultRule { op, path_contains: "segment-".into(), skip: *skip, times: 1, fault });
                true
            }
            Op::Crash => false,
            Op::Close => {
                if wal.close().await.is_ok() {
                    history.acked.store(history.states.len() - 1, Ordering::SeqCst);
                }
                false
            }
        };
        if !alive {
            return i + 1;
        }
    }
    ops.len()
}

fn append(wal: &Wal, history: &mut History, group: u64, sizes: &[usize], new_term: bool) -> bool {
    history.term += u64::from(new_term);
    let first = wal.group(group).last.map_or(0, |l| l.index + 1);
    let entries: Vec<LogEntry> = (first..).zip(sizes).map(|(i, n)| entry(i, history.term, *n)).collect();
    let before = history.states.len();
    for e in &entries {
        history.record(group, |m| drop(m.entries.insert(e.index, e.clone())));
    }
    let accepted = wal.append(group, entries, history.ack()).is_ok();
    if !accepted {
        history.states.truncate(before);
    }
    accepted
}

fn truncate(wal: &Wal, history: &mut History, group: u64, keep: u64) -> bool {
    let base = wal.group(group).purged.map_or(0, |p| p.index + 1);
    if wal.truncate_from(group, base + keep).is_err() {
        return false;
    }
    history.record(group, |m| m.entries.retain(|i, _| *i < base + keep));
    true
}

fn purge(wal: &Wal, history: &mut History, group: u64, ahead: u64) -> bool {
    let first = wal.group(group).purged.map_or(0, |p| p.index + 1);
    let Some(index) = (first + ahead).checked_sub(5) else { return true };
    // A purge beyond the end starts a new history there, as an installed snapshot does.
    let point = LogPoint { term: history.term, index };
    if wal.purge(group, point).is_err() {
        return false;
    }
    history.record(group, |m| {
        if m.view.purged.is_none_or(|p| p.index < index) {
            m.view.purged = Some(point);
            m.entries.retain(|i, _| *i > index);
        }
    });
    true
}

fn vote(wal: &Wal, history: &mut History, group: u64, committed: bool) -> bool {
    let vote = SavedVote { term: history.term, replica: group * 10, committed };
    history.record(group, |m| m.view.vote = Some(vote));
    let accepted = wal.save_vote(group, vote, history.ack()).is_ok();
    if !accepted {
        history.states.pop();
    }
    accepted
}

async fn remove(wal: &Wal, history: &mut History, group: u64) -> bool {
    let mut next = history.now().clone();
    next.remove(&group);
    history.states.push(next);
    let all = history.states.len() - 1;
    let removed = wal.remove_group(group).await.is_ok();
    if removed {
        history.acked.store(all, Ordering::SeqCst);
    }
    removed
}

async fn flush(wal: &Wal, history: &mut History) -> bool {
    let vote = SavedVote { term: history.term, replica: 99, committed: false };
    history.record(9, |m| m.view.vote = Some(vote));
    let (tx, rx) = tokio::sync::oneshot::channel();
    let ack = history.ack();
    let both: Completion = Box::new(move |r| {
        let ok = r.is_ok();
        ack(r);
        let _ = tx.send(ok);
    });
    if wal.save_vote(9, vote, both).is_err() {
        history.states.pop();
        return false;
    }
    rx.await.unwrap_or(false)
}

async fn observe(wal: &Wal) -> State {
    let mut state = State::new();
    for group in wal.groups() {
        let entries = wal.read(group, 0..u64::MAX, usize::MAX).await.expect("read");
        let entries: BTreeMap<u64, LogEntry> = entries.into_iter().map(|e| (e.index, e)).collect();
        state.insert(group, Model { view: wal.group(group), entries });
    }
    state
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime")
}

/// Runs lives until the operations are used up; checks every recovery.
fn run(path: &Path, engine: LogEngine, mut ops: &[Op]) {
    let options = || WalOptions { segment_bytes: SEGMENT, cache_bytes: 8 << 10, spare_segments: 1, engine };
    let mut history = History::new(State::new(), 1);
    let mut last_life = false;
    while !last_life {
        last_life = ops.is_empty();
        let runtime = runtime();
        let plan = FaultPlan::new();
        let used = runtime.block_on(async {
            let wal = open_with(path, options(), Some(plan.clone())).await.expect("recover");
            let found = observe(&wal).await;
            let acked = history.acked.load(Ordering::SeqCst);
            // Groups that were touched but hold nothing are the same as unknown ones.
            let bare = |s: &State| -> State {
                s.iter().filter(|(_, m)| **m != Model::default()).map(|(g, m)| (*g, m.clone())).collect()
            };
            let fits = history.states[acked..].iter().any(|s| bare(s) == bare(&found));
            assert!(fits, "recovered state is no acknowledged prefix: {found:#?}\nnot in {:#?}", &history.states[acked..]);
            history = History::new(found, history.term);
            let used = live(&wal, &plan, &mut history, ops).await;
            // What is readable now is the newest state, durable or not, as long as the log lives.
            if wal.ended().borrow().is_none() {
                assert_eq!(bare(&observe(&wal).await), bare(history.now()));
            }
            // The crash: nothing is closed and the writer runs no more; the runtime takes it along.
            used
        });
        drop(runtime);
        ops = &ops[used..];
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_crash_keeps_an_acknowledged_prefix(ops in proptest::collection::vec(op(), 1..120)) {
        let temp = tempfile::tempdir().expect("temp dir");
        run(temp.path(), LogEngine::Auto, &ops);
    }

    #[test]
    fn also_without_io_uring(ops in proptest::collection::vec(op(), 1..60)) {
        let temp = tempfile::tempdir().expect("temp dir");
        run(temp.path(), LogEngine::Blocking, &ops);
    }
}
