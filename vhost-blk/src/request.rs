//! The request parser: a descriptor chain in, a checked [`Request`] or a reasoned refusal out.
//!
//! Called by the queue loop for every chain and by the fuzz target. It is total: no chain makes it panic, loop or
//! allocate by an unchecked length. Data is bounded by [`IO_BYTES_MAX`], descriptors by
//! [`VHOST_CHAIN_DESCRIPTORS_MAX`], and every segment is checked against guest memory first.
//!
//! A request (virtio 1.2, 5.2.6) is a stream of device-readable bytes followed by device-writable ones, cut into
//! descriptors anywhere (2.7.4.2, no assumption on framing):
//!
//! | bytes | direction | meaning |
//! | --- | --- | --- |
//! | 0..4 | readable | type, little-endian |
//! | 4..8 | readable | reserved (legacy io priority), ignored |
//! | 8..16 | readable | sector of 512 bytes |
//! | data | readable (write, discard, write-zeroes) or writable (read, get-id) | |
//! | last | writable | status |
//!
//! The bounds of the volume are not checked here but by the device, which alone knows its size at that moment.

use crate::guest_buffer::{ReplyArea, Segment, Segments};
use bytes::Bytes;
use ogee_common::limits::{
    IO_BYTES_MAX, SECTOR_BYTES, VHOST_CHAIN_DESCRIPTORS_MAX, VHOST_ZERO_RANGES_MAX, VHOST_ZERO_SECTORS_MAX,
};
use smallvec::SmallVec;
use std::ops::Deref;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryError, Permissions};

/// Bytes of the request header.
const HEADER_BYTES: usize = 16;
/// Bytes of one range of a discard or write-zeroes request.
const RANGE_BYTES: usize = 16;
/// Bytes of a device id.
pub const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// The status byte of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed; for a write the outcome is unknown to the guest.
    IoError,
    /// A request type or flag that the device does not know.
    Unsupported,
}

impl Status {
    /// The byte as the guest reads it.
    #[must_use]
    pub fn byte(self) -> u8 {
        let value = match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        u8::try_from(value).expect("the status constants of virtio-blk are 0, 1 and 2")
    }
}

/// A range of a discard or write-zeroes request, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRange {
    /// First byte; a multiple of 512.
    pub offset: u64,
    /// Bytes; a multiple of 512, at most 1 GiB.
    pub len: u64,
}

/// What a guest asks for, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operation {
    /// Read `len` bytes, a positive multiple of 512 up to [`IO_BYTES_MAX`].
    Read {
        /// First byte; a multiple of 512.
        offset: u64,
        /// Bytes.
        len: u32,
    },
    /// Write `data`, whose length obeys the same rules.
    Write {
        /// First byte; a multiple of 512.
        offset: u64,
        /// The bytes as they were when the request was taken.
        data: Bytes,
    },
    /// Make completed writes durable.
    Flush,
    /// Tell the serial.
    GetId,
    /// Give space back.
    Discard(SmallVec<[ByteRange; 1]>),
    /// Make ranges read as zeros.
    WriteZeroes(SmallVec<[ByteRange; 1]>),
}

impl Operation {
    /// Payload bytes the request holds in memory while in flight.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        match self {
            Self::Read { len, .. } => *len as usize,
            Self::Write { data, .. } => data.len(),
            Self::Flush | Self::GetId | Self::Discard(_) | Self::WriteZeroes(_) => 0,
        }
    }
}

/// A checked request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// Where the answer goes.
    pub reply: ReplyArea,
}

/// Why a chain is not a request.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// The chain ends in the middle: a descriptor that cannot be read, an index out of range, a loop, or more than
    /// [`VHOST_CHAIN_DESCRIPTORS_MAX`] descriptors.
    #[error("parse request: chain of {descriptors} descriptors does not end")]
    Truncated {
        /// Descriptors read.
        descriptors: usize,
    },
    /// A device-readable descriptor follows a device-writable one (virtio 1.2, 2.7.4.2).
    #[error("parse request: readable descriptor after a writable one")]
    Order,
    /// A segment is not guest memory.
    #[error("parse request: {len} bytes at {address:#x} are not guest memory")]
    Outside {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        len: u32,
    },
    /// No byte for the status.
    #[error("parse request: no writable byte for the status")]
    NoStatus,
    /// Fewer readable bytes than a header.
    #[error("parse request: header of {len} bytes")]
    ShortHeader {
        /// Readable bytes.
        len: u64,
    },
    /// Data of a length the request type does not allow.
    #[error("parse request type {kind}: {readable} readable and {writable} writable bytes of data")]
    DataLen {
        /// Type field of the header.
        kind: u32,
        /// Readable bytes after the header.
        readable: u64,
        /// Writable bytes before the status.
        writable: u64,
    },
    /// A sector beyond what 64 bits can address in bytes, or a range longer than offered.
    #[error("parse request: {count} sectors at sector {sector}")]
    Sectors {
        /// First sector.
        sector: u64,
        /// Sectors.
        count: u64,
    },
    /// A request type the device does not know.
    #[error("parse request: unknown type {kind}")]
    UnknownType {
        /// Type field of the header.
        kind: u32,
    },
    /// A flag of a discard or write-zeroes range that the device does not know.
    #[error("parse request: unknown flags {flags:#x} of a range")]
    UnknownFlags {
        /// Flags field.
        flags: u32,
    },
    /// Guest memory went away between check and copy.
    #[error("parse request: read guest memory")]
    Memory(#[source] GuestMemoryError),
}

impl Refusal {
    /// What the guest is told.
    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Self::UnknownType { .. } | Self::UnknownFlags { .. } => Status::Unsupported,
            _ => Status::IoError,
        }
    }
}

/// What became of a chain.
#[derive(Debug)]
pub enum Parsed {
    /// A request to run.
    Request(Request),
    /// Not a request, but there is a place to say so.
    Refused {
        /// Where the answer goes.
        reply: ReplyArea,
        /// Why.
        refusal: Refusal,
    },
    /// Not a request and no place for an answer; the chain is only given back.
    Unanswerable(Refusal),
}

/// Parses one chain.
#[must_use]
pub fn parse<M>(mut chain: DescriptorChain<M>) -> Parsed
where
    M: Deref,
    M::Target: GuestMemory,
{
    let (readable, mut writable) = match collect(&mut chain) {
        Ok(both) => both,
        Err(refusal) => return Parsed::Unanswerable(refusal),
    };
    let Some(status) = writable.pop_last_byte() else {
        return Parsed::Unanswerable(Refusal::NoStatus);
    };
    let reply = ReplyArea { data: writable, status };
    match operation(chain.memory(), &readable, reply.data.len()) {
        Ok(operation) => Parsed::Request(Request { operation, reply }),
        Err(refusal) => Parsed::Refused { reply, refusal },
    }
}

/// Splits a chain into its readable and its writable segments, all of them checked.
fn collect<M>(chain: &mut DescriptorChain<M>) -> Result<(Segments, Segments), Refusal>
where
    M: Deref,
    M::Target: GuestMemory,
{
    let mut readable = Segments::default();
    let mut writable = Segments::default();
    let mut seen_writable = false;
    let mut descriptors = 0;
    // The iterator just ends at a descriptor it cannot follow, so the end is only believed if it is marked as one.
    let mut complete = false;
    while let Some(descriptor) = chain.next() {
        descriptors += 1;
        if descriptors > VHOST_CHAIN_DESCRIPTORS_MAX {
            return Err(Refusal::Truncated { descriptors });
        }
        let segment = Segment { address: descriptor.addr(), len: descriptor.len() };
        let access = if descriptor.is_write_only() { Permissions::Write } else { Permissions::Read };
        let outside = Refusal::Outside { address: segment.address.0, len: segment.len };
        let Ok(len) = usize::try_from(segment.len) else { return Err(outside) };
        if len > 0 && !chain.memory().check_range(segment.address, len, access) {
            return Err(outside);
        }
        if descriptor.is_write_only() {
            seen_writable = true;
            writable.push(segment);
        } else if seen_writable {
            return Err(Refusal::Order);
        } else {
            readable.push(segment);
        }
        complete = !descriptor.has_next();
    }
    if complete { Ok((readable, writable)) } else { Err(Refusal::Truncated { descriptors }) }
}

/// Reads the header and what belongs to its type.
fn operation<M>(memory: &M, readable: &Segments, writable_len: u64) -> Result<Operation, Refusal>
where
    M: GuestMemory + ?Sized,
{
    let header_len = HEADER_BYTES as u64;
    if readable.len() < header_len {
        return Err(Refusal::ShortHeader { len: readable.len() });
    }
    let mut header = [0; HEADER_BYTES];
    readable.read_into(memory, 0, &mut header).map_err(Refusal::Memory)?;
    let kind = le_u32(&header, 0);
    let sector = le_u64(&header, 8);
    let readable_len = readable.len() - header_len;
    let bad_len = || Refusal::DataLen { kind, readable: readable_len, writable: writable_len };

    match kind {
        VIRTIO_BLK_T_IN => {
            let len = io_len(writable_len).filter(|_| readable_len == 0).ok_or_else(bad_len)?;
            Ok(Operation::Read { offset: byte_offset(sector, u64::from(len))?, len })
        }
        VIRTIO_BLK_T_OUT => {
            let len = io_len(readable_len).filter(|_| writable_len == 0).ok_or_else(bad_len)?;
            let offset = byte_offset(sector, u64::from(len))?;
            Ok(Operation::Write { offset, data: payload(memory, readable, len as usize)?.into() })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Operation::GetId),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            let max = u64::from(VHOST_ZERO_RANGES_MAX) * RANGE_BYTES as u64;
            let whole = readable_len > 0 && readable_len.is_multiple_of(RANGE_BYTES as u64);
            let len = usize::try_from(readable_len).ok().filter(|_| whole && readable_len <= max).ok_or_else(bad_len)?;
            let payload = payload(memory, readable, len)?;
            let allowed = if kind == VIRTIO_BLK_T_DISCARD { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
            let ranges = payload.chunks_exact(RANGE_BYTES).map(|raw| range(raw, allowed)).collect::<Result<_, _>>()?;
            Ok(if kind == VIRTIO_BLK_T_DISCARD { Operation::Discard(ranges) } else { Operation::WriteZeroes(ranges) })
        }
        _ => Err(Refusal::UnknownType { kind }),
    }
}

/// Copies `len` checked bytes after the header; the one copy of write data (see [`crate::guest_buffer`]).
fn payload<M>(memory: &M, readable: &Segments, len: usize) -> Result<Vec<u8>, Refusal>
where
    M: GuestMemory + ?Sized,
{
    let mut out = Vec::new();
    readable.copy_out(memory, HEADER_BYTES as u64, len, &mut out).map_err(Refusal::Memory)?;
    Ok(out)
}

/// One range of a discard or write-zeroes request: sector (8 bytes), sectors (4), flags (4).
fn range(raw: &[u8], allowed_flags: u32) -> Result<ByteRange, Refusal> {
    let (sector, count, flags) = (le_u64(raw, 0), le_u32(raw, 8), le_u32(raw, 12));
    if flags & !allowed_flags != 0 {
        return Err(Refusal::UnknownFlags { flags });
    }
    if count > VHOST_ZERO_SECTORS_MAX {
        return Err(Refusal::Sectors { sector, count: u64::from(count) });
    }
    let len = u64::from(count) * u64::from(SECTOR_BYTES);
    Ok(ByteRange { offset: byte_offset(sector, len)?, len })
}

/// Data bytes of a read or write if they are a positive multiple of a sector within the limit.
fn io_len(len: u64) -> Option<u32> {
    let len = u32::try_from(len).ok()?;
    (len > 0 && len.is_multiple_of(SECTOR_BYTES) && len <= IO_BYTES_MAX).then_some(len)
}

/// Byte of the volume if `offset + len` fits into 64 bits.
fn byte_offset(sector: u64, len: u64) -> Result<u64, Refusal> {
    let size = u64::from(SECTOR_BYTES);
    let offset = sector.checked_mul(size).filter(|offset| offset.checked_add(len).is_some());
    offset.ok_or(Refusal::Sectors { sector, count: len / size })
}

/// Four bytes at `at`; the callers pass positions inside fixed-size records.
fn le_u32(raw: &[u8], at: usize) -> u32 {
    raw.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// Eight bytes at `at`, likewise.
fn le_u64(raw: &[u8], at: usize) -> u64 {
    raw.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests;
