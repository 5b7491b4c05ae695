//! The command line as a whole. Each group of commands has its arguments in its own file.

use crate::backup::{BackupCommand, RestoreArgs};
use crate::bench::{self, BenchArgs};
use crate::checksum::ChecksumArgs;
use crate::cluster::{ClusterCommand, PoolCommand};
use crate::connect::GlobalArgs;
use crate::daemon::DaemonArgs;
use crate::dev::DevCommand;
use crate::error::{CliError, ErrorKind};
use crate::export::ExportArgs;
use crate::image::ImageCommand;
use crate::libvirt::{self, LibvirtXmlArgs};
use crate::nbd::NbdCommand;
use crate::scrub::ScrubCommand;
use crate::verify::VerifyCommand;
use crate::snapshot::{CloneArgs, RollbackArgs, SnapshotCommand};
use crate::task::TaskCommand;
use crate::tls::TlsCommand;
use crate::vhost_many::{self, VhostArgs};
use crate::volume::VolumeCommand;
use clap::error::ErrorKind as ClapKind;
use clap::{Parser, Subcommand};

const AFTER_HELP: &str = "\
Names: a volume is name or folder/name; a snapshot is volume@snapshot. Sizes: 4096, 512MiB, 64G (powers of two).

Exit codes:
  0  done
  1  failed: a file cannot be read, data is damaged, anything without a code of its own
  2  wrong usage: arguments, names, sizes, image formats
  3  not found: a volume, snapshot, folder, pool or file
  4  conflict: it exists, is attached, is in use, or belongs to another owner
  5  unavailable: the cluster does not answer or has no leader
  6  no space, or a limit is reached

Errors are one line on standard error: `ogee: what: why`; with --json one object
{\"error\":{\"kind\":..,\"exit_code\":..,\"message\":..}}. OGEE_LOG=debug shows what goes on.

Try it:
  ogee dev up
  ogee image import debian-12.qcow2 golden
  ogee snapshot create golden@v1
  ogee clone golden@v1 vm1
  ogee vhost-blk vm1 --socket /tmp/vm1.sock";

/// Replicated block storage for virtual machines.
#[derive(Debug, Parser)]
#[command(name = "ogee", version, propagate_version = true, after_help = AFTER_HELP, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: GlobalArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Every command.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// A whole cluster on this machine: up, status, down, destroy
    #[command(subcommand)]
    Dev(DevCommand),
    /// The cluster at a glance
    #[command(after_help = "Example:\n  ogee status --mds 10.0.0.1:7000,10.0.0.2:7000")]
    Status,
    /// Chunkservers, copysets and pools of the cluster
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Read and verify all data of chunkservers, and mend what is bad
    #[command(subcommand)]
    Scrub(ScrubCommand),
    /// Read and verify every replica of a volume, and mend what is bad
    #[command(subcommand)]
    Verify(VerifyCommand),
    /// Make and list pools of chunkservers
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Make volumes from image files
    #[command(subcommand)]
    Image(ImageCommand),
    /// Write a volume or a snapshot to an image file, raw or qcow2
    #[command(after_help = "Examples:\n  ogee export golden@v1 golden.raw\n  ogee export vm1@backup vm1.qcow2 --format qcow2")]
    Export(ExportArgs),
    /// SHA-256 of the content of a volume or a snapshot
    #[command(after_help = "Example:\n  ogee checksum golden@v1")]
    Checksum(ChecksumArgs),
    /// Create, list, show, delete, grow and rename volumes
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Create, list and delete snapshots
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Make a volume that shares all data with a snapshot, at once, whatever its size
    #[command(after_help = "Examples:\n  ogee clone golden@v1 vm1\n  ogee clone golden vm2 --owner tenant-a")]
    Clone(CloneArgs),
    /// Take a volume back to one of its snapshots, at once, whatever its size
    #[command(after_help = "Example:\n  ogee rollback vm1@before-upgrade")]
    Rollback(RollbackArgs),
    /// Back volumes up to a folder or to S3: create, list, show, verify, remove, collect garbage
    #[command(subcommand)]
    Backup(BackupCommand),
    /// Make a new volume from a backup
    #[command(after_help = "Example:\n  ogee restore vm1@nightly vm1-old --repo file:///srv/backup")]
    Restore(RestoreArgs),
    /// Backups and restores that snapclone does in the background: list, show, watch, cancel
    #[command(subcommand)]
    Task(TaskCommand),
    /// Serve volumes to virtual machines (QEMU, libvirt) over vhost-user sockets: one in the foreground, or many by serve, attach, detach
    #[command(after_help = vhost_many::EXAMPLES)]
    VhostBlk(Box<VhostArgs>),
    /// Print what libvirt has to be told to use a volume: a disk element, or a whole domain
    #[command(after_help = libvirt::EXAMPLES)]
    LibvirtXml(LibvirtXmlArgs),
    /// Serve volumes and snapshots over NBD, for bare hosts, backup tools and anything else that speaks it
    #[command(subcommand)]
    Nbd(NbdCommand),
    /// Put load on volumes and report rates, latencies and what they cost
    #[command(after_help = bench::EXAMPLES)]
    Bench(Box<BenchArgs>),
    /// Make certificates for encrypted connections
    #[command(subcommand)]
    Tls(TlsCommand),
    /// Run a metadata server in the foreground
    #[command(after_help = "Example:\n  ogee mds --config /etc/ogee/mds.toml")]
    Mds(DaemonArgs),
    /// Run a chunkserver in the foreground
    #[command(after_help = "Example:\n  ogee chunkserver --config /etc/ogee/chunkserver.toml")]
    Chunkserver(DaemonArgs),
    /// Do the tasks that commands with --detach leave, in the foreground; any number of these may run
    #[command(after_help = "Example:\n  ogee snapclone --config /etc/ogee/snapclone.toml")]
    Snapclone(DaemonArgs),
}

/// What the arguments came to.
#[derive(Debug)]
pub(crate) enum Parsed {
    /// A command.
    Run(Box<Cli>),
    /// Help or the version, which was asked for.
    Show(String),
}

/// Parses the arguments, the program's name first.
///
/// # Errors
/// [`ErrorKind::Usage`], in one sentence that names the argument.
pub(crate) fn parse<I, T>(arguments: I) -> Result<Parsed, CliError>
where
    I: IntoIterator<Item = T>,
    T: Into<std::ffi::OsString> + Clone,
{
    let error = match Cli::try_parse_from(arguments) {
        Ok(cli) => return Ok(Parsed::Run(Box::new(cli))),
        Err(error) => error,
    };
    match error.kind() {
        ClapKind::DisplayHelp | ClapKind::DisplayVersion => Ok(Parsed::Show(error.render().to_string())),
        ClapKind::DisplayHelpOnMissingArgumentOrSubcommand | ClapKind::MissingSubcommand => {
            Err(CliError::new(ErrorKind::Usage, "a command is missing; see: ogee --help"))
        }
        _ => Err(CliError::new(ErrorKind::Usage, sentence(&error.render().to_string()))),
    }
}

/// One sentence of clap's several lines: without `error:`, the usage and the pointer to the help.
fn sentence(rendered: &str) -> String {
    let text = rendered.strip_prefix("error: ").unwrap_or(rendered);
    let text = text.split("\n\nUsage:").next().unwrap_or(text);
    let text = text.split("\n\nFor more information").next().unwrap_or(text);
    let words: Vec<&str> = text.split_whitespace().collect();
    format!("{}; see --help", words.join(" "))
}

#[cfg(test)]
mod tests;
