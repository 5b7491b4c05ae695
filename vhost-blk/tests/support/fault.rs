//! A device that fails or holds back what a test tells it to.

use bytes::Bytes;
use ogee_client::{BlockDevice, DeviceInfo, IoError, IoErrorKind, MemoryDevice, ReadData};
use std::sync::{Arc, Mutex};
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::watch;

/// Passes everything to a [`MemoryDevice`] unless told otherwise.
#[derive(Clone)]
pub struct FaultDevice {
    pub memory: MemoryDevice,
    fail: Arc<watch::Sender<Option<IoErrorKind>>>,
    held: Arc<watch::Sender<bool>>,
    started: Arc<AtomicU64>,
    short_reads: Arc<watch::Sender<bool>>,
    offsets: Arc<Mutex<Vec<u64>>>,
}

impl FaultDevice {
    pub fn new(memory: MemoryDevice) -> Self {
        Self {
            memory,
            fail: Arc::new(watch::Sender::new(None)),
            held: Arc::new(watch::Sender::new(false)),
            started: Arc::default(),
            short_reads: Arc::new(watch::Sender::new(false)),
            offsets: Arc::default(),
        }
    }

    /// Every IO fails with this kind from now on.
    pub fn fail(&self, kind: Option<IoErrorKind>) {
        self.fail.send_replace(kind);
    }

    /// Reads return less than asked for.
    pub fn short_reads(&self, short: bool) {
        self.short_reads.send_replace(short);
    }

    /// IO waits while held.
    pub fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// IOs that reached the device.
    pub fn started(&self) -> u64 {
        self.started.load(Ordering::SeqCst)
    }

    /// Offsets of the IOs that reached the device, in their order.
    pub fn offsets(&self) -> Vec<u64> {
        self.offsets.lock().unwrap().clone()
    }

    async fn gate(&self, verb: &'static str, offset: u64, len: u64) -> Result<(), IoError> {
        self.offsets.lock().unwrap().push(offset);
        self.started.fetch_add(1, Ordering::SeqCst);
        self.held.subscribe().wait_for(|held| !held).await.expect("the device holds the sender");
        let kind = *self.fail.borrow();
        kind.map_or(Ok(()), |kind| Err(IoError { kind, verb, offset, len, source: None }))
    }
}

impl BlockDevice for FaultDevice {
    fn info(&self) -> DeviceInfo {
        self.memory.info()
    }

    fn for_thread(&self) -> Self {
        self.clone()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, IoError> {
        self.gate("read", offset, u64::from(len)).await?;
        let short = *self.short_reads.borrow();
        self.memory.read(offset, if short { len - 512 } else { len }).await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), IoError> {
        self.gate("write", offset, data.len() as u64).await?;
        self.memory.write(offset, data).await
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.gate("flush", 0, 0).await?;
        self.memory.flush().await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.gate("discard", offset, len).await?;
        self.memory.discard(offset, len).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.gate("write zeroes", offset, len).await?;
        self.memory.write_zeroes(offset, len).await
    }

    fn resized(&self) -> watch::Receiver<u64> {
        self.memory.resized()
    }
}
