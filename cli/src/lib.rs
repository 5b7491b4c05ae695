//! The `ogee` command: parse the arguments, do one thing, say how it went.
//!
//! | file or folder | what |
//! | --- | --- |
//! | `args.rs` | the command line as a whole; arguments of a group are in the group's file |
//! | `connect.rs`, `open.rs` | which cluster; open and close a volume |
//! | `cluster.rs` | `status`, `cluster`, `pool` |
//! | `volume.rs`, `snapshot.rs` | `volume`; `snapshot`, `clone`, `rollback` |
//! | `image/`, `qcow2/`, `sparse.rs` | `image import`; the qcow2 format; holes and zeros |
//! | `export/`, `checksum.rs`, `copy_out.rs` | `export`, `checksum`; reading a whole volume in order |
//! | `backup/`, `half_made.rs` | `backup`, `restore`; volumes that are being filled |
//! | `vhost.rs`, `null_device.rs` | `vhost-blk` with one volume; the device of `--null` |
//! | `vhost_many/` | `vhost-blk serve`, `attach`, `detach`, `ls`, `stats`: many volumes in one daemon |
//! | `libvirt.rs` | `libvirt-xml` |
//! | `nbd.rs`, `nbd_tls.rs`, `nbd_metrics.rs`, `socket_access.rs` | `nbd serve`; mode and group of sockets |
//! | `file_device.rs` | the device of `nbd serve --file`, for measurements |
//! | `nbd_map/` | `nbd map`, `unmap`, `ls`: `/dev/nbdN` |
//! | `volume_metrics.rs` | `/metrics` of `vhost-blk` |
//! | `tls.rs` | `tls`: certificates |
//! | `bench/` | `bench` |
//! | `dev/` | `dev`: a cluster on this machine |
//! | `daemon/` | `mds`, `chunkserver`, `snapclone` |
//! | `task.rs` | `task`; leaving work to snapclone |
//! | `error.rs`, `sdk_error.rs` | exit codes and the one line of an error |
//! | `output/`, `logging.rs`, `signals.rs`, `names.rs` | tables, JSON, progress; logs; signals; names |
//!
//! Invariants: an error is exactly one line on standard error, and its exit code is the one `ogee --help` documents;
//! nothing is printed on standard output by a command that fails; a name or size is checked before anything is done;
//! the command never panics on input. Deliberately absent: policy of any kind (it is the servers') and retries (the SDK's).

mod args;
mod backup;
mod bench;
mod checksum;
mod claim;
mod cluster;
mod connect;
mod copy_out;
mod daemon;
mod dev;
mod error;
mod export;
mod file_device;
mod half_made;
mod image;
mod libvirt;
mod logging;
mod names;
mod nbd;
mod nbd_map;
mod nbd_metrics;
mod nbd_tls;
mod null_device;
mod open;
mod output;
pub mod qcow2;
mod qos;
mod scrub;
mod sdk_error;
mod signals;
mod snapshot;
mod socket_access;
mod sparse;
mod take_over;
mod task;
mod tls;
mod verify;
mod vhost;
mod vhost_many;
mod volume;
mod volume_metrics;
mod volume_space;

use args::{Cli, Command, Parsed};
use connect::Context;
use error::{CliError, ErrorKind};
use output::Output;
use std::ffi::OsString;
use std::future::Future;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

/// Blocking work that is under way when a command ends gets this long; it is only reading or writing files then.
const BLOCKING_END_LIMIT: Duration = Duration::from_secs(5);

/// Runs the command of these arguments (the program's name first) and says what went wrong, if anything did.
#[must_use]
pub fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.collect();
    // Arguments that do not parse may still say how the error is wanted.
    let json = arguments.iter().any(|a| a == "--json");
    match parse_and_act(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody reads standard error: the exit code remains.
            let _ = writeln!(std::io::stderr(), "{}", error.render(json));
            ExitCode::from(error.kind().exit_code())
        }
    }
}

fn parse_and_act(arguments: Vec<OsString>) -> Result<(), CliError> {
    match args::parse(arguments)? {
        Parsed::Show(text) => Output::new(false).say(&text),
        Parsed::Run(cli) => act(*cli),
    }
}

fn act(cli: Cli) -> Result<(), CliError> {
    let context = Context { out: Output::new(cli.global.json), global: cli.global };
    match cli.command {
        Command::LibvirtXml(args) => libvirt::run(&context, &args),
        Command::Tls(command) => tls::run(&context, command),
        Command::Mds(args) => daemon::mds::run(&args),
        Command::Chunkserver(args) => daemon::chunkserver::run(&args),
        Command::Snapclone(args) => daemon::snapclone::run(&args),
        command => {
            logging::start_for_command();
            on_runtime(act_as_client(context, command))
        }
    }
}

/// Commands that talk to a cluster.
async fn act_as_client(context: Context, command: Command) -> Result<(), CliError> {
    let c = &context;
    match command {
        Command::Dev(command) => dev::run(c, command).await,
        Command::Status => cluster::status(c).await,
        Command::Cluster(command) => cluster::run(c, command).await,
        Command::Scrub(command) => scrub::run(c, command).await,
        Command::Verify(command) => verify::run(c, command).await,
        Command::Pool(command) => cluster::run_pool(c, command).await,
        Command::Image(command) => image::run(c, command).await,
        Command::Export(args) => export::run(c, args).await,
        Command::Checksum(args) => checksum::run(c, args).await,
        Command::Volume(command) => volume::run(c, command).await,
        Command::Snapshot(command) => snapshot::run(c, command).await,
        Command::Clone(args) => snapshot::clone_volume(c, args).await,
        Command::Rollback(args) => snapshot::rollback(c, args).await,
        Command::Backup(command) => Box::pin(backup::run(c, command)).await,
        Command::Restore(args) => Box::pin(backup::run_restore(c, args)).await,
        Command::Task(command) => task::run(c, command).await,
        Command::VhostBlk(args) => Box::pin(vhost_many::run(c, *args)).await,
        Command::Nbd(command) => nbd::run(c, command).await,
        Command::Bench(args) => Box::pin(bench::run(c, *args)).await,
        Command::Mds(_) | Command::Chunkserver(_) | Command::Snapclone(_) | Command::Tls(_) | Command::LibvirtXml(_) => {
            Err(CliError::new(ErrorKind::Failure, "this command talks to no cluster"))
        }
    }
}

/// Runs a client command. Its own runtime has two threads: one for the command's IO, one to spare for the rest.
fn on_runtime(work: impl Future<Output = Result<(), CliError>>) -> Result<(), CliError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| CliError::caused(ErrorKind::Failure, "start the runtime", e))?;
    let done = runtime.block_on(work);
    runtime.shutdown_timeout(BLOCKING_END_LIMIT);
    done
}
