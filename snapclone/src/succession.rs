//! Several runs that are to make one backup: each takes over from those before it, because their owners died or seemed to.
//!
//! Whoever wants one backup and no second one writes each run down (durably, and fenced against owners before it) when it is
//! opened ([`RunGuard::opened`]), and makes sure that no earlier one publishes any more ([`bury`]) before its own does
//! ([`RunGuard::publishes`]). Invariant: of the runs that were written down at most one publishes, whoever sleeps for how long: for
//! each of them one create-if-absent decides, and a later one publishes only after it has won those of all earlier ones.
//!
//! A run that was buried is still adopted by the next one: it is buried after its blocks were referred to by a run with a record.

use crate::error::{RepoError, TransferError};
use crate::index::{Index, IndexKey, seal_index};
use crate::layout::{INDEXES, run_record};
use crate::repository::Repository;
use serde::{Deserialize, Serialize};

/// The name of a run: where it publishes. As text `VOLUME/GENERATION-RUN`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunName(pub(crate) IndexKey);

/// A text that is no name of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("it is no name of a run")]
pub struct NoRunName;

impl TryFrom<String> for RunName {
    type Error = NoRunName;

    fn try_from(text: String) -> Result<Self, NoRunName> {
        IndexKey::parse("", &text).map(Self).ok_or(NoRunName)
    }
}

impl From<RunName> for String {
    fn from(name: RunName) -> Self {
        let key = name.0.key();
        key.strip_prefix(INDEXES).unwrap_or(&key).to_owned()
    }
}

/// Who is asked before a run shows.
pub trait RunGuard: Sync {
    /// The run is open and has stored nothing yet. It goes on if there is no error.
    fn opened(&self, run: &RunName) -> impl Future<Output = Result<(), TransferError>> + Send;

    /// Everything is stored. It publishes if there is no error.
    fn publishes(&self) -> impl Future<Output = Result<(), TransferError>> + Send;
}

/// A run that takes over from nobody.
#[derive(Debug, Clone, Copy)]
pub struct Unguarded;

impl RunGuard for Unguarded {
    async fn opened(&self, _run: &RunName) -> Result<(), TransferError> {
        Ok(())
    }

    async fn publishes(&self) -> Result<(), TransferError> {
        Ok(())
    }
}

/// What one of these runs has published, if one has.
///
/// # Errors
/// The repository fails.
pub async fn published(repo: &Repository, runs: &[RunName]) -> Result<Option<Index>, RepoError> {
    for RunName(key) in runs {
        if let Some(index) = repo.index(key).await? {
            return Ok(Some(index));
        }
    }
    Ok(None)
}

/// Makes sure that none of these runs publishes any more. If one has done so, that is what it published.
///
/// # Errors
/// The repository fails; then some may be buried.
pub async fn bury(repo: &Repository, runs: &[RunName]) -> Result<Option<Index>, RepoError> {
    let mut found = None;
    for RunName(key) in runs {
        let name = key.key();
        // "It exists" may also be said of a note of ours whose answer was lost: then there is no index in it.
        if !repo.backend.create(&name, seal_index(&repo.sealer, &name, None)).await? {
            found = found.or(repo.index(key).await?);
        }
    }
    repo.backend.settle().await?;
    Ok(found)
}

/// Deletes the records of runs, so that collection need not wait until they count as dead. All of them must have been given to [`bury`]: whoever
/// adopts a run looks whether it was, and must not adopt one that nothing protects any more.
///
/// # Errors
/// The repository fails.
pub async fn forget(repo: &Repository, runs: &[RunName]) -> Result<(), RepoError> {
    for RunName(key) in runs {
        repo.backend.delete(&run_record(key.run)).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_runs_come_back() {
        let name = RunName(IndexKey { volume: "ab-01".to_owned(), generation: 3, run: 7 });
        let text = serde_json::to_string(&name).expect("text");
        assert_eq!(text, "\"ab-01/0000000000000003-0000000000000007\"");
        assert_eq!(serde_json::from_str::<RunName>(&text).expect("a name"), name);
        for bad in ["\"\"", "\"ab\"", "\"ab/1-2\"", "7"] {
            assert!(serde_json::from_str::<RunName>(bad).is_err(), "{bad}");
        }
    }
}
