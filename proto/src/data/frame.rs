//! Frame header, framing of a byte stream, and outgoing frames.
//!
//! Invariants: a header is believed only after its CRC; a body length is compared with
//! [`FRAME_BODY_BYTES_MAX`] before anything is allocated; the head's CRC is checked before the frame is handed on. The
//! payload is **not** checked here: its checksums travel in the head and are checked where the data is used.

use super::codec::{DecodeError, Reader};
use bytes::{BufMut, Bytes, BytesMut};
use ogee_common::checksum::crc32c;
use ogee_common::limits::FRAME_BODY_BYTES_MAX;
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt};

/// First two bytes of a frame: "OG".
pub const MAGIC: u16 = 0x474F;
/// Version of the form of frames, in every header.
pub const VERSION: u8 = 1;
/// Lowest version of the protocol that this build speaks.
pub const PROTOCOL_MIN: u16 = 1;
/// Highest version of the protocol that this build speaks.
pub const PROTOCOL_MAX: u16 = 3;
/// The version that has [`Opcode::PageMap`]: an older process ends a connection on which it comes.
pub const PAGE_MAP_SINCE: u16 = 2;
/// The version that has [`Opcode::Paste`], reads that tell missing pages, and zeroings that always mask: an older process would
/// take the latter two for plain ones.
pub const PASTE_SINCE: u16 = 3;
/// Bytes of a header.
pub const HEADER_BYTES: usize = 32;
/// Bytes that a reader asks from the socket at once: many small frames per system call.
const READ_CHUNK: usize = 128 << 10;

macro_rules! opcodes {
    ($($(#[$doc:meta])* $name:ident = $value:literal),+ $(,)?) => {
        /// What a frame asks for. A reply carries the opcode of its request with bit 7 set.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum Opcode { $($(#[$doc])* $name = $value),+ }

        impl Opcode {
            /// The opcode with this number.
            ///
            /// # Errors
            /// [`DecodeError::Opcode`].
            pub const fn parse(value: u8) -> Result<Self, DecodeError> {
                match value { $($value => Ok(Self::$name),)+ other => Err(DecodeError::Opcode(other)) }
            }

            /// Every opcode, for tests that want one of each.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];
        }
    };
}

opcodes! {
    /// First frame of a connection, both ways.
    Hello = 0x01,
    /// Write to a chunk.
    Write = 0x02,
    /// Zero a range of a chunk (write-zeroes or discard).
    Zero = 0x03,
    /// Read from a chunk.
    Read = 0x04,
    /// Raise the fence of a layer in a copyset and teach it the ancestry.
    OpenLayer = 0x05,
    /// Who leads a copyset.
    Status = 0x06,
    /// What a chunk holds, page by page, and what changed in it.
    PageMap = 0x07,
    /// Fill pages of a layer below everything that it has, with content of the backup it stands on.
    Paste = 0x08,
    /// Only in the Raft log: refuse writes below a seq.
    Seal = 0x10,
    /// Only in the Raft log: delete a layer.
    DropLayer = 0x11,
    /// Only in the Raft log: merge a version into the next.
    DropVersion = 0x12,
    /// Only in the Raft log: copy pages of a chunk from the ancestors into the layer.
    Flatten = 0x13,
    /// Raft AppendEntries.
    RaftAppend = 0x20,
    /// Raft RequestVote.
    RaftVote = 0x21,
    /// Raft Pre-Vote.
    RaftPreVote = 0x22,
    /// Raft snapshot manifest.
    RaftSnapshot = 0x23,
    /// Raft TransferLeader.
    RaftTransfer = 0x24,
    /// Page ranges for a replica that installs a Raft snapshot.
    FetchPages = 0x25,
    /// Heartbeats of all groups between two processes.
    RaftBeat = 0x26,
}

/// The fixed part of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The operation.
    pub opcode: Opcode,
    /// Whether this answers a request.
    pub is_reply: bool,
    /// [`super::Status`] of a reply; 0 in a request.
    pub status: u16,
    /// Flags of the operation; unknown bits are refused.
    pub flags: u16,
    /// Chosen by the asker, unique among its unanswered requests on the connection.
    pub request: u64,
    /// Bytes of the head.
    pub head_len: u32,
    /// Bytes of the payload.
    pub payload_len: u32,
    /// CRC32C of the head.
    pub head_crc: u32,
}

impl Header {
    /// Encodes the header with its own CRC.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0u8; HEADER_BYTES];
        let mut b = &mut out[..];
        b.put_u16_le(MAGIC);
        b.put_u8(VERSION);
        b.put_u8(self.opcode as u8 | if self.is_reply { 0x80 } else { 0 });
        b.put_u16_le(self.status);
        b.put_u16_le(self.flags);
        b.put_u64_le(self.request);
        b.put_u32_le(self.head_len);
        b.put_u32_le(self.payload_len);
        b.put_u32_le(self.head_crc);
        let crc = crc32c(&out[..HEADER_BYTES - 4]);
        out[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Decodes and checks a header.
    ///
    /// # Errors
    /// [`DecodeError`] for a wrong magic, CRC, version, opcode or length.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, DecodeError> {
        let mut r = Reader(bytes);
        if r.u16("magic")? != MAGIC {
            return Err(DecodeError::Magic);
        }
        let crc = u32::from_le_bytes([bytes[28], bytes[29], bytes[30], bytes[31]]);
        if crc32c(&bytes[..HEADER_BYTES - 4]) != crc {
            return Err(DecodeError::Checksum("header"));
        }
        let version = r.u8("version")?;
        if version != VERSION {
            return Err(DecodeError::Version(version));
        }
        let op = r.u8("opcode")?;
        let header = Self {
            opcode: Opcode::parse(op & 0x7f)?,
            is_reply: op & 0x80 != 0,
            status: r.u16("status")?,
            flags: r.u16("flags")?,
            request: r.u64("request")?,
            head_len: r.u32("head_len")?,
            payload_len: r.u32("payload_len")?,
            head_crc: r.u32("head_crc")?,
        };
        match header.head_len.checked_add(header.payload_len) {
            Some(body) if body <= FRAME_BODY_BYTES_MAX => Ok(header),
            _ => Err(DecodeError::OutOfRange("body length")),
        }
    }

    fn body_len(&self) -> usize {
        self.head_len as usize + self.payload_len as usize
    }
}

/// A received frame: the body lies in one buffer, so that `head ++ payload` can go to the log as it is.
#[derive(Debug, Clone)]
pub struct Frame {
    /// The fixed part.
    pub header: Header,
    /// Head and payload.
    pub body: Bytes,
}

impl Frame {
    /// The fields of the operation.
    #[must_use]
    pub fn head(&self) -> &[u8] {
        &self.body[..self.header.head_len as usize]
    }

    /// The raw data.
    #[must_use]
    pub fn payload(&self) -> Bytes {
        self.body.slice(self.header.head_len as usize..)
    }
}

/// A frame to send: header and head in one buffer, the payload apart, so that it is never copied.
#[derive(Debug, Clone)]
pub struct OutFrame {
    /// Header and head.
    pub prefix: Bytes,
    /// Raw data, in pieces; may be empty.
    pub payload: smallvec::SmallVec<[Bytes; 2]>,
}

impl OutFrame {
    /// A request.
    #[must_use]
    pub fn request(opcode: Opcode, request: u64, head: &[u8], payload: Bytes) -> Self {
        Self::build(opcode, false, 0, request, head, smallvec::smallvec![payload])
    }

    /// A request whose payload lies in several buffers.
    #[must_use]
    pub fn request_vectored(opcode: Opcode, request: u64, head: &[u8], payload: smallvec::SmallVec<[Bytes; 2]>) -> Self {
        Self::build(opcode, false, 0, request, head, payload)
    }

    /// A reply.
    #[must_use]
    pub fn reply(opcode: Opcode, status: super::Status, request: u64, head: &[u8], payload: Bytes) -> Self {
        Self::build(opcode, true, status.code(), request, head, smallvec::smallvec![payload])
    }

    fn build(
        opcode: Opcode,
        is_reply: bool,
        status: u16,
        request: u64,
        head: &[u8],
        payload: smallvec::SmallVec<[Bytes; 2]>,
    ) -> Self {
        let payload_bytes: usize = payload.iter().map(Bytes::len).sum();
        let fits = |n: usize| u32::try_from(n).expect("frame parts are bounded by FRAME_BODY_BYTES_MAX");
        let header = Header {
            opcode,
            is_reply,
            status,
            flags: 0,
            request,
            head_len: fits(head.len()),
            payload_len: fits(payload_bytes),
            head_crc: crc32c(head),
        };
        assert!(header.body_len() <= FRAME_BODY_BYTES_MAX as usize, "an outgoing frame exceeds the frame limit");
        let mut prefix = BytesMut::with_capacity(HEADER_BYTES + head.len());
        prefix.put_slice(&header.encode());
        prefix.put_slice(head);
        Self { prefix: prefix.freeze(), payload }
    }

    /// Bytes on the wire.
    #[must_use]
    pub fn len(&self) -> usize {
        self.prefix.len() + self.payload.iter().map(Bytes::len).sum::<usize>()
    }

    /// Never true; present because clippy wants it beside `len`.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.prefix.is_empty()
    }
}

/// Cuts a byte stream into frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads frames from `stream`.
    pub fn new(stream: R) -> Self {
        Self { stream, buffer: BytesMut::with_capacity(READ_CHUNK) }
    }

    /// The next frame, or `None` when the peer closed between two frames. Not cancellation-safe in its result, but a
    /// dropped call loses no bytes: they stay in the buffer.
    ///
    /// # Errors
    /// Errors of the socket; `InvalidData` with a [`DecodeError`] inside for bytes that are no frame. The connection is
    /// of no use afterwards.
    pub async fn next(&mut self) -> io::Result<Option<Frame>> {
        loop {
            match self.try_next().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))? {
                Ok(frame) => return Ok(Some(frame)),
                Err(missing) => self.buffer.reserve(missing.max(READ_CHUNK / 4)),
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    /// A frame that is already in the buffer, without reading from the socket.
    ///
    /// # Errors
    /// As [`FrameReader::next`].
    pub fn buffered(&mut self) -> io::Result<Option<Frame>> {
        self.try_next().map(Result::ok).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    }

    /// A whole frame, or how many bytes are missing.
    fn try_next(&mut self) -> Result<Result<Frame, usize>, DecodeError> {
        let Some(head) = self.buffer.first_chunk::<HEADER_BYTES>() else {
            return Ok(Err(HEADER_BYTES - self.buffer.len()));
        };
        let header = Header::decode(head)?;
        let total = HEADER_BYTES + header.body_len();
        if self.buffer.len() < total {
            return Ok(Err(total - self.buffer.len()));
        }
        let body = self.buffer.split_to(total).freeze().slice(HEADER_BYTES..);
        let frame = Frame { header, body };
        if crc32c(frame.head()) != header.head_crc {
            return Err(DecodeError::Checksum("head"));
        }
        Ok(Ok(frame))
    }
}
