//! Status codes and heads of replies.

use super::codec::{DecodeError, Reader, put_count};
use bytes::{BufMut, Bytes, BytesMut};
use ogee_common::id::Term;
use ogee_common::limits::{PAGE_BYTES, REQUEST_BYTES_MAX};

macro_rules! statuses {
    ($($(#[$doc:meta])* $name:ident = $value:literal),+ $(,)?) => {
        /// The outcome of a request.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum Status { $($(#[$doc])* $name = $value),+ }

        impl Status {
            /// The number on the wire.
            #[must_use]
            pub const fn code(self) -> u16 { self as u16 }

            /// The status with this number; an unknown one is [`Status::Unknown`].
            #[must_use]
            pub const fn parse(code: u16) -> Self {
                match code { $($value => Self::$name,)+ _ => Self::Unknown }
            }

            /// Every status.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];
        }
    };
}

statuses! {
    /// Done.
    Ok = 0,
    /// This replica does not lead the copyset, or not in the term named. Head: [`Redirect`].
    NotLeader = 1,
    /// No such copyset here.
    UnknownCopyset = 2,
    /// The attach epoch is lower than the fence. Final.
    Fenced = 3,
    /// The seq is lower than the copyset's minimum: a snapshot was made. Refresh and send again. Head: 8 bytes, the
    /// minimum seq.
    StaleSeq = 4,
    /// The layer is not open here with this epoch; send OpenLayer first.
    LayerNotOpen = 5,
    /// No space for new data.
    NoSpace = 6,
    /// Stored data failed its checksum.
    Corrupt = 7,
    /// Too many requests; try later.
    Overloaded = 8,
    /// The request is malformed. Final. Payload: a sentence.
    BadRequest = 9,
    /// The payload does not match its checksums; send again.
    PayloadChecksum = 10,
    /// No common protocol version. Head: two `u16`, lowest and highest spoken here.
    Version = 11,
    /// The replica is starting, or has no quorum; try later.
    NotReady = 12,
    /// The disk failed; this replica is out.
    DiskFailed = 13,
    /// A newer connection of the same session exists; the request was dropped.
    OldGeneration = 14,
    /// The layer was deleted. Final.
    LayerGone = 15,
    /// Another cluster or another process than the asker wanted.
    WrongTarget = 16,
    /// The asker's certificate does not allow the role it claims. Final.
    Forbidden = 17,
    /// A code that this build does not know.
    Unknown = 65535,
}

/// Where the leader is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Redirect {
    /// Chunkserver id of the leader; 0 unknown.
    pub leader: u32,
    /// The term this replica is in.
    pub term: Term,
}

impl Redirect {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(12);
        b.put_u32_le(self.leader);
        b.put_u64_le(self.term.0);
        b.freeze()
    }

    /// Decodes the head.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let v = Self { leader: r.u32("leader")?, term: Term(r.u64("term")?) };
        r.finish()?;
        Ok(v)
    }
}

/// Answer to a Status request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusReply {
    /// Where the leader is.
    pub at: Redirect,
    /// Index applied by this replica.
    pub applied: u64,
}

impl StatusReply {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(20);
        b.put_slice(&self.at.encode());
        b.put_u64_le(self.applied);
        b.freeze()
    }

    /// Decodes the head.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let (at, rest) = head.split_at_checked(12).ok_or(DecodeError::Short("redirect"))?;
        let mut r = Reader(rest);
        let v = Self { at: Redirect::decode(at)?, applied: r.u64("applied")? };
        r.finish()?;
        Ok(v)
    }
}

/// Head of a Read reply: one CRC32C per touched page, of the fragment in that page; none when all is zero, and then
/// there is no payload either.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadReply {
    /// Fragment checksums in page order; empty: everything reads as zero.
    pub crcs: Vec<u32>,
}

impl ReadReply {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(2 + self.crcs.len() * 4);
        put_count(&mut b, self.crcs.len());
        self.crcs.iter().for_each(|c| b.put_u32_le(*c));
        b.freeze()
    }

    /// Decodes the head.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let count = usize::from(r.u16("count")?);
        if count > (REQUEST_BYTES_MAX / PAGE_BYTES) as usize + 1 {
            return Err(DecodeError::OutOfRange("checksum count"));
        }
        let crcs = (0..count).map(|_| r.u32("crc")).collect::<Result<_, _>>()?;
        r.finish()?;
        Ok(Self { crcs })
    }
}
