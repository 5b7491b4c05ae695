//! `ogee mds`, `ogee chunkserver` and `ogee snapclone`: the daemons, in the foreground, until SIGINT or SIGTERM.
//!
//! Each is one file that holds all that the command knows of it: its configuration, the one for a dev cluster, and the
//! call that runs it.

pub(crate) mod chunkserver;
pub(crate) mod mds;
pub(crate) mod snapclone;

use crate::dev::DETACH_VARIABLE;
use clap::Args;
use ogee_proto::net::TlsConfig;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Arguments of all.
#[derive(Debug, Clone, Args)]
pub(crate) struct DaemonArgs {
    /// The configuration, a TOML file
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
}

/// A daemon of a dev cluster.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DevDaemon<'a> {
    /// Its number among those of its kind, from 1.
    pub number: u32,
    /// Its data directory.
    pub data: &'a Path,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Where it shows its metrics.
    pub metrics: Option<SocketAddr>,
    /// Where all nodes of the MDS listen.
    pub mds: &'a [SocketAddr],
    /// Its certificates, if the cluster has any.
    pub tls: Option<&'a TlsConfig>,
}

/// Leaves the terminal's session when `ogee dev up` asked for it, so that Ctrl-C and a hang-up there do not end the
/// daemon.
pub(crate) fn detach_if_asked() {
    if std::env::var_os(DETACH_VARIABLE).is_some() {
        // Fails only for a process that leads a group already; that one is detached enough.
        let _ = rustix::process::setsid();
    }
}

/// Lets the daemon open as many files as the system allows it: a chunkserver keeps thousands of chunk files open. The
/// default of a login session is 1,024.
pub(crate) fn allow_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // Without the right to raise it the daemon goes on and says so when a file cannot be opened.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}
