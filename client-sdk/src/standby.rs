//! A volume that another process of the same client still writes: everything for its IO is made ready, then it is attached.
//!
//! Used by `ogee vhost-blk --upgrade`. The volume is opened for reading first, which takes nothing from the process that writes it and costs the
//! MDS nothing: layout, leaders and connections are learned through that attach. When the other process has ended its IO for good, the attach is
//! *resumed* ([`OpenMode::Resume`]): granted only if this very client still has the volume, with a higher epoch. From then on IO goes through the
//! new attach and the connections that are there.
//!
//! ```text
//!             attach granted
//!   Standby ─────────────────► Attached
//! ```
//!
//! Invariants: no IO before the attach is granted (it fails with [`IoErrorKind::Closed`]), so the fence (`fence.rs`) holds for every IO; what the
//! reading attach knew is only believed as far as it cannot change (placements). Absent: who says that the other process has ended
//! (docs/adr/0015-upgrade-without-reconnection.md).

use crate::block_device::{BlockDevice, DeviceInfo, Extent, IoError, IoErrorKind, Moment, ReadData};
use crate::cluster::Cluster;
use crate::volume::{OpenError, OpenMode, Volume};
use bytes::Bytes;
use ogee_common::id::VolumeId;
use ogee_common::name::VolumeRef;
use ogee_common::rng;
use ogee_proto::MdsErrorKind;
use std::sync::{Arc, OnceLock};
use tokio::sync::watch;

#[derive(Debug)]
struct Shared {
    cluster: Cluster,
    name: VolumeRef,
    attached: OnceLock<Volume>,
}

/// See the module's documentation. Clones share the attach; [`BlockDevice::for_thread`] makes a handle with connections of its own.
#[derive(Debug, Clone)]
pub struct StandbyVolume {
    shared: Arc<Shared>,
    reader: Volume,
    /// This handle of the attached volume, once it was used.
    handle: Arc<OnceLock<Volume>>,
}

impl StandbyVolume {
    /// Opens the volume for reading and loads its layout. It shows `serial`, if there is one, in place of its own (see [`DeviceInfo`]).
    ///
    /// # Errors
    /// As [`Volume::open`].
    pub async fn prepare(cluster: &Cluster, name: &VolumeRef, serial: Option<&str>) -> Result<Self, OpenError> {
        let reader = Volume::open(cluster, name, OpenMode::ReadOnly).await?;
        let reader = if let Some(serial) = serial { reader.with_serial(serial) } else { reader };
        reader.load_layout().await;
        let shared = Shared { cluster: cluster.clone(), name: name.clone(), attached: OnceLock::new() };
        Ok(Self { shared: Arc::new(shared), reader, handle: Arc::default() })
    }

    /// The volume's number: what was opened, whatever its name means later.
    #[must_use]
    pub fn id(&self) -> VolumeId {
        self.reader.attach_info().volume
    }

    /// Attaches as the client that has the volume attached, whose IO the caller knows to have ended for good. Waits for the MDS, however long
    /// that takes: a guest waits behind it. A second call gives the same volume.
    ///
    /// # Errors
    /// [`OpenError`]: somebody else has the volume, or it is gone.
    pub async fn attach(&self) -> Result<Volume, OpenError> {
        let timing = self.shared.cluster.0.config.timing;
        let mut pause = timing.backoff_min;
        loop {
            if let Some(volume) = self.shared.attached.get() {
                return Ok(self.reader.with_attach_of(volume));
            }
            match Volume::open(&self.shared.cluster, &self.shared.name, OpenMode::Resume).await {
                Ok(volume) => {
                    volume.adopt_layout(&self.reader);
                    let volume = self.shared.attached.get_or_init(|| volume);
                    return Ok(self.reader.with_attach_of(volume));
                }
                Err(OpenError::Attach { source, .. }) if source.kind == MdsErrorKind::Unavailable => {
                    tracing::warn!(target: "controlpath", volume = %self.shared.name, error = %source, "taken over, and the MDS does not answer");
                }
                Err(error) => return Err(error),
            }
            tokio::time::sleep(rng::jitter(pause)).await;
            pause = (pause * 2).min(timing.backoff_max);
        }
    }

    /// This handle of the attached volume.
    fn volume(&self, verb: &'static str, offset: u64, len: u64) -> Result<&Volume, IoError> {
        if let Some(volume) = self.handle.get() {
            return Ok(volume);
        }
        let granted = self.shared.attached.get();
        let granted = granted.ok_or(IoError { kind: IoErrorKind::Closed, verb, offset, len, source: None })?;
        Ok(self.handle.get_or_init(|| self.reader.with_attach_of(granted)))
    }
}

impl BlockDevice for StandbyVolume {
    fn info(&self) -> DeviceInfo {
        match self.shared.attached.get() {
            Some(volume) => self.reader.with_attach_of(volume).info(),
            // As it will be.
            None => DeviceInfo { read_only: false, ..self.reader.info() },
        }
    }

    fn for_thread(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), reader: self.reader.for_thread(), handle: Arc::default() }
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, IoError> {
        self.volume("read", offset, u64::from(len))?.read(offset, len).await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), IoError> {
        self.volume("write", offset, data.len() as u64)?.write(offset, data).await
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.volume("flush", 0, 0)?.flush().await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.volume("discard", offset, len)?.discard(offset, len).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.volume("write zeroes", offset, len)?.write_zeroes(offset, len).await
    }

    async fn extents(&self, offset: u64, len: u64, since: Option<Moment>) -> Result<Vec<Extent>, IoError> {
        self.volume("extents", offset, len)?.extents(offset, len, since).await
    }

    async fn warm_up(&self) {
        self.reader.warm_up().await;
    }

    fn leave(&self) {
        if let Some(volume) = self.shared.attached.get() {
            volume.leave();
        }
    }

    /// Of the attach, once there is one: ask after it.
    fn resized(&self) -> watch::Receiver<u64> {
        self.shared.attached.get().unwrap_or(&self.reader).resized()
    }
}
