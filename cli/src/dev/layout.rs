//! Where things of a dev cluster are.
//!
//! ```text
//! DIR/dev.toml            addresses        DIR/mds-1/mds.toml          configuration
//! DIR/.lock               one command      DIR/mds-1/data/             the daemon's own
//!                         at a time        DIR/mds-1/pid, log
//!                                          DIR/cs-1/chunkserver.toml, data/, pid, log
//! ```

use super::record::{self, Record};
use crate::daemon::{self, DevDaemon};
use crate::error::{CliError, ErrorKind};
use ogee_proto::net::TlsConfig;
use std::fs::{File, TryLockError};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The file in an MDS's data directory that makes it a member (`docs/formats.md`).
const MDS_IDENTITY: &str = "identity";

/// What a daemon does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// `ogee mds`.
    Mds,
    /// `ogee chunkserver`.
    Chunkserver,
}

impl Role {
    /// The subcommand that runs it.
    #[must_use]
    pub(crate) const fn command(self) -> &'static str {
        match self {
            Self::Mds => "mds",
            Self::Chunkserver => "chunkserver",
        }
    }
}

/// One daemon of a dev cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DaemonPlace {
    /// `mds-1`, `cs-2`.
    pub name: String,
    /// What it does.
    pub role: Role,
    /// Its number, from 1.
    pub number: u32,
    /// Where it listens.
    pub addr: SocketAddr,
    /// Where it shows its metrics; clusters made before there were any have none.
    pub metrics: Option<SocketAddr>,
    /// Its folder.
    pub dir: PathBuf,
}

impl DaemonPlace {
    /// Its configuration.
    #[must_use]
    pub(crate) fn config(&self) -> PathBuf {
        self.dir.join(format!("{}.toml", self.role.command()))
    }

    /// Its standard output and error.
    #[must_use]
    pub(crate) fn log(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// Its process id, as last started.
    #[must_use]
    pub(crate) fn pid_file(&self) -> PathBuf {
        self.dir.join("pid")
    }

    /// What it keeps.
    #[must_use]
    pub(crate) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Makes the folder and the configuration, if they are not there. An edited configuration is left alone.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn prepare(&self, mds: &[SocketAddr], tls: Option<&TlsConfig>) -> Result<(), CliError> {
        let data = self.data();
        std::fs::create_dir_all(&data).map_err(|e| CliError::file("create", &data, e))?;
        let config = self.config();
        if config.exists() {
            return Ok(());
        }
        let (number, listen, metrics) = (self.number, self.addr, self.metrics);
        let daemon = DevDaemon { number, data: &data, listen, metrics, mds, tls };
        let text = match self.role {
            Role::Mds => daemon::mds::dev_config(&daemon),
            Role::Chunkserver => daemon::chunkserver::dev_config(&daemon),
        };
        let text = text.map_err(|e| CliError::caused(ErrorKind::Failure, format!("write {}", config.display()), e))?;
        record::replace(&config, &text)
    }

    /// Called once the cluster has served: from now on an MDS that lost its data must not start as a new one. One that
    /// has not become a member yet (three nodes, of which two serve) still may.
    ///
    /// # Errors
    /// What the file system says.
    pub(crate) fn settle(&self) -> Result<(), CliError> {
        if self.role != Role::Mds || !self.data().join(MDS_IDENTITY).exists() {
            return Ok(());
        }
        let config = self.config();
        let text = std::fs::read_to_string(&config).map_err(|e| CliError::file("read", &config, e))?;
        daemon::mds::settled_config(&text).map_or(Ok(()), |settled| record::replace(&config, &settled))
    }
}

/// The daemons of a cluster, the MDS first.
#[must_use]
pub(crate) fn daemons(root: &Path, record: &Record) -> Vec<DaemonPlace> {
    let place = |role: Role, short: &str, list: &[SocketAddr], metrics: &[SocketAddr]| -> Vec<DaemonPlace> {
        let numbered = (1u32..).zip(list);
        let mut metrics = metrics.iter().copied();
        let place = |(number, addr): (u32, &SocketAddr)| {
            let name = format!("{short}-{number}");
            DaemonPlace { dir: root.join(&name), name, role, number, addr: *addr, metrics: metrics.next() }
        };
        numbered.map(place).collect()
    };
    let mut all = place(Role::Mds, "mds", &record.mds, &record.mds_metrics);
    all.extend(place(Role::Chunkserver, "cs", &record.chunkservers, &record.chunkserver_metrics));
    all
}

/// The folder of an existing cluster, without symlinks, so that its daemons are found again by their command line.
///
/// # Errors
/// It does not exist or is no dev cluster ([`ErrorKind::NotFound`]).
pub(crate) fn existing_root(dir: &Path) -> Result<(PathBuf, Record), CliError> {
    let record = record::load_existing(dir)?;
    let root = dir.canonicalize().map_err(|e| CliError::file("open", dir, e))?;
    Ok((root, record))
}

/// Holds off other commands on the same folder until dropped.
#[derive(Debug)]
pub(crate) struct DirLock(#[allow(dead_code)] File); // held, never read

/// Takes the folder's lock.
///
/// # Errors
/// Another command has it ([`ErrorKind::Conflict`]).
pub(crate) fn lock(root: &Path) -> Result<DirLock, CliError> {
    let path = root.join(".lock");
    let file = File::create(&path).map_err(|e| CliError::file("create", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(DirLock(file)),
        Err(TryLockError::WouldBlock) => {
            let text = format!("another ogee dev command works on {}; wait for it", root.display());
            Err(CliError::new(ErrorKind::Conflict, text))
        }
        Err(TryLockError::Error(e)) => Err(CliError::file("lock", &path, e)),
    }
}
