//! `ogee dev`: a whole cluster on this machine from one binary and one command, for trying things out and for tests.
//!
//! | file | what |
//! | --- | --- |
//! | `record.rs` | `dev.toml`: the addresses, chosen once and kept |
//! | `certificates.rs` | the cluster's own authority, with `--tls` |
//! | `layout.rs` | folders, configuration files, pid files and logs of the daemons |
//! | `ports.rs` | free ports that no outgoing connection can take |
//! | `process.rs` | start a detached daemon, find it again, stop it; never signal a stranger |
//! | `ready.rs` | when the cluster serves |
//! | `up.rs`, `down.rs`, `status.rs` | the commands |
//!
//! Invariants: a folder belongs to one cluster, its data is never touched here except by `destroy`; every step may be
//! repeated after a crash; two commands never work on one folder at once (a lock). The daemons are the ones that run in
//! production, started as `ogee mds --config FILE` and `ogee chunkserver --config FILE`.

mod certificates;
mod down;
mod layout;
mod ports;
mod process;
mod ready;
mod record;
mod status;
mod up;

pub(crate) use process::{DETACH_VARIABLE, Running, program};
pub(crate) use certificates::client_tls;
pub(crate) use record::{is_dev_dir, mds_addrs, replace};

use crate::connect::Context;
use crate::error::CliError;
use clap::Subcommand;
use std::net::SocketAddr;
use std::path::Path;

/// The commands.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum DevCommand {
    /// Start the cluster of the folder --dir, or what of it is not running, and wait until it serves
    #[command(after_help = "Examples:\n  ogee dev up\n  ogee dev up --dir /var/tmp/try --chunkservers 5 --mds 3\n\n\
        The first run makes the folder and chooses ports; later runs keep data and ports and start only what is dead.\n\
        More chunkservers than before are added; fewer, or another number of MDS, is refused.")]
    Up(up::UpArgs),
    /// Show the daemons and whether the cluster serves
    #[command(after_help = "Example:\n  ogee dev status --dir /var/tmp/try --json")]
    Status,
    /// Stop the cluster; its data stays
    #[command(after_help = "Example:\n  ogee dev down --dir /var/tmp/try")]
    Down,
    /// Stop the cluster and delete its data
    #[command(after_help = "Example:\n  ogee dev destroy --dir /var/tmp/try --yes")]
    Destroy(down::DestroyArgs),
}

/// A daemon that is running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DaemonProcess {
    /// `mds-1`, `cs-2`.
    pub name: String,
    /// Its process id.
    pub pid: u32,
    /// Where it shows its metrics.
    pub metrics: Option<SocketAddr>,
}

/// The daemons of the dev cluster in the folder that are running.
///
/// # Errors
/// The folder holds no dev cluster, or its record is damaged.
pub(crate) fn processes(dir: &Path) -> Result<Vec<DaemonProcess>, CliError> {
    let (root, record) = layout::existing_root(dir)?;
    let running = |place: layout::DaemonPlace| {
        process::find(&place).map(|r| DaemonProcess { name: place.name, pid: r.pid, metrics: place.metrics })
    };
    Ok(layout::daemons(&root, &record).into_iter().filter_map(running).collect())
}

/// Carries out a command.
///
/// # Errors
/// See the commands.
pub(crate) async fn run(context: &Context, command: DevCommand) -> Result<(), CliError> {
    match command {
        DevCommand::Up(args) => up::run(context, args).await,
        DevCommand::Status => status::run(context).await,
        DevCommand::Down => down::run(context).await,
        DevCommand::Destroy(args) => down::destroy(context, &args).await,
    }
}
