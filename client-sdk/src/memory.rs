//! A [`BlockDevice`] in memory: for tests of the front ends and as the null backend of benchmarks.
//!
//! It keeps the promises of the trait (a completed write is visible to every later read) under one lock, and counts
//! what it was asked. It is not durable: that is the one promise it cannot keep.

use crate::block_device::{BlockDevice, DeviceInfo, IoError, IoErrorKind, ReadData, ReadPiece};
use bytes::Bytes;
use ogee_common::limits::{IO_BYTES_MAX, SECTOR_BYTES};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// What a [`MemoryDevice`] was asked so far.
#[derive(Debug, Default)]
pub struct MemoryCounters {
    /// Reads.
    pub reads: AtomicU64,
    /// Writes.
    pub writes: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
    /// Discards.
    pub discards: AtomicU64,
    /// Write-zeroes.
    pub write_zeroes: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    data: Mutex<Vec<u8>>,
    read_only: bool,
    sector_bytes: u32,
    size: watch::Sender<u64>,
    counters: MemoryCounters,
}

/// A device in memory. Clones share the data.
#[derive(Debug, Clone)]
pub struct MemoryDevice(Arc<Shared>);

impl MemoryDevice {
    /// A writable device of `size_bytes` zeros.
    #[must_use]
    pub fn new(size_bytes: usize) -> Self {
        Self::with_data(vec![0; size_bytes], false)
    }

    /// A device with the given content.
    #[must_use]
    pub fn with_data(data: Vec<u8>, read_only: bool) -> Self {
        Self::made(data, read_only, SECTOR_BYTES)
    }

    /// A writable device of `size_bytes` zeros in logical sectors of `sector_bytes`.
    #[must_use]
    pub fn with_sectors(size_bytes: usize, sector_bytes: u32) -> Self {
        Self::made(vec![0; size_bytes], false, sector_bytes)
    }

    fn made(data: Vec<u8>, read_only: bool, sector_bytes: u32) -> Self {
        let size = watch::Sender::new(data.len() as u64);
        let counters = MemoryCounters::default();
        Self(Arc::new(Shared { data: Mutex::new(data), read_only, sector_bytes, size, counters }))
    }

    /// What was asked so far.
    #[must_use]
    pub fn counters(&self) -> &MemoryCounters {
        &self.0.counters
    }

    /// Grows the device and tells its watchers.
    pub fn resize(&self, size_bytes: usize) {
        self.data().resize(size_bytes, 0);
        self.0.size.send_replace(size_bytes as u64);
    }

    fn data(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn range(&self, verb: &'static str, offset: u64, len: u64) -> Result<std::ops::Range<usize>, IoError> {
        let fail = |kind| IoError { kind, verb, offset, len, source: None };
        let sector = u64::from(self.0.sector_bytes);
        let end = offset.checked_add(len).ok_or_else(|| fail(IoErrorKind::InvalidInput))?;
        let aligned = offset.is_multiple_of(sector) && len.is_multiple_of(sector);
        if !aligned || end > *self.0.size.borrow() {
            return Err(fail(IoErrorKind::InvalidInput));
        }
        if verb != "read" && self.0.read_only {
            return Err(fail(IoErrorKind::ReadOnly));
        }
        let at = |n: u64| usize::try_from(n).map_err(|_| fail(IoErrorKind::InvalidInput));
        Ok(at(offset)?..at(end)?)
    }

    fn zero(&self, verb: &'static str, offset: u64, len: u64) -> Result<(), IoError> {
        let range = self.range(verb, offset, len)?;
        self.data()[range].fill(0);
        Ok(())
    }
}

impl BlockDevice for MemoryDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            size_bytes: *self.0.size.borrow(),
            read_only: self.0.read_only,
            sector_bytes: self.0.sector_bytes,
            serial: "ogee-memory".to_owned(),
        }
    }

    fn for_thread(&self) -> Self {
        self.clone()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, IoError> {
        self.0.counters.reads.fetch_add(1, Ordering::Relaxed);
        if len > IO_BYTES_MAX {
            let kind = IoErrorKind::InvalidInput;
            return Err(IoError { kind, verb: "read", offset, len: u64::from(len), source: None });
        }
        let range = self.range("read", offset, u64::from(len))?;
        let bytes = Bytes::copy_from_slice(&self.data()[range]);
        Ok(ReadData { pieces: smallvec::smallvec![ReadPiece::Data(bytes)] })
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), IoError> {
        self.0.counters.writes.fetch_add(1, Ordering::Relaxed);
        let range = self.range("write", offset, data.len() as u64)?;
        self.data()[range].copy_from_slice(&data);
        Ok(())
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.0.counters.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.0.counters.discards.fetch_add(1, Ordering::Relaxed);
        self.zero("discard", offset, len)
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.0.counters.write_zeroes.fetch_add(1, Ordering::Relaxed);
        self.zero("write zeroes", offset, len)
    }

    fn resized(&self) -> watch::Receiver<u64> {
        self.0.size.subscribe()
    }
}
