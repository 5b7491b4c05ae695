//! Certificates of a dev cluster that was made with `--tls`: `DIR/tls/{authority,daemon,client}`.
//!
//! All daemons share one certificate, for loopback addresses, and TLS is on although everything is on loopback.

use super::record::Record;
use crate::error::{CliError, ErrorKind};
use crate::tls::{self, Holder};
use ogee_proto::net::{KEY_FILE, Network, TlsConfig};
use std::path::{Path, PathBuf};

/// Days that the certificates of a dev cluster are valid.
const DAYS: u32 = 3650;

fn place(root: &Path, who: &str) -> PathBuf {
    root.join("tls").join(who)
}

/// What the daemons are told; `None` for a cluster without TLS.
#[must_use]
pub(crate) fn daemon_tls(root: &Path, record: &Record) -> Option<TlsConfig> {
    record.tls.then(|| TlsConfig { dir: place(root, "daemon"), loopback: true })
}

/// What clients of the dev cluster in the folder use; `None` if it has no TLS.
///
/// # Errors
/// The record is damaged.
pub(crate) fn client_tls(dir: &Path) -> Result<Option<TlsConfig>, CliError> {
    let uses_tls = Record::load(dir)?.is_some_and(|record| record.tls);
    Ok(uses_tls.then(|| TlsConfig { dir: place(dir, "client"), loopback: true }))
}

/// How the dev cluster in the folder is connected to.
///
/// # Errors
/// Its certificates are of no use.
pub(crate) fn dev_network(dir: &Path) -> Result<Network, CliError> {
    let config = client_tls(dir)?;
    Network::new(config.as_ref()).map_err(|e| CliError::caused(ErrorKind::Failure, "set TLS up", e))
}

/// Makes what is missing. The key is written last, so a folder with a key is whole.
///
/// # Errors
/// What the file system says.
pub(crate) fn prepare(root: &Path, record: &Record) -> Result<(), CliError> {
    if !record.tls || place(root, "client").join(KEY_FILE).exists() {
        return Ok(());
    }
    let all = root.join("tls");
    if all.exists() {
        // Left by a run that was killed; no daemon has started yet.
        std::fs::remove_dir_all(&all).map_err(|e| CliError::file("remove", &all, e))?;
    }
    std::fs::create_dir(&all).map_err(|e| CliError::file("create", &all, e))?;
    let addresses = ["127.0.0.1", "::1", "localhost"].map(str::to_owned);
    let authority = place(root, "authority");
    tls::authority(&authority)?;
    tls::issue(&authority, &place(root, "daemon"), Holder::Daemon(&addresses), DAYS)?;
    tls::issue(&authority, &place(root, "client"), Holder::Client("dev"), DAYS)
}
