//! Turns what the SDK says into what the command says: the kind (and so the exit code) and a sentence that names the
//! object and what to do. Pure; one table for refusals of the MDS and one for failed IO.

use crate::error::{CliError, ErrorKind};
use ogee_client::{IoError, IoErrorKind, MdsCallError};
use ogee_proto::MdsErrorKind;

/// A call to the MDS that failed. `doing` is what was being done, with the object's name: `create volume golden`.
#[must_use]
pub(crate) fn call_failed(doing: &str, error: &MdsCallError) -> CliError {
    let (kind, hint) = advice(error.kind);
    let unknown = error.outcome_unknown && !only_asks(error.rpc);
    let unknown = if unknown { "; it may have been carried out all the same" } else { "" };
    let text = format!("{doing}: {}{unknown}{hint}", error.message);
    CliError::new(kind, text).with_reason(error.kind.as_str())
}

/// Whether a call changes nothing, so that nobody cares whether it was carried out.
fn only_asks(rpc: &str) -> bool {
    ["stat_", "list_", "get_", "cluster_status", "connect"].iter().any(|start| rpc.starts_with(start))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(kind: MdsErrorKind, rpc: &'static str, outcome_unknown: bool) -> CliError {
        call_failed("doing it", &MdsCallError { kind, rpc, message: "because".to_owned(), outcome_unknown })
    }

    #[test]
    fn every_refusal_has_its_exit_code_and_names_its_reason() {
        for (kind, code) in [
            (MdsErrorKind::NotFound, 3),
            (MdsErrorKind::AlreadyExists, 4),
            (MdsErrorKind::InvalidArgument, 2),
            (MdsErrorKind::Attached, 4),
            (MdsErrorKind::Fenced, 4),
            (MdsErrorKind::InUse, 4),
            (MdsErrorKind::WrongOwner, 4),
            (MdsErrorKind::NoSpace, 6),
            (MdsErrorKind::Limit, 6),
            (MdsErrorKind::NotLeader, 5),
            (MdsErrorKind::WrongCluster, 1),
            (MdsErrorKind::Unavailable, 5),
        ] {
            let error = refusal(kind, "create_volume", false);
            assert_eq!(error.kind().exit_code(), code, "{kind:?}");
            assert!(error.render(true).contains(&format!("\"reason\":\"{}\"", kind.as_str())));
            assert!(error.render(false).starts_with("ogee: doing it: because"));
        }
    }

    #[test]
    fn an_unknown_outcome_is_told_only_of_changes() {
        let told = |rpc| refusal(MdsErrorKind::Unavailable, rpc, true).chain().contains("carried out");
        assert!(told("create_volume") && told("rollback_volume"));
        assert!(!told("stat_volume") && !told("cluster_status"));
    }

    #[test]
    fn every_failed_io_has_a_kind_and_a_sentence() {
        for (kind, code) in [
            (IoErrorKind::NoSpace, 6),
            (IoErrorKind::Fenced, 4),
            (IoErrorKind::ReadOnly, 4),
            (IoErrorKind::TimedOut, 5),
            (IoErrorKind::Corrupt, 1),
            (IoErrorKind::Closed, 1),
            (IoErrorKind::InvalidInput, 1),
        ] {
            let error = io_failed(IoError { kind, verb: "write", offset: 4096, len: 512, source: None });
            assert_eq!(error.kind().exit_code(), code, "{kind:?}");
            assert!(error.chain().contains("write of 512 bytes at 4096"), "{}", error.chain());
        }
    }
}
