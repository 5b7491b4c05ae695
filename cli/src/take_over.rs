//! `ogee vhost-blk --upgrade`, when a daemon serves the socket already: this one takes over from it, without a reconnection of the guest.
//!
//! Called by `vhost.rs`. Life: the running daemon has agreed; reach the cluster as its client, open the volume without taking it, start threads and connections;
//! take sockets, claim and front end; attach; say `ready`; serve on as any other daemon. Invariants: until the running daemon has let go, a failure here leaves it
//! going on; the volume is attached only after that. How and why: docs/adr/0015-upgrade-without-reconnection.md.

use crate::claim::Claim;
use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use crate::null_device::NullDevice;
use crate::open::{look_up_incoming, open_volume};
use crate::sdk_error::call_failed;
use crate::signals::StopSignals;
use crate::vhost::{VhostBlkArgs, end_incoming, end_volume, serve_failed, serve_until_end};
use crate::volume_metrics;
use ogee_client::{BlockDevice, Cluster, OpenError, OpenMode, StandbyVolume, Volume};
use ogee_common::id::VolumeId;
use ogee_common::name::VolumeRef;
use ogee_vhost_blk::{HandOverError, HandOverRefusal, ServeEnd, StopHandle, TakenOver, Upgrade, VhostBlkServer, WireError};
use std::fs::File;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::time::Duration;
use tokio::task::JoinHandle;

/// The running daemon has the address of its metrics until it has ended; it is asked for so often, and so many times.
const METRICS_PAUSE: Duration = Duration::from_millis(100);
const METRICS_ATTEMPTS: u32 = 300;

/// Asks the daemon that serves the socket whether this one may take over; `None`: there is no daemon.
///
/// # Errors
/// It refuses, or cannot be spoken with; it goes on.
pub(crate) async fn ask(args: &VhostBlkArgs, signals: &mut StopSignals) -> Result<Option<Upgrade>, CliError> {
    let (config, terms) = (args.config(), args.terms());
    or_stopped(signals, blocking(move || Upgrade::begin(&config, &terms).map_err(failed))).await
}

/// What has taken nothing from the running daemon yet, unless a signal comes first.
async fn or_stopped<T>(signals: &mut StopSignals, work: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    tokio::select! {
        done = work => done,
        () = signals.wait() => Err(failed(HandOverError::Stopped)),
    }
}

/// Takes over and serves.
///
/// # Errors
/// The volume cannot be opened or attached, the running daemon goes on, or what ends any other daemon.
pub(crate) async fn run(
    context: &Context,
    args: &VhostBlkArgs,
    upgrade: Upgrade,
    signals: &mut StopSignals,
) -> Result<(), CliError> {
    let Some(name) = args.volume() else {
        let device = NullDevice::new(args.null_bytes());
        let taken = take(args, upgrade, &device, signals).await?;
        return serve_until_end(context.out, args, &device.info(), taken.server, (taken.stop, None), signals).await.map(drop);
    };
    let client = NonZeroU64::new(upgrade.client());
    let cluster = context.cluster_as(client, args.io_timeout())?;
    if args.is_incoming() {
        let volume = or_stopped(signals, look_up_incoming(&cluster, name, args.serial())).await?;
        check_volume(name, volume.id(), &upgrade)?;
        let mut taken = take(args, upgrade, &volume, signals).await?;
        let claim = taken.claim(args, client)?;
        let served = serve_until_end(context.out, args, &volume.info(), taken.server, (taken.stop, None), signals).await;
        return end_incoming(&volume, name, claim, served, signals).await;
    }
    if args.is_read_only() {
        let volume = args.with_serial(or_stopped(signals, open_volume(&cluster, name, OpenMode::ReadOnly)).await?);
        check_volume(name, volume.attach_info().volume, &upgrade)?;
        let mut taken = take(args, upgrade, &volume, signals).await?;
        let claim = taken.claim(args, client)?;
        let metrics = args.metrics().map(|addr| tokio::spawn(metrics_when_free(addr, volume.clone())));
        let (stop, addr) = (taken.stop, args.metrics());
        let served = serve_until_end(context.out, args, &volume.info(), taken.server, (stop, addr), signals).await;
        end(metrics);
        return end_volume(&volume, claim, served, signals).await;
    }
    run_writer(context, args, (upgrade, client), (&cluster, name), signals).await
}

/// Takes over a volume that is written.
async fn run_writer(
    context: &Context,
    args: &VhostBlkArgs,
    (upgrade, client): (Upgrade, Option<NonZeroU64>),
    (cluster, name): (&Cluster, &VolumeRef),
    signals: &mut StopSignals,
) -> Result<(), CliError> {
    let prepare = async { StandbyVolume::prepare(cluster, name, args.serial()).await.map_err(|e| not_attached(name, e)) };
    let standby = or_stopped(signals, prepare).await?;
    check_volume(name, standby.id(), &upgrade)?;
    let mut taken = take(args, upgrade, &standby, signals).await?;
    let claim = taken.claim(args, client)?;
    // The guest waits from here on; without an MDS for as long as there is none.
    let volume = tokio::select! {
        attached = standby.attach() => attached.map_err(|e| not_attached(name, e))?,
        () = signals.wait() => {
            return Err(CliError::new(ErrorKind::Unavailable, format!("attach {name}: stopped before the MDS answered")));
        }
    };
    let metrics = args.metrics().map(|addr| tokio::spawn(metrics_when_free(addr, volume.clone())));
    let (stop, addr) = (taken.stop, args.metrics());
    let served = serve_until_end(context.out, args, &standby.info(), taken.server, (stop, addr), signals).await;
    end(metrics);
    end_volume(&volume, claim, served, signals).await
}

/// What was taken, and how the server that goes on with it is stopped.
struct Taken<D: BlockDevice> {
    server: VhostBlkServer<D>,
    stop: StopHandle,
    claim: Option<File>,
}

impl<D: BlockDevice> Taken<D> {
    fn claim(&mut self, args: &VhostBlkArgs, client: Option<NonZeroU64>) -> Result<Claim, CliError> {
        let lost = || CliError::new(ErrorKind::Failure, "the running daemon handed no claim over");
        let file = self.claim.take().ok_or_else(lost)?;
        Ok(Claim::handed_over(args.socket(), file, client.map_or(0, NonZeroU64::get)))
    }
}

/// Whether the name still means what the running daemon serves: a volume is renamed under it, and its name given to another one.
fn check_volume(name: &VolumeRef, found: VolumeId, upgrade: &Upgrade) -> Result<(), CliError> {
    if found.0 == upgrade.volume() {
        return Ok(());
    }
    let text = format!("{name} is volume {found} now, and the running daemon serves volume {}: it goes on", upgrade.volume());
    Err(CliError::new(ErrorKind::Conflict, text))
}

/// A signal stops it as long as nothing was taken; after that the server ends as soon as it runs.
async fn take<D: BlockDevice>(
    args: &VhostBlkArgs,
    upgrade: Upgrade,
    device: &D,
    signals: &mut StopSignals,
) -> Result<Taken<D>, CliError> {
    let (device, config) = (device.clone(), args.config());
    let stop = StopHandle::new().map_err(serve_failed)?;
    let stops = stop.clone();
    let take = move || upgrade.prepare(device, config, stops).and_then(ogee_vhost_blk::Prepared::take).map_err(failed);
    let mut taking = std::pin::pin!(blocking(take));
    let taken = tokio::select! {
        taken = &mut taking => taken,
        () = signals.wait() => {
            stop.stop();
            taking.await
        }
    };
    let TakenOver { server, claim } = taken?;
    Ok(Taken { server, stop, claim })
}

/// Runs what blocks its thread.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, CliError> + Send + 'static) -> Result<T, CliError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(CliError::caused(ErrorKind::Failure, "take over", e)))
}

/// Serves metrics as soon as the address is free, until aborted.
async fn metrics_when_free(addr: SocketAddr, volume: Volume) {
    let mut attempts = METRICS_ATTEMPTS;
    let _server = loop {
        match volume_metrics::serve(addr, &volume) {
            Ok(server) => break server,
            Err(error) if error.kind() == ErrorKind::Conflict && attempts > 0 => attempts -= 1,
            Err(error) => {
                tracing::warn!(target: "controlpath", error = error.chain(), "no metrics after the upgrade");
                return;
            }
        }
        tokio::time::sleep(METRICS_PAUSE).await;
    };
    std::future::pending::<()>().await;
}

fn end(metrics: Option<JoinHandle<()>>) {
    if let Some(task) = metrics {
        task.abort();
    }
}

fn not_attached(name: &VolumeRef, error: OpenError) -> CliError {
    match error {
        OpenError::Attach { source, .. } => call_failed(&format!("attach {name} for the running daemon's guest"), &source),
        other => CliError::caused(ErrorKind::Failure, format!("attach {name}"), other),
    }
}

fn failed(error: HandOverError) -> CliError {
    use ogee_vhost_blk::SocketError;
    let kind = match &error {
        HandOverError::Refused(HandOverRefusal::FrontEndBusy | HandOverRefusal::InFlight | HandOverRefusal::Attaching) => ErrorKind::Unavailable,
        HandOverError::Refused(HandOverRefusal::Failed) => ErrorKind::Failure,
        HandOverError::Refused(_) | HandOverError::Version { .. } | HandOverError::OtherUser { .. } => ErrorKind::Conflict,
        HandOverError::Wire(WireError::TimedOut { .. }) => ErrorKind::Unavailable,
        HandOverError::Stopped => ErrorKind::Failure,
        HandOverError::Socket(SocketError::PathTooLong { .. }) => ErrorKind::Usage,
        HandOverError::Serve(_) => ErrorKind::Usage,
        _ => ErrorKind::Failure,
    };
    CliError::caused(kind, "take over from the running daemon", error)
}

/// Whether the volume and the claim are somebody else's now.
pub(crate) fn is_handed_over(served: &Result<ServeEnd, CliError>) -> bool {
    matches!(served, Ok(ServeEnd::HandedOver))
}
