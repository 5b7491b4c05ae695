//! What clients saw is explained by what is promised (`vm-tests/src/history`): every sector is linearizable; no write of an old attach
//! takes effect after one of a newer; what was acknowledged is there after any power cut; snapshots are exact; clones and rollbacks are forks.

use anyhow::{Context, Result};

/// Runs the check and names the invariant when it fails.
///
/// # Errors
/// The violation.
pub(crate) fn explained<T>(check: impl FnOnce() -> Result<T>) -> Result<T> {
    check().context("the history is not explained")
}
