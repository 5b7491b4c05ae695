//! Where the harness puts things. The cache survives runs (kernel package, golden image, logs of the last run); scratch folders
//! belong to one test and are removed with it.

use crate::reaper::Reaper;
use anyhow::{Context, Result};
use std::path::PathBuf;

/// The cache: `OGEE_CACHE`, else `~/.cache/ogee-vm`, else a folder in the system's temporary directory.
#[must_use]
pub fn cache() -> PathBuf {
    if let Some(cache) = std::env::var_os("OGEE_CACHE") {
        return cache.into();
    }
    match std::env::var_os("HOME") {
        Some(home) => PathBuf::from(home).join(".cache/ogee-vm"),
        None => std::env::temp_dir().join("ogee-vm"),
    }
}

/// The folder for the logs of the last run, in the cache; made when missing.
///
/// # Errors
/// When it cannot be made.
pub fn logs() -> Result<PathBuf> {
    let logs = cache().join("logs");
    std::fs::create_dir_all(&logs).with_context(|| format!("create {}", logs.display()))?;
    Ok(logs)
}

/// A new scratch folder, removed when the guard is dropped or the test process dies.
///
/// # Errors
/// When it cannot be made.
pub fn scratch() -> Result<Reaper> {
    Reaper::of_folder(&scratch_folder()?)
}

/// A new folder on a real disk (`OGEE_TEST_DIR`, else `/var/tmp`): chunkservers use direct IO, which a `tmpfs` may refuse.
/// Its path is short, because UNIX socket paths are limited to 107 bytes. Nobody removes it but a [`Reaper`].
///
/// # Errors
/// When it cannot be made.
pub fn scratch_folder() -> Result<PathBuf> {
    let parent = std::env::var_os("OGEE_TEST_DIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let folder = tempfile::Builder::new().prefix("ogee-").tempdir_in(&parent);
    Ok(folder.with_context(|| format!("make a folder in {}", parent.display()))?.keep())
}
