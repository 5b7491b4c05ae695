//! One replica of one group: proposals, reads, checkpoints, administration.
//!
//! [`RaftGroup`] is what the owner holds. Invariants: proposals enter the log in the order of the calls of
//! [`RaftGroup::propose`]; an error other than `Unknown` and `Stopped` says that nothing was proposed.

use crate::api::{LeaderHint, Members, Proposed, RaftError};
use crate::budget::Spent;
use crate::poll_once;
use crate::replica::{LeaseRead, Replica};
use crate::snapshot::ReplicaSource;
use crate::state::{GroupState, GroupStatus, InitializeError, MembershipError};
use crate::types::{Command, PeerNode, TypeConfig};
use crate::wal::WalErrorKind;
use bytes::Bytes;
use ogee_common::clock;
use ogee_common::id::{ReplicaId, Term};
use ogee_common::limits::RAFT_COMMAND_BYTES_MAX;
use openraft::async_runtime::WatchReceiver as _;
use openraft::errors::{ClientWriteError, InitializeError as NotInitialized};
use openraft::impls::ProgressResponder;
use openraft::raft::ClientWriteResult;
use openraft::{ChangeMembers, ServerState};
use std::collections::{BTreeMap, BTreeSet};
use std::future::{Future, IntoFuture};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokio::sync::watch;

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
    /// `expected_term` the command is proposed only if this replica leads in that term. While a majority cannot be
    /// reached, what was queued before that stays open: the caller has its own timeout.
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
        self.0.metrics.borrow_watched().running_state.is_err() || self.0.state.borrow().status != GroupStatus::Running
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

    /// Whether this replica has applied everything that any earlier process of it can have applied: by a read barrier if
    /// it leads, by its leader's heartbeats if it follows. False is no statement: ask again later.
    pub async fn has_caught_up(&self) -> bool {
        if self.is_leader() {
            return self.read_barrier().await.is_ok();
        }
        let metrics = self.0.metrics.borrow_watched();
        let term = metrics.current_term;
        self.0.beats.is_enough(term)
            && metrics.local_committed.is_some_and(|c| c.leader_id.term == term)
            && metrics.last_applied >= metrics.local_committed
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
        self.0.state.subscribe()
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
        let mut state = replica.state.subscribe();
        tokio::select! {
            _ = ended.wait_for(|n| *n > before) => {}
            _ = state.wait_for(|s| s.status != GroupStatus::Running) => return Err(RaftError::Stopped),
        }
        self.trim(replica.tuning.tail_entries, replica.tuning.tail_bytes).await
    }

    /// Purges the log up to the last checkpoint, except for a tail of at most so many entries and so many bytes of
    /// commands. A follower that lags behind what is left needs a snapshot.
    ///
    /// # Errors
    /// `Stopped`.
    pub async fn trim(&self, entries: u64, bytes: u64) -> Result<(), RaftError> {
        let replica = &self.0;
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

    /// Asks for votes now, if no leader's lease runs. Does nothing within a lease of a restart, while a leader may still
    /// rely on what this replica promised before it.
    pub async fn elect(&self) {
        if clock::now() < self.0.votes_from {
            return;
        }
        let Some(_doubt) = self.0.promise.ballot(clock::now(), self.0.tuning.lease()) else { return };
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

    /// The other voters, to be asked for parts of their state.
    #[must_use]
    pub fn others(&self) -> Vec<ReplicaSource> {
        let others = self.members().into_iter().filter(|(replica, _)| *replica != self.0.id);
        others.map(|(replica, process)| ReplicaSource::new(&self.0, replica, process)).collect()
    }

    /// Replicas that receive the log but have no vote.
    #[must_use]
    pub fn learners(&self) -> Members {
        let metrics = self.0.metrics.borrow_watched();
        let membership = metrics.membership_config.membership();
        let process = |id: &u64| membership.get_node(id).map_or(0, |node| node.process);
        membership.learner_ids().map(|id| (ReplicaId(id), process(&id))).collect()
    }

    /// Voters and learners, by replica and process, once they are committed and as long as no change is under way.
    #[must_use]
    pub fn settled_members(&self) -> Option<(Members, Members)> {
        let (changed, uniform, applied) = {
            let metrics = self.0.metrics.borrow_watched();
            let config = &metrics.membership_config;
            (*config.log_id(), config.membership().get_joint_config().len() == 1, metrics.last_applied)
        };
        (uniform && changed.is_some() && changed <= applied).then(|| (self.members(), self.learners()))
    }

    /// Entries that another replica lacks, as this leader knows; `None` if it knows nothing of it.
    #[must_use]
    pub fn behind(&self, replica: ReplicaId) -> Option<u64> {
        let metrics = self.0.metrics.borrow_watched();
        let matching = metrics.replication.as_ref()?.get(&replica.0).copied().flatten()?;
        Some(metrics.last_log_index.unwrap_or(0).saturating_sub(matching.index))
    }

    /// Takes a replica out that has no vote. Returns when the change is committed.
    ///
    /// # Errors
    /// [`MembershipError`].
    pub async fn remove_learner(&self, replica: ReplicaId) -> Result<(), MembershipError> {
        let gone = ChangeMembers::RemoveNodes(BTreeSet::from([replica.0]));
        let result = self.0.raft.change_membership(gone, false).await;
        self.changed(result.err())
    }

    /// Adds a replica without a vote; it starts to catch up. Returns when the change is committed.
    ///
    /// # Errors
    /// [`MembershipError`].
    pub async fn add_learner(&self, replica: ReplicaId, process: u32) -> Result<(), MembershipError> {
        let result = self.0.raft.add_learner(replica.0, PeerNode { process }, false).await;
        self.changed(result.err())
    }

    /// Makes exactly `voters` the voters, all of them members already; others leave the group. Returns when the change
    /// is committed. A leader that is not among `voters` removes nobody: it hands the lead over to one of them that
    /// votes already and answers `NotLeader`, and the new leader is to be asked. So nobody leads a group that it has left.
    ///
    /// # Errors
    /// [`MembershipError`].
    pub async fn change_voters(&self, voters: BTreeSet<ReplicaId>) -> Result<(), MembershipError> {
        if !voters.contains(&self.0.id) {
            self.hand_over(&voters).await?;
        }
        let ids: BTreeSet<u64> = voters.into_iter().map(|r| r.0).collect();
        let result = self.0.raft.change_membership(ChangeMembers::ReplaceAllVoters(ids), false).await;
        self.changed(result.err())
    }

    /// Leaves the lead to the one of `voters` that has most of the log. `Ok` if this replica does not lead anyway.
    async fn hand_over(&self, voters: &BTreeSet<ReplicaId>) -> Result<(), MembershipError> {
        let (term, heir) = {
            let metrics = self.0.metrics.borrow_watched();
            if metrics.state != ServerState::Leader {
                return Ok(());
            }
            let matching = |id: &u64| metrics.replication.as_ref().and_then(|all| all.get(id).copied().flatten());
            let configs = metrics.membership_config.get_joint_config();
            let eligible = voters.iter().map(|id| id.0).filter(|id| configs.iter().all(|c| c.contains(id)));
            (metrics.current_term, eligible.max_by_key(matching))
        };
        let heir = heir.ok_or(MembershipError::Refused)?;
        let mut state = self.0.state.subscribe();
        self.transfer_leader(ReplicaId(heir)).await;
        let over = state.wait_for(|s| !s.is_leader || s.leader.term.0 > term || s.status != GroupStatus::Running);
        // A refused heir gets no second chance here: its group falls silent and elects somebody when the lease ends.
        let _ = tokio::time::timeout(self.0.tuning.lease() * 2, over).await;
        Err(MembershipError::NotLeader(self.leader()))
    }

    fn changed(
        &self,
        error: Option<openraft::errors::RaftError<TypeConfig, ClientWriteError<TypeConfig>>>,
    ) -> Result<(), MembershipError> {
        use openraft::errors::RaftError as E;
        Err(match error {
            None => return Ok(()),
            Some(E::Fatal(_)) => MembershipError::Stopped,
            Some(E::APIError(refusal)) => match refusal {
                ClientWriteError::ForwardToLeader(_) => MembershipError::NotLeader(self.leader()),
                ClientWriteError::LogEntryDiscarded(_) => MembershipError::Unknown,
                ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_) => {
                    MembershipError::Refused
                }
            },
        })
    }

    /// Stops the replica. Its log and state machine stay as they are; [`crate::RaftProcess::close_group`] also forgets it.
    pub async fn shutdown(&self) {
        // An error means that its task panicked; it has ended either way.
        let _ = self.0.raft.shutdown().await;
    }
}
