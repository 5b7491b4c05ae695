//! Encodings of everything the chunk store keeps in the metadata store, except rows ([`super::row`]). Pure.
//!
//! Invariant: a record starts with a format version and ends with a CRC32C over its *key* and its body, so that a
//! damaged or misplaced record is never believed; decoders are total. Byte tables: `docs/formats/chunkserver.md`.

use super::error::ChunkStoreError;
use bytes::Bytes;
use ogee_common::checksum::{crc32c, crc32c_append};
use ogee_common::id::Term;
use ogee_raft::api::{Applied, LogPos};

/// Format version of every record of this build.
pub const FORMAT: u8 = 1;

/// Appends the checksum of key and body.
pub(crate) fn seal(key: &[u8], mut body: Vec<u8>) -> Vec<u8> {
    let crc = crc32c_append(crc32c(key), &body);
    body.extend_from_slice(&crc.to_le_bytes());
    body
}

/// A cursor over a record whose checksum and version were checked.
#[derive(Debug)]
pub(crate) struct Fields<'a> {
    what: &'static str,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// Checks a stored record.
    pub(crate) fn open(what: &'static str, key: &[u8], record: &'a [u8]) -> Result<Self, ChunkStoreError> {
        let (body, crc) = record.split_last_chunk::<4>().ok_or(ChunkStoreError::Record { what })?;
        if crc32c_append(crc32c(key), body) != u32::from_le_bytes(*crc) {
            return Err(ChunkStoreError::Record { what });
        }
        let mut fields = Self::bare(what, body);
        if fields.u8()? != FORMAT {
            return Err(ChunkStoreError::Record { what });
        }
        Ok(fields)
    }

    /// Reads bytes that carry no checksum of their own.
    pub(crate) const fn bare(what: &'static str, rest: &'a [u8]) -> Self {
        Self { what, rest }
    }

    pub(crate) fn error(&self) -> ChunkStoreError {
        ChunkStoreError::Record { what: self.what }
    }

    pub(crate) fn take(&mut self, n: usize) -> Result<&'a [u8], ChunkStoreError> {
        let (now, rest) = self.rest.split_at_checked(n).ok_or_else(|| self.error())?;
        self.rest = rest;
        Ok(now)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], ChunkStoreError> {
        let (now, rest) = self.rest.split_first_chunk::<N>().ok_or_else(|| self.error())?;
        self.rest = rest;
        Ok(*now)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, ChunkStoreError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, ChunkStoreError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, ChunkStoreError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, ChunkStoreError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A list length that the remaining bytes can hold, `item` bytes each: never an allocation by an unchecked length.
    pub(crate) fn count(&mut self, item: usize) -> Result<usize, ChunkStoreError> {
        let n = self.u32()? as usize;
        if n.checked_mul(item).is_none_or(|bytes| bytes > self.rest.len()) {
            return Err(self.error());
        }
        Ok(n)
    }

    pub(crate) fn finish(self) -> Result<(), ChunkStoreError> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.error()) }
    }
}

/// Encodes position and membership, without checksum (it also travels in manifests).
pub(crate) fn put_applied(applied: &Applied, out: &mut Vec<u8>) {
    let pos = applied.pos.unwrap_or(LogPos { term: Term(0), index: 0 });
    out.extend_from_slice(&[u8::from(applied.pos.is_some()), 0, 0]);
    out.extend_from_slice(&pos.term.0.to_le_bytes());
    out.extend_from_slice(&pos.index.to_le_bytes());
    let len = u32::try_from(applied.membership.len()).expect("a membership is small");
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(&applied.membership);
}

pub(crate) fn take_applied(fields: &mut Fields<'_>) -> Result<Applied, ChunkStoreError> {
    let [has_pos, _, _] = fields.array::<3>()?;
    let pos = LogPos { term: Term(fields.u64()?), index: fields.u64()? };
    let len = fields.count(1)?;
    let membership = Bytes::copy_from_slice(fields.take(len)?);
    match has_pos {
        0 => Ok(Applied { pos: None, membership }),
        1 => Ok(Applied { pos: Some(pos), membership }),
        _ => Err(fields.error()),
    }
}

/// Encodes the record of [`super::key::KIND_APPLIED`].
#[must_use]
pub fn encode_applied(key: &[u8], applied: &Applied) -> Vec<u8> {
    let mut body = vec![FORMAT];
    put_applied(applied, &mut body);
    seal(key, body)
}

/// Decodes the record of [`super::key::KIND_APPLIED`].
///
/// # Errors
/// [`ChunkStoreError::Record`] when it is damaged.
pub fn decode_applied(key: &[u8], record: &[u8]) -> Result<Applied, ChunkStoreError> {
    let mut fields = Fields::open("applied position", key, record)?;
    let applied = take_applied(&mut fields)?;
    fields.finish()?;
    Ok(applied)
}

/// What recovery must know beyond the checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recovery {
    /// No entry above this index was applied before the process ended; see the module docs of `store`.
    pub horizon: u64,
    /// A Raft snapshot is being installed: chunk data may be as new as this index of the sender. 0: none.
    pub install_high: u64,
    /// Whether an install has begun and not ended.
    pub installing: bool,
}

impl Recovery {
    /// Encodes the record of [`super::key::KIND_RECOVERY`].
    #[must_use]
    pub fn encode(&self, key: &[u8]) -> Vec<u8> {
        let mut body = vec![FORMAT, u8::from(self.installing), 0, 0];
        body.extend_from_slice(&self.horizon.to_le_bytes());
        body.extend_from_slice(&self.install_high.to_le_bytes());
        seal(key, body)
    }

    /// Decodes the record of [`super::key::KIND_RECOVERY`].
    ///
    /// # Errors
    /// [`ChunkStoreError::Record`] when it is damaged.
    pub fn decode(key: &[u8], record: &[u8]) -> Result<Self, ChunkStoreError> {
        let mut fields = Fields::open("recovery record", key, record)?;
        let [installing, _, _] = fields.array::<3>()?;
        let v = Self { horizon: fields.u64()?, install_high: fields.u64()?, installing: installing == 1 };
        fields.finish()?;
        Ok(v)
    }
}

/// Summary of a chunk version; its rows are apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VersionRecord {
    /// Bit r: row r exists.
    pub rows: u16,
    /// Largest `last_index` of its rows.
    pub last_index: u64,
}

impl VersionRecord {
    /// Encodes the record.
    #[must_use]
    pub fn encode(&self, key: &[u8]) -> Vec<u8> {
        let mut body = vec![FORMAT, 0];
        body.extend_from_slice(&self.rows.to_le_bytes());
        body.extend_from_slice(&self.last_index.to_le_bytes());
        seal(key, body)
    }

    /// Decodes the record.
    ///
    /// # Errors
    /// [`ChunkStoreError::Record`] when it is damaged.
    pub fn decode(key: &[u8], record: &[u8]) -> Result<Self, ChunkStoreError> {
        let mut fields = Fields::open("version record", key, record)?;
        fields.u8()?;
        let v = Self { rows: fields.u16()?, last_index: fields.u64()? };
        fields.finish()?;
        Ok(v)
    }
}
