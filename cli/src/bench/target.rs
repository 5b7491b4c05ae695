//! What is loaded: the seam between the load loop and the ways to reach a device.
//!
//! Implemented by `sdk_target.rs` (a volume through the SDK) and by any other way to do block IO, such as a vhost-user
//! socket. Invariants: a [`Target`] lives on one thread and is driven by that thread's current-thread runtime; it has as
//! many IOs in flight as there are buffers in use; a buffer belongs to one IO from the call until the future completes.
//! The futures are not dropped before they complete, except at the end of the process.

use crate::error::CliError;
use std::error::Error;
use std::future::Future;

/// An IO that failed.
#[derive(Debug, thiserror::Error)]
#[error("{verb} of {len} bytes at {offset}")]
pub(crate) struct TargetError {
    /// Whether the device is gone for good, so that further IO makes no sense.
    pub(crate) is_final: bool,
    /// `read`, `write`, `flush` or `discard`.
    pub(crate) verb: &'static str,
    /// Byte of the device.
    pub(crate) offset: u64,
    /// Bytes.
    pub(crate) len: u64,
    /// What lay below.
    #[source]
    pub(crate) source: Box<dyn Error + Send + Sync>,
}

/// Memory of one IO, wherever the target needs it: a socket's buffer, or memory that is shared with a device. At least
/// sector-aligned where the target does direct IO.
pub(crate) trait IoBuffer {
    /// The whole buffer, to put in what is to be written. It holds what was put in last, or, after a read, anything.
    fn fill(&mut self) -> &mut [u8];

    /// What the last read brought, from its first byte.
    fn contents(&mut self) -> &[u8];
}

/// A device under load. Offsets and lengths are bytes and multiples of 512.
pub(crate) trait Target: 'static {
    /// Memory of one IO.
    type Buffer: IoBuffer;

    /// Makes the memory of one IO of at most `len` bytes. Called before the load begins, once for each IO in flight.
    ///
    /// # Errors
    /// There is no more such memory.
    fn buffer(&self, len: usize) -> Result<Self::Buffer, TargetError>;

    /// Reads `len` bytes at `offset` into the buffer.
    ///
    /// # Errors
    /// [`TargetError`].
    fn read(&self, offset: u64, len: usize, buffer: &mut Self::Buffer) -> impl Future<Output = Result<(), TargetError>>;

    /// Writes the first `len` bytes of the buffer at `offset`.
    ///
    /// # Errors
    /// [`TargetError`]; the outcome is unknown.
    fn write(&self, offset: u64, len: usize, buffer: &mut Self::Buffer) -> impl Future<Output = Result<(), TargetError>>;

    /// Waits until every write that completed is durable.
    ///
    /// # Errors
    /// [`TargetError`].
    fn flush(&self) -> impl Future<Output = Result<(), TargetError>>;

    /// Makes the range read as zeros and gives its space back.
    ///
    /// # Errors
    /// [`TargetError`].
    fn discard(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), TargetError>>;

    /// Work beside the IO, on the same runtime, as long as there is load: for a target whose completions somebody must
    /// reap. It is dropped when the load ends and must not end before; the default waits for ever.
    fn drive(&self) -> impl Future<Output = ()> {
        std::future::pending()
    }
}

/// One device as it is known before the threads start; opens it on a thread.
pub(crate) trait Source: Clone + Send + 'static {
    /// What it opens.
    type Target: Target;

    /// Name of the device, for messages.
    fn name(&self) -> String;

    /// Size of the device in bytes.
    fn size_bytes(&self) -> u64;

    /// Opens the device for one job, on the job's runtime.
    ///
    /// # Errors
    /// What could not be opened.
    fn open(&self) -> impl Future<Output = Result<Self::Target, CliError>>;
}
