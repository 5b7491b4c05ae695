//! [`ThinReply`]: the answer to a Read that asked which pages no version has.
//!
//! Part of version 3 of the protocol. Invariant: a missing page reads as zeros in the payload (or there is no payload), and only the asker
//! knows what belongs there: what a backup has.

use super::codec::{DecodeError, Reader};
use super::reply::ReadReply;
use bytes::{BufMut, Bytes, BytesMut};
use ogee_common::limits::{PAGE_BYTES, REQUEST_BYTES_MAX};

/// Head of the reply: that of a plain one, and the pages that are missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinReply {
    /// As in a plain reply.
    pub read: ReadReply,
    /// For each page that the range touches, in order, whether no version has it.
    pub missing: Vec<bool>,
}

impl ThinReply {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let read = self.read.encode();
        let mut b = BytesMut::with_capacity(read.len() + self.missing.len() / 8 + 3);
        b.put_u16_le(u16::try_from(self.missing.len()).expect("a request touches few pages"));
        for eight in self.missing.chunks(8) {
            b.put_u8(eight.iter().enumerate().fold(0, |byte, (bit, is_missing)| byte | u8::from(*is_missing) << bit));
        }
        b.put_slice(&read);
        b.freeze()
    }

    /// Decodes the head.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let count = usize::from(r.u16("pages")?);
        if count > (REQUEST_BYTES_MAX / PAGE_BYTES) as usize + 1 {
            return Err(DecodeError::OutOfRange("pages"));
        }
        let bits = r.take(count.div_ceil(8), "missing pages")?;
        let missing: Vec<bool> = (0..count).map(|page| bits[page / 8] >> (page % 8) & 1 == 1).collect();
        if !count.is_multiple_of(8) && bits.last().is_some_and(|last| last >> (count % 8) != 0) {
            return Err(DecodeError::OutOfRange("missing pages"));
        }
        Ok(Self { read: ReadReply::decode(r.0)?, missing })
    }
}
