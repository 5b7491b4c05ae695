//! Names of things in the chunk store: chunk, chunk version, metadata row; their keys in the metadata store and their
//! file names. Pure. Byte tables: `docs/formats/chunkserver.md`.
//!
//! Invariant: keys are big-endian, so that the order of keys is the order (copyset, layer, chunk, seq, row), and all
//! rows of a copyset, a layer or a version share a prefix. A key or file name is never reused for other content: layer
//! ids are never reused and a version's seq is below the minimum seq for ever once the version was merged away.

use ogee_common::id::{ChunkIndex, CopysetId, LayerId, VolumeSeq};
use ogee_common::limits::{PAGES_PER_ROW, ROWS_PER_CHUNK};
use ogee_disk::Table;

/// Per copyset: [`KIND_APPLIED`] and [`KIND_RECOVERY`].
pub const TABLE_COPYSET: Table = Table::new(16, "copyset");
/// Per copyset and layer: fence, minimum seq, chain, tombstone.
pub const TABLE_LAYER: Table = Table::new(17, "layer");
/// Per chunk version: which rows exist.
pub const TABLE_VERSION: Table = Table::new(18, "version");
/// Per chunk version and row: bitmaps and checksums.
pub const TABLE_ROW: Table = Table::new(19, "row");

/// Second part of a [`TABLE_COPYSET`] key: applied position and membership.
pub const KIND_APPLIED: u8 = 0;
/// Second part of a [`TABLE_COPYSET`] key: recovery horizon and install mark.
pub const KIND_RECOVERY: u8 = 1;

/// A chunk of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkKey {
    /// The layer.
    pub layer: LayerId,
    /// The chunk of the layer.
    pub chunk: ChunkIndex,
}

/// A chunk version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VersionKey {
    /// The chunk.
    pub at: ChunkKey,
    /// The seq its writes carried.
    pub seq: VolumeSeq,
}

/// A metadata row of a chunk version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey {
    /// The version.
    pub version: VersionKey,
    /// The row, 0 to 15.
    pub row: u8,
}

impl VersionKey {
    /// A version of a chunk.
    #[must_use]
    pub const fn new(layer: LayerId, chunk: ChunkIndex, seq: VolumeSeq) -> Self {
        Self { at: ChunkKey { layer, chunk }, seq }
    }

    /// A row of it.
    #[must_use]
    pub const fn row(self, row: u8) -> RowKey {
        RowKey { version: self, row }
    }

    /// Its data file below the data directory.
    #[must_use]
    pub fn file_name(&self, copyset: CopysetId) -> String {
        format!("{}/{:08x}.{:016x}.{:016x}", directory(copyset), self.at.chunk.0, self.at.layer.0, self.seq.0)
    }

    /// The version that a name in the copyset's directory belongs to; `None` for a foreign name.
    #[must_use]
    pub fn parse_name(name: &str) -> Option<Self> {
        let mut parts = name.split('.');
        let mut hex = |digits: usize| {
            let part = parts.next().filter(|p| p.len() == digits)?;
            u64::from_str_radix(part, 16).ok()
        };
        let (chunk, layer, seq) = (hex(8)?, hex(16)?, hex(16)?);
        if parts.next().is_some() {
            return None;
        }
        Some(Self::new(LayerId(layer), ChunkIndex(u32::try_from(chunk).ok()?), VolumeSeq(seq)))
    }

    /// Its key in [`TABLE_VERSION`].
    #[must_use]
    pub fn encode(&self, copyset: CopysetId) -> Vec<u8> {
        let mut key = layer_key(copyset, self.at.layer);
        key.extend_from_slice(&self.at.chunk.0.to_be_bytes());
        key.extend_from_slice(&self.seq.0.to_be_bytes());
        key
    }

    /// The version of a key in [`TABLE_VERSION`]; `None` when it is none.
    #[must_use]
    pub fn decode(key: &[u8]) -> Option<Self> {
        let key: &[u8; 24] = key.try_into().ok()?;
        let (_, rest) = key.split_first_chunk::<4>()?;
        let (layer, rest) = rest.split_first_chunk::<8>()?;
        let (chunk, rest) = rest.split_first_chunk::<4>()?;
        let seq: &[u8; 8] = rest.try_into().ok()?;
        Some(Self::new(
            LayerId(u64::from_be_bytes(*layer)),
            ChunkIndex(u32::from_be_bytes(*chunk)),
            VolumeSeq(u64::from_be_bytes(*seq)),
        ))
    }
}

impl RowKey {
    /// Its key in [`TABLE_ROW`].
    #[must_use]
    pub fn encode(&self, copyset: CopysetId) -> Vec<u8> {
        let mut key = self.version.encode(copyset);
        key.push(self.row);
        key
    }
}

/// Directory of a copyset's data files, below the data directory.
#[must_use]
pub fn directory(copyset: CopysetId) -> String {
    format!("chunks/{:08x}", copyset.0)
}

/// Key of a copyset's record in [`TABLE_COPYSET`].
#[must_use]
pub fn copyset_key(copyset: CopysetId, kind: u8) -> Vec<u8> {
    let mut key = copyset.0.to_be_bytes().to_vec();
    key.push(kind);
    key
}

/// Key of a layer in [`TABLE_LAYER`]; also the prefix of its versions and rows.
#[must_use]
pub fn layer_key(copyset: CopysetId, layer: LayerId) -> Vec<u8> {
    let mut key = copyset.0.to_be_bytes().to_vec();
    key.extend_from_slice(&layer.0.to_be_bytes());
    key
}

/// The row that holds a page of a chunk, and the page's number in it.
#[must_use]
pub fn row_of(page: u32) -> (u8, u32) {
    let row = u8::try_from(page / PAGES_PER_ROW).expect("a chunk has few rows");
    debug_assert!(u32::from(row) < ROWS_PER_CHUNK);
    (row, page % PAGES_PER_ROW)
}

/// First page of a row, counted in the chunk.
#[must_use]
pub fn first_page(row: u8) -> u32 {
    u32::from(row) * PAGES_PER_ROW
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: VersionKey = VersionKey::new(LayerId(0x1122), ChunkIndex(0x33), VolumeSeq(0x44));

    #[test]
    fn names_and_keys_are_pinned() {
        let copyset = CopysetId(0xAB);
        let name = KEY.file_name(copyset);
        assert_eq!(name, "chunks/000000ab/00000033.0000000000001122.0000000000000044");
        assert_eq!(VersionKey::parse_name(name.rsplit('/').next().expect("a name")), Some(KEY));
        for foreign in ["", "x", "00000033.1122.44", "00000033.0000000000001122.0000000000000044.new"] {
            assert_eq!(VersionKey::parse_name(foreign), None);
        }
        let golden = [0, 0, 0, 0xAB, 0, 0, 0, 0, 0, 0, 0x11, 0x22, 0, 0, 0, 0x33, 0, 0, 0, 0, 0, 0, 0, 0x44];
        assert_eq!(KEY.encode(copyset), golden);
        assert_eq!(VersionKey::decode(&golden), Some(KEY));
        assert_eq!(KEY.row(7).encode(copyset), [&golden[..], &[7]].concat());
        assert_eq!(copyset_key(copyset, KIND_RECOVERY), [0, 0, 0, 0xAB, 1]);
        assert_eq!(layer_key(copyset, LayerId(0x1122)), golden[..12]);
    }

    #[test]
    fn rows_tile_the_chunk() {
        assert_eq!(row_of(0), (0, 0));
        assert_eq!(row_of(255), (0, 255));
        assert_eq!(row_of(4095), (15, 255));
        assert_eq!(first_page(15), 3840);
    }
}
