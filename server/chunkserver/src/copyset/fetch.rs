//! What travels when a Raft snapshot is installed: the manifest, the requests for pages and their answers; and the side
//! that answers. Byte tables: `docs/formats/chunkserver.md`.
//!
//! Invariants: every message ends with a CRC32C over all before it and starts with a format version; decoders are
//! total and bounded; an answer never holds a page whose bytes do not match its checksum (such a page is told as
//! damaged). An answer tells the index that the sender had applied *after* it was gathered: nothing in it is newer.

use crate::store::error::ChunkStoreError;
use crate::store::key::{VersionKey, first_page};
use crate::store::layers::{LayerInfo, LayerTable};
use crate::store::lookup::{PageSource, View};
use crate::store::pages::PageSet;
use crate::store::record::{FORMAT, Fields, seal};
use crate::store::row::Row;
use crate::store::{ChunkKey, CopysetStore};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use ogee_common::checksum::{PAGE, crc32c};
use ogee_common::id::{ChunkIndex, LayerId, VolumeSeq};
use ogee_common::limits::{FETCH_BYTES_MAX, PAGES_PER_ROW, ROWS_PER_CHUNK};
use ogee_raft::api::{FetchHandler, MANIFEST_BYTES_MAX, RaftSnapshot, StateMachineError};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes that one row may add to an answer.
const ROW_ANSWER_BYTES_MAX: usize = PAGES_PER_ROW as usize * (PAGE + 4) + 128;

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

/// Answer to [`FetchRequest::Rows`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RowsAnswer {
    /// Index applied by the sender.
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
                    let version = VersionKey::new(LayerId(f.u64()?), ChunkIndex(f.u32()?), VolumeSeq(f.u64()?));
                    Self::Rows { version, from_index: f.u64()?, from_row }
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

/// Answers other replicas for a copyset's store.
#[derive(Debug)]
pub struct CopysetFetch {
    store: Arc<CopysetStore>,
}

impl CopysetFetch {
    /// Answers for a store.
    #[must_use]
    pub const fn new(store: Arc<CopysetStore>) -> Self {
        Self { store }
    }
}

impl FetchHandler for CopysetFetch {
    fn fetch(&self, request: Bytes) -> BoxFuture<'_, Result<Bytes, StateMachineError>> {
        Box::pin(async move {
            let answer = self.store.serve_fetch(&request).await;
            answer.map_err(|e| StateMachineError { verb: "answer a fetch", source: Box::new(e) })
        })
    }
}

impl CopysetStore {
    /// The state as of the last checkpoint, as a Raft snapshot.
    ///
    /// # Errors
    /// [`ChunkStoreError::Record`] when there are more layers than a manifest holds.
    pub(crate) fn raft_snapshot(&self) -> Result<RaftSnapshot, ChunkStoreError> {
        let state = self.state();
        let manifest = encode_manifest(&state.layers);
        if manifest.len() > MANIFEST_BYTES_MAX {
            return Err(ChunkStoreError::Record { what: "manifest (too many layers)" });
        }
        Ok(RaftSnapshot { applied: state.checkpointed.clone(), manifest })
    }

    /// The log has been applied up to everything that was ever committed before this process started: say so after
    /// a successful read barrier. It ends the leniency of the recovery horizon. Costs a lock and a comparison.
    pub fn caught_up(&self) {
        let mut state = self.state();
        state.lenient_until = state.lenient_until.min(state.applied_index());
    }

    /// Answers a request of a replica that installs a Raft snapshot of ours. May be called while entries are applied.
    ///
    /// # Errors
    /// [`ChunkStoreError::Fetch`] for a malformed request; [`ChunkStoreError::Busy`] while this replica is itself not in
    /// order; otherwise the disk failed.
    pub async fn serve_fetch(self: &Arc<Self>, request: &[u8]) -> Result<Bytes, ChunkStoreError> {
        let request = FetchRequest::decode(request)?;
        if !self.servable() {
            return Err(ChunkStoreError::Busy);
        }
        match request {
            FetchRequest::List { from, to } => Ok(self.list(from, to).encode()),
            FetchRequest::Rows { version, from_index, from_row } => {
                Ok(self.rows_since(version, from_index, from_row).await?.encode())
            }
        }
    }

    fn list(&self, from: ChunkIndex, to: ChunkIndex) -> ListAnswer {
        let state = self.state();
        let mut columns: BTreeMap<ChunkIndex, Column> = BTreeMap::new();
        for (key, version) in state.all_versions().filter(|(key, _)| (from..=to).contains(&key.at.chunk)) {
            columns.entry(key.at.chunk).or_default().versions.push((key, version.record.last_index));
        }
        let mut next = None;
        let mut bytes = 0;
        for (chunk, column) in &columns {
            bytes += 8 + column.versions.len() * 24;
            // The first column always travels; it is far below the limit of a frame.
            if bytes > FETCH_BYTES_MAX && Some(chunk) != columns.keys().next() {
                next = Some(*chunk);
                break;
            }
        }
        if let Some(next) = next {
            columns.split_off(&next);
        }
        ListAnswer { applied: state.applied_index(), next, columns }
    }

    async fn rows_since(
        self: &Arc<Self>,
        version: VersionKey,
        from_index: u64,
        from_row: u8,
    ) -> Result<RowsAnswer, ChunkStoreError> {
        let last = u8::try_from(ROWS_PER_CHUNK).expect("a chunk has few rows");
        let mut answer = RowsAnswer { next_row: last, ..RowsAnswer::default() };
        let mut bytes = 0;
        for row in from_row..last {
            if bytes + ROW_ANSWER_BYTES_MAX > FETCH_BYTES_MAX {
                answer.next_row = row;
                break;
            }
            if let Some(fetched) = self.fetched_row(version, row, from_index).await? {
                bytes += ROW_ANSWER_BYTES_MAX.min(fetched.data.len() + 2048);
                answer.rows.push(fetched);
            }
        }
        let state = self.state();
        answer.gone = state.version(version).is_none();
        answer.applied = state.applied_index();
        Ok(answer)
    }

    /// A row as it is at one moment, with its verified pages; `None` when it does not exist or is older.
    async fn fetched_row(
        self: &Arc<Self>,
        version: VersionKey,
        row: u8,
        from_index: u64,
    ) -> Result<Option<FetchedRow>, ChunkStoreError> {
        let pages = first_page(row)..first_page(row) + PAGES_PER_ROW;
        let Some(before) = self.last_index(version, row).await? else { return Ok(None) };
        if before < from_index {
            return Ok(None);
        }
        let read = self.read_pages(&View::Version(version), pages).await?;
        let mut meta = Row::default();
        // The row may have been changed between the two looks; an index that is too high does no harm.
        meta.changed_by(before.max(self.last_index(version, row).await?.unwrap_or(0)));
        let mut data = Vec::with_capacity(read.bytes.len());
        for (i, (source, bytes)) in read.sources.iter().zip(read.bytes.chunks_exact(PAGE)).enumerate() {
            let page = u32::try_from(i).expect("a row has 256 pages");
            match source {
                PageSource::Absent => {}
                PageSource::Zero => meta.set_zero(page),
                PageSource::Data { crc, .. } if !read.bad.contains(&i) => {
                    meta.set_data(page, *crc);
                    data.extend_from_slice(bytes);
                }
                PageSource::Data { touched: false, .. } if self.may_be_ahead() => return Err(ChunkStoreError::Busy),
                PageSource::Data { .. } | PageSource::Damaged { .. } => {
                    self.report_damage(source, version.at.chunk.0, first_page(row) + page);
                    meta.set_damaged(page);
                }
            }
        }
        Ok(Some(FetchedRow { row, meta, data: data.into() }))
    }

    /// Whether files may be newer than rows, because the log of an earlier process is still being replayed.
    fn may_be_ahead(&self) -> bool {
        let state = self.state();
        state.applied_index() < state.lenient_until
    }

    async fn last_index(self: &Arc<Self>, version: VersionKey, row: u8) -> Result<Option<u64>, ChunkStoreError> {
        let first = first_page(row);
        let loaded = self.rows_to_change(version, first..first + 1).await?;
        let state = self.state();
        match self.known_row(&state, &loaded, version.row(row)) {
            crate::store::copyset_store::Known::Row(row) => Ok(Some(row.last_index)),
            _ => Ok(None),
        }
    }
}

/// The column of a chunk in a store, by layer, as the receiver compares it with the sender's.
pub(crate) fn by_layer(versions: impl Iterator<Item = VersionKey>) -> BTreeMap<ChunkKey, Vec<VolumeSeq>> {
    let mut out: BTreeMap<ChunkKey, Vec<VolumeSeq>> = BTreeMap::new();
    for key in versions {
        out.entry(key.at).or_default().push(key.seq);
    }
    out
}
