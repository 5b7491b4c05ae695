//! [`FlattenHead`]: the log entry by which a layer gets pages of its ancestors as its own.
//!
//! Invariant: it names everything that its effect depends on besides immutable versions: the pages, and the chain they are
//! read through. So it is the same on every replica and when it is replayed.

use super::codec::{DecodeError, Reader, put_count};
use super::frame::Opcode;
use super::heads::{Ancestor, put_chain, take_chain};
use bytes::{BufMut, Bytes, BytesMut};
use ogee_common::id::{ChunkIndex, LayerId};
use ogee_common::limits::{PAGES_PER_ROW, ROWS_PER_CHUNK};

/// Bytes of a set of the pages of one row.
const PAGE_SET_BYTES: usize = PAGES_PER_ROW as usize / 8;

/// Copy pages of one row of a chunk from the ancestors of a layer into the layer, below everything it has. In the Raft log only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlattenHead {
    /// The layer.
    pub layer: LayerId,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// The row of 256 pages in it.
    pub row: u8,
    /// The pages of the row: bit 0 of the first byte is its first page. May be none; then only the ancestors are sealed.
    pub pages: [u8; PAGE_SET_BYTES],
    /// The ancestors, nearest first; at least one.
    pub chain: Vec<Ancestor>,
}

impl FlattenHead {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(16 + PAGE_SET_BYTES + self.chain.len() * 16);
        b.put_u8(Opcode::Flatten as u8);
        b.put_u8(self.row);
        put_count(&mut b, self.chain.len());
        b.put_u32_le(self.chunk.0);
        b.put_u64_le(self.layer.0);
        b.put_slice(&self.pages);
        put_chain(&self.chain, &mut b);
        b.freeze()
    }

    /// Decodes a head that fills `head`.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        if r.u8("opcode")? != Opcode::Flatten as u8 {
            return Err(DecodeError::OutOfRange("opcode"));
        }
        let row = r.u8("row")?;
        let count = usize::from(r.u16("count")?);
        let mut v = Self {
            row,
            chunk: ChunkIndex(r.u32("chunk")?),
            layer: LayerId(r.u64("layer")?),
            pages: r.array("pages")?,
            chain: Vec::new(),
        };
        if v.layer.0 == 0 || count == 0 || u32::from(row) >= ROWS_PER_CHUNK {
            return Err(DecodeError::OutOfRange("flatten"));
        }
        v.chain = take_chain(count, &mut r)?;
        r.finish()?;
        Ok(v)
    }
}
