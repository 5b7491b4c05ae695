//! Which cluster a command talks to, and the connection.
//!
//! The addresses come, in this order, from `--mds`, `--dir` (a dev cluster), `OGEE_MDS`, `OGEE_DIR`, and `./ogee-dev`
//! if that is a dev cluster. Nothing is asked of the MDS before the command's first call.

use crate::dev;
use crate::error::{CliError, ErrorKind};
use crate::output::Output;
use crate::sdk_error::call_failed;
use clap::Args;
use ogee_client::{BackupOpener, Cluster, ClusterConfig, LimitsPolicy, MdsClient};
use ogee_proto::net::{Network, TlsConfig};
use ogee_snapclone::Repositories;
use ogee_snapclone::service::SnapcloneConfig;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The folder of the dev cluster when none is named.
pub(crate) const DEFAULT_DIR: &str = "./ogee-dev";

/// Options that every command takes.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct GlobalArgs {
    /// Addresses of the MDS nodes, host:port[,host:port] [env: OGEE_MDS]
    #[arg(long, global = true, value_delimiter = ',', value_name = "ADDR", help_heading = "Global options")]
    pub mds: Vec<String>,
    /// Folder of a dev cluster, to find the MDS in [env: OGEE_DIR] [default: ./ogee-dev]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    pub dir: Option<PathBuf>,
    /// Folder with ca.pem, cert.pem and key.pem: connections to other hosts use TLS [env: OGEE_TLS_DIR]
    #[arg(long, global = true, value_name = "DIR", help_heading = "Global options")]
    pub tls_dir: Option<PathBuf>,
    /// Use TLS on loopback too, where it is off [env: OGEE_TLS_LOOPBACK=1]
    #[arg(long, global = true, help_heading = "Global options")]
    pub tls_loopback: bool,
    /// The configuration of snapclone, or its [[repository]] tables: for volumes that stand on backups [env: OGEE_REPO_CONFIG]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global options")]
    pub repo_config: Option<PathBuf>,
    /// Print JSON: one document on one line, errors too (on standard error)
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,
}

/// What a command has besides its own arguments.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    /// As given.
    pub global: GlobalArgs,
    /// Where results go.
    pub out: Output,
}

/// What a person needs to know when an IO takes long: commands give up, a served disk waits for ever.
pub(crate) const COMMAND_IO_TIMEOUT: Duration = Duration::from_secs(60);

impl Context {
    /// The folder of the dev cluster: `--dir`, `OGEE_DIR` or the default.
    #[must_use]
    pub(crate) fn dev_dir(&self) -> PathBuf {
        let named = self.global.dir.clone().or_else(|| std::env::var_os("OGEE_DIR").map(PathBuf::from));
        named.unwrap_or_else(|| PathBuf::from(DEFAULT_DIR))
    }

    /// A connection to the cluster. `io_timeout` bounds each IO on volumes; `None` waits for ever.
    ///
    /// # Errors
    /// No address is known ([`ErrorKind::Usage`]), or no thread can be started.
    pub(crate) fn cluster(&self, io_timeout: Option<Duration>) -> Result<Cluster, CliError> {
        self.cluster_as(None, io_timeout)
    }

    /// A connection for a command that copies volumes: limits of volumes do not concern it.
    ///
    /// # Errors
    /// As [`Context::cluster`].
    pub(crate) fn copying_cluster(&self) -> Result<Cluster, CliError> {
        let config = self.config(None, Some(COMMAND_IO_TIMEOUT))?;
        connect(ClusterConfig { limits: LimitsPolicy::Ignore, ..config })
    }

    /// As [`Context::cluster`], as a known client.
    ///
    /// # Errors
    /// The same.
    pub(crate) fn cluster_as(&self, client: Option<NonZeroU64>, io_timeout: Option<Duration>) -> Result<Cluster, CliError> {
        connect(self.config(client, io_timeout)?)
    }

    fn config(&self, client: Option<NonZeroU64>, io_timeout: Option<Duration>) -> Result<ClusterConfig, CliError> {
        let description = format!("{} ogee {}", host_name(), std::process::id());
        let (mds, network) = (self.mds_addrs()?, self.network()?);
        let backups = self.repositories()?.map(|all| -> Arc<dyn BackupOpener> { Arc::new(all) });
        Ok(ClusterConfig { mds, network, description, client, io_timeout, backups, ..ClusterConfig::default() })
    }

    /// The repositories that this process has access to; `None` when no file names any.
    ///
    /// # Errors
    /// The file cannot be read or makes no sense.
    pub(crate) fn repositories(&self) -> Result<Option<Repositories>, CliError> {
        let named = std::env::var_os("OGEE_REPO_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
        let Some(path) = self.global.repo_config.clone().or(named) else { return Ok(None) };
        let doing = || format!("repositories of {}", path.display());
        let all = SnapcloneConfig::load_repositories(&path).map_err(|e| CliError::caused(ErrorKind::Usage, doing(), e))?;
        Ok(Some(Repositories::new(all.into_iter().map(|r| (r.name, r.place)))))
    }

    /// Calls to the MDS, for commands that open no volume.
    ///
    /// # Errors
    /// As [`Context::cluster`].
    pub(crate) fn mds(&self) -> Result<Mds, CliError> {
        let cluster = self.cluster(Some(COMMAND_IO_TIMEOUT))?;
        Ok(Mds { client: cluster.mds().clone(), _cluster: cluster })
    }

    /// As [`Context::mds`], connected: what is timed afterwards is the call and not the connection.
    ///
    /// # Errors
    /// Also when the MDS does not answer.
    pub(crate) async fn connected_mds(&self) -> Result<Mds, CliError> {
        let mds = self.mds()?;
        mds.cluster_status().await.map_err(|e| call_failed("connect", &e))?;
        Ok(mds)
    }

    /// The folder of the dev cluster that the command talks to; `None` if it is another cluster.
    #[must_use]
    pub(crate) fn dev_cluster(&self) -> Option<PathBuf> {
        if self.global.dir.is_some() {
            return self.global.dir.clone();
        }
        let is_named = |list: String| !list.trim().is_empty();
        let elsewhere = !self.global.mds.is_empty() || std::env::var("OGEE_MDS").is_ok_and(is_named);
        Some(self.dev_dir()).filter(|dir| !elsewhere && dev::is_dev_dir(dir))
    }

    /// Whether anything names a cluster, as for [`Context::cluster`].
    #[must_use]
    pub(crate) fn names_cluster(&self) -> bool {
        let is_named = |list: String| !list.trim().is_empty();
        let by_variable = std::env::var("OGEE_MDS").is_ok_and(is_named) || std::env::var_os("OGEE_DIR").is_some();
        !self.global.mds.is_empty() || self.global.dir.is_some() || by_variable || dev::is_dev_dir(&self.dev_dir())
    }

    /// How connections are made: as the options say, or as the dev cluster has it.
    fn network(&self) -> Result<Network, CliError> {
        let dir = self.global.tls_dir.clone().or_else(|| std::env::var_os("OGEE_TLS_DIR").map(PathBuf::from));
        let config = match (dir, self.dev_cluster()) {
            (Some(dir), _) => {
                let loopback = self.global.tls_loopback || std::env::var_os("OGEE_TLS_LOOPBACK").is_some_and(|v| v == "1");
                Some(TlsConfig { dir, loopback })
            }
            (None, Some(dev)) => dev::client_tls(&dev)?,
            (None, None) => None,
        };
        Network::new(config.as_ref()).map_err(|e| CliError::caused(ErrorKind::Usage, "set TLS up", e))
    }

    fn mds_addrs(&self) -> Result<Vec<String>, CliError> {
        if !self.global.mds.is_empty() {
            return checked(&self.global.mds, "--mds");
        }
        if let Some(dir) = &self.global.dir {
            return dev::mds_addrs(dir);
        }
        if let Ok(list) = std::env::var("OGEE_MDS")
            && !list.trim().is_empty()
        {
            let list: Vec<String> = list.split(',').map(str::to_owned).collect();
            return checked(&list, "OGEE_MDS");
        }
        let dir = self.dev_dir();
        if std::env::var_os("OGEE_DIR").is_some() || dev::is_dev_dir(&dir) {
            return dev::mds_addrs(&dir);
        }
        let text = "no cluster is named: give --mds HOST:PORT or set OGEE_MDS; for a local one: ogee dev up";
        Err(CliError::new(ErrorKind::Usage, text))
    }
}

fn connect(config: ClusterConfig) -> Result<Cluster, CliError> {
    Cluster::connect_lazy(config).map_err(|e| call_failed("connect", &e))
}

/// The MDS client together with the connection that carries it.
#[derive(Debug)]
pub(crate) struct Mds {
    client: MdsClient,
    _cluster: Cluster,
}

impl std::ops::Deref for Mds {
    type Target = MdsClient;

    fn deref(&self) -> &MdsClient {
        &self.client
    }
}

/// Every address must look like `host:port`; said here, because a typo would otherwise look like a dead cluster.
fn checked(list: &[String], origin: &str) -> Result<Vec<String>, CliError> {
    let list: Vec<String> = list.iter().map(|a| a.trim().to_owned()).collect();
    let is_addr = |a: &str| a.rsplit_once(':').is_some_and(|(h, p)| !h.is_empty() && p.parse::<u16>().is_ok());
    match list.iter().find(|a| !is_addr(a)) {
        None => Ok(list),
        Some(bad) => {
            let text = format!("{origin}: {bad:?} is not an address; write host:port[,host:port]");
            Err(CliError::new(ErrorKind::Usage, text))
        }
    }
}

/// The host's name, for people only.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "unknown-host".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        let list = |texts: &[&str]| checked(&texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>(), "--mds");
        assert_eq!(list(&["a:1", " [::1]:70 "]).expect("good"), vec!["a:1", "[::1]:70"]);
        for bad in ["", "a", "a:", ":1", "a:99999"] {
            assert_eq!(list(&["a:1", bad]).expect_err(bad).kind(), ErrorKind::Usage);
        }
    }
}
