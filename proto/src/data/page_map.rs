//! [`PageMapHead`] and [`PageMapReply`]: what a chunk holds, page by page, and what changed in it since an earlier moment.
//!
//! Part of version 2 of the protocol; who agreed on version 1 is not asked. Invariants: the answer is about the whole
//! chunk and has one of two sizes, so it is bounded whatever the chunk holds; no page is both data and zero.

use super::codec::{DecodeError, Reader};
use super::frame::Opcode;
use super::heads::{Ancestor, LayerHead, put_chain, take_chain};
use bytes::{BufMut, Bytes, BytesMut};
use ogee_common::id::{LayerId, VolumeSeq};
use ogee_common::limits::{CHUNK_BYTES, PAGES_PER_CHUNK, PAGES_PER_ROW};

/// Bytes of a set of the pages of one row.
const ROW_BYTES: usize = PAGES_PER_ROW as usize / 8;

/// A set of pages of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkPages(Box<[u8; Self::BYTES]>);

impl ChunkPages {
    /// Bytes on the wire: page `p` is bit `p % 8` of byte `p / 8`.
    pub const BYTES: usize = PAGES_PER_CHUNK as usize / 8;

    /// No page.
    #[must_use]
    pub fn none() -> Self {
        Self(Box::new([0; Self::BYTES]))
    }

    /// Every page.
    #[must_use]
    pub fn all() -> Self {
        Self(Box::new([0xFF; Self::BYTES]))
    }

    /// Whether it holds a page, 0 to 4095.
    #[must_use]
    pub fn contains(&self, page: u32) -> bool {
        self.0[page as usize / 8] >> (page % 8) & 1 == 1
    }

    /// Pages of either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        Self(Box::new(std::array::from_fn(|byte| self.0[byte] | other.0[byte])))
    }

    /// Pages of both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        Self(Box::new(std::array::from_fn(|byte| self.0[byte] & other.0[byte])))
    }

    /// How many they are.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.iter().map(|byte| byte.count_ones()).sum()
    }

    /// Adds a page, 0 to 4095.
    pub fn insert(&mut self, page: u32) {
        self.0[page as usize / 8] |= 1 << (page % 8);
    }

    /// Replaces what it holds of a row, 0 to 15, by a set of the pages of a row.
    pub fn set_row(&mut self, row: u8, pages: &[u8; ROW_BYTES]) {
        self.0[usize::from(row) * ROW_BYTES..][..ROW_BYTES].copy_from_slice(pages);
    }

    fn take(r: &mut Reader<'_>, field: &'static str) -> Result<Self, DecodeError> {
        Ok(Self(Box::new(r.array(field)?)))
    }
}

/// Ask what a chunk holds, as seen at a seq of a layer through its ancestors, and which of its pages may have changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageMapHead {
    /// Where and by what right, as in a Read; always a whole chunk.
    pub at: LayerHead,
    /// The moment to compare with: a seq of the layer itself or of one of its ancestors. `None`: nothing is compared.
    pub since: Option<Ancestor>,
    /// Parents, as in a Read.
    pub chain: Vec<Ancestor>,
}

impl PageMapHead {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(LayerHead::BYTES + 16 + self.chain.len() * 16);
        self.at.put(Opcode::PageMap, self.chain.len(), &mut b);
        b[1] = u8::from(self.since.is_some());
        put_chain(self.since.as_slice(), &mut b);
        put_chain(&self.chain, &mut b);
        b.freeze()
    }

    /// Decodes the head.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let (at, modifier, count) = LayerHead::take(Opcode::PageMap, CHUNK_BYTES, &mut r)?;
        if at.offset != 0 || at.len != CHUNK_BYTES {
            return Err(DecodeError::OutOfRange("offset or len"));
        }
        let since = match modifier {
            0 => None,
            1 => Some(Ancestor { layer: LayerId(r.u64("since")?), seq: VolumeSeq(r.u64("since seq")?) }),
            _ => return Err(DecodeError::OutOfRange("modifier")),
        };
        if since.is_some_and(|s| s.layer.0 == 0) {
            return Err(DecodeError::OutOfRange("id 0"));
        }
        let chain = take_chain(count, &mut r)?;
        r.finish()?;
        Ok(Self { at, since, chain })
    }
}

/// What a chunk holds. A page that is neither data nor zero was never written, also not in an ancestor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageMapReply {
    /// Pages with data.
    pub data: ChunkPages,
    /// Pages that were made zeros and take no space.
    pub zero: ChunkPages,
    /// Pages that may differ from the moment to compare with: all that do, and some that were written with what they
    /// had. There if it was asked for.
    pub changed: Option<ChunkPages>,
}

impl PageMapReply {
    /// What is said of a chunk of which nothing is known: data, and all of it changed.
    #[must_use]
    pub fn unknown() -> Self {
        Self { data: ChunkPages::all(), zero: ChunkPages::none(), changed: Some(ChunkPages::all()) }
    }

    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(1 + 3 * ChunkPages::BYTES);
        b.put_u8(u8::from(self.changed.is_some()));
        [Some(&self.data), Some(&self.zero), self.changed.as_ref()].into_iter().flatten().for_each(|p| b.put_slice(&p.0[..]));
        b.freeze()
    }

    /// Decodes the head.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let flags = r.u8("flags")?;
        if flags > 1 {
            return Err(DecodeError::OutOfRange("flags"));
        }
        let (data, zero) = (ChunkPages::take(&mut r, "data pages")?, ChunkPages::take(&mut r, "zero pages")?);
        let changed = if flags == 1 { Some(ChunkPages::take(&mut r, "changed pages")?) } else { None };
        r.finish()?;
        if data.0.iter().zip(zero.0.iter()).any(|(d, z)| d & z != 0) {
            return Err(DecodeError::OutOfRange("pages"));
        }
        Ok(Self { data, zero, changed })
    }
}
