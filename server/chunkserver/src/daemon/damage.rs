//! The mark on a disk whose metadata store was found damaged: the file `damaged`, text for people.
//!
//! Every replica on the disk depends on the metadata store, and damage in it may be met again at any time, or hidden by
//! what is written later. So the process ends when it is found, and the mark keeps it from starting again: the disk can
//! only come back empty, as a new one, and the MDS rebuilds its replicas from the others. Invariant: a mark is never
//! removed by this program.

use super::error::{DaemonError, DaemonErrorKind, Reason};
use ogee_disk::DataDir;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::sync::watch;

/// File name in the data directory.
const FILE: &str = "damaged";

/// Refuses a disk that carries the mark.
///
/// # Errors
/// [`DaemonErrorKind::DataDir`].
pub(super) fn refuse_damaged(dir: &DataDir, path: &Path) -> Result<(), DaemonError> {
    if dir.holds(FILE) {
        let source = Reason::Condemned.into();
        return Err(DaemonError { kind: DaemonErrorKind::DataDir, verb: "use data directory with", path: path.join(FILE), source });
    }
    Ok(())
}

/// Waits until the metadata store is found damaged, or the disk has failed, and says how.
pub(super) async fn found(damaged: &mut watch::Receiver<Option<Arc<str>>>) -> Arc<str> {
    // The guard of the channel goes before anything else is waited for.
    let why = damaged.wait_for(Option::is_some).await.map(|why| why.clone().unwrap_or_default());
    match why {
        Ok(why) => why,
        // The store is gone, and with it everybody who could find anything.
        Err(_) => std::future::pending().await,
    }
}

/// Marks the disk and gives the reason for the process to end with.
pub(super) fn condemn(dir: &DataDir, path: PathBuf, why: &str) -> DaemonError {
    if let Err(error) = dir.write_small(FILE, format!("{why}\n").as_bytes()) {
        tracing::error!(error = &error as &dyn std::error::Error, "mark the damaged disk");
    }
    tracing::error!(target: "scrub", finding = "metadata", why, "the metadata of this disk is damaged; it can only come back empty, as a new one");
    DaemonError { kind: DaemonErrorKind::Disk, verb: "trust the metadata of", path, source: why.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condemned_disk_is_refused_for_good() {
        let tmp = tempfile::tempdir().expect("a temporary directory");
        let dir = DataDir::open(tmp.path()).expect("open");
        assert!(refuse_damaged(&dir, tmp.path()).is_ok());
        let error = condemn(&dir, tmp.path().to_owned(), "block checksum mismatch");
        assert_eq!(error.kind, DaemonErrorKind::Disk);
        let refused = refuse_damaged(&dir, tmp.path()).expect_err("must be refused");
        assert_eq!(refused.kind, DaemonErrorKind::DataDir);
        let text = std::fs::read_to_string(tmp.path().join(FILE)).expect("a mark");
        assert!(text.contains("block checksum mismatch"), "{text}");
    }
}
