//! The chunk store: chunk versions as sparse files, their bitmaps and checksums, checkpoints. Called by the copyset
//! state machine (`crate::copyset`), which gives it committed log entries in order, and by reads.
//!
//! | file | what |
//! | --- | --- |
//! | `key`, `record`, `row`, `layers`, `pages` | names, formats, pure parts |
//! | `lookup` | which version a page is read from (pure) |
//! | `process`, `cache` | what all copysets of a process share |
//! | `copyset_store`, `state` | one copyset: memory, loading |
//! | `page_io` | verified reads; writes that wait for space |
//! | `write`, `merge`, `flatten`, `paste` | the effects of log entries |
//! | `checkpoint` | making them durable |
//! | `column` | replacing what a Raft snapshot replaces |
//!
//! # What is durable when
//!
//! An entry's effect is first in data files (page cache) and in dirty rows (memory); the log repeats it after a crash.
//! A checkpoint flushes the dirty files, then writes dirty rows, versions, layers and the applied position in one
//! synced batch, then unlinks files of removed versions. So after a crash, *the files may be newer than the rows, never
//! older*, and what the rows lack is in the log.
//!
//! **INV (replay converges).** Replaying the log from the checkpoint over such files gives the same bytes, bitmaps and
//! checksums. For each kind of operation:
//! - A whole-page write or zero depends on nothing.
//! - A partial-page write onto a page that its own version holds reads the page from the file, which may be newer. It
//!   converges: a sector that no entry after the checkpoint writes is the same in every state of the page; one that is
//!   written has its last writer replayed.
//! - A partial-page write that creates the page in its version reads an *older* version or a parent. Those are
//!   immutable: a version is written only while no request with a higher seq was admitted (`min_seq`), and a parent's
//!   `min_seq` is above the seq that a child sees from the moment the child was opened ([`LayerTable::open`]). All their
//!   writers come earlier in the log and are replayed first. Punched holes and in-place writes hit the newest version
//!   only; removed versions keep their files until the checkpoint that contains the removal.
//! - A merge (`DropVersion`) reads the older version, immutable as above, and fills only pages that the newer one lacks
//!   at that point of the log.
//! - A flatten reads ancestors, immutable as above, and fills only what its own base version lacks (`flatten`).
//! - A paste carries its data and fills only what the base version lacks; its pages are in no way different from what partial writes
//!   before it could have read (`paste`).
//! - `min_seq`, fences and tombstones are rows of the same batch as the applied position, so refusals repeat exactly.
//!
//! # ADR: verification of read-modify-write during replay
//!
//! *Context.* Replay may meet a page whose file content is newer than its checksum; that must not fail. But a page that
//! rotted must not be given a fresh, good checksum either.
//! *Choice.* A recovery horizon H is durable: no entry above H is applied before a larger H was written (H is written
//! with each checkpoint, [`ogee_common::limits::HORIZON_ENTRIES`] ahead, so it costs nothing on the steady path). After a
//! start, H as found bounds what the earlier process can have applied; the end of the local log does not, because a
//! leader may apply what only its followers have flushed. A checksum mismatch of the page under a partial write is
//! accepted only if the entry is at or below that H, the page lies in the version being written, this process has not
//! changed it, and the disk gave its bytes. In every other case the page becomes *damaged*: the write is kept, no checksum is stored, and reads say
//! `Corrupt` until the page is written whole, zeroed or repaired from another replica. Pages of older versions and
//! parents are always verified strictly.
//! *Price.* A page that rots between two runs and is partly written by one of the first entries after the restart is not
//! noticed; counted in [`StoreCounters::unverified_pages`]. *Status.* Accepted.
//!
//! # ADR: committed entries and a full disk
//!
//! A committed entry cannot be refused. So writes that would allocate are refused before they are proposed while
//! [`ChunkStore::space_state`] is `Full`, a reserve before the real end. If a write meets ENOSPC nevertheless, it is
//! tried again with a pause until it succeeds: the copyset stalls, keeps serving reads, and resumes by itself.

pub(crate) mod cache;
pub(crate) mod checkpoint;
pub(crate) mod column;
pub(crate) mod copyset_store;
pub mod error;
pub mod flatten;
pub mod key;
pub mod layers;
pub mod lookup;
mod merge;
pub(crate) mod pace;
pub(crate) mod page_io;
pub mod pages;
mod paste;
pub mod process;
pub mod record;
pub mod row;
pub(crate) mod state;
pub(crate) mod write;

pub use crate::copyset::reading::{ReadAnswer, ReadChain, ReadError, ReadOutcome, ReadRange};
pub use copyset_store::{CopysetStore, Fault};
pub use error::{ChunkStoreError, ChunkStoreErrorKind};
pub use flatten::{BASE_SEQ, FlattenOrder};
pub use key::{ChunkKey, RowKey, VersionKey};
pub use layers::{LayerInfo, LayerTable, Refusal};
pub use lookup::{PageSource, View};
pub use process::{ChunkStore, SpaceState, StoreCounters, StoreTuning};
