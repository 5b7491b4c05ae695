//! A volume through the SDK as the target of a load.
//!
//! Invariant: on the steady path nothing is allocated here: a write hands the SDK a reference to the buffer's bytes, a
//! read keeps the bytes as they came, and they are joined only if somebody looks at them. Filling a buffer anew takes
//! the bytes back, which is free once the SDK has let go of them.

use super::target::{IoBuffer, Source, Target, TargetError};
use crate::error::CliError;
use bytes::{Bytes, BytesMut};
use ogee_client::{BlockDevice, IoError, IoErrorKind, ReadData, ReadPiece};

/// Opens one device for job after job.
#[derive(Debug, Clone)]
pub(crate) struct SdkSource<D> {
    /// Its name.
    pub(crate) name: String,
    /// The device; every job gets a handle of its own.
    pub(crate) device: D,
}

impl<D: BlockDevice> Source for SdkSource<D> {
    type Target = SdkTarget<D>;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.device.info().size_bytes
    }

    async fn open(&self) -> Result<SdkTarget<D>, CliError> {
        Ok(SdkTarget(self.device.for_thread()))
    }
}

/// A device of the SDK.
#[derive(Debug)]
pub(crate) struct SdkTarget<D>(D);

/// Bytes that go out or came in.
#[derive(Debug, Default)]
pub(crate) struct SdkBuffer {
    /// While it is being filled; empty otherwise.
    open: BytesMut,
    /// What is written.
    sealed: Bytes,
    /// What was read.
    read: ReadData,
    /// What was read, joined, if it came in pieces.
    joined: Vec<u8>,
}

impl SdkBuffer {
    /// The first `len` bytes that were filled in, for the SDK.
    fn payload(&mut self, len: usize) -> Bytes {
        if !self.open.is_empty() {
            self.sealed = std::mem::take(&mut self.open).freeze();
        }
        if len == self.sealed.len() { self.sealed.clone() } else { self.sealed.slice(..len) }
    }
}

impl IoBuffer for SdkBuffer {
    fn fill(&mut self) -> &mut [u8] {
        if self.open.is_empty() {
            // Copies only if the SDK still holds the bytes, as it may after a write that failed.
            let sealed = std::mem::take(&mut self.sealed);
            self.open = sealed.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
        }
        &mut self.open
    }

    fn contents(&mut self) -> &[u8] {
        if let [ReadPiece::Data(bytes)] = &self.read.pieces[..] {
            return bytes;
        }
        self.joined.clear();
        for piece in &self.read.pieces {
            match piece {
                ReadPiece::Data(bytes) => self.joined.extend_from_slice(bytes),
                ReadPiece::Zeros(n) => self.joined.resize(self.joined.len() + *n as usize, 0),
            }
        }
        &self.joined
    }
}

impl<D: BlockDevice> Target for SdkTarget<D> {
    type Buffer = SdkBuffer;

    fn buffer(&self, len: usize) -> Result<SdkBuffer, TargetError> {
        Ok(SdkBuffer { open: BytesMut::zeroed(len), ..SdkBuffer::default() })
    }

    async fn read(&self, offset: u64, len: usize, buffer: &mut SdkBuffer) -> Result<(), TargetError> {
        let asked = u32::try_from(len).expect("an IO is bounded by IO_BYTES_MAX");
        buffer.read = self.0.read(offset, asked).await.map_err(failed)?;
        Ok(())
    }

    async fn write(&self, offset: u64, len: usize, buffer: &mut SdkBuffer) -> Result<(), TargetError> {
        let data = buffer.payload(len);
        self.0.write(offset, data).await.map_err(failed)
    }

    async fn flush(&self) -> Result<(), TargetError> {
        self.0.flush().await.map_err(failed)
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), TargetError> {
        self.0.discard(offset, len).await.map_err(failed)
    }
}

fn failed(error: IoError) -> TargetError {
    let is_final = matches!(error.kind, IoErrorKind::Fenced | IoErrorKind::Closed | IoErrorKind::ReadOnly);
    TargetError { is_final, verb: error.verb, offset: error.offset, len: error.len, source: Box::new(error) }
}
