//! A local file as a device: to measure `ogee nbd serve` beside other NBD servers over the same file.
//!
//! Served by `ogee nbd serve --file PATH`, which the help does not show. Reads and writes are done in the page cache by the
//! thread that asks, so they cost what the kernel's copy costs as long as the file is in memory. **Not for data**: a
//! completed write is durable only after a flush, which breaks the promise of [`BlockDevice`] (and FUA). Absent: waiting for
//! a disk without blocking the thread, growth.

use bytes::{Bytes, BytesMut};
use ogee_client::{BlockDevice, DeviceInfo, IoError, IoErrorKind, ReadData, ReadPiece};
use ogee_common::limits::{PAGE_BYTES, SECTOR_BYTES};
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use tokio::sync::watch;

/// The device.
#[derive(Debug, Clone)]
pub(crate) struct FileDevice {
    file: Arc<File>,
    size_bytes: u64,
    resized: Arc<watch::Sender<u64>>,
}

impl FileDevice {
    /// Opens a file; its last bytes are left out if they fill no page.
    ///
    /// # Errors
    /// It cannot be opened for reading and writing.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let page = u64::from(PAGE_BYTES);
        let size_bytes = file.metadata()?.len() / page * page;
        Ok(Self { file: Arc::new(file), size_bytes, resized: Arc::new(watch::Sender::new(size_bytes)) })
    }

    fn punch(&self, verb: &'static str, offset: u64, len: u64) -> Result<(), IoError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&*self.file, flags, offset, len).map_err(|e| failed(verb, offset, len)(e.into()))
    }
}

fn failed(verb: &'static str, offset: u64, len: u64) -> impl FnOnce(io::Error) -> IoError {
    move |source| {
        let is_full = source.kind() == io::ErrorKind::StorageFull;
        let kind = if is_full { IoErrorKind::NoSpace } else { IoErrorKind::Corrupt };
        IoError { kind, verb, offset, len, source: Some(Box::new(source)) }
    }
}

impl BlockDevice for FileDevice {
    fn info(&self) -> DeviceInfo {
        let (size_bytes, serial) = (self.size_bytes, "ogee-file".to_owned());
        DeviceInfo { size_bytes, read_only: false, sector_bytes: SECTOR_BYTES, serial }
    }

    fn for_thread(&self) -> Self {
        self.clone()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, IoError> {
        let mut data = BytesMut::zeroed(len as usize);
        self.file.read_exact_at(&mut data, offset).map_err(failed("read", offset, len.into()))?;
        Ok(ReadData { pieces: [ReadPiece::Data(data.freeze())].into_iter().collect() })
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), IoError> {
        self.file.write_all_at(&data, offset).map_err(failed("write", offset, data.len() as u64))
    }

    async fn flush(&self) -> Result<(), IoError> {
        let file = Arc::clone(&self.file);
        let synced = tokio::task::spawn_blocking(move || file.sync_data()).await;
        synced.unwrap_or_else(|e| Err(io::Error::other(e))).map_err(failed("flush", 0, 0))
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.punch("discard", offset, len)
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.punch("write zeroes", offset, len)
    }

    fn resized(&self) -> watch::Receiver<u64> {
        self.resized.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_is_read_written_and_zeroed_in_place() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), vec![1; 10_000]).expect("written");
        let device = FileDevice::open(file.path()).expect("opened");
        assert_eq!(device.info().size_bytes, 8192, "whole pages");
        device.write(4096, Bytes::from_static(&[2; 512])).await.expect("written");
        device.flush().await.expect("flushed");
        let back = device.for_thread().read(3584, 1536).await.expect("read").to_vec();
        assert_eq!(back, [[1; 512], [2; 512], [1; 512]].concat());
        device.write_zeroes(0, 512).await.expect("zeroed");
        device.discard(4096, 4096).await.expect("discarded");
        let back = device.read(0, 8192).await.expect("read").to_vec();
        assert_eq!(back, [vec![0; 512], vec![1; 3584], vec![0; 4096]].concat());
        let error = device.read(8192, 4096).await.expect_err("behind the end of the file");
        assert_eq!((error.verb, error.offset), ("read", 8192));
    }

    #[test]
    fn a_file_that_is_not_there_is_not_made() {
        let dir = tempfile::tempdir().expect("a folder");
        assert!(FileDevice::open(&dir.path().join("none")).is_err());
        assert!(!dir.path().join("none").exists());
    }
}
