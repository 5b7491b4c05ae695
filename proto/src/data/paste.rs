//! [`PasteHead`]: pages of the backup that a layer stands on, for the layer's base version.
//!
//! Part of version 3 of the protocol. Invariants: the head tells its own length and that of the data behind it, so that
//! `head ++ payload` is a self-describing [`super::Command`], as that of a Write; it names no seq, epoch or term, because its effect is
//! the same whoever sends it and when (`ogee_chunkserver::store::paste`). A page is data or zeros, never both.

use super::codec::{DecodeError, Reader, put_count};
use super::frame::Opcode;
use bytes::{BufMut, Bytes, BytesMut};
use ogee_common::checksum::{PAGE, ZERO_PAGE_CRC, crc32c};
use ogee_common::id::{ChunkIndex, CopysetId, LayerId};
use ogee_common::limits::{PAGES_PER_ROW, ROWS_PER_CHUNK};

/// Bytes of a set of the pages of one row.
const PAGE_SET_BYTES: usize = PAGES_PER_ROW as usize / 8;

/// Pages of one row of a chunk: bit 0 of the first byte of a set is the row's first page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PastePages {
    /// The row of 256 pages in its chunk, 0 to 15.
    pub row: u8,
    /// Pages whose data follows the head, in order.
    pub data: [u8; PAGE_SET_BYTES],
    /// Pages that are zeros.
    pub zero: [u8; PAGE_SET_BYTES],
    /// CRC32C of each page of `data`, in order.
    pub crcs: Vec<u32>,
}

impl PastePages {
    /// Content that starts at a page of a row and stays in it, as sets, and the data of those pages that are not zeros. `content` is whole
    /// pages; `wanted` says which of them are meant.
    #[must_use]
    pub fn of(row: u8, first_page: u32, content: &[u8], wanted: impl Fn(u32) -> bool) -> (Self, Bytes) {
        let mut pages = Self { row, data: [0; PAGE_SET_BYTES], zero: [0; PAGE_SET_BYTES], crcs: vec![] };
        let mut data = BytesMut::new();
        for (page, bytes) in (first_page..PAGES_PER_ROW).zip(content.chunks_exact(PAGE)).filter(|(page, _)| wanted(*page)) {
            let crc = crc32c(bytes);
            let is_zero = crc == ZERO_PAGE_CRC && bytes.iter().all(|b| *b == 0);
            let set = if is_zero { &mut pages.zero } else { &mut pages.data };
            set[page as usize / 8] |= 1 << (page % 8);
            if !is_zero {
                pages.crcs.push(crc);
                data.put_slice(bytes);
            }
        }
        (pages, data.freeze())
    }

    /// Whether there is nothing to paste.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.data.iter().chain(&self.zero).all(|b| *b == 0)
    }

    /// Bytes of the data that belongs to it.
    #[must_use]
    pub fn data_bytes(&self) -> usize {
        self.crcs.len() * PAGE
    }

    /// Whether `data` has the checksums.
    #[must_use]
    pub fn matches(&self, data: &[u8]) -> bool {
        data.len() == self.data_bytes() && data.chunks_exact(PAGE).zip(&self.crcs).all(|(page, crc)| crc32c(page) == *crc)
    }
}

/// Fill pages of a layer that its base version lacks. Carried by the client that read them from the backup, and in the Raft log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PasteHead {
    /// The copyset the chunk lies in.
    pub copyset: CopysetId,
    /// The layer that stands on the backup.
    pub layer: LayerId,
    /// The chunk of it.
    pub chunk: ChunkIndex,
    /// The pages.
    pub pages: PastePages,
}

impl PasteHead {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let pages = &self.pages;
        let mut b = BytesMut::with_capacity(20 + 2 * PAGE_SET_BYTES + pages.crcs.len() * 4);
        b.put_u8(Opcode::Paste as u8);
        b.put_u8(pages.row);
        put_count(&mut b, pages.crcs.len());
        b.put_u32_le(self.copyset.0);
        b.put_u32_le(self.chunk.0);
        b.put_u64_le(self.layer.0);
        b.put_slice(&pages.data);
        b.put_slice(&pages.zero);
        pages.crcs.iter().for_each(|crc| b.put_u32_le(*crc));
        b.freeze()
    }

    /// Decodes a head that fills `head`.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let v = Self::take(&mut r)?;
        r.finish()?;
        Ok(v)
    }

    pub(super) fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        if r.u8("opcode")? != Opcode::Paste as u8 {
            return Err(DecodeError::OutOfRange("opcode"));
        }
        let row = r.u8("row")?;
        let count = usize::from(r.u16("count")?);
        let (copyset, chunk) = (CopysetId(r.u32("copyset")?), ChunkIndex(r.u32("chunk")?));
        let layer = LayerId(r.u64("layer")?);
        let (data, zero): ([u8; PAGE_SET_BYTES], [u8; PAGE_SET_BYTES]) = (r.array("data")?, r.array("zero")?);
        if layer.0 == 0 || copyset.0 == 0 || u32::from(row) >= ROWS_PER_CHUNK {
            return Err(DecodeError::OutOfRange("paste"));
        }
        let both = data.iter().zip(&zero).any(|(d, z)| d & z != 0);
        if both || data.iter().map(|b| b.count_ones() as usize).sum::<usize>() != count {
            return Err(DecodeError::OutOfRange("pages"));
        }
        let crcs = (0..count).map(|_| r.u32("crc")).collect::<Result<_, _>>()?;
        Ok(Self { copyset, layer, chunk, pages: PastePages { row, data, zero, crcs } })
    }
}
