//! What a replicated write costs here: three processes on one runtime, commands of 4 KiB, one group or several.
//!
//! `cargo run --release -p ogee-raft --example depth -- DIR [SECONDS]`. Prints writes per second, CPU per write of all
//! three together, latency, and flushes per 1,000 writes and disk.

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use ogee_common::clock;
use ogee_common::id::ReplicaId;
use ogee_disk::DataDir;
use ogee_proto::data::Role;
use ogee_proto::link;
use ogee_proto::net::{self, Network};
use ogee_raft::{
    AddressBook, Applied, ApplyEntry, EntryKind, FetchHandler, PeerConnection, RaftGroup, Identity, RaftProcess, RaftSnapshot,
    RaftTuning, SnapshotSource, StateMachine, StateMachineError, Wal, WalOptions,
};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const CLUSTER: [u8; 16] = *b"depth benchmark!";

/// Counts, and keeps nothing.
#[derive(Default)]
struct Counter(Applied);

impl StateMachine for Counter {
    async fn load(&mut self) -> Result<Applied, StateMachineError> {
        Ok(Applied::default())
    }

    async fn apply(&mut self, entries: Vec<ApplyEntry>) -> Result<Vec<Bytes>, StateMachineError> {
        let replies = vec![Bytes::new(); entries.len()];
        for entry in entries {
            self.0.pos = Some(entry.pos);
            if let EntryKind::Membership(m) = entry.kind {
                self.0.membership = m;
            }
        }
        Ok(replies)
    }

    async fn checkpoint(&mut self) -> Result<Applied, StateMachineError> {
        Ok(self.0.clone())
    }

    async fn snapshot(&mut self) -> Result<RaftSnapshot, StateMachineError> {
        Ok(RaftSnapshot { applied: self.0.clone(), manifest: Bytes::new() })
    }

    async fn install(
        &mut self,
        snapshot: RaftSnapshot,
        _source: &(impl SnapshotSource + 'static),
    ) -> Result<(), StateMachineError> {
        self.0 = snapshot.applied;
        Ok(())
    }
}

struct Nothing;

impl FetchHandler for Nothing {
    fn fetch(&self, _request: Bytes) -> BoxFuture<'_, Result<Bytes, StateMachineError>> {
        Box::pin(async { Ok(Bytes::new()) })
    }
}

#[derive(Default)]
struct Book(Mutex<HashMap<u32, SocketAddr>>);

impl AddressBook for Book {
    fn addr(&self, process: u32) -> Option<SocketAddr> {
        self.0.lock().expect("not poisoned").get(&process).copied()
    }
}

/// What process `process` says of itself.
fn identity(process: u32) -> Identity {
    Identity { process, role: Role::Chunkserver, cluster: CLUSTER, network: Network::default() }
}

async fn start(process: u32, dir: &Path, groups: u64, book: Arc<Book>) -> (Wal, Vec<RaftGroup>) {
    let data = DataDir::open(&dir.join(format!("process-{process}"))).expect("data directory");
    let wal = Wal::open(&data, "wal", WalOptions::default()).await.expect("log");
    let raft =
        RaftProcess::new(identity(process), wal.clone(), book.clone(), RaftTuning::default());
    let mut opened = Vec::new();
    for group in 1..=groups {
        let id = ReplicaId(group * 10 + u64::from(process));
        opened.push(raft.open_group(group, id, Counter::default(), Arc::new(Nothing)).await.expect("open group"));
    }
    let listener = net::listen(([127, 0, 0, 1], 0).into()).await.expect("listen");
    book.0.lock().expect("not poisoned").insert(process, listener.local_addr().expect("address"));
    tokio::spawn(async move {
        loop {
            let accepted = net::accept(&listener).await.expect("accept");
            let stream = Network::default().admit(accepted).await.expect("a plain connection");
            let raft = raft.clone();
            tokio::spawn(link::serve(stream, process, move |hello| Ok(PeerConnection::new(raft, hello.process))));
        }
    });
    (wal, opened)
}

fn cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("procfs");
    let fields = stat.rsplit(')').next().expect("a name in brackets").split_whitespace().skip(11).take(2);
    Duration::from_millis(fields.map(|f| f.parse::<u64>().expect("a number")).sum::<u64>() * 10)
}

async fn measure(leaders: &[RaftGroup], wals: &[Wal], depth: usize, span: Duration) {
    let command = Bytes::from(vec![7; 4096]);
    let flushes = || wals.iter().map(|w| w.stats().flushes).sum::<u64>();
    let (begin, cpu_before, flushes_before) = (clock::now(), cpu(), flushes());
    let mut latencies = Vec::new();
    let mut next = 0;
    let mut calls = FuturesUnordered::new();
    loop {
        while calls.len() < depth && begin.elapsed() < span {
            let sent = clock::now();
            let call = leaders[next % leaders.len()].propose(command.clone(), None);
            next += 1;
            calls.push(async move {
                call.await.expect("applied");
                sent.elapsed()
            });
        }
        match calls.next().await {
            Some(latency) => latencies.push(latency),
            None => break,
        }
    }
    let (took, spent, writes) = (begin.elapsed(), cpu() - cpu_before, latencies.len() as f64);
    latencies.sort_unstable();
    let at = |percent: usize| latencies[(latencies.len() - 1) * percent / 100];
    println!(
        "groups {:2}  depth {depth:3}: {:7.0} writes/s  {:5.1} us CPU/write  p50 {:?}  p99 {:?}  {:.0} flushes/1000/disk",
        leaders.len(),
        writes / took.as_secs_f64(),
        spent.as_secs_f64() * 1e6 / writes,
        at(50),
        at(99),
        (flushes() - flushes_before) as f64 * 1000.0 / 3.0 / writes,
    );
}

fn main() {
    let mut args = std::env::args().skip(1);
    let dir = args.next().expect("a directory");
    let span = Duration::from_secs(args.next().map_or(3, |s| s.parse().expect("seconds")));
    for groups in [1, 16] {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        let place = Path::new(&dir).join(format!("groups-{groups}"));
        std::fs::create_dir_all(&place).expect("create directory");
        runtime.block_on(async {
            let book = Arc::new(Book::default());
            let mut wals = Vec::new();
            let mut first = Vec::new();
            for process in 1..=3 {
                let (wal, opened) = start(process, &place, groups, book.clone()).await;
                wals.push(wal);
                first = if process == 1 { opened } else { first };
            }
            for group in &first {
                let members = (1..=3).map(|p| (ReplicaId(group.group() * 10 + u64::from(p)), p)).collect();
                group.initialize(members).await.expect("initialize");
                let mut state = group.state();
                state.wait_for(|s| s.is_leader).await.expect("leads");
                while group.read_barrier().await.is_err() {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            for depth in [1, 8, 32, 128] {
                measure(&first, &wals, depth, span).await;
            }
        });
    }
}
