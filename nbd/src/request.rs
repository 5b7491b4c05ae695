//! Requests: their heads decoded, and what they ask for checked before anything is done.
//!
//! Called by `connection.rs` (and by the fuzz target): first [`RequestHead::decode`], then, with the payload at hand,
//! [`check`]. Invariants: pure and total; no length is used for an allocation before `decode` has bounded it; a
//! request that passes `check` lies inside the export, is aligned to sectors and changes nothing on a read-only export.
//! Errors are those proto.md names ("Error values"). Absent: the payload itself.

use crate::context::Contexts;
use crate::handshake::{Agreement, Framing};
use crate::wire::{
    EXTENDED_REQUEST_BYTES, EXTENDED_REQUEST_MAGIC, Errno, Fields, REQUEST_BYTES, REQUEST_MAGIC, command,
    command_flag as flag,
};
use ogee_common::limits::NBD_PAYLOAD_BYTES_MAX;

/// The head of a request, as sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHead {
    /// Flags.
    pub flags: u16,
    /// Type.
    pub kind: u16,
    /// Named in the reply; opaque.
    pub cookie: u64,
    /// Byte of the export.
    pub offset: u64,
    /// Bytes: of the payload if there is one, else of the range.
    pub len: u64,
    /// Bytes that follow the head; at most `NBD_PAYLOAD_BYTES_MAX`.
    pub payload_len: usize,
}

/// Why the connection must be closed: what follows cannot be told apart any more, or is too much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// The stream is out of step.
    #[error("a request begins with {magic:#010x}, not with {expected:#010x}")]
    Magic {
        /// As sent.
        magic: u32,
        /// As agreed.
        expected: u32,
    },
    /// Longer than `NBD_PAYLOAD_BYTES_MAX`.
    #[error("a request has {len} bytes of payload, at most {NBD_PAYLOAD_BYTES_MAX} are taken")]
    PayloadTooLong {
        /// As sent.
        len: u64,
    },
}

impl RequestHead {
    /// Bytes of a head.
    #[must_use]
    pub const fn bytes(framing: Framing) -> usize {
        match framing {
            Framing::Extended => EXTENDED_REQUEST_BYTES,
            Framing::Simple | Framing::Structured => REQUEST_BYTES,
        }
    }

    /// The head at the front of `input`; `None` if it is not complete.
    ///
    /// # Errors
    /// [`RequestError`].
    pub fn decode(framing: Framing, input: &[u8]) -> Result<Option<Self>, RequestError> {
        let mut fields = Fields(input);
        let Some(magic) = fields.u32() else { return Ok(None) };
        let extended = framing == Framing::Extended;
        let expected = if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        if magic != expected {
            return Err(RequestError::Magic { magic, expected });
        }
        let mut read = || {
            let (flags, kind) = (fields.u16()?, fields.u16()?);
            let (cookie, offset) = (fields.u64()?, fields.u64()?);
            let len = if extended { fields.u64()? } else { u64::from(fields.u32()?) };
            Some((flags, kind, cookie, offset, len))
        };
        let Some((flags, kind, cookie, offset, len)) = read() else { return Ok(None) };
        // A write always has one: QEMU 10.0 leaves the flag out that extended headers want for it.
        let has_payload = kind == command::WRITE || (extended && flags & flag::PAYLOAD_LEN != 0);
        let payload_len = if has_payload { len } else { 0 };
        if payload_len > u64::from(NBD_PAYLOAD_BYTES_MAX) {
            return Err(RequestError::PayloadTooLong { len });
        }
        let payload_len = usize::try_from(payload_len).expect("it was bounded");
        Ok(Some(Self { flags, kind, cookie, offset, len, payload_len }))
    }
}

/// A request that may be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read.
    Read {
        /// Byte of the export.
        offset: u64,
        /// Bytes; at most `NBD_PAYLOAD_BYTES_MAX`.
        len: u32,
        /// Whether the data must come in one chunk.
        one_chunk: bool,
    },
    /// Write the payload.
    Write {
        /// Byte of the export.
        offset: u64,
    },
    /// Make durable what was answered; it is already.
    Flush,
    /// Discard.
    Trim {
        /// Byte of the export.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Make the range read as zeros.
    WriteZeroes {
        /// Byte of the export.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether the zeros must have space of their own.
        allocate: bool,
    },
    /// Read ahead.
    Cache {
        /// Byte of the export.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// Say what is allocated, or what changed.
    BlockStatus {
        /// Byte of the export.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Whether one extent, not longer than asked for, is wanted.
        one: bool,
        /// In which contexts; at least one.
        contexts: Contexts,
    },
    /// Answer what is in flight and close.
    Disconnect,
}

/// Why a request is refused; the connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// As the protocol says it.
    pub errno: Errno,
    /// For people, in the reply where it has room for it.
    pub reason: &'static str,
}

const fn refuse<T>(errno: Errno, reason: &'static str) -> Result<T, Refusal> {
    Err(Refusal { errno, reason })
}

/// What a request asks for, if that is possible on this connection.
///
/// # Errors
/// [`Refusal`].
pub fn check(head: &RequestHead, agreed: &Agreement) -> Result<Command, Refusal> {
    if head.kind == command::DISC {
        return Ok(Command::Disconnect);
    }
    check_flags(head, agreed)?;
    let RequestHead { offset, len, .. } = *head;
    let has = |bit| head.flags & bit != 0;
    if head.kind == command::FLUSH {
        let is_plain = (offset, len) == (0, 0);
        return if is_plain { Ok(Command::Flush) } else { refuse(Errno::Inval, "a flush has no range") };
    }
    let writes = matches!(head.kind, command::WRITE | command::TRIM | command::WRITE_ZEROES);
    if writes && agreed.read_only {
        return refuse(Errno::Perm, "the export is read-only");
    }
    check_range(head, agreed)?;
    match head.kind {
        command::READ => match u32::try_from(len) {
            Ok(len) if len <= NBD_PAYLOAD_BYTES_MAX => {
                Ok(Command::Read { offset, len, one_chunk: has(flag::DF) })
            }
            _ => refuse(Errno::Overflow, "longer than the maximum payload"),
        },
        command::WRITE => Ok(Command::Write { offset }),
        command::TRIM => Ok(Command::Trim { offset, len }),
        command::CACHE => Ok(Command::Cache { offset, len }),
        command::WRITE_ZEROES if has(flag::NO_HOLE) && has(flag::FAST_ZERO) => {
            refuse(Errno::NotSup, "zeros without a hole are written like data")
        }
        command::WRITE_ZEROES => Ok(Command::WriteZeroes { offset, len, allocate: has(flag::NO_HOLE) }),
        command::BLOCK_STATUS => {
            Ok(Command::BlockStatus { offset, len, one: has(flag::REQ_ONE), contexts: agreed.contexts })
        }
        _ => refuse(Errno::Inval, "unknown command"),
    }
}

/// Flags, and what has to be agreed on for a command.
fn check_flags(head: &RequestHead, agreed: &Agreement) -> Result<(), Refusal> {
    let own = match head.kind {
        command::READ if agreed.framing != Framing::Simple => flag::DF,
        command::WRITE if agreed.framing == Framing::Extended => flag::PAYLOAD_LEN,
        command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
        command::BLOCK_STATUS => flag::REQ_ONE,
        command::READ | command::WRITE | command::FLUSH | command::TRIM | command::CACHE => 0,
        _ => return refuse(Errno::Inval, "unknown command"),
    };
    if head.flags & !(own | flag::FUA) != 0 {
        return refuse(Errno::Inval, "a flag that this command does not have");
    }
    if head.kind == command::BLOCK_STATUS && agreed.contexts.is_empty() {
        return refuse(Errno::Inval, "no metadata context was agreed on");
    }
    Ok(())
}

/// Not empty, aligned, inside.
fn check_range(head: &RequestHead, agreed: &Agreement) -> Result<(), Refusal> {
    let sector = u64::from(agreed.sector_bytes);
    if head.len == 0 {
        return refuse(Errno::Inval, "an empty range");
    }
    let is_inside = head.offset.checked_add(head.len).is_some_and(|end| end <= agreed.size_bytes);
    if !is_inside {
        let grows = matches!(head.kind, command::WRITE | command::WRITE_ZEROES);
        return refuse(if grows { Errno::NoSpc } else { Errno::Inval }, "beyond the end of the export");
    }
    if !head.offset.is_multiple_of(sector) || !head.len.is_multiple_of(sector) {
        return refuse(Errno::Inval, "not in whole logical sectors");
    }
    Ok(())
}
