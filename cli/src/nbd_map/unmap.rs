//! `ogee nbd unmap`: flush, detach, end the server.
//!
//! Order: the device is opened exclusively, which fails while it is mounted and keeps it from being mounted; what the kernel has is
//! flushed to the server; the keeper goes, so that it does not mend what is taken apart; the kernel lets the device go; the server answers
//! what it has and gives the volume back. Every step may be repeated: a command that was killed is simply given again.

use super::DirArgs;
use super::child::{self, END_LIMIT};
use super::device::System;
use super::keeper::{backend, kernel_failed};
use super::options::{device_index, device_path};
use super::place::{Place, Record, records};
use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use clap::Args;
use ogee_nbd::kernel::KernelNbd;
use rustix::fs::OFlags;
use serde::Serialize;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::Duration;

/// Looks at a device that a process has open: udev reads every new device for a moment.
const LOOKS: u32 = 10;
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// Arguments of `ogee nbd unmap`.
#[derive(Debug, Clone, Args)]
pub(crate) struct UnmapArgs {
    /// What to unmap
    #[arg(value_name = "DEVICE|VOLUME", required_unless_present = "all")]
    target: Option<String>,
    /// Unmap everything that is mapped here
    #[arg(long, conflicts_with = "target")]
    all: bool,
    /// Also if it is used or its server does not answer: what is not written is lost, and IO fails
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    dir: DirArgs,
}

#[derive(Debug, Serialize)]
struct Unmapped {
    unmapped: PathBuf,
    volume: String,
}

/// Carries out `ogee nbd unmap`.
///
/// # Errors
/// Nothing of that name is mapped ([`ErrorKind::NotFound`]), it is in use ([`ErrorKind::Conflict`]), or it cannot be flushed.
pub(crate) async fn run(context: &Context, args: &UnmapArgs) -> Result<(), CliError> {
    let mapped = records(&args.dir.socket_dir)?;
    let Some(target) = &args.target else {
        return unmap_all(context, args, mapped).await;
    };
    let name = target.strip_prefix('/').unwrap_or(target);
    let by_volume = mapped.iter().position(|record| record.volume == *name);
    let by_device = || device_index(target).ok().and_then(|index| mapped.iter().position(|record| record.index == index));
    let Some(found) = by_volume.or_else(by_device) else {
        let text = format!("{target}: not mapped by ogee; see: ogee nbd ls");
        return Err(CliError::new(ErrorKind::NotFound, text));
    };
    let record = mapped.into_iter().nth(found).ok_or_else(|| CliError::new(ErrorKind::NotFound, "not mapped"))?;
    let unmapped = unmap(args, record).await?;
    context.out.result(&unmapped, |one| format!("{} is unmapped", one.unmapped.display()))
}

/// All of them, the last device first; the first error counts after all were tried.
async fn unmap_all(context: &Context, args: &UnmapArgs, mapped: Vec<Record>) -> Result<(), CliError> {
    let (mut unmapped, mut failed) = (vec![], None);
    for record in mapped.into_iter().rev() {
        match unmap(args, record).await {
            Ok(one) => unmapped.push(one),
            Err(error) if failed.is_some() => context.out.warn(&error.chain()),
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) => Err(error),
        None => context.out.result(&unmapped, |all| {
            all.iter().map(|one| format!("{} is unmapped", one.unmapped.display())).collect::<Vec<_>>().join("\n")
        }),
    }
}

async fn unmap(args: &UnmapArgs, record: Record) -> Result<Unmapped, CliError> {
    let device = device_path(record.index);
    let within = format!("unmap {} ({})", device.display(), record.volume);
    let (place, force) = (Place::of(&args.dir.socket_dir, &record.volume), args.force);
    let work = tokio::task::spawn_blocking(move || {
        take_down(&place, &record, force)?;
        Ok(Unmapped { unmapped: device, volume: record.volume })
    });
    let done = work.await.map_err(|e| CliError::caused(ErrorKind::Failure, "unmap", e))?;
    done.map_err(|e: CliError| e.within(within))
}

fn take_down(place: &Place, record: &Record, force: bool) -> Result<(), CliError> {
    let system = System::default();
    // Somebody else may have the device by now.
    let is_ours = system.is_attached_to(record.index, &backend(&record.volume));
    let held = if is_ours && !force { Some(flushed(place, &system, record)?) } else { None };
    if let Some(keeper) = child::find_keeper(record.keeper_pid, &record.volume) {
        keeper.end(END_LIMIT)?;
    }
    if is_ours {
        KernelNbd::open().and_then(|mut kernel| kernel.disconnect(record.index)).map_err(kernel_failed)?;
    }
    // The last close lets the kernel forget size and name.
    drop(held);
    if let Some(server) = child::find_server(place) {
        server.end(END_LIMIT)?;
    }
    place.forget();
    Ok(())
}

/// The device, exclusively open and flushed.
fn flushed(place: &Place, system: &System, record: &Record) -> Result<File, CliError> {
    let advice = "stop that first, or --force";
    let mut looks = 0;
    while let Some(user) = system.user(record.index)? {
        looks += 1;
        if looks >= LOOKS || !user.starts_with("opened") {
            return Err(CliError::new(ErrorKind::Conflict, format!("it is {user}")).with_advice(advice));
        }
        std::thread::sleep(LOOK_PAUSE);
    }
    if child::find_server(place).is_none() {
        let text = format!("its server does not run; ogee nbd map {} starts it, --force loses what is not written", record.volume);
        return Err(CliError::new(ErrorKind::Conflict, text));
    }
    let path = device_path(record.index);
    let flags = i32::try_from(OFlags::EXCL.bits()).unwrap_or_default();
    let device = File::options().read(true).custom_flags(flags).open(&path).map_err(|e| match e.kind() {
        std::io::ErrorKind::ResourceBusy => CliError::new(ErrorKind::Conflict, "it is in use").with_advice(advice),
        _ => CliError::file("open", &path, e),
    })?;
    device.sync_all().map_err(|e| CliError::file("flush", &path, e).with_advice("--force loses what is not written"))?;
    Ok(device)
}
