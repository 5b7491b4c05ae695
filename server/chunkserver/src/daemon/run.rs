//! Start, life and end of a chunkserver process.
//!
//! Order of the start: lock the directory, read the superblock, register with the MDS (a new disk must; an old one goes
//! on without it), open log and metadata, open every replica, listen, send heartbeats. Order of the end: stop
//! listening, checkpoint every replica, shut the groups down. A crash at any point is a normal restart.

use super::config::ChunkserverConfig;
use super::damage;
use super::control::{Control, ControlParts, PeerBook};
use super::copysets::Copysets;
use super::data_server::DataServer;
use super::error::{DaemonError, DaemonErrorKind, Reason};
use super::flatten::Flattens;
use super::mds_channel::MdsChannel;
use super::mender;
use super::metrics::{self, Metrics};
use super::scrub::{Depth, Scrub};
use super::sessions::Sessions;
use super::superblock::Superblock;
use super::upkeep::{Upkeep, checkpoint, load_book};
use crate::store::{ChunkStore, StoreTuning};
use bytes::Bytes;
use ogee_common::id::ChunkserverId;
use ogee_common::{limits, rng};
use ogee_disk::DataDir;
use ogee_metrics::MetricsServer;
use ogee_proto::data::Role;
use ogee_proto::link::serve;
use ogee_proto::mds;
use ogee_proto::net::{self, Network};
use ogee_raft::{Identity, RaftProcess, RaftTuning, Wal, WalError, WalOptions};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// The data directory is looked for this often.
const DIRECTORY_LOOK: Duration = Duration::from_secs(1);
/// Pause between two attempts to register.
const REGISTER_PAUSE: Duration = Duration::from_millis(300);

/// Runs a chunkserver until `shutdown` completes. Must be called on a current-thread runtime, which it has for itself.
///
/// # Errors
/// [`DaemonErrorKind`] says what an operator can act on.
pub async fn run(config: ChunkserverConfig, shutdown: impl Future<Output = ()>) -> Result<(), DaemonError> {
    let process = Process::start(&config).await?;
    process.serve(shutdown).await
}

struct Process {
    own: u32,
    path: std::path::PathBuf,
    dir: DataDir,
    listener: net::Listener,
    network: Network,
    server: Arc<DataServer>,
    copysets: Arc<Copysets>,
    control: Arc<Control>,
    upkeep: Upkeep,
    scrub: Arc<Scrub>,
    compare: Arc<Scrub>,
    verify: Arc<Scrub>,
    wal: Wal,
    /// The store's word that its metadata is damaged.
    damaged: watch::Receiver<Option<Arc<str>>>,
    /// The store's word that the disk has failed.
    failed: watch::Receiver<Option<Arc<str>>>,
    _metrics: Option<MetricsServer>,
}

impl Process {
    async fn start(config: &ChunkserverConfig) -> Result<Self, DaemonError> {
        let path = config.data_dir.clone();
        let fail = |kind, verb, source| DaemonError { kind, verb, path: path.clone(), source };
        let dir = DataDir::open(&path)
            .map_err(|e| fail(DaemonErrorKind::DataDir, "open data directory", e.into()))?;
        damage::refuse_damaged(&dir, &path)?;
        let superblock = Superblock::load_or_create(&dir, &path)?;
        let network = Network::new(config.tls.as_ref())
            .map_err(|e| fail(DaemonErrorKind::Certificate, "read certificates for", e.into()))?;
        let listener = net::listen(config.listen).await
            .map_err(|e| fail(DaemonErrorKind::Listen, "listen for the chunkserver of", format!("{}: {e}", config.listen).into()))?;
        let mds = Arc::new(MdsChannel::new(config.mds.clone(), network.clone()));
        let superblock = register(config, &dir, superblock, &mds).await?;
        let own = superblock.id.0;
        let meta = ogee_disk::open_meta(&dir.path("meta"))
            .map_err(|e| fail(DaemonErrorKind::DataDir, "open metadata of", e.into()))?;
        let wal = Wal::open(&dir, "wal", WalOptions::default())
            .await
            .map_err(|e| fail(DaemonErrorKind::DataDir, "open write-ahead log of", e.into()))?;
        let book = Arc::new(PeerBook::default());
        book.restore(load_book(&*meta));
        let (role, cluster) = (Role::Chunkserver, superblock.cluster);
        let identity = Identity { process: own, role, cluster, network: network.clone() };
        let raft = RaftProcess::new(identity, wal.clone(), book.clone(), RaftTuning::default());
        let store = ChunkStore::new(dir.clone(), meta.clone(), store_tuning(config, &dir));
        let copysets = Arc::new(Copysets::new(raft.clone(), store.clone(), meta.clone(), path.clone()));
        let (damaged, failed) = (store.damage(), store.failure());
        open_replicas(&copysets, &damaged, &dir, &path).await?;
        let sessions = Arc::new(Sessions::default());
        let scrub = Scrub::of_config(Depth::Deep, config, copysets.clone(), meta.clone());
        let compare = Scrub::of_config(Depth::Light, config, copysets.clone(), meta.clone());
        let verify = Scrub::of_config(Depth::Volume, config, copysets.clone(), meta.clone());
        let metrics = Metrics {
            own,
            wal: wal.clone(),
            dir: dir.clone(),
            meta: meta.clone(),
            store: store.clone(),
            copysets: copysets.clone(),
            sessions: sessions.clone(),
            scrub: scrub.clone(),
            compare: compare.clone(),
        };
        let server = Arc::new(DataServer {
            own,
            cluster: superblock.cluster,
            process: raft,
            copysets: copysets.clone(),
            sessions,
        });
        let own_dir = dir.clone();
        let control = Control::new(ControlParts {
            own,
            uuid: superblock.uuid,
            addr: config.listen,
            capacity_bytes: config.capacity_bytes,
            dir,
            mds,
            copysets: copysets.clone(),
            store,
            book: book.clone(),
            scrub: scrub.clone(),
            verify: verify.clone(),
            flattens: Flattens::of_config(config),
        });
        let upkeep = Upkeep { copysets: copysets.clone(), control: control.clone(), book, meta, wal: wal.clone() };
        tracing::info!(chunkserver = %superblock.id, listen = %config.listen, zone = config.zone, "chunkserver serves");
        let _metrics = config.metrics.and_then(|addr| metrics::serve(addr, metrics));
        Ok(Self { own, path, dir: own_dir, listener, network, server, copysets, control, upkeep, scrub, compare, verify, wal, damaged, failed, _metrics })
    }

    async fn serve(self, shutdown: impl Future<Output = ()>) -> Result<(), DaemonError> {
        let mut tasks = JoinSet::new();
        tasks.spawn(self.control.run());
        tasks.spawn(self.upkeep.run());
        tasks.spawn(self.scrub.run());
        tasks.spawn(self.compare.run());
        tasks.spawn(self.verify.run());
        tasks.spawn(mender::run(self.copysets.clone()));
        tasks.spawn(accept_all(self.listener, self.network, self.server, self.own));
        let mut ended = self.wal.ended();
        let (mut damaged, mut failed) = (self.damaged, self.failed);
        let outcome = tokio::select! {
            () = shutdown => Ok(()),
            () = directory_gone(&self.dir) => Err(DaemonError {
                kind: DaemonErrorKind::Disk,
                verb: "go on in",
                path: self.path,
                source: Reason::DirectoryGone.into(),
            }),
            why = damage::found(&mut damaged) => Err(damage::condemn(&self.dir, self.path, &why)),
            why = damage::found(&mut failed) => Err(DaemonError {
                kind: DaemonErrorKind::Disk,
                verb: "go on with the disk of",
                path: self.path,
                source: why.as_ref().into(),
            }),
            why = log_end(&mut ended) => Err(DaemonError {
                kind: DaemonErrorKind::Disk,
                verb: "write log in",
                path: self.path,
                source: why,
            }),
        };
        tasks.shutdown().await;
        for hosted in self.copysets.all() {
            if outcome.is_ok() {
                checkpoint(&hosted).await;
            }
            hosted.group.shutdown().await;
        }
        if let Err(error) = self.wal.close().await {
            tracing::error!(error = &error as &dyn std::error::Error, "close the log");
        }
        outcome
    }
}

/// Opens every replica. A metadata store that is found damaged condemns the disk.
async fn open_replicas(
    copysets: &Copysets,
    damaged: &watch::Receiver<Option<Arc<str>>>,
    dir: &DataDir,
    path: &std::path::Path,
) -> Result<(), DaemonError> {
    copysets.open_all().await.map_err(|error| {
        let found = damaged.borrow().clone();
        found.map_or(error, |why| damage::condemn(dir, path.to_owned(), &why))
    })
}

fn store_tuning(config: &ChunkserverConfig, dir: &DataDir) -> StoreTuning {
    /// Bytes that a cached row of 256 pages costs.
    const ROW_BYTES: usize = 1280;
    let mib = usize::try_from(config.metadata_cache_mib).expect("32 bits fit");
    let twentieth = dir.usage().map_or(u64::MAX, |u| u.total_bytes / 20);
    let space_reserve_bytes = config.reserve_bytes.unwrap_or(limits::SPACE_RESERVE_BYTES.min(twentieth));
    StoreTuning {
        row_cache_rows: (mib << 20) / ROW_BYTES,
        space_reserve_bytes,
        install_bytes_per_second: u64::from(config.rebuild_mib_per_second) << 20,
        ..StoreTuning::default()
    }
}

/// Registers the disk. A new disk waits until the MDS gives it an id; one that has its id goes on without the MDS, so
/// that a cluster whose MDS is away can still restart its chunkservers.
async fn register(
    config: &ChunkserverConfig,
    dir: &DataDir,
    superblock: Superblock,
    mds: &MdsChannel,
) -> Result<Superblock, DaemonError> {
    let request = mds::RegisterChunkserverRequest {
        uuid: Bytes::copy_from_slice(&superblock.uuid),
        id: superblock.id.0,
        addr: config.listen.to_string(),
        pool: config.pool.clone(),
        zone: config.zone.clone(),
        host: config.host.clone(),
        capacity_bytes: config.capacity_bytes.unwrap_or_else(|| dir.usage().map_or(0, |u| u.total_bytes)),
        cluster: if superblock.id.0 == 0 { Bytes::new() } else { Bytes::copy_from_slice(&superblock.cluster) },
    };
    loop {
        let answer = mds
            .call(|mut client| {
                let request = request.clone();
                async move { client.register_chunkserver(request).await }
            })
            .await;
        match answer {
            Ok(reply) => return accept_identity(config, dir, superblock, &reply),
            Err(status) if refuses(&status) => return Err(identity(config, status.message().to_owned().into())),
            Err(status) if superblock.id.0 != 0 => {
                tracing::warn!(%status, "not registered with the MDS now; starting with the known identity");
                return Ok(superblock);
            }
            Err(status) => {
                tracing::info!(%status, "waiting for the MDS to register a new disk");
                tokio::time::sleep(rng::jitter(REGISTER_PAUSE)).await;
            }
        }
    }
}

fn refuses(status: &tonic::Status) -> bool {
    let kind = status.metadata().get(ogee_proto::ERROR_METADATA).and_then(|v| v.to_str().ok());
    matches!(
        kind.and_then(ogee_proto::MdsErrorKind::parse),
        Some(ogee_proto::MdsErrorKind::WrongCluster | ogee_proto::MdsErrorKind::InvalidArgument)
    )
}

fn identity(config: &ChunkserverConfig, source: Box<dyn std::error::Error + Send + Sync>) -> DaemonError {
    let path = config.data_dir.clone();
    DaemonError { kind: DaemonErrorKind::Identity, verb: "register data directory", path, source }
}

fn accept_identity(
    config: &ChunkserverConfig,
    dir: &DataDir,
    superblock: Superblock,
    reply: &mds::RegisterChunkserverReply,
) -> Result<Superblock, DaemonError> {
    let cluster: [u8; 16] = reply.cluster[..]
        .try_into()
        .map_err(|_| identity(config, Reason::IdentityMismatch.into()))?;
    let known = Superblock { id: ChunkserverId(reply.id), cluster, ..superblock };
    if superblock.id.0 == 0 {
        known.store(dir, &config.data_dir)?;
        return Ok(known);
    }
    if known == superblock { Ok(known) } else { Err(identity(config, Reason::IdentityMismatch.into())) }
}

/// Waits until somebody has deleted the data directory, or its disk was taken out.
async fn directory_gone(dir: &DataDir) {
    while Superblock::is_in_place(dir) {
        tokio::time::sleep(DIRECTORY_LOOK).await;
    }
}

/// Waits until the log has ended and says why.
async fn log_end(ended: &mut watch::Receiver<Option<WalError>>) -> Box<dyn std::error::Error + Send + Sync> {
    match ended.wait_for(Option::is_some).await {
        Ok(why) => why.clone().map_or_else(|| Reason::LogPoisoned.into(), Into::into),
        Err(_) => Reason::LogPoisoned.into(),
    }
}

async fn accept_all(listener: net::Listener, network: Network, server: Arc<DataServer>, own: u32) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        match net::accept(&listener).await {
            Ok(accepted) => {
                connections.spawn(serve_one(accepted, network.clone(), server.clone(), own));
            }
            Err(error) => {
                tracing::warn!(%error, "accept a connection");
                tokio::time::sleep(REGISTER_PAUSE).await;
            }
        }
    }
}

async fn serve_one(accepted: net::Accepted, network: Network, server: Arc<DataServer>, own: u32) {
    let peer = accepted.addr();
    let stream = match network.admit(accepted).await {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(target: "datapath", %peer, %error, "a connection is refused");
            return;
        }
    };
    if let Err(error) = serve(stream, own, |hello| server.accept(hello)).await {
        tracing::debug!(target: "datapath", %peer, %error, "connection ended");
    }
}
