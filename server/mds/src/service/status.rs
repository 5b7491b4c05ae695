//! [`CallError`]: why a call failed, and the one place where [`MdsErrorKind`] meets gRPC status codes.
//!
//! | kind | code | | kind | code |
//! | --- | --- | --- | --- | --- |
//! | not-found | NOT_FOUND | | wrong-owner | PERMISSION_DENIED |
//! | already-exists | ALREADY_EXISTS | | no-space | RESOURCE_EXHAUSTED |
//! | invalid-argument | INVALID_ARGUMENT | | limit | OUT_OF_RANGE |
//! | attached | FAILED_PRECONDITION | | not-leader | FAILED_PRECONDITION |
//! | fenced | ABORTED | | wrong-cluster | UNAUTHENTICATED |
//! | in-use | FAILED_PRECONDITION | | unavailable | UNAVAILABLE |
//!
//! Invariants: every refusal carries its kind in the metadata [`ERROR_METADATA`], which is what programs read; a
//! non-leader also names the leader's address, empty when unknown. The message is the chain of causes, for people.

use crate::machine::Halt;
use crate::machine::command::DecodeError;
use crate::machine::tx::RowError;
use crate::placement::PlacementError;
use crate::refusal::{Refusal, USERS_SHOWN_MAX};
use ogee_common::id::ChunkserverId;
use ogee_common::name::NameError;
use ogee_proto::data::PASTE_SINCE;
use ogee_proto::{ERROR_METADATA, LEADER_METADATA, MdsErrorKind};
use ogee_raft::RaftError;
use std::error::Error;
use std::time::Duration;
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Code, Status};

/// A call that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The state machine refused.
    #[error(transparent)]
    Refused(Box<Refusal>),
    /// A name is malformed.
    #[error("bad {what}")]
    Name {
        what: &'static str,
        #[source]
        source: NameError,
    },
    /// A field is malformed.
    #[error("bad {what}: {wanted}")]
    Argument { what: &'static str, wanted: &'static str },
    /// A volume occurs twice in a group.
    #[error("volume {path:?} is named twice")]
    Twice { path: String },
    /// More was asked for than one call gives.
    #[error("at most {max} {what} in one call")]
    TooMany { what: &'static str, max: usize },
    /// No plan of copysets exists.
    #[error("plan copysets")]
    Placement(#[source] PlacementError),
    /// Every copyset's fullest disk has no room.
    #[error("no copyset has room for another segment")]
    NoRoom,
    /// No copyset has a majority of its chunkservers up.
    #[error("no copyset is reachable now")]
    NoCopyset,
    /// This node does not lead.
    #[error("this MDS node does not lead")]
    NotLeader { leader: String },
    /// The log did not take or finish the command.
    #[error("replicate the command")]
    Raft(#[source] RaftError),
    /// It took too long; it may still happen.
    #[error("{what} took longer than {limit:?}; it may still happen")]
    TimedOut { what: &'static str, limit: Duration },
    /// Two or more clients of a group do not hold their writes: no cut through their volumes is exact.
    #[error(
        "the clients of {} do not answer; a group can go round one such client only: stop or restart the others, or \
         leave their volumes out", list(volumes)
    )]
    Unreachable { volumes: Vec<String> },
    /// Clients of a group let go of their holds before the cut was made.
    #[error("a client came back or went away while it held its writes; try again")]
    HoldBroken,
    /// Chunkservers of an older build, which would skip what such a volume has written.
    #[error("a volume on a backup needs version {PASTE_SINCE} of the data protocol, which {} of its pool do not speak: upgrade all chunkservers first", ids(chunkservers))]
    OldChunkservers { chunkservers: Vec<ChunkserverId> },
    /// Chunkservers that have not said what they speak since this lead began.
    #[error(
        "it is not known whether {} of its pool are of a build that can hold a volume on a backup: they were not heard of; start them, or wait until \
         their replicas were rebuilt elsewhere", ids(chunkservers)
    )]
    Unheard { chunkservers: Vec<ChunkserverId> },
    /// A hold that is acknowledged is not under way.
    #[error("this hold is not under way")]
    NoSuchHold,
    /// An attach was to be resumed that is over.
    #[error("this client does not have the volume attached any more")]
    NotHeld,
    /// The rows of this node cannot be read.
    #[error("read metadata")]
    Rows(#[source] Box<RowError>),
    /// The answer of the state machine cannot be read, which a mixed version can cause.
    #[error("read the answer of the log")]
    Answer(#[from] DecodeError),
    /// A task of this process ended early: it is shutting down.
    #[error("the MDS is shutting down")]
    Ending,
}

impl From<Refusal> for CallError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(Box::new(refusal))
    }
}

impl From<Halt> for CallError {
    fn from(halt: Halt) -> Self {
        match halt {
            Halt::Refused(refusal) => Self::Refused(refusal),
            Halt::Rows(error) => error.into(),
        }
    }
}

impl From<RowError> for CallError {
    fn from(error: RowError) -> Self {
        tracing::error!(target: "controlpath", error = &error as &dyn Error, "metadata rows cannot be read");
        Self::Rows(Box::new(error))
    }
}

impl CallError {
    /// What a program can act on.
    pub(crate) fn kind(&self) -> MdsErrorKind {
        match self {
            Self::Refused(refusal) => refusal.kind(),
            Self::Name { .. } | Self::Argument { .. } | Self::Twice { .. } | Self::OldChunkservers { .. } => MdsErrorKind::InvalidArgument,
            Self::Placement(PlacementError::Replicas(_)) => MdsErrorKind::InvalidArgument,
            Self::TooMany { .. } | Self::Placement(PlacementError::TooManyCopysets { .. }) => MdsErrorKind::Limit,
            Self::Placement(PlacementError::TooFewZones { .. }) | Self::NoRoom => MdsErrorKind::NoSpace,
            Self::NotLeader { .. } => MdsErrorKind::NotLeader,
            Self::NoSuchHold => MdsErrorKind::NotFound,
            Self::NotHeld => MdsErrorKind::Fenced,
            Self::Unreachable { .. } => MdsErrorKind::InUse,
            Self::NoCopyset
            | Self::Unheard { .. }
            | Self::HoldBroken
            | Self::Raft(_)
            | Self::TimedOut { .. }
            | Self::Rows(_)
            | Self::Answer(_)
            | Self::Ending => MdsErrorKind::Unavailable,
        }
    }

    /// Whether the state machine refused with this kind.
    pub(crate) fn is_refusal(&self, test: impl FnOnce(&Refusal) -> bool) -> bool {
        matches!(self, Self::Refused(refusal) if test(refusal))
    }
}

/// The status code of a kind.
const fn code(kind: MdsErrorKind) -> Code {
    match kind {
        MdsErrorKind::NotFound => Code::NotFound,
        MdsErrorKind::AlreadyExists => Code::AlreadyExists,
        MdsErrorKind::InvalidArgument => Code::InvalidArgument,
        MdsErrorKind::Attached | MdsErrorKind::InUse | MdsErrorKind::NotLeader => Code::FailedPrecondition,
        MdsErrorKind::Fenced => Code::Aborted,
        MdsErrorKind::WrongOwner => Code::PermissionDenied,
        MdsErrorKind::NoSpace => Code::ResourceExhausted,
        MdsErrorKind::Limit => Code::OutOfRange,
        MdsErrorKind::WrongCluster => Code::Unauthenticated,
        MdsErrorKind::Unavailable => Code::Unavailable,
    }
}

fn list(paths: &[String]) -> String {
    let shown: Vec<String> = paths.iter().take(USERS_SHOWN_MAX).map(|p| format!("{p:?}")).collect();
    let dots = if shown.len() < paths.len() { ", ..." } else { "" };
    format!("{}{dots}", shown.join(", "))
}

fn ids(chunkservers: &[ChunkserverId]) -> String {
    let shown: Vec<String> = chunkservers.iter().take(USERS_SHOWN_MAX).map(ToString::to_string).collect();
    let dots = if shown.len() < chunkservers.len() { ", ..." } else { "" };
    format!("{}{dots}", shown.join(", "))
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text.push_str(": ");
        text.push_str(&e.to_string());
        cause = e.source();
    }
    text
}

impl From<CallError> for Status {
    fn from(error: CallError) -> Self {
        let kind = error.kind();
        let mut metadata = MetadataMap::new();
        metadata.insert(ERROR_METADATA, MetadataValue::from_static(kind.as_str()));
        if let CallError::NotLeader { leader } = &error {
            let addr = MetadataValue::try_from(leader.as_str());
            metadata.insert(LEADER_METADATA, addr.unwrap_or(MetadataValue::from_static("")));
        }
        Self::with_metadata(code(kind), chain(&error), metadata)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_says_kind_leader_and_causes() {
        let status = Status::from(CallError::NotLeader { leader: "10.0.0.1:7".into() });
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(status.metadata().get(LEADER_METADATA).and_then(|v| v.to_str().ok()), Some("10.0.0.1:7"));
        assert_eq!(status.metadata().get(ERROR_METADATA).and_then(|v| v.to_str().ok()), Some("not-leader"));
        let status = Status::from(CallError::Name { what: "path", source: NameError::Dots });
        assert_eq!(status.message(), "bad path: '.' and '..' are not names");
        assert_eq!(status.metadata().get(LEADER_METADATA), None);
        let refusal = Refusal::NoPool;
        assert_eq!(Status::from(CallError::from(refusal)).code(), Code::NotFound);
    }

    #[test]
    fn the_outcome_of_what_may_still_happen_is_called_unavailable() {
        for error in [
            CallError::Raft(RaftError::Unknown),
            CallError::Raft(RaftError::NoQuorum),
            CallError::TimedOut { what: "x", limit: Duration::from_secs(1) },
            CallError::Ending,
        ] {
            assert_eq!(error.kind(), MdsErrorKind::Unavailable, "{error}");
        }
    }
}
