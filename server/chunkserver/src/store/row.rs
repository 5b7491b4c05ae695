//! [`Row`]: what is known of 256 pages of a chunk version. Pure.
//!
//! A page is in exactly one of four states, and only rows say which; the data file alone means nothing:
//!
//! ```text
//! absent ── write ──> data(crc) ── zero ──> zero        damaged: the page was lost to silent corruption and then partly
//!    │                  │   ^ └── rmw of bad data ─┐    overwritten, so no checksum can be right. It is never read as
//!    └────── zero ──────┼───┼──> zero ── write ──┘ └──> data; a whole overwrite, a zero or a repair ends it.
//! ```
//!
//! Invariants: the sets of data and zero pages are disjoint; damaged pages are a part of the data pages; `last_index`
//! never falls.

use super::error::ChunkStoreError;
use super::pages::PageSet;
use super::record::{FORMAT, Fields, seal};
use ogee_common::checksum::crc32c;
use ogee_common::limits::PAGES_PER_ROW;

/// Bytes of a row in memory, roughly; for sizing the cache.
pub const ROW_MEMORY_BYTES: usize = std::mem::size_of::<Row>() + 64;

/// Flag in the encoded row: a set of damaged pages follows.
const FLAG_DAMAGED: u8 = 1;

/// Bitmaps and checksums of 256 pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Raft index of the last entry that changed the row.
    pub last_index: u64,
    data: PageSet,
    zero: PageSet,
    damaged: PageSet,
    /// Pages changed since the process started; in memory only, see the recovery horizon.
    touched: PageSet,
    crcs: [u32; PAGES_PER_ROW as usize],
}

/// What a row says of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    /// This version holds nothing: look at older ones.
    Absent,
    /// Reads as zeros, whatever older versions hold.
    Zero,
    /// Data with this checksum is in the file.
    Data {
        /// CRC32C of the page.
        crc: u32,
        /// Whether it was written since the process started.
        touched: bool,
    },
    /// The data is known to be wrong.
    Damaged,
}

impl Default for Row {
    fn default() -> Self {
        Self {
            last_index: 0,
            data: PageSet::EMPTY,
            zero: PageSet::EMPTY,
            damaged: PageSet::EMPTY,
            touched: PageSet::EMPTY,
            crcs: [0; PAGES_PER_ROW as usize],
        }
    }
}

impl Row {
    /// What is known of a page.
    #[must_use]
    pub fn page(&self, page: u32) -> PageState {
        if self.zero.contains(page) {
            PageState::Zero
        } else if self.damaged.contains(page) {
            PageState::Damaged
        } else if self.data.contains(page) {
            PageState::Data { crc: self.crcs[page as usize], touched: self.touched.contains(page) }
        } else {
            PageState::Absent
        }
    }

    /// Pages that mask older versions.
    #[must_use]
    pub fn held(&self) -> PageSet {
        self.data.union(self.zero)
    }

    /// Pages with data in the file, damaged ones included.
    #[must_use]
    pub const fn data(&self) -> PageSet {
        self.data
    }

    /// Pages that read as zeros.
    #[must_use]
    pub const fn zero(&self) -> PageSet {
        self.zero
    }

    /// Pages whose data is known to be wrong.
    #[must_use]
    pub const fn damaged(&self) -> PageSet {
        self.damaged
    }

    /// CRC32C over what the row says of its pages; `None` while one of them is damaged, which no two replicas have in common. The index of
    /// the last change takes no part: a row that was fetched may carry a higher one.
    #[must_use]
    pub fn digest(&self) -> Option<u32> {
        if !self.damaged.is_empty() {
            return None;
        }
        let crcs: Vec<u8> = self.data.iter().flat_map(|page| self.crcs[page as usize].to_le_bytes()).collect();
        Some(crc32c(&[&self.data.encode()[..], &self.zero.encode()[..], &crcs].concat()))
    }

    /// The row as one that this process has not changed.
    #[must_use]
    pub fn untouched(self) -> Self {
        Self { touched: PageSet::EMPTY, ..self }
    }

    /// Records that an entry changed the row.
    pub fn changed_by(&mut self, index: u64) {
        self.last_index = self.last_index.max(index);
    }

    /// The page was written whole.
    pub fn set_data(&mut self, page: u32, crc: u32) {
        self.zero.remove(page);
        self.damaged.remove(page);
        self.data.insert(page);
        self.touched.insert(page);
        self.crcs[page as usize] = crc;
    }

    /// The page reads as zeros.
    pub fn set_zero(&mut self, page: u32) {
        self.data.remove(page);
        self.damaged.remove(page);
        self.zero.insert(page);
        self.touched.insert(page);
    }

    /// The page holds data that is wrong.
    pub fn set_damaged(&mut self, page: u32) {
        self.zero.remove(page);
        self.data.insert(page);
        self.damaged.insert(page);
        self.touched.insert(page);
        self.crcs[page as usize] = 0;
    }

    /// Appends the fields, without version and checksum (they also travel to other replicas).
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        let flags = if self.damaged.is_empty() { 0 } else { FLAG_DAMAGED };
        out.extend_from_slice(&[flags, 0, 0]);
        out.extend_from_slice(&self.last_index.to_le_bytes());
        out.extend_from_slice(&self.data.encode());
        out.extend_from_slice(&self.zero.encode());
        if flags & FLAG_DAMAGED != 0 {
            out.extend_from_slice(&self.damaged.encode());
        }
        for page in self.data.iter() {
            out.extend_from_slice(&self.crcs[page as usize].to_le_bytes());
        }
    }

    pub(crate) fn take(fields: &mut Fields<'_>) -> Result<Self, ChunkStoreError> {
        let [flags, _, _] = fields.array::<3>()?;
        let mut row = Self { last_index: fields.u64()?, ..Self::default() };
        row.data = PageSet::decode(&fields.array()?);
        row.zero = PageSet::decode(&fields.array()?);
        if flags & FLAG_DAMAGED != 0 {
            row.damaged = PageSet::decode(&fields.array()?);
        }
        let sound = row.data.intersection(row.zero).is_empty() && row.damaged.minus(row.data).is_empty();
        if flags & !FLAG_DAMAGED != 0 || !sound {
            return Err(fields.error());
        }
        for page in row.data.iter() {
            row.crcs[page as usize] = fields.u32()?;
        }
        Ok(row)
    }

    /// Encodes the row as it is stored under `key`.
    #[must_use]
    pub fn encode(&self, key: &[u8]) -> Vec<u8> {
        let mut body = vec![FORMAT];
        self.put(&mut body);
        seal(key, body)
    }

    /// Decodes a stored row.
    ///
    /// # Errors
    /// [`ChunkStoreError::Record`] when it is damaged or belongs to another key.
    pub fn decode(key: &[u8], record: &[u8]) -> Result<Self, ChunkStoreError> {
        let mut fields = Fields::open("metadata row", key, record)?;
        let row = Self::take(&mut fields)?;
        fields.finish()?;
        Ok(row)
    }
}
