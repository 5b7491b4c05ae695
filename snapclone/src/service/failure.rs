//! Why the work on a task ended before its end, and what follows from that. Pure.
//!
//! Invariant: what may pass (no answer of a repository or of the cluster) is told apart from what will not, so that only the former is tried again.

use super::task::TaskError;
use crate::error::{RepoError, RepoErrorKind, TransferError};
use ogee_client::{IoErrorKind, MdsCallError, OpenError};
use ogee_proto::MdsErrorKind;
use std::error::Error;

/// Why work ended.
#[derive(Debug)]
pub(super) enum Failure {
    /// Another instance owns the task, or may by now.
    Lost,
    /// It may work later; the text is for people.
    Passing(String),
    /// It will not work.
    Final(String),
}

/// An error with what lies below it, in one line.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        // Some libraries print their source themselves; it is not said twice.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        next = cause.source();
    }
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

impl Failure {
    fn of(passes: bool, text: String) -> Self {
        if passes { Self::Passing(text) } else { Self::Final(text) }
    }

    /// A refusal or failure of a call to the MDS about a volume or snapshot.
    pub(super) fn call(doing: &str, error: &MdsCallError) -> Self {
        let passes = matches!(error.kind, MdsErrorKind::Unavailable | MdsErrorKind::NotLeader);
        Self::of(passes, format!("{doing}: {}", error.message))
    }

    /// A failed attach.
    pub(super) fn open(doing: &str, error: OpenError) -> Self {
        match error {
            OpenError::Attach { source, .. } => Self::call(doing, &source),
            other => Self::Final(format!("{doing}: {}", chain(&other))),
        }
    }
}

impl From<RepoError> for Failure {
    fn from(error: RepoError) -> Self {
        let passes = matches!(error.kind, RepoErrorKind::Unavailable | RepoErrorKind::Abandoned);
        Self::of(passes, chain(&error))
    }
}

impl From<TransferError> for Failure {
    fn from(error: TransferError) -> Self {
        match error {
            TransferError::Repo(error) => error.into(),
            TransferError::Volume(error) => {
                let passes = matches!(error.kind, IoErrorKind::TimedOut);
                Self::of(passes, chain(&error))
            }
            // The guard withdraws a run when its owner has lost the task.
            TransferError::Withdrawn => Self::Lost,
        }
    }
}

impl From<TaskError> for Failure {
    fn from(error: TaskError) -> Self {
        Self::Final(chain(&error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_may_pass_is_tried_again() {
        let repo = |kind| Failure::from(RepoError::new(kind, "read", "x", "because"));
        assert!(matches!(repo(RepoErrorKind::Unavailable), Failure::Passing(text) if text == "read x: because"));
        assert!(matches!(repo(RepoErrorKind::Abandoned), Failure::Passing(_)));
        for kind in [RepoErrorKind::Corrupt, RepoErrorKind::Denied, RepoErrorKind::NotFound, RepoErrorKind::NoSpace] {
            assert!(matches!(repo(kind), Failure::Final(_)), "{kind:?}");
        }
        let call = |kind| {
            let error = MdsCallError { kind, rpc: "stat_volume", message: "m".to_owned(), outcome_unknown: false };
            Failure::call("look", &error)
        };
        assert!(matches!(call(MdsErrorKind::Unavailable), Failure::Passing(text) if text == "look: m"));
        assert!(matches!(call(MdsErrorKind::NotFound), Failure::Final(_)));
        assert!(matches!(Failure::from(TransferError::Withdrawn), Failure::Lost));
    }
}
