//! A device that answers everything at once and keeps nothing: what is left is the cost of the path to it.
//!
//! Served by `ogee vhost-blk --null SIZE` for measurements. Reads are zeros. Invariant: no IO waits, fails (inside the
//! device) or allocates here.

use bytes::Bytes;
use ogee_client::{BlockDevice, DeviceInfo, IoError, ReadData, ReadPiece};
use ogee_common::limits::SECTOR_BYTES;
use std::sync::Arc;
use tokio::sync::watch;

/// The device.
#[derive(Debug, Clone)]
pub(crate) struct NullDevice {
    size_bytes: u64,
    resized: Arc<watch::Sender<u64>>,
}

impl NullDevice {
    /// A device of so many bytes, a multiple of 4,096.
    #[must_use]
    pub(crate) fn new(size_bytes: u64) -> Self {
        Self { size_bytes, resized: Arc::new(watch::Sender::new(size_bytes)) }
    }
}

impl BlockDevice for NullDevice {
    fn info(&self) -> DeviceInfo {
        let (size_bytes, serial) = (self.size_bytes, "ogee-null".to_owned());
        DeviceInfo { size_bytes, read_only: false, sector_bytes: SECTOR_BYTES, serial }
    }

    fn for_thread(&self) -> Self {
        self.clone()
    }

    async fn read(&self, _offset: u64, len: u32) -> Result<ReadData, IoError> {
        Ok(ReadData { pieces: [ReadPiece::Zeros(len)].into_iter().collect() })
    }

    async fn write(&self, _offset: u64, _data: Bytes) -> Result<(), IoError> {
        Ok(())
    }

    async fn flush(&self) -> Result<(), IoError> {
        Ok(())
    }

    async fn discard(&self, _offset: u64, _len: u64) -> Result<(), IoError> {
        Ok(())
    }

    async fn write_zeroes(&self, _offset: u64, _len: u64) -> Result<(), IoError> {
        Ok(())
    }

    fn resized(&self) -> watch::Receiver<u64> {
        self.resized.subscribe()
    }
}
