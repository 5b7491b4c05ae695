//! What the outside may know of a replica, and the errors of its administration.

use crate::api::LeaderHint;
use crate::types::TypeConfig;
use crate::wal::WalError;
use ogee_common::id::Term;
use openraft::ServerState;
use openraft::errors::Fatal;
use openraft::metrics::RaftServerMetrics;

/// Why a replica failed. The chain of sources says what went wrong.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the replica failed")]
pub struct GroupFailure(#[source] pub(crate) Cause);

impl PartialEq for GroupFailure {
    /// Two failures are the same if people would read the same.
    fn eq(&self, other: &Self) -> bool {
        self.0.to_string() == other.0.to_string()
    }
}

impl Eq for GroupFailure {}

/// What went wrong.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Cause {
    /// openraft ended: the state machine failed, or the log under this group, or there is a bug.
    #[error(transparent)]
    Raft(Fatal<TypeConfig>),
    /// The log of the whole process failed, maybe under another group.
    #[error(transparent)]
    Log(WalError),
}

/// Whether a replica runs.
///
/// ```text
/// Running --shutdown--> Shutdown
///    +------failure---> Failed
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupStatus {
    /// It takes part.
    Running,
    /// It was told to stop.
    Shutdown,
    /// Its log or its state machine failed. It stays out until the process starts again.
    Failed(GroupFailure),
}

impl GroupStatus {
    pub(crate) fn of(fatal: Fatal<TypeConfig>) -> Self {
        match fatal {
            Fatal::Stopped => Self::Shutdown,
            other => Self::Failed(GroupFailure(Cause::Raft(other))),
        }
    }
}

/// What is known of a replica. Changes with leader, term, membership and status, not with each entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupState {
    /// Who leads, as far as this replica knows.
    pub leader: LeaderHint,
    /// Whether this replica leads. It may not serve reads yet: ask [`crate::RaftGroup::read_barrier`].
    pub is_leader: bool,
    /// Whether it runs.
    pub status: GroupStatus,
}

impl GroupState {
    pub(crate) fn starting() -> Self {
        Self { leader: LeaderHint::default(), is_leader: false, status: GroupStatus::Running }
    }

    pub(crate) fn of(metrics: &RaftServerMetrics<TypeConfig>) -> Self {
        let process = metrics
            .current_leader
            .and_then(|id| metrics.membership_config.get_node(&id))
            .map_or(0, |node| node.process);
        let term = Term(metrics.vote.leader_id.term);
        let is_leader = metrics.state == ServerState::Leader;
        Self { leader: LeaderHint { process, term }, is_leader, status: GroupStatus::Running }
    }

    /// Sets the final status, unless there is one.
    pub(crate) fn stop(&mut self, status: GroupStatus) -> bool {
        if self.status != GroupStatus::Running {
            return false;
        }
        (self.is_leader, self.leader.process, self.status) = (false, 0, status);
        true
    }
}

/// Why a group was not initialized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InitializeError {
    /// This replica is not among the members.
    #[error("the replica is not among the members of its group")]
    NotMember,
    /// The replica has stopped.
    #[error("the replica has stopped")]
    Stopped,
}

/// Why the membership was not changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MembershipError {
    /// This replica does not lead.
    #[error("not the leader (leader hint: process {}, {})", .0.process, .0.term)]
    NotLeader(LeaderHint),
    /// Another change is under way, or the change is not possible from the present membership.
    #[error("the membership cannot be changed so now")]
    Refused,
    /// Leadership was lost meanwhile; the change may or may not come about.
    #[error("outcome unknown: leadership was lost")]
    Unknown,
    /// The replica has stopped.
    #[error("the replica has stopped")]
    Stopped,
}
