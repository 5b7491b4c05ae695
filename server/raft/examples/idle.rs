//! What groups cost that have nothing to do: three processes of [`RaftProcess`] on a thread and a runtime each, N groups
//! of three replicas.
//!
//! `cargo run --release --example idle -- DIR [SECONDS] [GROUPS]...`. Prints CPU per second of each process (its thread,
//! from /proc), frames that it received and times that it was woken per second (voluntary context switches).

use bytes::Bytes;
use futures_util::future::BoxFuture;
use ogee_common::id::ReplicaId;
use ogee_disk::DataDir;
use ogee_proto::data::{Frame, Role};
use ogee_proto::link::{self, Handler, Responder};
use ogee_proto::net::{self, Network};
use ogee_raft::{
    AddressBook, Applied, ApplyEntry, EntryKind, FetchHandler, PeerConnection, RaftGroup, Identity, RaftProcess, RaftSnapshot,
    RaftTuning, SnapshotSource, StateMachine, StateMachineError, Wal, WalOptions,
};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;
use tokio::sync::oneshot;

const CLUSTER: [u8; 16] = *b"idle benchmark !";

/// Keeps nothing.
#[derive(Default)]
struct Nothing(Applied);

impl StateMachine for Nothing {
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

struct NoParts;

impl FetchHandler for NoParts {
    fn fetch(&self, _request: Bytes) -> BoxFuture<'_, Result<Bytes, StateMachineError>> {
        Box::pin(async { Ok(Bytes::new()) })
    }
}

#[derive(Default)]
struct Book {
    addrs: Mutex<HashMap<u32, SocketAddr>>,
    frames: AtomicU64,
}

impl AddressBook for Book {
    fn addr(&self, process: u32) -> Option<SocketAddr> {
        self.addrs.lock().expect("not poisoned").get(&process).copied()
    }
}

/// Counts what comes in.
struct Counted(PeerConnection, Arc<Book>);

impl Handler for Counted {
    fn handle(&self, frame: Frame, responder: Responder) {
        self.1.frames.fetch_add(1, Ordering::Relaxed);
        self.0.handle(frame, responder);
    }

    fn closed(&self) {
        self.0.closed();
    }
}

/// What process `process` says of itself.
fn identity(process: u32) -> Identity {
    Identity { process, role: Role::Chunkserver, cluster: CLUSTER, network: Network::default() }
}

async fn open(process: u32, dir: PathBuf, groups: u64, book: Arc<Book>) -> Vec<RaftGroup> {
    let data = DataDir::open(&dir.join(format!("process-{process}"))).expect("data directory");
    let options = WalOptions { segment_bytes: 8 << 20, ..WalOptions::default() };
    let wal = Wal::open(&data, "wal", options).await.expect("log");
    let raft = RaftProcess::new(identity(process), wal, book.clone(), RaftTuning::default());
    let mut opened = Vec::new();
    for group in 1..=groups {
        let id = ReplicaId(group * 10 + u64::from(process));
        opened.push(raft.open_group(group, id, Nothing::default(), Arc::new(NoParts)).await.expect("open group"));
    }
    let listener = net::listen(([127, 0, 0, 1], 0).into()).await.expect("listen");
    book.addrs.lock().expect("not poisoned").insert(process, listener.local_addr().expect("address"));
    tokio::spawn(async move {
        loop {
            let accepted = net::accept(&listener).await.expect("accept");
            let stream = Network::default().admit(accepted).await.expect("a plain connection");
            let (raft, book) = (raft.clone(), book.clone());
            let handler = move |hello: &ogee_proto::data::HelloHead| {
                Ok(Counted(PeerConnection::new(raft, hello.process), book))
            };
            tokio::spawn(link::serve(stream, process, handler));
        }
    });
    opened
}

/// One process: a thread.
struct Process {
    groups: Vec<RaftGroup>,
    handle: tokio::runtime::Handle,
    /// The thread in /proc.
    place: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Process {
    fn start(process: u32, dir: PathBuf, groups: u64, book: Arc<Book>) -> Self {
        let (ready_tx, ready) = mpsc::sync_channel(1);
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            let handle = runtime.handle().clone();
            let place = Path::new("/proc").join(std::fs::read_link("/proc/thread-self").expect("procfs"));
            runtime.block_on(async move {
                let opened = open(process, dir, groups, book).await;
                ready_tx.send((opened, handle, place)).expect("the benchmark waits");
                // An error means that the benchmark has ended.
                let _ = stopped.await;
            });
            runtime.shutdown_timeout(Duration::from_secs(5));
        });
        let (groups, handle, place) = ready.recv().expect("the process starts");
        Self { groups, handle, place, stop: Some(stop), thread: Some(thread) }
    }

    fn initialize(&self) {
        let (done_tx, done) = mpsc::sync_channel(1);
        let groups = self.groups.clone();
        self.handle.spawn(async move {
            for group in &groups {
                let members = (1..=3).map(|p| (ReplicaId(group.group() * 10 + u64::from(p)), p)).collect();
                group.initialize(members).await.expect("initialize");
            }
            done_tx.send(()).expect("the benchmark waits");
        });
        done.recv().expect("initialized");
    }

    fn leads(&self) -> usize {
        self.groups.iter().filter(|g| g.is_leader()).count()
    }

    /// CPU seconds, and times it was woken.
    fn spent(&self) -> (f64, f64) {
        let stat = std::fs::read_to_string(self.place.join("schedstat")).expect("procfs");
        let nanos: f64 = stat.split_whitespace().next().expect("three numbers").parse().expect("a number");
        let status = std::fs::read_to_string(self.place.join("status")).expect("procfs");
        let woken = status.lines().find_map(|l| l.strip_prefix("voluntary_ctxt_switches:")).expect("a line");
        (nanos / 1e9, woken.trim().parse().expect("a number"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the process does not panic");
        }
    }
}

fn measure(dir: &Path, groups: u64, span: Duration) {
    let book = Arc::new(Book::default());
    let processes: Vec<_> = (1..=3).map(|p| Process::start(p, dir.to_owned(), groups, book.clone())).collect();
    processes.iter().for_each(Process::initialize);
    while processes.iter().map(Process::leads).sum::<usize>() as u64 != groups {
        std::thread::sleep(Duration::from_millis(100));
    }
    // Until what the elections left behind is done.
    std::thread::sleep(Duration::from_secs(5));
    let (before, frames) = (processes.iter().map(Process::spent).collect::<Vec<_>>(), book.frames.load(Ordering::Relaxed));
    std::thread::sleep(span);
    let frames = book.frames.load(Ordering::Relaxed) - frames;
    let seconds = span.as_secs_f64();
    println!("{groups} groups: {:.0} frames/s in all", frames as f64 / seconds);
    for (process, (cpu, woken)) in processes.iter().zip(before) {
        let (cpu_after, woken_after) = process.spent();
        println!(
            "    leads {:4}: {:5.2} % of a core, woken {:.0}/s",
            process.leads(),
            (cpu_after - cpu) / seconds * 100.0,
            (woken_after - woken) / seconds
        );
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().expect("a directory"));
    let span = Duration::from_secs(args.next().map_or(10, |s| s.parse().expect("seconds")));
    let mut sizes: Vec<u64> = args.map(|s| s.parse().expect("a number of groups")).collect();
    if sizes.is_empty() {
        sizes = vec![32, 300, 1000];
    }
    for groups in sizes {
        let place = dir.join(format!("groups-{groups}"));
        std::fs::create_dir_all(&place).expect("create directory");
        measure(&place, groups, span);
    }
}
