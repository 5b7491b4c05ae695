//! `DIR/dev.toml`: which daemons a dev cluster has and where they listen. Chosen once, kept for ever: a cluster's
//! members know each other by address.
//!
//! ```toml
//! mds = ["127.0.0.1:21001"]
//! chunkservers = ["127.0.0.1:21002", "127.0.0.1:21003", "127.0.0.1:21004"]
//! mds_metrics = ["127.0.0.1:21005"]
//! chunkserver_metrics = ["127.0.0.1:21006", "127.0.0.1:21007", "127.0.0.1:21008"]
//! ```
//!
//! It is replaced by rename, so it is whole or absent; everything else in the folder can be made again from it.

use crate::error::{CliError, ErrorKind};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The file's name.
const FILE: &str = "dev.toml";
const HEADER: &str = "# Made by `ogee dev up`: where the daemons of this cluster listen. Kept between runs.\n";

/// The daemons' addresses, in the order of their numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Record {
    /// Of `mds-1`, `mds-2`, ...
    pub mds: Vec<SocketAddr>,
    /// Of `cs-1`, `cs-2`, ...
    pub chunkservers: Vec<SocketAddr>,
    /// Where `mds-1`, `mds-2`, ... show their metrics; empty in records that are older.
    #[serde(default)]
    pub mds_metrics: Vec<SocketAddr>,
    /// Where `cs-1`, `cs-2`, ... show their metrics; empty in records that are older.
    #[serde(default)]
    pub chunkserver_metrics: Vec<SocketAddr>,
    /// Whether connections use TLS, with certificates in `DIR/tls`.
    #[serde(default)]
    pub tls: bool,
}

impl Record {
    /// Reads the record of the folder; `None` when there is none.
    ///
    /// # Errors
    /// It cannot be read or is damaged.
    pub(crate) fn load(dir: &Path) -> Result<Option<Self>, CliError> {
        let path = file_of(dir);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(CliError::file("read", &path, e)),
        };
        let bad = |e: toml::de::Error| CliError::caused(ErrorKind::Failure, format!("read {}", path.display()), e);
        let record: Self = toml::from_str(&text).map_err(bad)?;
        if record.mds.is_empty() {
            return Err(CliError::new(ErrorKind::Failure, format!("{} names no mds", path.display())));
        }
        Ok(Some(record))
    }

    /// Writes the record of the folder, durably.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn save(&self, dir: &Path) -> Result<(), CliError> {
        let path = file_of(dir);
        let body = toml::to_string(self);
        let body = body.map_err(|e| CliError::caused(ErrorKind::Failure, format!("write {}", path.display()), e))?;
        replace(&path, &format!("{HEADER}{body}"))
    }
}

fn file_of(dir: &Path) -> PathBuf {
    dir.join(FILE)
}

/// Writes a file whole or not at all.
///
/// # Errors
/// What the file system says.
pub(crate) fn replace(path: &Path, text: &str) -> Result<(), CliError> {
    let temporary = path.with_extension("new");
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(text.as_bytes())?;
        file.sync_all()
    });
    written.map_err(|e| CliError::file("write", &temporary, e))?;
    std::fs::rename(&temporary, path).map_err(|e| CliError::file("write", path, e))
}

/// Whether the folder holds a dev cluster.
#[must_use]
pub(crate) fn is_dev_dir(dir: &Path) -> bool {
    file_of(dir).is_file()
}

/// The MDS addresses of the dev cluster in the folder.
///
/// # Errors
/// There is none ([`ErrorKind::NotFound`]), or its record is damaged.
pub(crate) fn mds_addrs(dir: &Path) -> Result<Vec<String>, CliError> {
    Ok(load_existing(dir)?.mds.iter().map(ToString::to_string).collect())
}

/// The record of a folder that must hold a cluster.
///
/// # Errors
/// There is none ([`ErrorKind::NotFound`]), or it is damaged.
pub(crate) fn load_existing(dir: &Path) -> Result<Record, CliError> {
    let none = || {
        let text = format!("{} holds no dev cluster; make one: ogee dev up --dir {0}", dir.display());
        CliError::new(ErrorKind::NotFound, text)
    };
    Record::load(dir)?.ok_or_else(none)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().expect("a folder");
        assert_eq!(Record::load(dir.path()).expect("none"), None);
        assert_eq!(mds_addrs(dir.path()).expect_err("none").kind(), ErrorKind::NotFound);
        let addr = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let metrics = (vec![addr(4)], vec![addr(5), addr(6)]);
        let record = Record {
            mds: vec![addr(1)],
            chunkservers: vec![addr(2), addr(3)],
            mds_metrics: metrics.0,
            chunkserver_metrics: metrics.1,
            tls: true,
        };
        record.save(dir.path()).expect("saved");
        assert_eq!(Record::load(dir.path()).expect("loaded"), Some(record));
        assert_eq!(mds_addrs(dir.path()).expect("known"), vec!["127.0.0.1:1"]);
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1, "no temporary file stays");
    }

    #[test]
    fn a_record_from_before_there_were_metrics_is_read() {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::write(file_of(dir.path()), "mds = [\"127.0.0.1:1\"]\nchunkservers = [\"127.0.0.1:2\"]").expect("written");
        let record = Record::load(dir.path()).expect("read").expect("a record");
        assert_eq!((record.chunkservers.len(), record.chunkserver_metrics.len()), (1, 0));
    }

    #[test]
    fn a_damaged_record_is_an_error_and_not_a_new_cluster() {
        let dir = tempfile::tempdir().expect("a folder");
        for text in ["mds = [", "mds = []\nchunkservers = []", "mds = [\"x\"]\nchunkservers = []", "color = 1"] {
            std::fs::write(file_of(dir.path()), text).expect("written");
            assert!(Record::load(dir.path()).is_err(), "{text}");
        }
    }
}
