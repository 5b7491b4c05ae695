//! What travels when a Raft snapshot is installed: the manifest, the requests for pages and their answers. Pure. The side
//! that answers is [`super::serving`], the side that asks [`super::install`]. Byte tables: `docs/formats/chunkserver.md`.
//!
//! Invariants: every message ends with a CRC32C over all before it and starts with a format version; decoders are
//! total and bounded; a decoded answer holds no page whose bytes do not match its checksum.

use crate::store::error::ChunkStoreError;
use crate::store::key::{RowKey, VersionKey};
use crate::store::layers::{LayerInfo, LayerTable};
use crate::store::pages::PageSet;
use crate::store::record::{FORMAT, Fields, seal};
use crate::store::row::Row;
use crate::store::ChunkKey;
use bytes::Bytes;
use ogee_common::checksum::{PAGE, crc32c};
use ogee_common::id::{ChunkIndex, LayerId, VolumeSeq};
use ogee_common::limits::ROWS_PER_CHUNK;
use std::collections::BTreeMap;

/// Bytes of an encoded [`RowDigest`].
const DIGEST_BYTES: usize = 20 + 1 + 8 + 1 + 4;

/// A request for a part of the sender's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchRequest {
    /// Which versions exist, for chunks from `from` to `to` inclusive.
    List {
        /// First chunk.
        from: ChunkIndex,
        /// Last chunk.
        to: ChunkIndex,
    },
    /// Rows of a version from `from_row` on that were changed by an entry at or above `from_index`, with their pages.
    Rows {
        /// The version.
        version: VersionKey,
        /// Lowest index that counts as changed; 0 for every row.
        from_index: u64,
        /// First row.
        from_row: u8,
    },
    /// One row of a version with its pages, to repair a page of ours (see [`super::repair`]).
    Row {
        /// The version.
        version: VersionKey,
        /// The row.
        row: u8,
    },
    /// What rows hold, in few bytes each, to compare replicas (see [`super::compare`]).
    Digests {
        /// Rows behind this one; `None`: from the first.
        after: Option<RowKey>,
        /// Up to this one, inclusive; `None`: to the last.
        to: Option<RowKey>,
    },
}

/// What a row holds, in few bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowDigest {
    /// The row.
    pub key: RowKey,
    /// Index of the last entry that changed it, or a higher one.
    pub last_index: u64,
    /// CRC32C over which pages are data and which zero, and their checksums; `None` while a page of it is damaged.
    pub crc: Option<u32>,
}

/// Answer to [`FetchRequest::Digests`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DigestsAnswer {
    /// Index applied before the rows were looked at: they hold all of its effects.
    pub before: u64,
    /// Index applied after: they hold none of later effects.
    pub after: u64,
    /// Whether these are all rows of the range; else there are more behind the last.
    pub complete: bool,
    /// The rows that hold anything, in order.
    pub rows: Vec<RowDigest>,
}

/// All versions of all layers that share a chunk index: what is fetched as one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Column {
    /// Version and the index of its last change, sorted.
    pub versions: Vec<(VersionKey, u64)>,
}

/// Answer to [`FetchRequest::List`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ListAnswer {
    /// Index applied by the sender.
    pub applied: u64,
    /// First chunk that did not fit.
    pub next: Option<ChunkIndex>,
    /// Columns with at least one version.
    pub columns: BTreeMap<ChunkIndex, Column>,
}

/// A row with its pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchedRow {
    /// Number of the row.
    pub row: u8,
    /// Bitmaps and checksums.
    pub meta: Row,
    /// Data pages that are not damaged, in order.
    pub data: Bytes,
}

/// Answer to [`FetchRequest::Rows`] and [`FetchRequest::Row`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RowsAnswer {
    /// Index applied by the sender: after the rows were gathered for `Rows`, before the row was for `Row`.
    pub applied: u64,
    /// The version does not exist any more.
    pub gone: bool,
    /// First row that did not fit; 16 when all did.
    pub next_row: u8,
    /// The rows.
    pub rows: Vec<FetchedRow>,
}

fn bad(what: &'static str) -> ChunkStoreError {
    ChunkStoreError::Fetch { what }
}

/// Opens a sealed message; damage is the sender's, not ours.
fn open<'a>(what: &'static str, message: &'a [u8]) -> Result<Fields<'a>, ChunkStoreError> {
    Fields::open(what, &[], message).map_err(|_| bad(what))
}

fn put_version(version: &VersionKey, out: &mut Vec<u8>) {
    out.extend_from_slice(&version.at.layer.0.to_le_bytes());
    out.extend_from_slice(&version.at.chunk.0.to_le_bytes());
    out.extend_from_slice(&version.seq.0.to_le_bytes());
}

fn take_version(f: &mut Fields<'_>) -> Result<VersionKey, ChunkStoreError> {
    Ok(VersionKey::new(LayerId(f.u64()?), ChunkIndex(f.u32()?), VolumeSeq(f.u64()?)))
}

fn put_row_key(key: &RowKey, out: &mut Vec<u8>) {
    put_version(&key.version, out);
    out.push(key.row);
}

fn take_row_key(f: &mut Fields<'_>) -> Result<RowKey, ChunkStoreError> {
    let version = take_version(f)?;
    let row = f.u8()?;
    if u32::from(row) < ROWS_PER_CHUNK { Ok(version.row(row)) } else { Err(f.error()) }
}

fn put_count(n: usize, out: &mut Vec<u8>) {
    out.extend_from_slice(&u32::try_from(n).expect("messages are bounded by their size").to_le_bytes());
}

impl FetchRequest {
    /// Encodes the request.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = vec![FORMAT];
        match self {
            Self::List { from, to } => {
                out.push(1);
                out.extend_from_slice(&from.0.to_le_bytes());
                out.extend_from_slice(&to.0.to_le_bytes());
            }
            Self::Rows { version, from_index, from_row } => {
                out.extend_from_slice(&[2, *from_row]);
                put_version(version, &mut out);
                out.extend_from_slice(&from_index.to_le_bytes());
            }
            Self::Row { version, row } => {
                out.extend_from_slice(&[3, *row]);
                put_version(version, &mut out);
            }
            Self::Digests { after, to } => {
                out.push(4);
                for bound in [after, to] {
                    out.push(u8::from(bound.is_some()));
                    put_row_key(&bound.unwrap_or_else(|| VersionKey::new(LayerId(0), ChunkIndex(0), VolumeSeq(0)).row(0)), &mut out);
                }
            }
        }
        seal(&[], out).into()
    }

    /// Decodes a request.
    ///
    /// # Errors
    /// [`ChunkStoreError::Fetch`].
    pub fn decode(message: &[u8]) -> Result<Self, ChunkStoreError> {
        let mut f = open("fetch request", message)?;
        let mut take = || {
            let request = match f.u8()? {
                1 => Self::List { from: ChunkIndex(f.u32()?), to: ChunkIndex(f.u32()?) },
                2 => {
                    let from_row = f.u8()?;
                    Self::Rows { version: take_version(&mut f)?, from_index: f.u64()?, from_row }
                }
                3 => {
                    let row = f.u8()?;
                    Self::Row { version: take_version(&mut f)?, row }
                }
                4 => {
                    let bound = |f: &mut Fields<'_>| Ok::<_, ChunkStoreError>((f.u8()? == 1, take_row_key(f)?));
                    let (after, to) = (bound(&mut f)?, bound(&mut f)?);
                    Self::Digests { after: after.0.then_some(after.1), to: to.0.then_some(to.1) }
                }
                _ => return Err(f.error()),
            };
            Ok::<_, ChunkStoreError>(request)
        };
        let request = take().map_err(|_| bad("fetch request"))?;
        f.finish().map_err(|_| bad("fetch request"))?;
        Ok(request)
    }
}

impl ListAnswer {
    /// Encodes the answer.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = vec![FORMAT, u8::from(self.next.is_some())];
        out.extend_from_slice(&self.applied.to_le_bytes());
        out.extend_from_slice(&self.next.unwrap_or_default().0.to_le_bytes());
        put_count(self.columns.len(), &mut out);
        for (chunk, column) in &self.columns {
            out.extend_from_slice(&chunk.0.to_le_bytes());
            put_count(column.versions.len(), &mut out);
            for (version, last_index) in &column.versions {
                out.extend_from_slice(&version.at.layer.0.to_le_bytes());
                out.extend_from_slice(&version.seq.0.to_le_bytes());
                out.extend_from_slice(&last_index.to_le_bytes());
            }
        }
        seal(&[], out).into()
    }

    /// Decodes an answer.
    ///
    /// # Errors
    /// [`ChunkStoreError::Fetch`].
    pub fn decode(message: &[u8]) -> Result<Self, ChunkStoreError> {
        let mut f = open("list of versions", message)?;
        Self::take(&mut f).map_err(|_| bad("list of versions")).and_then(|answer| {
            f.finish().map_err(|_| bad("list of versions"))?;
            Ok(answer)
        })
    }

    fn take(f: &mut Fields<'_>) -> Result<Self, ChunkStoreError> {
        let has_next = f.u8()? == 1;
        let applied = f.u64()?;
        let next = ChunkIndex(f.u32()?);
        let mut columns = BTreeMap::new();
        for _ in 0..f.count(8)? {
            let chunk = ChunkIndex(f.u32()?);
            let count = f.count(24)?;
            let version = |f: &mut Fields<'_>| {
                let key = VersionKey::new(LayerId(f.u64()?), chunk, VolumeSeq(f.u64()?));
                Ok((key, f.u64()?))
            };
            let versions = (0..count).map(|_| version(f)).collect::<Result<Vec<_>, ChunkStoreError>>()?;
            if versions.is_empty() || !versions.windows(2).all(|w| w[0].0 < w[1].0) {
                return Err(f.error());
            }
            columns.insert(chunk, Column { versions });
        }
        Ok(Self { applied, next: has_next.then_some(next), columns })
    }
}

impl RowsAnswer {
    /// Encodes the answer.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let rows = u8::try_from(self.rows.len()).expect("a version has 16 rows");
        let mut out = vec![FORMAT, u8::from(self.gone), self.next_row, rows];
        out.extend_from_slice(&self.applied.to_le_bytes());
        for row in &self.rows {
            out.push(row.row);
            row.meta.put(&mut out);
            out.extend_from_slice(&row.data);
        }
        seal(&[], out).into()
    }

    /// Decodes an answer and verifies every page in it.
    ///
    /// # Errors
    /// [`ChunkStoreError::Fetch`].
    pub fn decode(message: &Bytes) -> Result<Self, ChunkStoreError> {
        let mut f = open("rows of a version", message)?;
        let answer = Self::take(&mut f, message).map_err(|_| bad("rows of a version"))?;
        f.finish().map_err(|_| bad("rows of a version"))?;
        Ok(answer)
    }

    fn take(f: &mut Fields<'_>, message: &Bytes) -> Result<Self, ChunkStoreError> {
        let [gone, next_row, count] = f.array::<3>()?;
        let applied = f.u64()?;
        let mut rows: Vec<FetchedRow> = vec![];
        for _ in 0..count {
            let row = f.u8()?;
            let meta = Row::take(f)?;
            let pages = pages_sent(&meta);
            let data = message.slice_ref(f.take(pages.len() * PAGE)?);
            let crc_of = |page| match meta.page(page) {
                crate::store::row::PageState::Data { crc, .. } => Some(crc),
                _ => None,
            };
            let good = pages.iter().zip(data.chunks_exact(PAGE)).all(|(p, bytes)| crc_of(p) == Some(crc32c(bytes)));
            if !good || u32::from(row) >= ROWS_PER_CHUNK || rows.last().is_some_and(|last| last.row >= row) {
                return Err(f.error());
            }
            rows.push(FetchedRow { row, meta, data });
        }
        if u32::from(next_row) > ROWS_PER_CHUNK {
            return Err(f.error());
        }
        Ok(Self { applied, gone: gone == 1, next_row, rows })
    }
}

impl DigestsAnswer {
    /// Encodes the answer.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut out = vec![FORMAT, u8::from(self.complete)];
        out.extend_from_slice(&self.before.to_le_bytes());
        out.extend_from_slice(&self.after.to_le_bytes());
        put_count(self.rows.len(), &mut out);
        for row in &self.rows {
            put_row_key(&row.key, &mut out);
            out.extend_from_slice(&row.last_index.to_le_bytes());
            out.push(u8::from(row.crc.is_some()));
            out.extend_from_slice(&row.crc.unwrap_or(0).to_le_bytes());
        }
        seal(&[], out).into()
    }

    /// Decodes an answer.
    ///
    /// # Errors
    /// [`ChunkStoreError::Fetch`].
    pub fn decode(message: &[u8]) -> Result<Self, ChunkStoreError> {
        let mut f = open("digests of rows", message)?;
        let mut take = || {
            let complete = f.u8()? == 1;
            let (before, after) = (f.u64()?, f.u64()?);
            let mut rows: Vec<RowDigest> = vec![];
            for _ in 0..f.count(DIGEST_BYTES)? {
                let (key, last_index) = (take_row_key(&mut f)?, f.u64()?);
                let (has, crc) = (f.u8()? == 1, f.u32()?);
                if rows.last().is_some_and(|last| last.key >= key) {
                    return Err(f.error());
                }
                rows.push(RowDigest { key, last_index, crc: has.then_some(crc) });
            }
            Ok::<_, ChunkStoreError>(Self { before, after, complete, rows })
        };
        let answer = take().map_err(|_| bad("digests of rows"))?;
        f.finish().map_err(|_| bad("digests of rows"))?;
        Ok(answer)
    }
}

/// Pages of a row whose data travels.
#[must_use]
pub fn pages_sent(row: &Row) -> PageSet {
    row.data().minus(row.damaged())
}

/// Encodes the layers of a Raft snapshot.
#[must_use]
pub fn encode_manifest(layers: &LayerTable) -> Bytes {
    let mut out = vec![FORMAT];
    put_count(layers.len(), &mut out);
    for (layer, info) in layers.iter() {
        out.extend_from_slice(&layer.0.to_le_bytes());
        info.put(&mut out);
    }
    seal(&[], out).into()
}

/// Decodes the layers of a Raft snapshot.
///
/// # Errors
/// [`ChunkStoreError::Fetch`].
pub fn decode_manifest(manifest: &[u8]) -> Result<LayerTable, ChunkStoreError> {
    let mut f = open("manifest", manifest)?;
    let mut take = || {
        let mut layers = LayerTable::default();
        for _ in 0..f.count(27)? {
            layers.restore(LayerId(f.u64()?), LayerInfo::take(&mut f)?);
        }
        Ok::<_, ChunkStoreError>(layers)
    };
    let layers = take().map_err(|_| bad("manifest"))?;
    f.finish().map_err(|_| bad("manifest"))?;
    Ok(layers)
}

/// The column of a chunk in a store, by layer, as the receiver compares it with the sender's.
pub(crate) fn by_layer(versions: impl Iterator<Item = VersionKey>) -> BTreeMap<ChunkKey, Vec<VolumeSeq>> {
    let mut out: BTreeMap<ChunkKey, Vec<VolumeSeq>> = BTreeMap::new();
    for key in versions {
        out.entry(key.at).or_default().push(key.seq);
    }
    out
}
