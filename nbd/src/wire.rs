//! Numbers of the NBD protocol and the reading of big-endian fields.
//!
//! Source: proto.md of the NBD project (`NetworkBlockDevice/nbd`), with its branch `extension-ext-header`; names are
//! those of the document without `NBD_`. Invariants: [`Fields`] never reads behind its end and never panics; every
//! field on the wire is big-endian. Absent: meaning.

/// First word of the greeting, `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second word of the greeting and head of every option, `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Head of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Head of a request with a 32-bit length.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Head of a request with a 64-bit length.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Head of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Head of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Head of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Bytes of a request with a 32-bit length, without payload.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a request with a 64-bit length, without payload.
pub const EXTENDED_REQUEST_BYTES: usize = 32;
/// Bytes of the head of an option: magic, option, length.
pub const OPTION_HEAD_BYTES: usize = 16;

/// Handshake flags of the server and of the client.
pub mod handshake_flag {
    /// Options may be refused, one after the other.
    pub const FIXED_NEWSTYLE: u16 = 1;
    /// The 124 zeros after EXPORT_NAME are left out.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options of the handshake.
pub mod option {
    /// Choose an export without a reply that could refuse it.
    pub const EXPORT_NAME: u32 = 1;
    /// End the connection.
    pub const ABORT: u32 = 2;
    /// Name all exports.
    pub const LIST: u32 = 3;
    /// Begin TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Choose an export.
    pub const GO: u32 = 7;
    /// Structured replies from now on.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Requests and replies with 64-bit lengths from now on.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of the replies to options.
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export's name.
    pub const SERVER: u32 = 2;
    /// Something about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known.
    pub const ERR_UNSUP: u32 = (1 << 31) + 1;
    /// The option makes no sense.
    pub const ERR_INVALID: u32 = (1 << 31) + 3;
    /// The option is answered under TLS only.
    pub const ERR_TLS_REQD: u32 = (1 << 31) + 5;
    /// There is no such export.
    pub const ERR_UNKNOWN: u32 = (1 << 31) + 6;
    /// Extended headers were agreed on, which say more.
    pub const ERR_EXT_HEADER_REQD: u32 = (1 << 31) + 10;
}

/// Kinds of information about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Its name.
    pub const NAME: u16 = 1;
    /// A line for people.
    pub const DESCRIPTION: u16 = 2;
    /// Size constraints.
    pub const BLOCK_SIZE: u16 = 3;
}

/// What the server can do with an export.
pub mod transmission_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The flag FUA.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES with the flag NO_HOLE.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The flag DF.
    pub const SEND_DF: u16 = 1 << 7;
    /// Flushes hold for all connections.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The flag FAST_ZERO.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Types of requests.
pub mod command {
    /// Read.
    pub const READ: u16 = 0;
    /// Write.
    pub const WRITE: u16 = 1;
    /// End the connection; has no reply.
    pub const DISC: u16 = 2;
    /// Flush.
    pub const FLUSH: u16 = 3;
    /// Discard.
    pub const TRIM: u16 = 4;
    /// Read ahead.
    pub const CACHE: u16 = 5;
    /// Write zeros.
    pub const WRITE_ZEROES: u16 = 6;
    /// Ask for metadata.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of requests.
pub mod command_flag {
    /// Reply when durable.
    pub const FUA: u16 = 1;
    /// Zeros must be allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One chunk of data in the reply.
    pub const DF: u16 = 1 << 2;
    /// One extent in the reply.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Only if zeroing is faster than writing.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// Extended headers: the length is that of a payload.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Flag of a structured or extended reply chunk: it is the last of its request.
pub const REPLY_FLAG_DONE: u16 = 1;

/// Types of structured and extended reply chunks.
pub mod chunk {
    /// Nothing more.
    pub const NONE: u16 = 0;
    /// Data with its offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeros with their offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents with 32-bit lengths.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents with 64-bit lengths.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error with a message.
    pub const ERROR: u16 = (1 << 15) + 1;
}

/// The one metadata context there is.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its number in replies; any number would do.
pub const BASE_ALLOCATION_ID: u32 = 1;
/// `ogee:changed:SNAPSHOT`: may differ from the snapshot; QEMU's `NBD_STATE_DIRTY`.
pub const STATE_CHANGED: u32 = 1;
/// `base:allocation`: not allocated.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: reads as zeros.
pub const STATE_ZERO: u32 = 1 << 1;

/// Why a request failed, as the protocol says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// The export is read-only.
    Perm = 1,
    /// The device failed.
    Io = 5,
    /// The request makes no sense.
    Inval = 22,
    /// No space, or a write beyond the end.
    NoSpc = 28,
    /// Too long.
    Overflow = 75,
    /// Not faster than writing.
    NotSup = 95,
    /// The device goes away.
    Shutdown = 108,
}

impl Errno {
    /// The number on the wire.
    #[must_use]
    pub const fn number(self) -> u32 {
        self as u32
    }
}

/// Big-endian fields, taken from the front.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// The next `len` bytes, if there are so many.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.bytes(N)?.try_into().ok()
    }

    /// The next 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64-bit number.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A 32-bit length and so many bytes of UTF-8 without NUL, at most `NBD_STRING_BYTES_MAX`.
    pub fn string(&mut self) -> Option<&'a str> {
        let len = usize::try_from(self.u32()?).ok()?;
        let text = std::str::from_utf8(self.bytes(len)?).ok()?;
        (len <= ogee_common::limits::NBD_STRING_BYTES_MAX && !text.contains('\0')).then_some(text)
    }

    /// Whether nothing is left.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
