//! The one interface between front ends (vhost-blk, nbd, cli) and volumes.
//!
//! A front end knows only this trait; it never sees a chunk, a copyset or Raft. Invariants: a completed write is
//! durable and visible to every later read through any handle of the same device; buffers are owned by the callee until
//! the future completes. Futures are **not** cancellation-safe: a dropped write is *unknown*, it may still land.

use bytes::Bytes;
use ogee_common::id::{LayerId, VolumeSeq};
use smallvec::SmallVec;
use std::future::Future;

/// What a front end must know of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Size in bytes; a multiple of 4,096.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Bytes of a logical sector: 512 or 4,096. IO that is not in whole sectors is refused.
    pub sector_bytes: u32,
    /// Serial shown to guests (virtio-blk GET_ID); at most 20 bytes ASCII.
    pub serial: String,
}

/// A piece of read data, in order of the volume's addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadPiece {
    /// Bytes that were written, verified against their checksums.
    Data(Bytes),
    /// So many bytes of zeros.
    Zeros(u32),
}

impl ReadPiece {
    /// Bytes of the piece.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Data(b) => b.len(),
            Self::Zeros(n) => *n as usize,
        }
    }

    /// Whether the piece has no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The answer to a read: pieces whose lengths add up to what was asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ReadData {
    /// The pieces in order.
    pub pieces: SmallVec<[ReadPiece; 2]>,
}

impl ReadData {
    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pieces.iter().map(ReadPiece::len).sum()
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies everything into one buffer; for tests and tools, not for the IO path.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.len());
        for piece in &self.pieces {
            match piece {
                ReadPiece::Data(b) => out.extend_from_slice(b),
                ReadPiece::Zeros(n) => out.resize(out.len() + *n as usize, 0),
            }
        }
        out
    }
}

/// What is known of a run of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentKind {
    /// It may hold anything.
    Data,
    /// It was made zeros and takes no space.
    Zero,
    /// It was never written, also not in what the volume stands on: it reads as zeros and takes no space.
    Hole,
}

/// A run of bytes of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, not 0.
    pub len: u64,
    /// What it is.
    pub kind: ExtentKind,
    /// Whether it may differ from the moment that it was compared with; true if it was not compared.
    pub changed: bool,
}

/// A moment in the life of a layer, that of a volume snapshot: what the layer shows up to a seq. Neither number is ever
/// used again in a cluster, so a moment stays what it is after its snapshot was deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Moment {
    /// The layer.
    pub layer: LayerId,
    /// The newest seq that is seen.
    pub seq: VolumeSeq,
}

/// Why an IO failed, as far as a front end can act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IoErrorKind {
    /// Not sector-aligned, beyond the end, or longer than [`ogee_common::limits::IO_BYTES_MAX`].
    InvalidInput,
    /// The device is attached read-only.
    ReadOnly,
    /// Another client attached the volume; this handle may not be used any more.
    Fenced,
    /// The cluster has no space for new data.
    NoSpace,
    /// The policy's time ran out; the outcome of a write is unknown.
    TimedOut,
    /// Data failed its checksum on every replica.
    Corrupt,
    /// The device was detached or is shutting down.
    Closed,
}

/// A failed IO.
#[derive(Debug, thiserror::Error)]
#[error("{verb} of {len} bytes at {offset}: {kind:?}")]
pub struct IoError {
    /// What a caller can act on.
    pub kind: IoErrorKind,
    /// `read`, `write`, `flush`, `discard`, `write zeroes` or `extents`.
    pub verb: &'static str,
    /// Byte of the volume.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What lay below, if anything.
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Where a guest comes from that is about to use a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// Its hypervisor is new to the device: it boots, or a live migration brought it here.
    New,
    /// Its hypervisor has used the device before, through a daemon that is dead, and comes back.
    Back,
}

/// A device that holds blocks. Clones share the device. Offsets and lengths are bytes and multiples of
/// [`DeviceInfo::sector_bytes`].
pub trait BlockDevice: Clone + Send + Sync + 'static {
    /// Size and properties as of now; the size may grow (see [`BlockDevice::resized`]).
    fn info(&self) -> DeviceInfo;

    /// A handle whose IO is driven by the runtime that first uses it. One per queue thread: sockets and buffers are not
    /// shared between threads.
    #[must_use]
    fn for_thread(&self) -> Self;

    /// Reads `len` bytes at `offset`.
    ///
    /// # Errors
    /// [`IoErrorKind`] says what a caller can do.
    fn read(&self, offset: u64, len: u32) -> impl Future<Output = Result<ReadData, IoError>> + Send;

    /// Writes `data` at `offset`; durable when it returns.
    ///
    /// # Errors
    /// [`IoErrorKind`]; after any error the outcome is unknown except for `InvalidInput`, `ReadOnly` and `NoSpace`.
    fn write(&self, offset: u64, data: Bytes) -> impl Future<Output = Result<(), IoError>> + Send;

    /// Waits until every write completed before the call is durable.
    ///
    /// # Errors
    /// [`IoErrorKind::Closed`], [`IoErrorKind::Fenced`].
    fn flush(&self) -> impl Future<Output = Result<(), IoError>> + Send;

    /// Makes the range read as zeros and gives its space back.
    ///
    /// # Errors
    /// As [`BlockDevice::write`].
    fn discard(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), IoError>> + Send;

    /// Makes the range read as zeros.
    ///
    /// # Errors
    /// As [`BlockDevice::write`].
    fn write_zeroes(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), IoError>> + Send;

    /// What a range holds, and what of it may have changed since an earlier moment: extents from `offset` on, at least one
    /// if `len` is not 0, together at most `len` bytes. They may cover less than asked for. No change is missed; what was
    /// written with the content it had counts as changed. A device that knows nothing says that there is data everywhere,
    /// and that all of it changed.
    ///
    /// # Errors
    /// As [`BlockDevice::read`].
    fn extents(
        &self,
        _offset: u64,
        len: u64,
        _since: Option<Moment>,
    ) -> impl Future<Output = Result<Vec<Extent>, IoError>> + Send {
        async move { Ok(vec![Extent { len, kind: ExtentKind::Data, changed: true }]) }
    }

    /// A guest is about to send IO. Said before the first IO, and again whenever it starts anew; returns at once. For devices that are
    /// taken only when a guest needs them ([`crate::IncomingVolume`]).
    fn guest_starts(&self, _arrival: Arrival) {}

    /// The front end of that guest is gone, and nobody waits for its IO any more. Not said when it is the daemon that ends.
    fn guest_left(&self) {}

    /// Makes ready what the first IO through this handle would have to wait for, as far as it can be without being attached for writing. Called on the
    /// runtime that will drive the handle's IO; sends no IO and never fails.
    fn warm_up(&self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// Whether [`BlockDevice::leave`] is possible: not while the device is being taken, for what is asked for may be granted later.
    fn may_leave(&self) -> bool {
        true
    }

    /// Another process goes on with the device as the same client: from now on no IO is sent through any handle, and the attach is not given back.
    fn leave(&self) {}

    /// A watch that carries the size in bytes and changes when the volume is resized.
    fn resized(&self) -> tokio::sync::watch::Receiver<u64>;
}
