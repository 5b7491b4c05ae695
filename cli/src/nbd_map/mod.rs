//! `ogee nbd map`, `unmap`, `ls`: volumes as `/dev/nbdN` of this host, through the kernel's NBD client.
//!
//! | file | what |
//! | --- | --- |
//! | `options.rs`, `table.rs` | options of a mapping; `/etc/ogee/nbdtab` |
//! | `place.rs` | sockets, records, locks, logs |
//! | `keeper.rs` | the process that keeps a mapping (drawing) |
//! | `child.rs` | starting and finding keeper and server |
//! | `device.rs` | what `/sys` and `/proc` say of a device |
//! | `unmap.rs`, `list.rs` | the other two commands |
//!
//! Three processes have a part: the *server* (`ogee nbd serve`) may die and is started again, the *keeper* may die and leaves
//! device and server as they are, until `map` is said once more, and the kernel, which holds the IO meanwhile. Invariant: a device
//! that anything uses is not detached unless `--force` says so.

mod child;
mod device;
mod keeper;
mod list;
mod options;
mod place;
mod table;
mod unmap;

pub(crate) use list::run as ls;
pub(crate) use unmap::{UnmapArgs, run as unmap};

use crate::connect::Context;
use crate::daemon::detach_if_asked;
use crate::error::{CliError, ErrorKind};
use crate::signals::StopSignals;
use child::Session;
use clap::Args;
use device::System;
use keeper::{Plan, kernel_failed};
use ogee_common::name::VolumeRef;
use ogee_common::size::ByteLen;
use ogee_nbd::kernel::KernelNbd;
use options::{DIR_DEFAULT, MapOptions, device_path};
use place::{Place, Record};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use table::{Entry, TABLE_DEFAULT};

pub(crate) const MAP_EXAMPLES: &str = "\
Examples:
  ogee nbd map team/db                                  # prints the device, for example /dev/nbd0
  ogee nbd map team/db --device /dev/nbd3 --connections 8
  ogee nbd map golden@v1
  ogee nbd map --all                                    # what /etc/ogee/nbdtab lists, as at boot
  ogee nbd map team/db --foreground                     # for a systemd unit

It needs root and the kernel's module nbd. A server runs in the background and is started again when it dies: IO waits meanwhile.
A volume that is mapped already stays as it is. Lines of the table: VOLUME[@SNAPSHOT] DEVICE or -, options without dashes:
  team/db  /dev/nbd0  connections=8,timeout=30";

pub(crate) const UNMAP_EXAMPLES: &str = "\
Examples:
  ogee nbd unmap /dev/nbd0
  ogee nbd unmap team/db
  ogee nbd unmap --all";

/// Arguments of `ogee nbd map`.
#[derive(Debug, Clone, Args)]
pub(crate) struct MapArgs {
    /// What to map
    #[arg(value_name = "VOLUME[@SNAPSHOT]", value_parser = VolumeRef::parse, required_unless_present = "all")]
    volume: Option<VolumeRef>,
    /// Map what the table lists
    #[arg(long, conflicts_with_all = ["volume", "foreground"])]
    all: bool,
    /// The table
    #[arg(long, value_name = "FILE", default_value = TABLE_DEFAULT, requires = "all")]
    table: PathBuf,
    #[command(flatten)]
    options: MapOptions,
    /// Stay, and keep the mapping until SIGTERM; the device stays attached then
    #[arg(long)]
    foreground: bool,
    #[command(flatten)]
    dir: DirArgs,
}

/// Where mappings are noted.
#[derive(Debug, Clone, Args)]
pub(crate) struct DirArgs {
    /// Folder of sockets, records and logs of mappings
    #[arg(long, value_name = "DIR", default_value = DIR_DEFAULT)]
    socket_dir: PathBuf,
}

/// A mapping, as it is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Mapped {
    device: PathBuf,
    volume: String,
    size_bytes: u64,
    read_only: bool,
    /// Whether it was there before.
    was_mapped: bool,
}

impl Mapped {
    fn of(record: &Record, was_mapped: bool) -> Self {
        let Record { volume, index, size_bytes, read_only, .. } = record;
        Self { device: device_path(*index), volume: volume.clone(), size_bytes: *size_bytes, read_only: *read_only, was_mapped }
    }
}

/// Carries out `ogee nbd map`.
///
/// # Errors
/// The volume cannot be served or the device not attached; with `--all` the first that failed, after all were tried.
pub(crate) async fn map(context: &Context, args: MapArgs) -> Result<(), CliError> {
    if args.all {
        return map_all(context, &args).await;
    }
    let Some(volume) = args.volume.clone() else {
        return Err(CliError::new(ErrorKind::Usage, "name a volume, or give --all"));
    };
    let within = format!("map {volume}");
    let plan = plan(context, &args.dir, Entry { volume, options: args.options });
    let out = context.out;
    if args.foreground {
        let kept = keep(context, plan).await;
        // The command that started it in the background says that itself.
        let is_background = std::env::var_os(crate::dev::DETACH_VARIABLE).is_some();
        return kept.map_err(|e| if is_background { e } else { e.within(within) });
    }
    let mapped = map_one(plan).await.map_err(|e| e.within(within))?;
    out.result(&mapped, |mapped| mapped.device.display().to_string())
}

fn plan(context: &Context, dir: &DirArgs, Entry { volume, options }: Entry) -> Plan {
    let place = Place::of(&dir.socket_dir, &volume.to_string());
    Plan { volume, options, place, cluster: child::cluster_arguments(&context.global) }
}

/// The mappings of the table, one after the other; what is mapped already stays.
async fn map_all(context: &Context, args: &MapArgs) -> Result<(), CliError> {
    if args.options != MapOptions::parse(std::iter::empty()).map_err(|e| CliError::caused(ErrorKind::Failure, "options", e))? {
        return Err(CliError::new(ErrorKind::Usage, "with --all the options are in the table"));
    }
    let (mut mapped, mut failed) = (vec![], None);
    for entry in table::read(&args.table)? {
        let within = format!("map {}", entry.volume);
        match map_one(plan(context, &args.dir, entry)).await {
            Ok(one) => mapped.push(one),
            Err(error) => {
                let error = error.within(within);
                if failed.is_some() {
                    // The first one is the result; each is told.
                    context.out.warn(&error.chain());
                } else {
                    failed = Some(error);
                }
            }
        }
    }
    match failed {
        Some(error) => Err(error),
        None => context.out.result(&mapped, |all| {
            let line = |one: &Mapped| format!("{} {} ({})", one.device.display(), one.volume, ByteLen(one.size_bytes));
            all.iter().map(line).collect::<Vec<_>>().join("\n")
        }),
    }
}

/// Maps in the background, unless it is mapped.
async fn map_one(plan: Plan) -> Result<Mapped, CliError> {
    let work = tokio::task::spawn_blocking(move || start_keeper(&plan));
    work.await.map_err(|e| CliError::caused(ErrorKind::Failure, "start the keeper", e))?
}

fn start_keeper(plan: &Plan) -> Result<Mapped, CliError> {
    let volume = plan.volume.to_string();
    if let Some(record) = plan.place.record()
        && System::default().is_attached_to(record.index, &plan.backend())
        && child::find_keeper(record.keeper_pid, &volume).is_some()
    {
        return match plan.options.device {
            Some(wanted) if wanted != record.index => {
                let text = format!("it is mapped already, on {}", device_path(record.index).display());
                Err(CliError::new(ErrorKind::Conflict, text))
            }
            _ => Ok(Mapped::of(&record, true)),
        };
    }
    // Said here and not in a log: the most frequent mistakes.
    KernelNbd::open().map_err(kernel_failed)?;
    plan.place.make_dir()?;
    let mut arguments: Vec<OsString> = vec!["nbd".into(), "map".into(), volume.into(), "--foreground".into()];
    arguments.extend(plan.options.arguments().into_iter().map(OsString::from));
    arguments.extend([OsString::from("--socket-dir"), plan.place.dir().into()]);
    arguments.extend(plan.cluster.iter().cloned());
    let ready = child::start(&plan.place, &arguments, Session::Own, None)?;
    let ready = ready.ok_or_else(|| CliError::new(ErrorKind::Failure, "the keeper was stopped"))?;
    serde_json::from_value(ready.line).map_err(|e| CliError::caused(ErrorKind::Failure, "read what the keeper says", e))
}

/// Keeps a mapping in this process.
async fn keep(context: &Context, plan: Plan) -> Result<(), CliError> {
    detach_if_asked();
    let mut signals = StopSignals::listen()?;
    plan.place.make_dir()?;
    let (stop, stopped) = UnixStream::pair().map_err(|e| CliError::caused(ErrorKind::Failure, "make a pair of sockets", e))?;
    let out = context.out;
    let mut keeping = tokio::task::spawn_blocking(move || {
        keeper::keep(&plan, &stopped, |record| {
            let mapped = Mapped::of(record, false);
            out.result(&mapped, |mapped| format!("ready: {} on {}", mapped.volume, mapped.device.display()))
        })
    });
    let ended = tokio::select! {
        ended = &mut keeping => ended,
        () = signals.wait() => {
            drop(stop);
            keeping.await
        }
    };
    ended.map_err(|e| CliError::caused(ErrorKind::Failure, "keep the mapping", e))?
}
