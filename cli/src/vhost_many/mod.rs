//! `ogee vhost-blk serve`, `attach`, `detach`, `ls`, `stats`: many volumes in one daemon, managed through a control socket.
//!
//! | file | what |
//! | --- | --- |
//! | `serve.rs` | the daemon's life |
//! | `daemon.rs` | what it does when it is asked |
//! | `table.rs` | what is attached, by socket |
//! | `attachment.rs`, `running.rs` | the life of one volume (drawing); its open volume and its server's thread |
//! | `known.rs` | whether a name still means the volume that was served, and nobody else had it since |
//! | `control.rs`, `protocol.rs`, `spec.rs` | the control socket; its language; how a volume is asked for |
//! | `state.rs`, `book.rs` | the state file; the table with the file that follows it |
//! | `figures.rs` | `/metrics` |
//! | `client.rs` | the commands that ask a daemon |
//!
//! One process has one connection to the cluster and to the MDS is one client; each volume has a socket, a server's thread, and queue
//! threads while a front end is connected. Invariants: what goes wrong with one volume (fenced, deleted, a hostile guest, a thread that
//! panics, a socket that is gone) changes nothing for the others; what a client was told is done is done, and with `--state` it
//! is done again after a kill. Deliberately absent: `--incoming` (live migration has a daemon for each guest) and null devices.

mod attachment;
mod book;
mod client;
mod control;
mod daemon;
mod figures;
mod known;
mod protocol;
mod running;
mod serve;
mod spec;
mod state;
mod table;

use crate::connect::Context;
use crate::error::CliError;
use crate::socket_access::{socket_group, socket_mode};
use crate::vhost::{self, VhostBlkArgs, serial};
use clap::{Args, Subcommand};
use ogee_common::name::VolumeRef;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Help of `ogee vhost-blk`.
pub(crate) const EXAMPLES: &str = "\
Examples:
  ogee vhost-blk vm1 --socket /run/ogee/vm1.sock --queues 4
  ogee vhost-blk golden@v1 --socket /run/ogee/v1.sock --read-only

It prints `ready` and what QEMU and libvirt need. SIGTERM and SIGINT end it: requests in flight are answered first.

Many volumes in one daemon:
  ogee vhost-blk serve --control /run/ogee/vhost-blk.control --state /var/lib/ogee/vhost-blk.state
  ogee vhost-blk attach vm1 --control /run/ogee/vhost-blk.control
A volume that has the name of one of these commands comes after the options: ogee vhost-blk --socket /run/ogee/ls.sock ls";

const SERVE_EXAMPLES: &str = "\
Example:
  ogee vhost-blk serve --control /run/ogee/vhost-blk.control --state /var/lib/ogee/vhost-blk.state --socket-mode 660 \\
    --socket-group libvirt-qemu --metrics 127.0.0.1:9200

Who may write to the control socket may attach any volume: it is its owner's, and with --control-group also a group's.
It prints `ready` when each volume of the state file was tried once; one that fails is tried again every second. SIGTERM and SIGINT
end it: requests in flight are answered first, then all volumes are given back; the state file keeps them for the next start.";

const ATTACH_EXAMPLES: &str = "\
Examples:
  ogee vhost-blk attach vm1 --control /run/ogee/vhost-blk.control           # serves /run/ogee/vm1.sock
  ogee vhost-blk attach team/db --control /run/ogee/vhost-blk.control --socket /run/ogee/team-db.sock --queues 4
  ogee vhost-blk attach golden@v1 --control /run/ogee/vhost-blk.control --read-only

When it returns the socket can be connected to. `ogee libvirt-xml` prints what libvirt has to be told.";

const DETACH_EXAMPLES: &str = "\
Examples:
  ogee vhost-blk detach vm1 --control /run/ogee/vhost-blk.control
  ogee vhost-blk detach --socket /run/ogee/v1.sock --control /run/ogee/vhost-blk.control
  ogee vhost-blk detach vm1 --force --control /run/ogee/vhost-blk.control   # its virtual machine loses the disk

When it returns requests in flight were answered, the socket is gone and the volume is given back.";

/// Arguments of `ogee vhost-blk`: one volume, or a command of the daemon with many.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, disable_help_subcommand = true)]
pub(crate) struct VhostArgs {
    #[command(subcommand)]
    many: Option<ManyCommand>,
    #[command(flatten)]
    one: Option<VhostBlkArgs>,
}

/// Many volumes in one daemon.
#[derive(Debug, Subcommand)]
enum ManyCommand {
    /// Serve any number of volumes in one daemon, in the foreground; which ones is said through a control socket
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(ServeArgs),
    /// Attach a volume to a running daemon and serve it
    #[command(after_help = ATTACH_EXAMPLES)]
    Attach(AttachArgs),
    /// Stop serving a volume and give it back
    #[command(after_help = DETACH_EXAMPLES)]
    Detach(DetachArgs),
    /// What a daemon has attached
    #[command(after_help = "Example:\n  ogee vhost-blk ls --control /run/ogee/vhost-blk.control --json")]
    Ls(ControlArgs),
    /// What the volumes of a daemon did since they were attached: IOs, errors, bytes, latency
    #[command(after_help = "Example:\n  ogee vhost-blk stats --control /run/ogee/vhost-blk.control --json")]
    Stats(ControlArgs),
}

/// Which daemon.
#[derive(Debug, Clone, Args)]
struct ControlArgs {
    /// The daemon's control socket
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
}

/// Arguments of `serve`.
#[derive(Debug, Clone, Args)]
struct ServeArgs {
    /// The control socket, a UNIX socket; at most 107 bytes
    #[arg(long, value_name = "PATH")]
    control: PathBuf,
    /// Let a group use the control socket too, a local name or a number
    #[arg(long, value_name = "GROUP", value_parser = socket_group)]
    control_group: Option<u32>,
    /// Keep what is attached in this file, and attach it again at the next start; by default nothing is kept
    #[arg(long, value_name = "FILE")]
    state: Option<PathBuf>,
    /// Permissions of volumes' sockets that are attached without their own, octal; by default as the umask has it
    #[arg(long, value_name = "MODE", value_parser = socket_mode)]
    socket_mode: Option<u32>,
    /// Group of volumes' sockets that are attached without their own: the one that QEMU runs in
    #[arg(long, value_name = "GROUP", value_parser = socket_group)]
    socket_group: Option<u32>,
    /// Fail an IO that takes longer, in seconds; by default guests wait for ever
    #[arg(long, value_name = "SECONDS")]
    io_timeout: Option<u64>,
    /// Answer GET /metrics here, for Prometheus: what each volume did; by default nowhere
    #[arg(long, value_name = "ADDR")]
    metrics: Option<SocketAddr>,
}

/// Arguments of `attach`.
#[derive(Debug, Clone, Args)]
struct AttachArgs {
    /// The volume, or with --read-only also a snapshot
    #[arg(value_name = "VOLUME[@SNAPSHOT]", value_parser = VolumeRef::parse)]
    volume: VolumeRef,
    #[command(flatten)]
    control: ControlArgs,
    /// The UNIX socket to serve, at most 107 bytes; by default VOLUME.sock beside the control socket
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Permissions of the socket, octal; by default the daemon's --socket-mode
    #[arg(long, value_name = "MODE", value_parser = socket_mode)]
    socket_mode: Option<u32>,
    /// Group of the socket, a local name or a number; by default the daemon's --socket-group
    #[arg(long, value_name = "GROUP", value_parser = socket_group)]
    socket_group: Option<u32>,
    /// Queues offered, best as many as the guest has CPUs
    #[arg(long, default_value_t = ogee_vhost_blk::NUM_QUEUES_DEFAULT)]
    queues: u16,
    /// Refuse writes; a volume or a snapshot may be attached so on any number of sockets
    #[arg(long)]
    read_only: bool,
    /// What the guest sees as the disk's serial, at most 20 characters; by default ogee and the volume's number
    #[arg(long, value_name = "TEXT", value_parser = serial)]
    serial: Option<String>,
    /// Take the volume from the client that has it attached
    #[arg(long, conflicts_with = "read_only")]
    steal: bool,
}

/// Arguments of `detach`.
#[derive(Debug, Clone, Args)]
struct DetachArgs {
    /// The volume or snapshot
    #[arg(value_name = "VOLUME[@SNAPSHOT]", value_parser = VolumeRef::parse, required_unless_present = "socket")]
    volume: Option<VolumeRef>,
    #[command(flatten)]
    control: ControlArgs,
    /// The one that is served on this socket
    #[arg(long, value_name = "PATH", conflicts_with = "volume")]
    socket: Option<PathBuf>,
    /// Also under a virtual machine that is connected: it loses its disk
    #[arg(long)]
    force: bool,
}

/// Carries out `ogee vhost-blk`.
///
/// # Errors
/// Those of the command.
pub(crate) async fn run(context: &Context, args: VhostArgs) -> Result<(), CliError> {
    match (args.many, args.one) {
        (Some(ManyCommand::Serve(args)), _) => {
            let doing = format!("serve volumes by {}", args.control.display());
            serve::run(context, &args).await.map_err(|e| e.within(doing))
        }
        (Some(ManyCommand::Attach(args)), _) => client::attach(context, args).await,
        (Some(ManyCommand::Detach(args)), _) => client::detach(context, args).await,
        (Some(ManyCommand::Ls(args)), _) => client::list(context, &args).await,
        (Some(ManyCommand::Stats(args)), _) => client::stats(context, &args).await,
        (None, Some(args)) => vhost::run(context, args).await,
        // clap asks for the arguments of one volume first.
        (None, None) => Err(CliError::new(crate::error::ErrorKind::Usage, "name a volume and --socket; see --help")),
    }
}
