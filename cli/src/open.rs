//! Opening and closing volumes for a command.

use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use crate::sdk_error::call_failed;
use ogee_client::{Cluster, IncomingEnd, IncomingVolume, OpenError, OpenMode, Volume};
use ogee_common::id::VolumeId;
use ogee_common::name::{VolumePath, VolumeRef};
use ogee_proto::{MdsErrorKind, mds};
use std::time::Duration;

/// A command waits this long for the IO in flight and the MDS when it gives a volume back.
const DETACH_TIMEOUT: Duration = Duration::from_secs(20);

/// What the MDS has under the name of a volume now; of a snapshot, its volume.
///
/// # Errors
/// There is none, or the MDS does not answer.
pub(crate) async fn look_up(cluster: &Cluster, name: &VolumeRef) -> Result<mds::Volume, CliError> {
    let found = cluster.mds().stat_volume(mds::StatVolumeRequest { path: name.path.to_string() }).await;
    found.map_err(|e| call_failed(&format!("open {name}"), &e))
}

/// Attaches a volume or a snapshot.
///
/// # Errors
/// What the MDS refused, with the name and, for an attached volume, what can be done.
pub(crate) async fn open_volume(cluster: &Cluster, name: &VolumeRef, mode: OpenMode) -> Result<Volume, CliError> {
    match Volume::open(cluster, name, mode).await {
        Ok(volume) => Ok(volume),
        Err(OpenError::Attach { source, .. }) => {
            let error = call_failed(&format!("open {name}"), &source);
            if source.kind == MdsErrorKind::Attached {
                return Err(error.with_advice("stop that client first, or take the volume from it (vhost-blk --steal, nbd serve --steal)"));
            }
            Err(error)
        }
        Err(e @ OpenError::SnapshotIsReadOnly { .. }) => {
            Err(CliError::caused(ErrorKind::Usage, format!("open {name}"), e))
        }
        Err(e) => Err(CliError::caused(ErrorKind::Failure, format!("open {name}"), e)),
    }
}

/// Waits for IO in flight and gives the volume back.
///
/// # Errors
/// The MDS does not answer, or IO in flight does not end in time. The next attach takes the volume over by its fence.
pub(crate) async fn close_volume(volume: &Volume) -> Result<(), CliError> {
    let name = &volume.attach_info().name;
    match tokio::time::timeout(DETACH_TIMEOUT, volume.detach()).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(e)) => Err(call_failed(&format!("detach {name}"), &e.0)),
        Err(_) => Err(not_in_time(name)),
    }
}

/// Looks up a volume that a guest will bring along by live migration; it is attached when that guest starts.
///
/// # Errors
/// The MDS does not know it or does not answer, or the name is that of a snapshot.
pub(crate) async fn look_up_incoming(cluster: &Cluster, name: &VolumeRef, serial: Option<&str>) -> Result<IncomingVolume, CliError> {
    if name.snapshot.is_some() {
        return Err(CliError::new(ErrorKind::Usage, format!("{name} is a snapshot; --incoming is for volumes that are written")));
    }
    match IncomingVolume::look_up(cluster, &name.path, serial).await {
        Ok(volume) => Ok(volume),
        Err(OpenError::Attach { source, .. }) => Err(call_failed(&format!("look up {name}"), &source)),
        Err(e) => Err(CliError::caused(ErrorKind::Failure, format!("look up {name}"), e)),
    }
}

/// As [`open_volume`], of the volume that the name meant a moment ago: names move.
///
/// # Errors
/// The same, and the name means another volume now ([`ErrorKind::Conflict`]); that one is given back.
pub(crate) async fn open_same(cluster: &Cluster, name: &VolumeRef, mode: OpenMode, volume_id: VolumeId) -> Result<Volume, CliError> {
    let volume = open_volume(cluster, name, mode).await?;
    if volume.attach_info().volume == volume_id {
        return Ok(volume);
    }
    give_back(&volume).await;
    Err(CliError::new(ErrorKind::Conflict, format!("{name} was renamed while it was attached: try again")))
}

/// Gives a volume back that is not used after all; that this fails is only told in the log.
pub(crate) async fn give_back(volume: &Volume) {
    if let Err(error) = close_volume(volume).await {
        let name = &volume.attach_info().name;
        tracing::warn!(target: "controlpath", volume = %name, error = error.chain(), "volume not given back");
    }
}

/// As [`close_volume`], for a volume that may never have been attached.
///
/// # Errors
/// The same.
pub(crate) async fn close_incoming(volume: &IncomingVolume, name: &VolumeRef) -> Result<IncomingEnd, CliError> {
    match tokio::time::timeout(DETACH_TIMEOUT, volume.detach()).await {
        Ok(Ok(end)) => Ok(end),
        Ok(Err(e)) => Err(call_failed(&format!("detach {name}"), &e.0)),
        Err(_) => Err(not_in_time(name)),
    }
}

fn not_in_time(name: &VolumeRef) -> CliError {
    let text = format!("detach {name}: IO in flight has not ended within {} s", DETACH_TIMEOUT.as_secs());
    CliError::new(ErrorKind::Unavailable, text)
}

/// Opens for reading. A failure to close later is only a warning, because everything was read.
///
/// # Errors
/// As [`open_volume`].
pub(crate) async fn open_for_reading(context: &Context, name: &VolumeRef) -> Result<(Cluster, Volume), CliError> {
    let cluster = context.copying_cluster()?;
    let volume = open_volume(&cluster, name, OpenMode::ReadOnly).await?;
    Ok((cluster, volume))
}

/// Ends the attach of whoever has the volume: takes it, which fences that client, and gives it back.
///
/// # Errors
/// As [`open_volume`] and [`close_volume`].
pub(crate) async fn take_and_release(cluster: &Cluster, path: &VolumePath) -> Result<(), CliError> {
    let name = VolumeRef { path: path.clone(), snapshot: None };
    let volume = open_volume(cluster, &name, OpenMode::ReadWrite { steal: true }).await?;
    close_volume(&volume).await
}
