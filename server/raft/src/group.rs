//! One replica of one group: proposals, reads, checkpoints, administration.
//!
//! [`RaftGroup`] is what the owner holds; [`Replica`] is the same for the rest of this crate. Invariants: proposals enter
//! the log in the order of the calls of [`RaftGroup::propose`]; an error other than `Unknown` and `Stopped` says that
//! nothing was proposed; a read barrier succeeds only in a term whose first entry is applied here, within the lease.

use crate::alias::{LogId, Vote};
use crate::api::{FetchHandler, LeaderHint, Members, Proposed, RaftError};
use crate::links::Links;
use crate::machine::{Machine, MachineAdapter};
use crate::poll_once;
use crate::state::{GroupState, GroupStatus, InitializeError, MembershipError};
use crate::ticker::{ElectionTimer, Tick};
use crate::tuning::RaftTuning;
use crate::types::{Command, PeerNode, TypeConfig};
use crate::wal::{Wal, WalErrorKind};
use bytes::Bytes;
use ogee_common::clock::Instant;
use ogee_common::id::{ReplicaId, Term};
use ogee_common::limits::{RAFT_COMMAND_BYTES_MAX, RAFT_PROPOSAL_BYTES_MAX, RAFT_PROPOSALS_MAX};
use openraft::type_config::alias::WatchReceiverOf;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ClientWriteError, ForwardReason, ForwardToLeader, InitializeError as NotInitialized};
use openraft::impls::ProgressResponder;
use openraft::raft::ClientWriteResult;
use openraft::{ChangeMembers, Raft, RaftMetrics, ServerState};
use std::collections::{BTreeMap, BTreeSet};
use std::future::{Future, IntoFuture};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use tokio::sync::watch;

/// Everything of one replica.
pub(crate) struct Replica {
    pub(crate) group: u64,
    pub(crate) id: ReplicaId,
    pub(crate) raft: Raft<TypeConfig, MachineAdapter>,
    pub(crate) machine: Arc<Machine>,
    pub(crate) fetch: Arc<dyn FetchHandler>,
    pub(crate) links: Arc<Links>,
    pub(crate) wal: Wal,
    pub(crate) tuning: RaftTuning,
    pub(crate) metrics: WatchReceiverOf<TypeConfig, RaftMetrics<TypeConfig>>,
    pub(crate) state: watch::Receiver<GroupState>,
    pub(crate) timer: ElectionTimer,
    /// Before this time no vote is given: one may have been promised to a leader before the restart.
    pub(crate) votes_from: Instant,
    pub(crate) installing: AtomicBool,
    /// The last term in which the lead was handed over: its lease is void for reads from then on.
    pub(crate) handed_over: AtomicU64,
    pub(crate) budget: Arc<Budget>,
    pub(crate) checkpointing: tokio::sync::Mutex<()>,
}

impl Replica {
    /// The vote of this replica, as far as it is durable.
    pub(crate) fn vote(&self) -> Vote {
        self.metrics.borrow_watched().vote
    }

    /// The last entry known to be committed.
    pub(crate) fn committed(&self) -> Option<LogId> {
        self.metrics.borrow_watched().local_committed
    }

    /// An AppendEntries of a leader with `vote` arrived.
    pub(crate) fn heard(&self, vote: &Vote) {
        if vote.leader_id.term >= self.metrics.borrow_watched().current_term {
            self.timer.heard();
        }
    }

    /// Looks at this replica's timers.
    pub(crate) fn tick(&self, tick: Tick) {
        let state = self.metrics.borrow_watched().state;
        match state {
            ServerState::Leader if tick.beat => {
                self.timer.heard();
                // Not ready: the core is so busy that it needs no heartbeat to show that it lives.
                let _ = poll_once::ready(self.raft.trigger().heartbeat());
            }
            ServerState::Follower | ServerState::Candidate => {
                if !tick.stood_still && self.timer.due(tick.now) {
                    let _ = poll_once::ready(self.raft.trigger().elect(true));
                }
            }
            _ => {}
        }
    }

    /// Connections from or to `process` ended: if it leads this group, votes are asked for when its lease ends.
    pub(crate) fn process_lost(&self, process: u32) {
        let metrics = self.metrics.borrow_watched();
        let Some(leader) = metrics.current_leader.filter(|id| *id != self.id.0) else { return };
        if metrics.membership_config.get_node(&leader).is_none_or(|node| node.process != process) {
            return;
        }
        // Each group starts at another of its remaining voters, so that not one process gets the lead of all.
        let mut voters: Vec<u64> = metrics.membership_config.voter_ids().filter(|id| *id != leader).collect();
        drop(metrics);
        voters.sort_unstable();
        let count = voters.len() as u64;
        if let Some(mine) = voters.iter().position(|id| *id == self.id.0) {
            let rank = (mine as u64 + count - self.group % count) % count;
            self.timer.suspect(u32::try_from(rank).unwrap_or(u32::MAX));
        }
    }

    fn leader(&self) -> LeaderHint {
        let metrics = self.metrics.borrow_watched();
        let node = metrics.current_leader.and_then(|id| metrics.membership_config.get_node(&id).copied());
        LeaderHint { process: node.map_or(0, |n| n.process), term: Term(metrics.current_term) }
    }

    fn refused(&self, forward: &ForwardToLeader<TypeConfig>) -> RaftError {
        match forward.reason {
            ForwardReason::LeaseExpired => RaftError::NoQuorum,
            ForwardReason::NotLeader | ForwardReason::LeadershipTransfer => {
                let process = forward.leader_node.map_or(0, |node| node.process);
                RaftError::NotLeader(LeaderHint { process, ..self.leader() })
            }
        }
    }

    fn proposed(&self, result: ClientWriteResult<TypeConfig>) -> Result<Proposed, RaftError> {
        match result {
            Ok(done) => Ok(Proposed { pos: crate::alias::pos_of(&done.log_id), reply: done.data.0 }),
            Err(ClientWriteError::ForwardToLeader(forward)) => Err(self.refused(&forward)),
            Err(ClientWriteError::LogEntryDiscarded(_)) => Err(RaftError::Unknown),
            // Answers to changes of the membership, not to commands.
            Err(ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_)) => {
                Err(RaftError::Unknown)
            }
        }
    }

    /// The read lease by what this replica published last: no message to the core, no other task.
    fn lease_read(&self) -> LeaseRead {
        let metrics = self.metrics.borrow_watched();
        if metrics.running_state.is_err() {
            return LeaseRead::Refused(RaftError::Stopped);
        }
        if metrics.state != ServerState::Leader {
            drop(metrics);
            return LeaseRead::Refused(RaftError::NotLeader(self.leader()));
        }
        let term = metrics.current_term;
        // Applied in this term: then everything that earlier leaders acknowledged is applied, and what this one
        // acknowledged was applied before that. So the state now is linearizable if nobody else can lead now.
        let caught_up = metrics.last_applied.is_some_and(|id| id.leader_id.term == term);
        let leased = metrics.last_quorum_acked.is_some_and(|at| openraft::Instant::elapsed(&*at) < self.tuning.read_lease());
        if caught_up && leased && self.handed_over.load(Ordering::Acquire) != term {
            LeaseRead::Granted(Term(term))
        } else {
            LeaseRead::Ask
        }
    }

    /// The same by way of the core: asks the others at once and waits two heartbeats for a majority, then until the
    /// entries are applied.
    async fn confirmed_read(&self) -> Result<Term, RaftError> {
        let lease = self.tuning.lease();
        let patience = self.tuning.heartbeat * 2;
        let option = openraft::LinearizerOption::new(Some(self.tuning.read_lease()), true).with_wait_timeout(patience);
        let linearizer = match self.raft.get_read_linearizer(option).await {
            Ok(linearizer) => linearizer,
            Err(openraft::errors::RaftError::Fatal(_)) => return Err(RaftError::Stopped),
            Err(openraft::errors::RaftError::APIError(refusal)) => {
                use openraft::errors::LinearizableReadError as Refusal;
                return Err(match refusal {
                    Refusal::ForwardToLeader(forward) => self.refused(&forward),
                    Refusal::QuorumNotEnough(_) => RaftError::NoQuorum,
                });
            }
        };
        let term = Term(linearizer.read_log_id().committed_leader_id().term);
        match linearizer.try_await_ready(&self.raft, Some(2 * lease)).await {
            Ok(Ok(_)) => Ok(term),
            Ok(Err(_)) => Err(RaftError::NoQuorum),
            Err(_) => Err(RaftError::Stopped),
        }
    }
}

enum LeaseRead {
    Granted(Term),
    Refused(RaftError),
    Ask,
}

/// What is proposed and not yet answered, bounded.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    requests: AtomicUsize,
    bytes: AtomicUsize,
}

impl Budget {
    fn take(self: &Arc<Self>, bytes: usize) -> Option<Spent> {
        let spent = Spent { budget: self.clone(), bytes };
        let requests = self.requests.fetch_add(1, Ordering::AcqRel) + 1;
        let bytes = self.bytes.fetch_add(bytes, Ordering::AcqRel) + bytes;
        (requests <= RAFT_PROPOSALS_MAX && bytes <= RAFT_PROPOSAL_BYTES_MAX).then_some(spent)
    }
}

/// A part of a [`Budget`]; given back when dropped.
struct Spent {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Drop for Spent {
    fn drop(&mut self) {
        self.budget.requests.fetch_sub(1, Ordering::AcqRel);
        self.budget.bytes.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// One replica of one group. Clones are the same replica.
#[derive(Clone)]
pub struct RaftGroup(pub(crate) Arc<Replica>);

impl std::fmt::Debug for RaftGroup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RaftGroup").field("group", &self.0.group).field("replica", &self.0.id).finish_non_exhaustive()
    }
}

impl RaftGroup {
    /// The group.
    #[must_use]
    pub fn group(&self) -> u64 {
        self.0.group
    }

    /// This replica.
    #[must_use]
    pub fn replica(&self) -> ReplicaId {
        self.0.id
    }

    /// Gives a new group its members. To be called on every replica with the same members; a replica that has members
    /// already is left alone.
    ///
    /// # Errors
    /// [`InitializeError`].
    pub async fn initialize(&self, members: Members) -> Result<(), InitializeError> {
        let nodes: BTreeMap<u64, PeerNode> =
            members.into_iter().map(|(replica, process)| (replica.0, PeerNode { process })).collect();
        match self.0.raft.initialize(nodes).await {
            Ok(()) | Err(openraft::errors::RaftError::APIError(NotInitialized::NotAllowed(_))) => Ok(()),
            Err(openraft::errors::RaftError::APIError(NotInitialized::NotInMembers(_))) => {
                Err(InitializeError::NotMember)
            }
            Err(openraft::errors::RaftError::Fatal(_)) => Err(InitializeError::Stopped),
        }
    }

    /// Proposes a command. It is queued at the call, in the order of calls, not when the future is first polled; the
    /// future ends when the command is applied here. Dropping it abandons the answer, not the command. With
    /// `expected_term` the command is proposed only if this replica leads in that term.
    ///
    /// # Errors
    /// [`RaftError`]. After `Unknown` the command may still be applied.
    pub fn propose(
        &self,
        command: Bytes,
        expected_term: Option<Term>,
    ) -> impl Future<Output = Result<Proposed, RaftError>> + Send + 'static + use<> {
        let queued = self.queue(command, expected_term);
        let replica = self.0.clone();
        async move {
            let (answer, _spent) = queued?;
            match answer.await {
                Ok(result) => replica.proposed(result),
                // The core ended with the command in its hands.
                Err(_) => Err(RaftError::Unknown),
            }
        }
    }

    fn queue(
        &self,
        command: Bytes,
        expected_term: Option<Term>,
    ) -> Result<(tokio::sync::oneshot::Receiver<ClientWriteResult<TypeConfig>>, Spent), RaftError> {
        if command.len() > RAFT_COMMAND_BYTES_MAX {
            return Err(RaftError::TooLong);
        }
        match self.0.wal.admit(command.len()).map_err(|e| e.kind()) {
            Ok(()) => {}
            Err(WalErrorKind::NoSpace) => return Err(RaftError::NoSpace),
            Err(_) => return Err(RaftError::Stopped),
        }
        let spent = self.0.budget.take(command.len()).ok_or(RaftError::Overloaded)?;
        let (responder, answer) = ProgressResponder::complete_only();
        let mut request = self.0.raft.write(Command(command)).responder(responder);
        if let Some(term) = expected_term {
            request = request.with_leader(term.0);
        }
        match poll_once::ready(request.into_future()) {
            Some(Ok(())) => Ok((answer, spent)),
            Some(Err(_)) => Err(RaftError::Stopped),
            // The core's queue is full, or the core has ended and its error is being waited for.
            None if self.is_stopped() => Err(RaftError::Stopped),
            None => Err(RaftError::Overloaded),
        }
    }

    fn is_stopped(&self) -> bool {
        self.0.metrics.borrow_watched().running_state.is_err()
            || self.0.state.borrow().status != GroupStatus::Running
    }

    /// Waits until the applied state is linearizable for a read that starts now, and returns the term of the lead.
    /// Under a lease, with everything applied, this is a few comparisons.
    ///
    /// # Errors
    /// [`RaftError`]: `NotLeader`, `NoQuorum`, `Stopped`.
    pub fn read_barrier(&self) -> impl Future<Output = Result<Term, RaftError>> + Send + 'static + use<> {
        let (decided, replica) = (self.0.lease_read(), self.0.clone());
        async move {
            match decided {
                LeaseRead::Granted(term) => Ok(term),
                LeaseRead::Refused(error) => Err(error),
                LeaseRead::Ask => Box::pin(async move { replica.confirmed_read().await }).await,
            }
        }
    }

    /// Who leads, as far as this replica knows.
    #[must_use]
    pub fn leader(&self) -> LeaderHint {
        self.0.leader()
    }

    /// Whether this replica leads, as far as it knows.
    #[must_use]
    pub fn is_leader(&self) -> bool {
        self.0.metrics.borrow_watched().state == ServerState::Leader
    }

    /// Index of the last entry applied here; 0 if none.
    #[must_use]
    pub fn applied_index(&self) -> u64 {
        self.0.metrics.borrow_watched().last_applied.map_or(0, |id| id.index)
    }

    /// Index up to which the log was purged; 0 if never.
    #[must_use]
    pub fn purged_index(&self) -> u64 {
        self.0.metrics.borrow_watched().purged.map_or(0, |id| id.index)
    }

    /// State changes: leader, term, status.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<GroupState> {
        self.0.state.clone()
    }

    /// Makes everything applied durable in the state machine and purges the log up to there, except for a tail
    /// ([`RaftTuning::tail_entries`], [`RaftTuning::tail_bytes`]). Apply waits while the state machine makes its
    /// checkpoint.
    ///
    /// # Errors
    /// `Stopped`, also when the state machine fails meanwhile.
    pub async fn checkpoint(&self) -> Result<(), RaftError> {
        let replica = &self.0;
        let _one_at_a_time = replica.checkpointing.lock().await;
        let mut ended = replica.machine.checkpoints();
        let before = *ended.borrow_and_update();
        replica.raft.trigger().snapshot().await.map_err(|_| RaftError::Stopped)?;
        let mut state = replica.state.clone();
        tokio::select! {
            _ = ended.wait_for(|n| *n > before) => {}
            _ = state.wait_for(|s| s.status != GroupStatus::Running) => return Err(RaftError::Stopped),
        }
        let (entries, bytes) = (replica.tuning.tail_entries, replica.tuning.tail_bytes);
        if let Some(upto) = replica.machine.purgeable(entries, bytes).await {
            // openraft clips this to the checkpoint it knows, which it may learn of a moment later: then the rest is
            // purged after the next checkpoint.
            replica.raft.trigger().purge_log(upto).await.map_err(|_| RaftError::Stopped)?;
        }
        Ok(())
    }

    /// Hands the lead over to `to`. Does nothing unless this replica leads. Reads and proposals are refused from here on
    /// in this term, whether or not the other replica gets the lead.
    pub async fn transfer_leader(&self, to: ReplicaId) {
        let term = {
            let metrics = self.0.metrics.borrow_watched();
            (metrics.state == ServerState::Leader).then_some(metrics.current_term)
        };
        if let Some(term) = term
            && to != self.0.id
        {
            // Before openraft lets go: the new leader is voted for in spite of the lease.
            self.0.handed_over.store(term, Ordering::Release);
            // An error means that the replica has stopped, which leads nowhere either.
            let _ = self.0.raft.trigger().transfer_leader(to.0).await;
        }
    }

    /// Asks for votes now, if no leader's lease runs.
    pub async fn elect(&self) {
        // An error means that the replica has stopped.
        let _ = self.0.raft.trigger().elect(true).await;
    }

    /// Voters, by replica and process.
    #[must_use]
    pub fn members(&self) -> Members {
        let metrics = self.0.metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let process = |id: &u64| membership.get_node(id).map_or(0, |node| node.process);
        membership.voter_ids().map(|id| (ReplicaId(id), process(&id))).collect()
    }

    /// Replicas that receive the log but have no vote.
    #[must_use]
    pub fn learners(&self) -> Members {
        let metrics = self.0.metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let process = |id: &u64| membership.get_node(id).map_or(0, |node| node.process);
        membership.learner_ids().map(|id| (ReplicaId(id), process(&id))).collect()
    }

    /// Adds a replica without a vote; it starts to catch up. Returns when the change is committed.
    ///
    /// # Errors
    /// [`MembershipError`].
    pub async fn add_learner(&self, replica: ReplicaId, process: u32) -> Result<(), MembershipError> {
        let result = self.0.raft.add_learner(replica.0, PeerNode { process }, false).await;
        self.changed(result.map(|_| ()))
    }

    /// Makes exactly `voters` the voters, all of them members already; others leave the group. Returns when the change
    /// is committed.
    ///
    /// # Errors
    /// [`MembershipError`].
    pub async fn change_voters(&self, voters: BTreeSet<ReplicaId>) -> Result<(), MembershipError> {
        let ids: BTreeSet<u64> = voters.into_iter().map(|r| r.0).collect();
        let result = self.0.raft.change_membership(ChangeMembers::ReplaceAllVoters(ids), false).await;
        self.changed(result.map(|_| ()))
    }

    fn changed(
        &self,
        result: Result<(), openraft::errors::RaftError<TypeConfig, ClientWriteError<TypeConfig>>>,
    ) -> Result<(), MembershipError> {
        use openraft::errors::RaftError as E;
        match result {
            Ok(()) => Ok(()),
            Err(E::Fatal(_)) => Err(MembershipError::Stopped),
            Err(E::APIError(ClientWriteError::ForwardToLeader(_))) => Err(MembershipError::NotLeader(self.leader())),
            Err(E::APIError(ClientWriteError::LogEntryDiscarded(_))) => Err(MembershipError::Unknown),
            Err(E::APIError(ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_))) => {
                Err(MembershipError::Refused)
            }
        }
    }

    /// Stops the replica. Its log and state machine stay as they are; [`crate::RaftProcess::close_group`] also forgets it.
    pub async fn shutdown(&self) {
        // An error means that its task panicked; it has ended either way.
        let _ = self.0.raft.shutdown().await;
    }
}
