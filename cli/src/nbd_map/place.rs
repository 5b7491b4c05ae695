//! Files of a mapping, in `/run/ogee/nbd` unless told otherwise.
//!
//! ```text
//! DIR/NAME.sock         the server's socket      DIR/NAME.sock.client   by which client the server attached (claim.rs)
//! DIR/NAME.lock         locked by the keeper     DIR/NAME.json          the mapping, for `ls` and `unmap`
//! DIR/NAME.log          keeper and server        NAME: the volume's, and 16 digits of its SHA-256
//! ```
//!
//! Invariants: a record is whole or absent; it is a hint about processes and devices, never a proof: whoever acts on it looks at the
//! process or the device itself. The folder is for root alone: who opens a socket in it can write the volume.

use crate::dev;
use crate::error::{CliError, ErrorKind};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{DirBuilder, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Of a volume's name in a file's name; a socket's path has 107 bytes in all.
const READABLE_BYTES_MAX: usize = 32;
/// A log that is longer begins anew when the volume is mapped.
const LOG_BYTES_MAX: u64 = 4 << 20;

/// Where the files of one mapping are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    dir: PathBuf,
    name: String,
}

/// What the keeper of a mapping wrote down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// As named when it was mapped.
    pub volume: String,
    /// The number of its device.
    pub index: u32,
    /// Of the device.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Connections that there should be.
    pub connections: u16,
    /// Connections that there are.
    pub live: u16,
    /// The process that keeps them.
    pub keeper_pid: u32,
    /// The process that serves; none while it is away.
    pub server_pid: Option<u32>,
}

impl Place {
    /// The files of a volume's mapping.
    #[must_use]
    pub(crate) fn of(dir: &Path, volume: &str) -> Self {
        let digest = Sha256::digest(volume.as_bytes());
        let hex: String = digest.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        let readable: String = volume.chars().map(|c| if c == '/' { '-' } else { c }).take(READABLE_BYTES_MAX).collect();
        // Another directory is the caller's; a server is started in this one.
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
        Self { dir, name: format!("{readable}.{hex}") }
    }

    /// The server's socket.
    #[must_use]
    pub(crate) fn socket(&self) -> PathBuf {
        self.file("sock")
    }

    /// What keeper and server say.
    #[must_use]
    pub(crate) fn log(&self) -> PathBuf {
        self.file("log")
    }

    /// The folder.
    #[must_use]
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.dir.join(format!("{}.{extension}", self.name))
    }

    /// Makes the folder.
    ///
    /// # Errors
    /// The file system refuses.
    pub(crate) fn make_dir(&self) -> Result<(), CliError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.map_err(|e| CliError::file("create", &self.dir, e))
    }

    /// The log, to append to.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn open_log(&self) -> Result<File, CliError> {
        let path = self.log();
        let file = File::options().create(true).append(true).open(&path).map_err(|e| CliError::file("open", &path, e))?;
        if file.metadata().is_ok_and(|log| log.len() > LOG_BYTES_MAX) {
            file.set_len(0).map_err(|e| CliError::file("shorten", &path, e))?;
        }
        Ok(file)
    }

    /// Makes this process the one keeper, for as long as the file is held.
    ///
    /// # Errors
    /// There is another one ([`ErrorKind::Conflict`]), or the file system refuses.
    pub(crate) fn lock(&self) -> Result<File, CliError> {
        let path = self.file("lock");
        let file = File::options().create(true).append(true).open(&path).map_err(|e| CliError::file("open", &path, e))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(TryLockError::WouldBlock) => Err(CliError::new(ErrorKind::Conflict, "another process keeps this mapping")),
            Err(TryLockError::Error(e)) => Err(CliError::file("lock", &path, e)),
        }
    }

    /// The record, if there is a readable one.
    #[must_use]
    pub(crate) fn record(&self) -> Option<Record> {
        read(&self.file("json"))
    }

    /// Writes the record.
    ///
    /// # Errors
    /// The file system refuses.
    pub(crate) fn save(&self, record: &Record) -> Result<(), CliError> {
        let text = serde_json::to_string(record);
        let text = text.map_err(|e| CliError::caused(ErrorKind::Failure, "write the record of a mapping", e))?;
        dev::replace(&self.file("json"), &text)
    }

    /// Removes the record: nothing is mapped any more.
    pub(crate) fn forget(&self) {
        // What is left says "gone" in listings, and the next mapping replaces it.
        let _ = std::fs::remove_file(self.file("json"));
    }
}

fn read(path: &Path) -> Option<Record> {
    serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()
}

/// Every mapping of the folder, by device.
///
/// # Errors
/// The folder cannot be read. That it is not there is no error.
pub(crate) fn records(dir: &Path) -> Result<Vec<Record>, CliError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(vec![]),
        Err(e) => return Err(CliError::file("read", dir, e)),
    };
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut records: Vec<Record> =
        files.filter(|path| path.extension().is_some_and(|e| e == "json")).filter_map(|path| read(&path)).collect();
    records.sort_by(|a, b| (a.index, &a.volume).cmp(&(b.index, &b.volume)));
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(volume: &str, index: u32) -> Record {
        Record {
            volume: volume.to_owned(),
            index,
            size_bytes: 1 << 30,
            read_only: false,
            connections: 4,
            live: 3,
            keeper_pid: 7,
            server_pid: None,
        }
    }

    #[test]
    fn names_are_apart_and_short() {
        let dir = Path::new(DIR);
        let names: std::collections::BTreeSet<PathBuf> =
            ["a/b", "a-b", "a/b@c"].iter().map(|volume| Place::of(dir, volume).socket()).collect();
        assert_eq!(names.len(), 3);
        let long = Place::of(dir, &"x/".repeat(400)).socket();
        assert!(long.as_os_str().len() <= 80, "{long:?}");
        assert!(long.starts_with(dir));
    }

    const DIR: &str = super::super::options::DIR_DEFAULT;

    #[test]
    fn records_are_listed_by_device_and_damaged_ones_are_left_out() {
        let dir = tempfile::tempdir().expect("a folder");
        assert_eq!(records(&dir.path().join("none")).expect("none"), []);
        let (first, second) = (record("b", 0), record("a", 1));
        for written in [&second, &first] {
            Place::of(dir.path(), &written.volume).save(written).expect("saved");
        }
        std::fs::write(dir.path().join("x.json"), "{").expect("written");
        assert_eq!(records(dir.path()).expect("listed"), [first, second]);
        Place::of(dir.path(), "a").forget();
        assert_eq!(Place::of(dir.path(), "a").record(), None);
    }

    #[test]
    fn there_is_one_keeper() {
        let dir = tempfile::tempdir().expect("a folder");
        let place = Place::of(dir.path(), "vm1");
        let held = place.lock().expect("nobody else");
        assert_eq!(place.lock().expect_err("held").kind(), ErrorKind::Conflict);
        drop(held);
        place.lock().expect("free again");
    }
}
