//! One per process: the log, the connections and the clock that all its replicas share.
//!
//! The owner of the listening socket hands every Raft frame to [`RaftProcess::handle`] (or serves connections of peers
//! with [`PeerConnection`]). Invariants: a group is open at most once per process; every replica that was opened is
//! ticked until it is closed; a lost connection reaches every group whose leader it concerns.

use crate::api::{AddressBook, FetchHandler, StateMachine};
use crate::beat;
use crate::beat_count::BeatCount;
use crate::budget::Budget;
use crate::group::RaftGroup;
use crate::inbound;
use crate::lease::LeaseClock;
use crate::links::{Identity, LinkEvents, Links};
use crate::log_store::LogStore;
use crate::machine::{Machine, MachineAdapter, MachineFault};
use crate::network::GroupNetwork;
use crate::poll_once;
use crate::repair::{self, RepairError};
use crate::replica::Replica;
use crate::state::{Cause, GroupFailure, GroupState, GroupStatus};
use crate::ticker::{self, ElectionTimer, Started};
use crate::tuning::{RaftTuning, TuningError};
use crate::types::TypeConfig;
use crate::wal::{Wal, WalError, WalErrorKind};
use ogee_common::{clock, sim};
use ogee_common::id::ReplicaId;
use ogee_proto::data::{Frame, Opcode, RaftHead, Status};
use ogee_proto::link::{Handler, Responder};
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::Fatal;
use openraft::metrics::RaftServerMetrics;
use openraft::storage::RaftLogStorage as _;
use openraft::type_config::alias::WatchReceiverOf;
use openraft::{ConfigError, Raft, RaftLogReader as _, RaftMetrics};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};
use tokio::sync::watch;

/// Why a replica was not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The group is open in this process.
    #[error("group {0} is open already")]
    AlreadyOpen(u64),
    /// The times of the process do not go together.
    #[error("check the times of raft")]
    Tuning(#[source] TuningError),
    /// openraft refuses the times of the process.
    #[error("check the times of raft")]
    Config(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The log has no place for the group.
    #[error("open the log of group {group}")]
    Log {
        /// The group.
        group: u64,
        /// What the log said.
        #[source]
        source: WalError,
    },
    /// The state machine or the log cannot be read, or they do not belong together.
    #[error("load group {group}")]
    Load {
        /// The group.
        group: u64,
        /// What was found.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl OpenError {
    fn load(group: u64, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Load { group, source: source.into() }
    }

    /// Whether log and checkpoint of the group do not belong together: what the checkpoint lacks was purged from the
    /// log. Something on the disk was lost.
    #[must_use]
    pub fn is_gap(&self) -> bool {
        matches!(self, Self::Load { source, .. } if matches!(source.downcast_ref(), Some(RepairError::Gap { .. })))
    }
}

/// The Raft layer of one process.
pub struct RaftProcess {
    wal: Wal,
    links: Arc<Links>,
    tuning: RaftTuning,
    /// `None` while a group is being opened.
    groups: RwLock<HashMap<u64, Option<Arc<Replica>>>>,
    /// A leader's process went away: the ticker is to look at everybody's timer.
    hurry: AtomicBool,
}

impl std::fmt::Debug for RaftProcess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RaftProcess").field("process", &self.links.process()).finish_non_exhaustive()
    }
}

impl RaftProcess {
    /// Sets the layer up on the calling tokio runtime, on which everything of it stays.
    #[must_use]
    pub fn new(identity: Identity, wal: Wal, book: Arc<dyn AddressBook>, tuning: RaftTuning) -> Arc<Self> {
        let this = Arc::new_cyclic(|this: &Weak<Self>| {
            let events: Weak<dyn LinkEvents> = this.clone();
            let links = Links::new(identity, book, events);
            Self { wal, links, tuning: tuning.clone(), groups: RwLock::default(), hurry: AtomicBool::new(false) }
        });
        if tuning.validate().is_ok() {
            tokio::spawn(ticker::run(Arc::downgrade(&this), tuning));
        }
        tokio::spawn(watch_log(this.wal.ended(), Arc::downgrade(&this)));
        this
    }

    /// Starts a replica: loads its state machine, brings its log in line and takes part from then on. A new group is
    /// given its members by [`RaftGroup::initialize`]; a replica that joins later is added by the leader.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open_group<S: StateMachine>(
        self: &Arc<Self>,
        group: u64,
        replica: ReplicaId,
        machine: S,
        fetch: Arc<dyn FetchHandler>,
    ) -> Result<RaftGroup, OpenError> {
        let place = Place::take(self, group)?;
        self.tuning.validate().map_err(OpenError::Tuning)?;
        let log = self.wal.open_group(group).map_err(|source| OpenError::Log { group, source })?;
        let machine = Machine::load((group, replica.0), machine).await.map_err(|e: MachineFault| OpenError::load(group, e))?;
        let opened = Arc::new(self.start(group, replica, log, machine, fetch).await?);
        place.fill(opened.clone());
        Ok(RaftGroup(opened))
    }

    async fn start(
        &self,
        group: u64,
        id: ReplicaId,
        mut log: LogStore,
        machine: Arc<Machine>,
        fetch: Arc<dyn FetchHandler>,
    ) -> Result<Replica, OpenError> {
        let applied = machine.applied().await;
        repair::align(&mut log, applied).await.map_err(|e: RepairError| OpenError::load(group, e))?;
        let mut reader = log.get_log_reader().await;
        let vote = reader.read_vote().await.map_err(|e| OpenError::load(group, e))?;
        let promised = vote.is_some_and(|v| v.leader_id.term > 0);
        let started = if promised { Started::Again } else { Started::Fresh };
        let promise = if promised { self.tuning.lease() } else { std::time::Duration::ZERO };
        let config = self.tuning.openraft().validate().map_err(|e: ConfigError| OpenError::Config(e.into()))?;
        let links = self.links.clone();
        let timer = Arc::new(ElectionTimer::new(&self.tuning, started));
        let lease = Arc::new(LeaseClock::default());
        let network = GroupNetwork {
            links: links.clone(),
            group,
            replica: id.0,
            machine: machine.clone(),
            timer: timer.clone(),
            lease: lease.clone(),
            // One may be lost, or late on a busy machine, without every group falling back to frames of its own.
            fresh: self.tuning.heartbeat * 3,
        };
        let adapter = MachineAdapter(machine.clone());
        let raft = Raft::<TypeConfig, MachineAdapter>::new(id.0, Arc::new(config), network, log, adapter)
            .await
            .map_err(|e: Fatal<TypeConfig>| OpenError::load(group, e))?;
        let now = clock::now();
        let state = watch::Sender::new(GroupState::starting());
        tokio::spawn(publish_state((group, id.0), raft.server_metrics(), raft.metrics(), state.clone()));
        Ok(Replica {
            group,
            id,
            metrics: raft.metrics(),
            state,
            raft,
            machine,
            fetch,
            links,
            wal: self.wal.clone(),
            timer,
            tuning: self.tuning.clone(),
            lease,
            promise: Arc::default(),
            beats: BeatCount::default(),
            told: AtomicU64::new(0),
            votes_from: now + promise,
            installing: AtomicBool::new(false),
            handed_over: AtomicU64::new(u64::MAX),
            budget: Arc::new(Budget::default()),
            checkpointing: tokio::sync::Mutex::new(()),
        })
    }

    /// Carries out one Raft or fetch request. To be called in the order of arrival, on the connection's task.
    #[allow(clippy::needless_pass_by_value)] // a handler owns its frame
    pub fn handle(&self, frame: Frame, responder: Responder) {
        let opcode = frame.header.opcode;
        if opcode == Opcode::RaftBeat {
            return beat::receive(self, frame.head(), responder);
        }
        let head = frame.body.slice(..frame.head().len());
        let head = match RaftHead::decode(&head) {
            Ok(head) => head,
            Err(error) => return responder.bad_request(&error),
        };
        match self.replica(head.group) {
            Some(replica) => inbound::dispatch(&replica, opcode, head, frame.payload(), responder),
            None => responder.status(Status::NotReady),
        }
    }

    /// Whether [`RaftProcess::handle`] is for requests with this opcode.
    #[must_use]
    pub const fn handles(opcode: Opcode) -> bool {
        matches!(
            opcode,
            Opcode::RaftAppend
                | Opcode::RaftVote
                | Opcode::RaftPreVote
                | Opcode::RaftSnapshot
                | Opcode::RaftTransfer
                | Opcode::RaftBeat
                | Opcode::FetchPages
        )
    }

    /// Tells the layer that a connection **from** `process` ended; those **to** it it watches itself. Groups led from
    /// there ask for votes as soon as the lease allows.
    pub fn peer_lost(&self, process: u32) {
        self.for_each(|replica| replica.process_lost(process));
        self.hurry.store(true, Ordering::Release);
    }

    /// Whether a connection has ended since the last call.
    pub(crate) fn take_hurry(&self) -> bool {
        self.hurry.swap(false, Ordering::AcqRel)
    }

    /// The group of this number, if it is open.
    #[must_use]
    pub fn group(&self, group: u64) -> Option<RaftGroup> {
        self.replica(group).map(RaftGroup)
    }

    pub(crate) fn replica(&self, group: u64) -> Option<Arc<Replica>> {
        self.groups.read().unwrap_or_else(PoisonError::into_inner).get(&group).cloned().flatten()
    }

    pub(crate) fn links(&self) -> &Arc<Links> {
        &self.links
    }

    /// The log that all groups share.
    #[must_use]
    pub fn wal(&self) -> &Wal {
        &self.wal
    }

    /// Stops a replica and forgets it. Its log stays; [`Wal::remove_group`] removes it.
    pub async fn close_group(&self, group: u64) {
        let replica = self.groups.write().unwrap_or_else(PoisonError::into_inner).remove(&group).flatten();
        if let Some(replica) = replica {
            RaftGroup(replica).shutdown().await;
        }
    }

    /// Stops all replicas and closes all connections.
    pub async fn shutdown(&self) {
        let open: Vec<u64> = self.groups.read().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        for group in open {
            self.close_group(group).await;
        }
        self.links.close();
    }

    pub(crate) fn for_each(&self, f: impl FnMut(&Arc<Replica>)) {
        self.groups.read().unwrap_or_else(PoisonError::into_inner).values().flatten().for_each(f);
    }
}

impl LinkEvents for RaftProcess {
    fn peer_up(&self, process: u32) {
        // Replication that backs off from this peer goes on at once.
        self.for_each(|replica| {
            let metrics = replica.metrics.borrow_watched();
            let here: Vec<u64> = metrics
                .membership_config
                .nodes()
                .filter(|(_, node)| node.process == process)
                .map(|(id, _)| *id)
                .collect();
            let leads = metrics.state == openraft::ServerState::Leader;
            drop(metrics);
            if leads && !here.is_empty() {
                // Not ready: the core is busy, and the backoff is short.
                let _ = poll_once::ready(replica.raft.trigger().reset_backoff(here));
            }
        });
    }

    fn peer_down(&self, process: u32) {
        self.peer_lost(process);
    }
}

/// The place of a group that is being opened; given up again unless it is filled.
struct Place {
    process: Arc<RaftProcess>,
    group: u64,
    filled: bool,
}

impl Place {
    fn take(process: &Arc<RaftProcess>, group: u64) -> Result<Self, OpenError> {
        let mut groups = process.groups.write().unwrap_or_else(PoisonError::into_inner);
        if groups.contains_key(&group) {
            return Err(OpenError::AlreadyOpen(group));
        }
        groups.insert(group, None);
        drop(groups);
        Ok(Self { process: process.clone(), group, filled: false })
    }

    fn fill(mut self, replica: Arc<Replica>) {
        self.filled = true;
        self.process.groups.write().unwrap_or_else(PoisonError::into_inner).insert(self.group, Some(replica));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.filled {
            self.process.groups.write().unwrap_or_else(PoisonError::into_inner).remove(&self.group);
        }
    }
}

/// Publishes what changes rarely; ends with the replica's core.
async fn publish_state(
    (group, replica): (u64, u64),
    mut server: WatchReceiverOf<TypeConfig, RaftServerMetrics<TypeConfig>>,
    all: WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>,
    publish: watch::Sender<GroupState>,
) {
    loop {
        let fresh = GroupState::of(&server.borrow_and_update());
        if fresh.is_leader {
            sim::saw(|| sim::Seen::Leads { group, term: fresh.leader.term.0, replica });
        }
        publish.send_if_modified(|known| {
            let news = known.status == GroupStatus::Running && *known != fresh;
            if news {
                *known = fresh;
            }
            news
        });
        if server.changed().await.is_err() {
            break;
        }
    }
    let fatal = all.borrow_watched().running_state.clone().err().unwrap_or(Fatal::Panicked);
    publish.send_if_modified(|known| known.stop(GroupStatus::of(fatal)));
}

/// Stops all replicas when the log fails (INV): those that write nothing would not notice, and one that leads would
/// go on serving reads from a disk that is out.
async fn watch_log(mut ended: watch::Receiver<Option<WalError>>, process: Weak<RaftProcess>) {
    let why = match ended.wait_for(Option::is_some).await {
        Ok(why) => why.clone(),
        Err(_) => return,
    };
    let (Some(why), Some(process)) = (why.filter(|e| e.kind() != WalErrorKind::Closed), process.upgrade()) else {
        return;
    };
    let mut replicas = Vec::new();
    process.for_each(|replica| replicas.push(replica.clone()));
    for replica in replicas {
        let failure = GroupFailure(Cause::Log(why.clone()));
        replica.state.send_if_modified(|known| known.stop(GroupStatus::Failed(failure)));
        RaftGroup(replica).shutdown().await;
    }
}

/// Serves a connection of another process of the same role: everything on it is Raft.
#[derive(Debug)]
pub struct PeerConnection {
    process: Arc<RaftProcess>,
    peer: u32,
}

impl PeerConnection {
    /// A connection from process `peer`, as its hello says.
    #[must_use]
    pub const fn new(process: Arc<RaftProcess>, peer: u32) -> Self {
        Self { process, peer }
    }
}

impl Handler for PeerConnection {
    fn handle(&self, frame: Frame, responder: Responder) {
        self.process.handle(frame, responder);
    }

    fn closed(&self) {
        self.process.peer_lost(self.peer);
    }
}
