//! Everything of one replica, as the other modules of this crate see it: its timers, its lease, its answers.
//!
//! Invariants: a read is granted only in a term whose first entry is applied here, within the lease, and not after the
//! lead was handed over or a vote for another may have been given; what is answered for a proposal says "nothing was proposed" only when openraft says so.

use crate::alias::{LogId, Vote};
use crate::api::{FetchHandler, LeaderHint, Proposed, RaftError};
use crate::beat_count::BeatCount;
use crate::budget::Budget;
use crate::codec::Beat;
use crate::lease::LeaseClock;
use crate::links::Links;
use crate::machine::{Machine, MachineAdapter};
use crate::poll_once;
use crate::promise::{Arrival, Promise};
use crate::state::{GroupState, GroupStatus};
use crate::ticker::{ElectionTimer, Tick};
use crate::tuning::RaftTuning;
use crate::types::TypeConfig;
use crate::wal::Wal;
use ogee_common::clock::{self, Instant};
use ogee_common::id::{ReplicaId, Term};
use ogee_common::sim::{self, Canary};
use openraft::async_runtime::{Instant as _, WatchReceiver as _};
use openraft::errors::{ClientWriteError, ForwardReason, ForwardToLeader};
use openraft::raft::ClientWriteResult;
use openraft::type_config::alias::WatchReceiverOf;
use openraft::{Raft, RaftMetrics, ServerState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
    pub(crate) state: watch::Sender<GroupState>,
    pub(crate) timer: Arc<ElectionTimer>,
    pub(crate) lease: Arc<LeaseClock>,
    pub(crate) promise: Arc<Promise>,
    /// Beats accepted in the present term.
    pub(crate) beats: BeatCount,
    /// The committed index at the beat before.
    pub(crate) told: AtomicU64,
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
        let metrics = self.metrics.borrow_watched();
        metrics.local_committed
    }

    /// An AppendEntries of a leader with `vote` arrived. To be called before the core gets it.
    pub(crate) fn heard(&self, vote: &Vote) -> Arrival {
        if vote.leader_id.term >= self.metrics.borrow_watched().current_term {
            self.timer.heard();
        }
        self.promise.arrival()
    }

    /// Whether a leader's line in a common heartbeat is accepted: then it is promised a lease from `now` on.
    pub(crate) fn beaten(&self, beat: &Beat, now: Instant) -> bool {
        if beat.target != self.id.0 || self.state.borrow().status != GroupStatus::Running {
            return false;
        }
        let metrics = self.metrics.borrow_watched();
        let follows = metrics.running_state.is_ok()
            && matches!(metrics.state, ServerState::Follower | ServerState::Learner)
            && metrics.current_term == beat.term
            && metrics.local_committed.map_or(0, |id| id.index) >= beat.committed;
        let accepted = follows && self.promise.renew(beat.term, now);
        if accepted {
            self.timer.heard();
            self.beats.heard(beat.term);
        }
        accepted
    }

    /// What this replica has to say to the other members by the common heartbeat.
    pub(crate) fn beats(&self, mut say: impl FnMut(u32, Beat)) {
        let metrics = self.metrics.borrow_watched();
        let term = metrics.current_term;
        let leads = metrics.state == ServerState::Leader
            && metrics.running_state.is_ok()
            && self.state.borrow().status == GroupStatus::Running
            && self.handed_over.load(Ordering::Acquire) != term;
        // A core that stands still, or has lost its majority, is left to its followers' timers.
        let alive = metrics.last_quorum_acked.is_some_and(|at| at.into_inner().elapsed() < self.tuning.lease());
        if !leads || !alive {
            return;
        }
        // What was committed a beat ago: followers learn of commits a little later and shall not have to refuse.
        let committed = self.told.swap(metrics.cluster_committed.map_or(0, |id| id.index), Ordering::AcqRel);
        for (id, node) in metrics.membership_config.nodes().filter(|(id, _)| **id != self.id.0) {
            say(node.process, Beat { group: self.group, target: *id, term, committed });
        }
    }

    /// Whether this replica leads and a majority has promised not to vote for another one at `now`.
    pub(crate) fn leads_surely(&self, now: Instant) -> bool {
        let metrics = self.metrics.borrow_watched();
        let (term, configs) = (metrics.current_term, metrics.membership_config.get_joint_config());
        metrics.state == ServerState::Leader
            && self.handed_over.load(Ordering::Acquire) != term
            && self.lease.held(term, self.id.0, configs, now).is_some_and(|at| now < at + self.tuning.lease())
    }

    /// Whether the core of this leader should hear that it still leads: three times before its lease ends.
    fn wants_heartbeat(&self) -> bool {
        let acked = self.metrics.borrow_watched().last_quorum_acked;
        acked.is_none_or(|at| at.into_inner().elapsed() >= self.tuning.heartbeat * 3 / 2)
    }

    /// Looks at this replica's timers.
    pub(crate) fn tick(&self, tick: Tick) {
        let state = self.metrics.borrow_watched().state;
        match state {
            ServerState::Leader if tick.beat => {
                self.timer.heard();
                if self.wants_heartbeat() {
                    // Not ready: the core is so busy that it needs no heartbeat to show that it lives.
                    let _ = poll_once::ready(self.raft.trigger().heartbeat());
                }
            }
            ServerState::Follower | ServerState::Candidate if !tick.stood_still && self.timer.due(tick.now) => {
                // The doubt ends when the core has it in its queue.
                if let Some(_doubt) = self.promise.ballot(tick.now, self.tuning.lease()) {
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

    pub(crate) fn leader(&self) -> LeaderHint {
        let metrics = self.metrics.borrow_watched();
        let node = metrics.current_leader.and_then(|id| metrics.membership_config.get_node(&id).copied());
        LeaderHint { process: node.map_or(0, |n| n.process), term: Term(metrics.current_term) }
    }

    pub(crate) fn refused(&self, forward: &ForwardToLeader<TypeConfig>) -> RaftError {
        match forward.reason {
            ForwardReason::LeaseExpired => RaftError::NoQuorum,
            ForwardReason::NotLeader | ForwardReason::LeadershipTransfer => {
                let process = forward.leader_node.map_or(0, |node| node.process);
                RaftError::NotLeader(LeaderHint { process, ..self.leader() })
            }
        }
    }

    pub(crate) fn proposed(&self, result: ClientWriteResult<TypeConfig>) -> Result<Proposed, RaftError> {
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

    /// The read lease by what this replica published last: no message to the core, no other task. What was published may
    /// be old; then the lease, which is of this moment, says that nobody else can lead yet all the same.
    pub(crate) fn lease_read(&self) -> LeaseRead {
        let metrics = self.metrics.borrow_watched();
        if metrics.running_state.is_err() || self.state.borrow().status != GroupStatus::Running {
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
        let (configs, now) = (metrics.membership_config.get_joint_config(), clock::now());
        let since = self.lease.held(term, self.id.0, configs, now);
        let leased = since.is_some_and(|at| now < at + self.tuning.read_lease());
        let undisputed = self.promise.may_lead(term) && self.handed_over.load(Ordering::Acquire) != term;
        if caught_up && undisputed && (leased || sim::planted(Canary::IgnoreLease)) {
            LeaseRead::Granted(Term(term))
        } else {
            LeaseRead::Ask
        }
    }

    /// The same by way of the core: asks the others at once and waits two heartbeats for a majority, then until the
    /// entries are applied.
    pub(crate) async fn confirmed_read(&self) -> Result<Term, RaftError> {
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
        let mut published = self.metrics.clone();
        match linearizer.try_await_ready(&self.raft, Some(2 * lease)).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return Err(RaftError::NoQuorum),
            Err(_) => return Err(RaftError::Stopped),
        }
        // The last word is with the stricter clock, which the same answers have moved; what is applied may be published
        // a moment later.
        let deadline = clock::now() + patience;
        loop {
            match self.lease_read() {
                LeaseRead::Granted(term) => return Ok(term),
                LeaseRead::Refused(error) => return Err(error),
                LeaseRead::Ask => {}
            }
            match tokio::time::timeout_at(deadline, published.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return Err(RaftError::Stopped),
                Err(_) => return Err(RaftError::NoQuorum),
            }
        }
    }
}

/// What the lease says of a read.
pub(crate) enum LeaseRead {
    /// Go on, in this term.
    Granted(Term),
    /// Not here, not now.
    Refused(RaftError),
    /// The core must find out.
    Ask,
}
