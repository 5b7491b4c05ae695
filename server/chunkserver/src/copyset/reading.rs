//! Reads for clients.
//!
//! INV: every page is verified against its checksum before it is returned; a mismatch is [`ReadError::Corrupt`], never
//! data; [`super::repair`] then mends the page from another replica. Cost: nothing but memory copies and checksums when the pages are cached by the kernel
//! and the rows by us; otherwise one hand-off to the blocking pool for rows and one for pages.

use crate::store::error::{ChunkStoreError, ChunkStoreErrorKind};
use crate::store::key::{ChunkKey, VersionKey};
use crate::store::lookup::View;
use crate::store::page_io::PagesRead;
use crate::store::{CopysetStore, PageSource, Refusal};
use bytes::Bytes;
use ogee_common::checksum::{PAGE, ZERO_PAGE_CRC, crc32c};
use ogee_common::geometry::page_fragments;
use ogee_common::id::{AttachEpoch, VolumeSeq};
use ogee_common::limits::PAGE_BYTES;
use ogee_proto::data::{Ancestor, ReadHead, Status};
use std::sync::Arc;

/// Where the parents to read through to come from.
#[derive(Debug, Clone)]
pub enum ReadChain {
    /// From OpenLayer, as the copyset knows them; none when the layer is unknown.
    Known,
    /// From the request of a read-only client.
    Given(Arc<[Ancestor]>),
}

/// What to read.
#[derive(Debug, Clone)]
pub struct ReadRange {
    /// The chunk.
    pub at: ChunkKey,
    /// Newest seq that is seen.
    pub seq: VolumeSeq,
    /// Parents.
    pub chain: ReadChain,
    /// First byte in the chunk.
    pub offset: u32,
    /// Bytes, at least 1; offset and length lie inside the chunk.
    pub len: u32,
}

impl ReadChain {
    /// That of a request: epoch 0 brings its own.
    #[must_use]
    pub fn of(epoch: AttachEpoch, chain: &[Ancestor]) -> Self {
        if epoch.0 == 0 { Self::Given(chain.into()) } else { Self::Known }
    }
}

impl ReadRange {
    /// The range of a request.
    #[must_use]
    pub fn of(head: &ReadHead) -> Self {
        let at = &head.at;
        let chain = ReadChain::of(at.epoch, &head.chain);
        let key = ChunkKey { layer: at.layer, chunk: at.chunk };
        Self { at: key, seq: at.seq, chain, offset: at.offset, len: at.len }
    }
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadOutcome {
    /// The whole range reads as zeros.
    AllZero,
    /// The bytes.
    Data {
        /// The range, contiguous.
        bytes: Bytes,
        /// One CRC32C for each touched page, of the fragment in it.
        crcs: Vec<u32>,
    },
}

/// What is answered to a client's read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadAnswer {
    /// What was read.
    pub outcome: ReadOutcome,
    /// For each page touched, whether no version has it; empty if that was not asked.
    pub missing: Vec<bool>,
}

/// Why nothing was read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Fence or tombstone forbid it.
    #[error("read refused")]
    Refused(#[source] Refusal),
    /// A page does not match its checksum, or its file is gone. Another replica may have it.
    #[error("page {page} of chunk {} does not match its checksum", .at.chunk)]
    Corrupt {
        /// The chunk that was read.
        at: ChunkKey,
        /// The page of the chunk.
        page: u32,
        /// The version that holds the page.
        version: VersionKey,
    },
    /// The replica is starting, installing, or the pages are held up by a full disk; try later.
    #[error("the replica cannot be read now")]
    NotReady,
    /// The store failed.
    #[error("read chunk")]
    Store(#[source] ChunkStoreError),
}

impl ReadError {
    /// A failure of the store.
    pub(crate) fn of_store(error: ChunkStoreError) -> Self {
        match error.kind() {
            ChunkStoreErrorKind::Busy => Self::NotReady,
            _ => Self::Store(error),
        }
    }

    /// The status to answer with.
    #[must_use]
    pub const fn status(&self) -> Status {
        match self {
            Self::Refused(refusal) => refusal.status(),
            Self::Corrupt { .. } => Status::Corrupt,
            Self::NotReady => Status::NotReady,
            Self::Store(_) => Status::DiskFailed,
        }
    }

    /// Status (u16, little-endian) and head of the reply, as for a command.
    #[must_use]
    pub fn reply(&self) -> Vec<u8> {
        match self {
            Self::Refused(refusal) => refusal.reply(),
            _ => self.status().code().to_le_bytes().to_vec(),
        }
    }
}

impl CopysetStore {
    /// Answers a client's read, verified. The caller has just taken a read barrier on this replica.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn read(self: &Arc<Self>, head: &ReadHead) -> Result<ReadAnswer, ReadError> {
        self.caught_up();
        self.admit_read(&head.at).map_err(ReadError::Refused)?;
        let range = ReadRange::of(head);
        let read = self.read_verified(&range).await?;
        let missing = match head.tells_missing {
            true => read.sources.iter().map(|source| *source == PageSource::Absent).collect(),
            false => vec![],
        };
        Ok(ReadAnswer { outcome: outcome(&range, read), missing })
    }

    /// What to look through.
    ///
    /// # Errors
    /// [`ReadError::NotReady`].
    pub(crate) fn view(&self, at: ChunkKey, seq: VolumeSeq, chain: &ReadChain) -> Result<View, ReadError> {
        let state = self.state();
        if !state.servable() {
            return Err(ReadError::NotReady);
        }
        let chain = match chain {
            ReadChain::Given(chain) => Arc::clone(chain),
            ReadChain::Known => state.layers.get(at.layer).map(|l| Arc::clone(&l.chain)).unwrap_or_default(),
        };
        Ok(View::Layer { at, seq, chain })
    }

    /// Reads a range of a chunk, verified. Without a read barrier only immutable versions may be read.
    ///
    /// # Errors
    /// [`ReadError`], never `Refused`.
    pub async fn read_range(self: &Arc<Self>, range: &ReadRange) -> Result<ReadOutcome, ReadError> {
        Ok(outcome(range, self.read_verified(range).await?))
    }

    async fn read_verified(self: &Arc<Self>, range: &ReadRange) -> Result<PagesRead, ReadError> {
        let view = self.view(range.at, range.seq, &range.chain)?;
        let first = range.offset / PAGE_BYTES;
        let pages = first..(range.offset + range.len).div_ceil(PAGE_BYTES);
        let read = self.read_pages(&view, pages).await.map_err(ReadError::of_store)?;
        if let Some(bad) = read.bad.first() {
            if !self.servable() {
                return Err(ReadError::NotReady);
            }
            let page = first + u32::try_from(*bad).expect("a chunk has few pages");
            let source = &read.sources[*bad];
            self.report_damage(source, range.at.chunk.0, page);
            let version = source.version().expect("only a page with data can be bad");
            return Err(ReadError::Corrupt { at: range.at, page, version });
        }
        Ok(read)
    }
}

fn outcome(range: &ReadRange, read: PagesRead) -> ReadOutcome {
    let first = range.offset / PAGE_BYTES;
    if read.sources.iter().all(PageSource::is_zero) {
        return ReadOutcome::AllZero;
    }
    let start = (range.offset - first * PAGE_BYTES) as usize;
    let len = range.len as usize;
    let bytes = read.bytes.freeze().slice(start..start + len);
    let crcs = page_fragments(range.offset, len).map(|f| match read.sources[(f.page - first) as usize] {
        PageSource::Data { crc, .. } if f.range.len() == PAGE => crc,
        _ if f.range.len() == PAGE => ZERO_PAGE_CRC,
        _ => crc32c(&bytes[f.range]),
    });
    let crcs = crcs.collect();
    ReadOutcome::Data { bytes, crcs }
}
