//! [`run()`]: one MDS node from its configuration to its end.
//!
//! | in the data directory | what |
//! | --- | --- |
//! | `identity` | node and cluster (`identity`) |
//! | `wal/` | the Raft log |
//! | `meta/` | the rows (RocksDB) |
//!
//! Invariants: nothing is served before the directory is known to be this node's; the log is only purged behind a
//! checkpoint of the rows; a failed disk ends the node, it does not go on without; when told to stop, the node lets
//! streams end, makes a checkpoint and closes its log, and a node that is killed instead loses nothing. Everything runs
//! on the runtime that polls [`run()`], usually a current-thread one.

use crate::config::MdsConfig;
use crate::door::Door;
use crate::error::{MdsError, MdsErrorStage};
use crate::log::GroupLog;
use crate::machine::{MdsMachine, Shared};
use crate::metrics::{self, Metrics};
use crate::service::rpc::MdsService;
use crate::service::{Core, NodeAddr};
use crate::{duties, identity};
use ogee_common::clock;
use ogee_common::id::ReplicaId;
use ogee_disk::{DataDir, MetaStore};
use ogee_proto::data::Role;
use ogee_proto::mds::mds_server::MdsServer;
use ogee_proto::net::{self, Listener, Network};
use ogee_raft::{AddressBook, GroupStatus, Identity, Members, RaftGroup, RaftProcess, RaftTuning, Wal, WalOptions};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;

/// The Raft group of the MDS; copysets are numbered below 2^32.
const GROUP: u64 = 1 << 32;
/// Rows are made durable at least this often while they change, which bounds what a start replays.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(10);
/// And whenever this many entries are only in the log.
const CHECKPOINT_ENTRIES: u64 = 4096;
/// How often that is looked at.
const CHECKPOINT_LOOK: Duration = Duration::from_secs(1);
/// Pings of idle gRPC connections: a client whose host died is noticed within two of them, so its stream ends.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Calls under way are given this long when the node stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// A stopping leader waits this long for another node to take the lead.
const HAND_OVER_TIMEOUT: Duration = Duration::from_millis(500);
/// Bytes of a log segment: metadata commands are small.
const SEGMENT_BYTES: u64 = 16 << 20;

/// Runs a node until `shutdown` is ready.
///
/// # Errors
/// [`MdsError`]: it cannot start, or its disk failed.
pub async fn run(config: MdsConfig, shutdown: impl Future<Output = ()> + Send) -> Result<(), MdsError> {
    config.validate().map_err(MdsError::Config)?;
    let listener = net::listen(config.listen).await.map_err(MdsError::at(MdsErrorStage::Listen))?;
    run_on(listener, config, shutdown).await
}

/// As [`run()`], on a socket that listens already.
///
/// # Errors
/// [`MdsError`].
pub async fn run_on(
    listener: Listener,
    config: MdsConfig,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), MdsError> {
    config.validate().map_err(MdsError::Config)?;
    let node = Node::start(&config).await?;
    let result = node.serve(listener, &config, shutdown).await;
    node.stop().await;
    result
}

/// Addresses of the other nodes, from the configuration.
struct Book(HashMap<u32, SocketAddr>);

impl AddressBook for Book {
    fn addr(&self, process: u32) -> Option<SocketAddr> {
        self.0.get(&process).copied()
    }
}

/// The identity under which nodes know each other before the cluster has one: the FNV-1a hash of its name.
fn group_identity(cluster: &str) -> [u8; 16] {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    cluster.bytes().fold(OFFSET, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME)).to_be_bytes()
}

/// What a running node holds.
struct Node {
    raft: Arc<RaftProcess>,
    group: RaftGroup,
    wal: Wal,
    shared: Arc<Shared>,
    network: Network,
    _dir: DataDir,
}

impl Node {
    async fn start(config: &MdsConfig) -> Result<Self, MdsError> {
        let network = Network::new(config.tls.as_ref()).map_err(MdsError::at(MdsErrorStage::Certificate))?;
        let claimed = config.clone();
        let opened = ogee_common::sim::spawn_blocking(move || -> Result<(DataDir, Arc<dyn MetaStore>), MdsError> {
            let dir = DataDir::open(&claimed.data_dir).map_err(MdsError::at(MdsErrorStage::DataDir))?;
            identity::claim(&dir, &claimed)?;
            let store = ogee_disk::open_meta(&dir.path("meta")).map_err(MdsError::at(MdsErrorStage::Store))?;
            Ok((dir, store))
        });
        let (dir, store) = opened.await.map_err(MdsError::at(MdsErrorStage::Store))??;
        let options = WalOptions { segment_bytes: SEGMENT_BYTES, ..WalOptions::default() };
        let wal = Wal::open(&dir, "wal", options).await.map_err(MdsError::at(MdsErrorStage::Log))?;
        let nodes = config.nodes();
        let book = Arc::new(Book(nodes.iter().map(|n| (n.id, n.addr)).collect()));
        let tuning = RaftTuning::default();
        let cluster = group_identity(&config.cluster);
        let own = Identity { process: config.node, role: Role::Mds, cluster, network: network.clone() };
        let raft = RaftProcess::new(own, wal.clone(), book, tuning);
        let shared = Shared::new(store);
        let machine = MdsMachine::new(shared.clone());
        let replica = ReplicaId(config.node.into());
        let group = raft.open_group(GROUP, replica, machine, shared.clone()).await;
        let group = group.map_err(MdsError::at(MdsErrorStage::Join))?;
        let members: Members = nodes.iter().map(|n| (ReplicaId(n.id.into()), n.id)).collect();
        group.initialize(members).await.map_err(MdsError::at(MdsErrorStage::Join))?;
        Ok(Self { raft, group, wal, shared, network, _dir: dir })
    }

    /// Serves until told to stop or until something fails.
    async fn serve(
        &self,
        listener: Listener,
        config: &MdsConfig,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), MdsError> {
        let rebuild_after = Duration::from_secs(config.rebuild_after_seconds.into());
        let nodes = config.nodes().iter().map(|n| NodeAddr { id: n.id, addr: n.addr.to_string() }).collect();
        let core = Core::new(self.shared.clone(), Arc::new(GroupLog::new(self.group.clone())), nodes, rebuild_after);
        let _metrics = config.metrics.and_then(|addr| metrics::serve(addr, self.metrics(&core)));
        let (cluster, network) = (group_identity(&config.cluster), self.network.clone());
        let door = Door { node: config.node, cluster, raft: self.raft.clone(), network };
        let (incoming, door) = door.open(listener);
        let mut tasks = JoinSet::new();
        tasks.spawn(door);
        tasks.spawn(duties::run(core.clone()));
        tasks.spawn(checkpoints(self.group.clone()));
        let (stop, stopped) = oneshot::channel::<()>();
        let server = Server::builder()
            .http2_keepalive_interval(Some(KEEP_ALIVE))
            .http2_keepalive_timeout(Some(KEEP_ALIVE))
            .serve_with_incoming_shutdown(MdsServer::new(MdsService(core.clone())), ReceiverStream::new(incoming), async {
                // An error means that this function has ended.
                let _ = stopped.await;
            });
        let mut server = tokio::spawn(server);
        tracing::info!(target: "controlpath", node = config.node, listen = %config.listen, "the MDS node serves");
        let result = tokio::select! {
            () = shutdown => Ok(()),
            failed = self.failed() => failed,
            ended = &mut server => match ended {
                Ok(result) => return result.map_err(MdsError::at(MdsErrorStage::Serve)),
                Err(panic) => return Err(MdsError::at(MdsErrorStage::Serve)(panic)),
            },
        };
        self.hand_over().await;
        drop(stop);
        core.hub.leave();
        if tokio::time::timeout(STOP_TIMEOUT, &mut server).await.is_err() {
            server.abort();
        }
        result
    }

    fn metrics(&self, core: &Arc<Core>) -> Metrics {
        Metrics { core: core.clone(), group: self.group.clone(), wal: self.wal.clone() }
    }

    /// Gives the lead to another node, so that nobody waits for an election. Does nothing if this one does not lead.
    async fn hand_over(&self) {
        let own = self.group.replica();
        let Some(next) = self.group.members().into_keys().find(|id| *id != own) else { return };
        self.group.transfer_leader(next).await;
        let mut state = self.group.state();
        let handed = state.wait_for(|s| !s.is_leader);
        if tokio::time::timeout(HAND_OVER_TIMEOUT, handed).await.is_err() {
            tracing::debug!(target: "controlpath", "the lead was not taken over in time");
        }
    }

    /// Ends when the node cannot go on.
    async fn failed(&self) -> Result<(), MdsError> {
        let mut state = self.group.state();
        let status = match state.wait_for(|s| s.status != GroupStatus::Running).await {
            Ok(state) => state.status.clone(),
            Err(_) => GroupStatus::Shutdown,
        };
        match status {
            GroupStatus::Failed(failure) => Err(MdsError::at(MdsErrorStage::Replicate)(failure)),
            _ => Ok(()),
        }
    }

    async fn stop(self) {
        if self.group.state().borrow().status == GroupStatus::Running
            && let Err(error) = self.group.checkpoint().await
        {
            tracing::warn!(target: "controlpath", %error, "the last checkpoint failed; the log has everything");
        }
        self.raft.shutdown().await;
        if let Err(error) = self.wal.close().await {
            tracing::error!(target: "controlpath", error = &error as &dyn std::error::Error, "close the log");
        }
    }
}

/// Makes checkpoints as the log grows.
async fn checkpoints(group: RaftGroup) {
    let (mut done, mut at) = (group.applied_index(), clock::now());
    loop {
        tokio::time::sleep(CHECKPOINT_LOOK).await;
        let applied = group.applied_index();
        let due = applied - done.min(applied) >= CHECKPOINT_ENTRIES
            || (applied > done && at.elapsed() >= CHECKPOINT_INTERVAL);
        if !due {
            continue;
        }
        if let Err(error) = group.checkpoint().await {
            tracing::error!(target: "controlpath", %error, "checkpoint metadata");
            return;
        }
        (done, at) = (applied, clock::now());
    }
}

#[cfg(test)]
mod tests {
    use super::group_identity;

    #[test]
    fn clusters_of_other_names_are_strangers() {
        // Reference values of FNV-1a with 128 bits.
        assert_eq!(group_identity(""), 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128.to_be_bytes());
        assert_eq!(group_identity("a"), 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964_u128.to_be_bytes());
    }
}
