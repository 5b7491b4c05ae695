//! Turns what the SDK says into what the command says: the kind (and so the exit code) and a sentence that names the
//! object and what to do. Pure; one table for refusals of the MDS and one for failed IO.

use crate::error::{CliError, ErrorKind};
use ogee_client::{IoError, IoErrorKind, MdsCallError};
use ogee_proto::MdsErrorKind;

/// A call to the MDS that failed. `doing` is what was being done, with the object's name: `create volume golden`.
#[must_use]
pub(crate) fn call_failed(doing: &str, error: &MdsCallError) -> CliError {
    let (kind, hint) = advice(error.kind);
    let unknown = if error.outcome_unknown { "; it may have been carried out all the same" } else { "" };
    let text = format!("{doing}: {}{unknown}{hint}", error.message);
    CliError::new(kind, text).with_reason(error.kind.as_str())
}

/// The exit code's kind, and what a person can do where the MDS cannot know it.
const fn advice(kind: MdsErrorKind) -> (ErrorKind, &'static str) {
    match kind {
        MdsErrorKind::NotFound => (ErrorKind::NotFound, ""),
        MdsErrorKind::AlreadyExists
        | MdsErrorKind::Attached
        | MdsErrorKind::InUse
        | MdsErrorKind::WrongOwner
        | MdsErrorKind::Fenced => (ErrorKind::Conflict, ""),
        MdsErrorKind::InvalidArgument => (ErrorKind::Usage, ""),
        MdsErrorKind::NoSpace | MdsErrorKind::Limit => (ErrorKind::NoSpace, ""),
        MdsErrorKind::NotLeader | MdsErrorKind::Unavailable => {
            (ErrorKind::Unavailable, " (is the cluster running? see: ogee dev status)")
        }
        MdsErrorKind::WrongCluster => (ErrorKind::Failure, ""),
    }
}

/// A failed IO on a volume.
#[must_use]
pub(crate) fn io_failed(error: IoError) -> CliError {
    let (kind, hint) = match error.kind {
        IoErrorKind::NoSpace => (ErrorKind::NoSpace, "the cluster has no space for new data"),
        IoErrorKind::Fenced => (ErrorKind::Conflict, "another client took the volume"),
        IoErrorKind::ReadOnly => (ErrorKind::Conflict, "the volume is attached read-only"),
        IoErrorKind::TimedOut => (ErrorKind::Unavailable, "too few replicas answer (see: ogee cluster copysets)"),
        IoErrorKind::Corrupt => (ErrorKind::Failure, "data failed its checksum on every replica"),
        IoErrorKind::Closed => (ErrorKind::Failure, "the volume was detached meanwhile"),
        IoErrorKind::InvalidInput => (ErrorKind::Failure, "the request does not fit the volume"),
    };
    CliError::caused(kind, hint, error)
}
