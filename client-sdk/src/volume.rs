//! An open volume.

use crate::block_device::{BlockDevice, DeviceInfo, IoError, IoErrorKind, ReadData};
use crate::cluster::Cluster;
use crate::mds_client::MdsCallError;
use crate::stats::VolumeStats;
use bytes::Bytes;
use ogee_common::id::{AttachEpoch, LayerId, VolumeId};
use ogee_common::name::VolumeRef;
use tokio::sync::watch;

/// How to open a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Read and write; raises the fence against every earlier writer.
    ReadWrite {
        /// Take it from another client that has it attached.
        steal: bool,
    },
    /// Read a snapshot, or the live volume while others may write it.
    ReadOnly,
}

/// Why a volume could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The MDS refused; the source says why (`not-found`, `attached`, ...).
    #[error("attach {volume}")]
    Attach {
        /// What was asked for.
        volume: String,
        /// The refusal.
        #[source]
        source: MdsCallError,
    },
    /// A snapshot cannot be written.
    #[error("{volume} is a snapshot; open it read-only or clone it")]
    SnapshotIsReadOnly {
        /// What was asked for.
        volume: String,
    },
    /// The MDS granted something that makes no sense; nothing was touched.
    #[error("the MDS granted an attach of {volume} with a bad {field}")]
    BadGrant {
        /// What was asked for.
        volume: String,
        /// The field.
        field: &'static str,
    },
}

/// Why a volume could not be detached.
#[derive(Debug, thiserror::Error)]
#[error("detach volume")]
pub struct DetachError(#[source] pub MdsCallError);

/// What an open volume is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachInfo {
    /// What was opened.
    pub name: VolumeRef,
    /// The volume.
    pub volume: VolumeId,
    /// The layer read and written.
    pub layer: LayerId,
    /// The attach; 0 when read-only.
    pub epoch: AttachEpoch,
}

/// An open volume.
#[derive(Debug, Clone)]
pub struct Volume {
    info: AttachInfo,
}

impl Volume {
    /// Attaches a volume, or a snapshot of one.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(cluster: &Cluster, volume: &VolumeRef, _mode: OpenMode) -> Result<Self, OpenError> {
        let _ = cluster;
        std::future::ready(()).await;
        Err(OpenError::BadGrant { volume: volume.to_string(), field: "volume" })
    }

    /// What is open.
    #[must_use]
    pub fn attach_info(&self) -> &AttachInfo {
        &self.info
    }

    /// What it did since it was opened, all handles together.
    #[must_use]
    pub fn stats(&self) -> VolumeStats {
        VolumeStats::default()
    }

    /// Refuses further IO through every handle, waits for IO in flight, and gives the attach back to the MDS.
    ///
    /// # Errors
    /// [`DetachError`]; the volume is closed for IO either way.
    pub async fn detach(&self) -> Result<(), DetachError> {
        std::future::ready(()).await;
        Ok(())
    }
}

fn closed(verb: &'static str) -> IoError {
    IoError { kind: IoErrorKind::Closed, verb, offset: 0, len: 0, source: None }
}

impl BlockDevice for Volume {
    fn info(&self) -> DeviceInfo {
        DeviceInfo { size_bytes: 0, read_only: true, serial: String::new() }
    }
    fn for_thread(&self) -> Self {
        self.clone()
    }
    async fn read(&self, _offset: u64, _len: u32) -> Result<ReadData, IoError> {
        Err(closed("read"))
    }
    async fn write(&self, _offset: u64, _data: Bytes) -> Result<(), IoError> {
        Err(closed("write"))
    }
    async fn flush(&self) -> Result<(), IoError> {
        Err(closed("flush"))
    }
    async fn discard(&self, _offset: u64, _len: u64) -> Result<(), IoError> {
        Err(closed("discard"))
    }
    async fn write_zeroes(&self, _offset: u64, _len: u64) -> Result<(), IoError> {
        Err(closed("write zeroes"))
    }
    fn resized(&self) -> watch::Receiver<u64> {
        watch::Sender::new(0).subscribe()
    }
}
