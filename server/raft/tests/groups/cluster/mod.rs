//! A cluster of Raft processes in one test: real sockets, real logs, each process a thread with its own runtime, so that
//! ending the runtime is a crash (sockets close, nothing is said) and blocking it is a hang.

#![allow(dead_code, unreachable_pub)] // each test uses its part

pub mod machine;

use bytes::Bytes;
use machine::{Machine, Parts, Watched};
use ogee_common::id::{ReplicaId, Term};
use ogee_disk::{DataDir, FaultPlan};
use ogee_proto::data::{Frame, Role};
use ogee_proto::link::{self, Handler, Responder};
use ogee_proto::net::{self, Network};
use ogee_raft::{
    AddressBook, Members, PeerConnection, Proposed, RaftError, RaftGroup, Identity, RaftProcess, RaftTuning, Wal, WalOptions,
};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

pub const CLUSTER: [u8; 16] = *b"raft test clustr";
/// Every wait of a test ends here.
pub const DEADLINE: Duration = Duration::from_secs(30);

#[allow(clippy::disallowed_methods)] // tests measure real time
pub fn now() -> Instant {
    Instant::now()
}

/// Addresses, and who does not hear whom.
#[derive(Default)]
pub struct Net {
    addrs: Mutex<HashMap<u32, SocketAddr>>,
    deaf: Mutex<HashSet<(u32, u32)>>,
    /// Frames of which each direction was cut are kept, so that no answer gives the cut away.
    swallowed: Mutex<Vec<Responder>>,
    pub frames: AtomicU64,
    pub connections: AtomicU64,
}

impl Net {
    /// Nothing from `from` reaches `to` any more.
    pub fn cut(&self, from: u32, to: u32) {
        self.deaf.lock().expect("lock").insert((from, to));
    }

    pub fn isolate(&self, process: u32, others: impl IntoIterator<Item = u32>) {
        for other in others {
            self.cut(process, other);
            self.cut(other, process);
        }
    }

    pub fn heal(&self) {
        self.deaf.lock().expect("lock").clear();
        self.swallowed.lock().expect("lock").clear();
    }
}

impl AddressBook for Net {
    fn addr(&self, process: u32) -> Option<SocketAddr> {
        self.addrs.lock().expect("lock").get(&process).copied()
    }
}

struct Filter {
    net: Arc<Net>,
    inner: PeerConnection,
    from: u32,
    to: u32,
}

impl Handler for Filter {
    fn handle(&self, frame: Frame, responder: Responder) {
        self.net.frames.fetch_add(1, Ordering::Relaxed);
        if self.net.deaf.lock().expect("lock").contains(&(self.from, self.to)) {
            self.net.swallowed.lock().expect("lock").push(responder);
        } else {
            self.inner.handle(frame, responder);
        }
    }

    fn closed(&self) {
        self.inner.closed();
    }
}

/// One process.
pub struct Node {
    pub process: u32,
    pub raft: Arc<RaftProcess>,
    pub wal: Wal,
    pub groups: BTreeMap<u64, RaftGroup>,
    pub watched: BTreeMap<u64, Arc<Watched>>,
    /// Its thread, as the kernel counts.
    thread_stat: std::path::PathBuf,
    handle: tokio::runtime::Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Node {
    /// Runs a future on the node's own runtime.
    pub fn run<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> T {
        let (tx, rx) = std::sync::mpsc::sync_channel(1);
        self.handle.spawn(async move {
            let _ = tx.send(future.await);
        });
        rx.recv_timeout(DEADLINE).expect("the node answers before the deadline")
    }

    /// CPU time of the node's thread.
    pub fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(&self.thread_stat).expect("procfs");
        let after_name = stat.rsplit(')').next().expect("a name in brackets");
        let ticks = after_name.split_whitespace().skip(11).take(2).map(|f| f.parse::<u64>().expect("a number"));
        Duration::from_millis(ticks.sum::<u64>() * 10)
    }

    /// Starts a future on the node's own runtime.
    pub fn spawn(&self, future: impl Future<Output = ()> + Send + 'static) {
        self.handle.spawn(future);
    }

    pub fn group(&self, group: u64) -> RaftGroup {
        self.groups[&group].clone()
    }

    pub fn propose(&self, group: u64, command: &[u8], term: Option<Term>) -> Result<Proposed, RaftError> {
        let (group, command) = (self.group(group), Bytes::copy_from_slice(command));
        self.run(async move { group.propose(command, term).await })
    }

    pub fn read(&self, group: u64) -> Result<Term, RaftError> {
        let group = self.group(group);
        self.run(async move { group.read_barrier().await })
    }

    pub fn checkpoint(&self, group: u64) -> Result<(), RaftError> {
        let group = self.group(group);
        self.run(async move { group.checkpoint().await })
    }

    pub fn commands(&self, group: u64) -> Vec<Bytes> {
        self.watched[&group].commands()
    }

    /// Blocks the node's runtime until the returned sender is dropped.
    pub fn hang(&self) -> std::sync::mpsc::Sender<()> {
        let (tx, rx) = std::sync::mpsc::channel::<()>();
        self.handle.spawn(async move {
            let _ = rx.recv();
        });
        tx
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the node's thread does not panic");
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.end();
    }
}

/// How a cluster is made.
#[derive(Clone)]
pub struct Setup {
    pub processes: u32,
    pub groups: Vec<u64>,
    pub tuning: RaftTuning,
    pub wal: WalOptions,
}

impl Default for Setup {
    fn default() -> Self {
        let wal = WalOptions { segment_bytes: 8 << 20, ..WalOptions::default() };
        Self { processes: 3, groups: vec![1], tuning: RaftTuning::default(), wal }
    }
}

/// The cluster. Processes count from 1; the replica of group g in process p is g * 100 + p.
pub struct Cluster {
    pub setup: Setup,
    pub net: Arc<Net>,
    pub dirs: Vec<tempfile::TempDir>,
    pub nodes: BTreeMap<u32, Node>,
    pub faults: Arc<FaultPlan>,
    /// The process whose disk asks the plan.
    pub faulty: u32,
}

pub fn replica(group: u64, process: u32) -> ReplicaId {
    ReplicaId(group * 100 + u64::from(process))
}

impl Cluster {
    /// Starts all processes and initializes all groups everywhere.
    pub fn start(setup: Setup) -> Self {
        let mut cluster = Self::prepare(setup);
        for process in cluster.all() {
            cluster.boot(process);
        }
        cluster.initialize();
        cluster
    }

    pub fn prepare(setup: Setup) -> Self {
        let dirs = (0..setup.processes).map(|_| tempfile::tempdir().expect("temporary directory")).collect();
        let (net, nodes, faults) = (Arc::default(), BTreeMap::new(), FaultPlan::new());
        Self { setup, net, dirs, nodes, faults, faulty: 0 }
    }

    pub fn all(&self) -> Vec<u32> {
        (1..=self.setup.processes).collect()
    }

    pub fn members(&self, group: u64) -> Members {
        self.all().into_iter().map(|p| (replica(group, p), p)).collect()
    }

    pub fn initialize(&self) {
        for node in self.nodes.values() {
            for (id, group) in &node.groups {
                let (group, members) = (group.clone(), self.members(*id));
                node.run(async move { group.initialize(members).await }).expect("initialize");
            }
        }
    }

    /// Starts a process on its directory.
    pub fn boot(&mut self, process: u32) {
        let dir = self.dirs[process as usize - 1].path().to_owned();
        let faults = (process == self.faulty).then(|| self.faults.clone());
        let (net, setup) = (self.net.clone(), self.setup.clone());
        let (ready_tx, ready_rx) = std::sync::mpsc::sync_channel(1);
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            let handle = runtime.handle().clone();
            // "self/task/<id>", which means the same in every thread of this process.
            let me = std::fs::read_link("/proc/thread-self").expect("procfs");
            let stat = std::path::Path::new("/proc").join(me).join("stat");
            runtime.block_on(async move {
                ready_tx.send((handle, stat, start_node(process, dir, faults, net, setup).await)).expect("the test waits");
                let _ = stopped.await;
            });
            runtime.shutdown_timeout(Duration::from_secs(5));
        });
        let (handle, thread_stat, parts) = ready_rx.recv_timeout(DEADLINE).expect("the process starts");
        let (raft, wal, groups, watched) = parts;
        let (stop, thread) = (Some(stop), Some(thread));
        self.nodes.insert(process, Node { process, raft, wal, groups, watched, thread_stat, handle, stop, thread });
    }

    /// Ends a process without a word.
    pub fn kill(&mut self, process: u32) {
        drop(self.nodes.remove(&process));
    }

    /// The one that leads `group` and serves reads.
    pub fn leader(&self, group: u64) -> u32 {
        self.leader_among(group, &self.nodes.keys().copied().collect::<Vec<_>>())
    }

    pub fn leader_among(&self, group: u64, processes: &[u32]) -> u32 {
        let mut found = 0;
        wait("a leader", || {
            found = processes
                .iter()
                .copied()
                .find(|p| self.nodes.get(p).is_some_and(|n| n.group(group).is_leader() && n.read(group).is_ok()))
                .unwrap_or(0);
            found != 0
        });
        found
    }

    pub fn node(&self, process: u32) -> &Node {
        &self.nodes[&process]
    }

    /// Waits until every running replica of `group` holds exactly `expected`.
    pub fn converged(&self, group: u64, expected: &[Bytes]) {
        wait("all replicas to hold the same", || self.nodes.values().all(|n| n.commands(group) == expected));
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A responder that is kept keeps its connection's queue.
        self.net.heal();
        self.nodes.clear();
    }
}

type Parcel = (Arc<RaftProcess>, Wal, BTreeMap<u64, RaftGroup>, BTreeMap<u64, Arc<Watched>>);

/// What process `process` says of itself.
fn identity(process: u32) -> Identity {
    Identity { process, role: Role::Chunkserver, cluster: CLUSTER, network: Network::default() }
}

async fn start_node(
    process: u32,
    dir: std::path::PathBuf,
    faults: Option<Arc<FaultPlan>>,
    net: Arc<Net>,
    setup: Setup,
) -> Parcel {
    let data = DataDir::open_with_faults(&dir, faults).expect("data directory");
    let wal = Wal::open(&data, "wal", setup.wal).await.expect("log");
    let book: Arc<dyn AddressBook> = net.clone();
    let raft = RaftProcess::new(identity(process), wal.clone(), book, setup.tuning);
    let (mut groups, mut watched) = (BTreeMap::new(), BTreeMap::new());
    for group in setup.groups {
        let seen = Arc::new(Watched::default());
        let machine = Machine { watched: seen.clone(), file: dir.join(format!("checkpoint-{group}")) };
        let fetch = Arc::new(Parts(seen.clone()));
        let opened = raft.open_group(group, replica(group, process), machine, fetch).await.expect("open group");
        groups.insert(group, opened);
        watched.insert(group, seen);
    }
    let listener = net::listen(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("listen");
    net.addrs.lock().expect("lock").insert(process, listener.local_addr().expect("address"));
    tokio::spawn(serve(listener, process, net, raft.clone()));
    (raft, wal, groups, watched)
}

async fn serve(listener: net::Listener, process: u32, net: Arc<Net>, raft: Arc<RaftProcess>) {
    loop {
        let accepted = net::accept(&listener).await.expect("accept");
        let stream = Network::default().admit(accepted).await.expect("a plain connection");
        net.connections.fetch_add(1, Ordering::Relaxed);
        let (net, raft) = (net.clone(), raft.clone());
        tokio::spawn(link::serve(stream, process, move |hello| {
            assert_eq!((hello.target, hello.cluster), (process, CLUSTER));
            let inner = PeerConnection::new(raft, hello.process);
            Ok(Filter { net, inner, from: hello.process, to: process })
        }));
    }
}

/// Polls until `done` or the deadline.
pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = now();
    while !done() {
        assert!(start.elapsed() < DEADLINE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub fn numbered(range: std::ops::Range<u32>) -> Vec<Bytes> {
    range.map(|i| Bytes::from(format!("command {i}"))).collect()
}

/// Logs of a test, with `RUST_LOG`.
pub fn logs() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
}
