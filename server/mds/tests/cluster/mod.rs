//! MDS nodes in threads of their own, real sockets and disks, and chunkservers that only heartbeat.
//!
//! Ending a node's runtime is as abrupt as a crash for everybody else: sockets close, nothing is said.

#![allow(dead_code, unreachable_pub)] // each test uses its part

use ogee_common::limits::HEARTBEAT_INTERVAL;
use ogee_mds::{MdsConfig, MdsError, PeerConfig};
use ogee_proto::data::PROTOCOL_MAX;
use ogee_proto::mds::mds_client::MdsClient;
use ogee_proto::mds::{self as m, layer_task::Kind};
use ogee_proto::{ERROR_METADATA, LEADER_METADATA, MdsErrorKind};
use std::collections::BTreeSet;
use std::future::Future;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

/// Every wait of a test ends here.
pub const DEADLINE: Duration = Duration::from_secs(30);
pub const GIB: u64 = 1 << 30;

pub type Client = MdsClient<Channel>;

#[allow(clippy::disallowed_methods)] // tests measure real time
pub fn now() -> Instant {
    Instant::now()
}

/// Asks again and again until there is an answer.
pub async fn poll<T, F: Future<Output = Option<T>>>(what: &str, mut ask: impl FnMut() -> F) -> T {
    let deadline = now() + DEADLINE;
    loop {
        if let Some(value) = ask().await {
            return value;
        }
        assert!(now() < deadline, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A node in its own thread.
pub struct Node {
    pub config: MdsConfig,
    stop: Option<oneshot::Sender<bool>>,
    thread: Option<std::thread::JoinHandle<Result<(), MdsError>>>,
}

impl Node {
    pub fn start(listener: TcpListener, config: MdsConfig) -> Self {
        listener.set_nonblocking(true).expect("non-blocking");
        let (stop, stopped) = oneshot::channel();
        let of_thread = config.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
            let result = runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("listener").into();
                let (gracefully, told) = oneshot::channel::<()>();
                let node = ogee_mds::run_on(listener, of_thread, async {
                    let _ = told.await;
                });
                let mut node = Box::pin(node);
                tokio::select! {
                    result = &mut node => return result,
                    graceful = stopped => {
                        if graceful == Ok(false) {
                            return Ok(());
                        }
                    }
                }
                drop(gracefully);
                node.await
            });
            runtime.shutdown_timeout(Duration::from_secs(5));
            result
        });
        Self { config, stop: Some(stop), thread: Some(thread) }
    }

    /// Ends the node's runtime in the middle of whatever it does.
    pub fn kill(&mut self) {
        self.end(false).expect("no failure before");
    }

    /// Tells the node to stop.
    pub fn stop(&mut self) -> Result<(), MdsError> {
        self.end(true)
    }

    fn end(&mut self, gracefully: bool) -> Result<(), MdsError> {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(gracefully);
        }
        self.thread.take().map_or(Ok(()), |t| t.join().expect("the node's thread does not panic"))
    }

    /// Waits for a node that ends by itself.
    pub fn join(mut self) -> Result<(), MdsError> {
        self.thread.take().expect("a thread").join().expect("the node's thread does not panic")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.end(false);
    }
}

/// The nodes of one MDS.
pub struct Cluster {
    pub nodes: Vec<Node>,
    pub dirs: Vec<TempDir>,
}

impl Cluster {
    pub fn start(count: u32) -> Self {
        let dirs: Vec<TempDir> = (0..count).map(|_| tempfile::tempdir().expect("temp dir")).collect();
        let listeners: Vec<TcpListener> =
            (0..count).map(|_| TcpListener::bind("127.0.0.1:0").expect("listen")).collect();
        let addrs: Vec<SocketAddr> = listeners.iter().map(|l| l.local_addr().expect("address")).collect();
        let peers: Vec<PeerConfig> = (1..).zip(&addrs).map(|(id, addr)| PeerConfig { id, addr: *addr }).collect();
        let config = |(node, (dir, listen)): (u32, (&TempDir, &SocketAddr))| MdsConfig {
            rebuild_after_seconds: REBUILD_AFTER_SECONDS,
            tls: None,
            node,
            cluster: "test".into(),
            data_dir: dir.path().join("mds"),
            listen: *listen,
            bootstrap: true,
            metrics: None,
            peers: if count == 1 { vec![] } else { peers.clone() },
        };
        let configs: Vec<MdsConfig> = (1..).zip(dirs.iter().zip(&addrs)).map(config).collect();
        let nodes = listeners.into_iter().zip(configs).map(|(l, c)| Node::start(l, c)).collect();
        Self { nodes, dirs }
    }

    /// Starts a node that was ended, on its old address and directory.
    pub fn restart(&mut self, at: usize) {
        let config = MdsConfig { bootstrap: false, ..self.nodes[at].config.clone() };
        let deadline = now() + DEADLINE;
        let listener = loop {
            match TcpListener::bind(config.listen) {
                Ok(listener) => break listener,
                Err(e) => assert!(now() < deadline, "{e}"),
            }
            std::thread::yield_now();
        };
        self.nodes[at] = Node::start(listener, config);
    }

    pub fn addr(&self, at: usize) -> SocketAddr {
        self.nodes[at].config.listen
    }

    /// The node that leads, and a client of it.
    pub async fn leader(&self) -> (usize, Client) {
        poll("a leader", || async {
            for (at, node) in self.nodes.iter().enumerate().filter(|(_, n)| n.thread.is_some()) {
                let mut client = client(node.config.listen);
                if client.cluster_status(m::Empty {}).await.is_ok() {
                    return Some((at, client));
                }
            }
            None
        })
        .await
    }
}

/// The nodes give up a chunkserver that is silent for this long.
pub const REBUILD_AFTER_SECONDS: u32 = 6;

pub fn client(addr: SocketAddr) -> Client {
    let endpoint = Endpoint::from_shared(format!("http://{addr}")).expect("a URI");
    MdsClient::new(endpoint.connect_timeout(Duration::from_secs(2)).connect_lazy())
}

/// What an error says to a program.
pub fn kind(status: &Status) -> Option<MdsErrorKind> {
    MdsErrorKind::parse(status.metadata().get(ERROR_METADATA)?.to_str().ok()?)
}

pub fn refused<T: std::fmt::Debug>(result: Result<tonic::Response<T>, Status>) -> (MdsErrorKind, String) {
    let status = result.expect_err("a refusal");
    (kind(&status).unwrap_or_else(|| panic!("no kind: {status:?}")), status.message().to_owned())
}

pub fn leader_of(status: &Status) -> String {
    status.metadata().get(LEADER_METADATA).expect("a leader's address").to_str().expect("text").to_owned()
}

/// Chunkservers that do what the MDS says, at once.
pub struct Fleet {
    pub servers: Vec<Arc<Server>>,
    pub addrs: Arc<Mutex<Vec<SocketAddr>>>,
    tasks: Vec<JoinHandle<()>>,
}

/// One of them.
pub struct Server {
    pub id: u32,
    pub uuid: [u8; 16],
    pub addr: String,
    /// The data protocol that it says it speaks.
    pub protocol: AtomicU32,
    /// Layer tasks are left undone.
    pub stuck: AtomicBool,
    /// Replicas that exist here: copyset and replica.
    pub replicas: Mutex<BTreeSet<(u32, u64)>>,
    /// Replicas that the MDS allowed to be made, each time it said so.
    pub created: Mutex<Vec<u64>>,
    /// Tasks carried out.
    pub done: Mutex<Vec<m::LayerTask>>,
    pub beats: AtomicU32,
}

pub fn registration(n: u32) -> m::RegisterChunkserverRequest {
    m::RegisterChunkserverRequest {
        uuid: vec![u8::try_from(n).expect("few"); 16].into(),
        id: 0,
        addr: format!("127.0.0.1:{}", 20_000 + n),
        pool: "default".into(),
        zone: format!("zone-{n}"),
        host: "host".into(),
        capacity_bytes: 1 << 40,
        cluster: Default::default(),
    }
}

impl Server {
    async fn beat(&self, client: &mut Client, done: &mut Vec<m::TaskDone>) -> Result<(), Status> {
        let copysets: Vec<m::CopysetReport> = {
            let replicas = self.replicas.lock().expect("lock");
            let report = |(copyset, replica): &(u32, u64)| m::CopysetReport {
                copyset: *copyset,
                replica: *replica,
                leader: copyset % 3 + 1,
                term: 1,
                applied: 1,
                conf_epoch: 1,
                ..m::CopysetReport::default()
            };
            replicas.iter().map(report).collect()
        };
        let request = m::HeartbeatRequest {
            chunkserver: self.id,
            uuid: self.uuid.to_vec().into(),
            addr: self.addr.clone(),
            capacity_bytes: 1 << 40,
            free_bytes: 1 << 39,
            copysets,
            done: done.clone(),
            disk_error: String::new(),
            held: vec![],
            protocol: self.protocol.load(Ordering::SeqCst),
            ..m::HeartbeatRequest::default()
        };
        let reply = client.heartbeat(request).await?.into_inner();
        done.clear();
        for copyset in &reply.host {
            for replica in copyset.replicas.iter().filter(|r| r.chunkserver == self.id) {
                if reply.create.contains(&replica.replica) {
                    self.created.lock().expect("lock").push(replica.replica);
                    self.replicas.lock().expect("lock").insert((copyset.id, replica.replica));
                }
            }
        }
        if !self.stuck.load(Ordering::SeqCst) {
            for task in reply.tasks {
                done.extend(task.copysets.iter().map(|c| m::TaskDone { task: task.id, copyset: *c }));
                self.done.lock().expect("lock").push(task);
            }
        }
        self.beats.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

impl Fleet {
    /// Registers three chunkservers in three zones and makes the pool `default` with `copysets` copysets.
    pub async fn start(cluster: &Cluster, copysets: u32) -> Self {
        let (_, mut client) = cluster.leader().await;
        let addrs = cluster.nodes.iter().map(|n| n.config.listen).collect();
        let mut fleet = Self { servers: vec![], addrs: Arc::new(Mutex::new(addrs)), tasks: vec![] };
        for n in 1..=3 {
            let request = registration(n);
            let (uuid, addr) = ([u8::try_from(n).expect("few"); 16], request.addr.clone());
            let id = client.register_chunkserver(request).await.expect("register").into_inner().id;
            let server = Arc::new(Server {
                id,
                uuid,
                addr,
                protocol: AtomicU32::new(PROTOCOL_MAX.into()),
                stuck: AtomicBool::new(false),
                replicas: Mutex::default(),
                created: Mutex::default(),
                done: Mutex::default(),
                beats: AtomicU32::new(0),
            });
            fleet.tasks.push(tokio::spawn(beat_on(server.clone(), fleet.addrs.clone())));
            fleet.servers.push(server);
        }
        let request = m::CreatePoolRequest { name: "default".into(), replicas: 3, copysets };
        client.create_pool(request).await.expect("pool");
        fleet
    }

    pub fn stick(&self, stuck: bool) {
        for server in &self.servers {
            server.stuck.store(stuck, Ordering::SeqCst);
        }
    }

    /// Kinds of the tasks carried out so far, by layer.
    pub fn done(&self, layer: u64) -> Vec<Kind> {
        let of = |s: &Arc<Server>| s.done.lock().expect("lock").clone();
        let mut tasks: Vec<m::LayerTask> = self.servers.iter().flat_map(of).filter(|t| t.layer == layer).collect();
        tasks.sort_by_key(|t| t.id);
        tasks.dedup_by_key(|t| t.id);
        tasks.into_iter().filter_map(|t| t.kind).collect()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Heartbeats to whichever node leads, ten times as often as a real one.
async fn beat_on(server: Arc<Server>, addrs: Arc<Mutex<Vec<SocketAddr>>>) {
    let (mut at, mut done) = (0, vec![]);
    loop {
        let addr = {
            let addrs = addrs.lock().expect("lock");
            addrs[at % addrs.len()]
        };
        let mut client = client(addr);
        while server.beat(&mut client, &mut done).await.is_ok() {
            tokio::time::sleep(HEARTBEAT_INTERVAL / 10).await;
        }
        at += 1;
        tokio::time::sleep(HEARTBEAT_INTERVAL / 10).await;
    }
}

pub fn create(path: &str, size_bytes: u64) -> m::CreateVolumeRequest {
    m::CreateVolumeRequest {
        path: path.into(),
        size_bytes,
        create_parents: true,
        ..m::CreateVolumeRequest::default()
    }
}

pub fn attach(path: &str, client: u64, steal: bool) -> m::AttachVolumeRequest {
    m::AttachVolumeRequest {
        path: path.into(),
        snapshot: String::new(),
        read_only: false,
        steal,
        client,
        description: format!("client {client}"),
        resume: false,
        reads_backups: false,
    }
}

pub fn snapshot_of(path: &str, name: &str) -> m::CreateSnapshotRequest {
    m::CreateSnapshotRequest { path: path.into(), name: name.into() }
}

pub fn allocate(grant: &m::AttachGrant, index: u32) -> m::AllocateSegmentRequest {
    let volume = grant.volume.as_ref().expect("a volume").id;
    m::AllocateSegmentRequest { volume, epoch: grant.epoch, layer: grant.layer, index }
}

pub fn watch(grant: &m::AttachGrant, client: u64) -> m::WatchAttachRequest {
    m::WatchAttachRequest { volume: grant.volume.as_ref().expect("a volume").id, epoch: grant.epoch, client }
}
