//! Work that nobody waits for: checkpoints, so that the log can be purged; the watch over free space; the address book
//! kept over restarts.
//!
//! Invariants: a copyset is checkpointed when its log is long, when it pins the oldest log segments, when memory for
//! dirty metadata runs short, or after [`CHECKPOINT_INTERVAL`]; one copyset at a time, so that flushes stay smooth.

use super::control::{Control, PeerBook};
use super::copysets::{Copysets, Hosted};
use ogee_common::clock::{self, Instant};
use ogee_common::id::CopysetId;
use ogee_disk::{Batch, Durability, MetaStore, Table};
use ogee_raft::Wal;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// The loop looks at everything this often.
const TURN: Duration = Duration::from_millis(250);
/// Entries applied since the last checkpoint that make one due.
const CHECKPOINT_ENTRIES: u64 = 16_384;
/// A copyset with anything applied is checkpointed after this time.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(60);
/// Log bytes above which the copysets with the oldest entries are checkpointed.
const LOG_BYTES_MAX: u64 = 512 << 20;
/// Key and table of the address book: for each chunkserver 4 bytes id, then the address as text, postcard.
const TABLE_BOOK: Table = Table::new(33, "address_book");
const BOOK_KEY: &[u8] = b"book";

struct Seen {
    applied: u64,
    at: Instant,
}

/// The loop of upkeep; its owner drops it.
pub(super) struct Upkeep {
    pub(super) copysets: Arc<Copysets>,
    pub(super) control: Arc<Control>,
    pub(super) book: Arc<PeerBook>,
    pub(super) meta: Arc<dyn MetaStore>,
    pub(super) wal: Wal,
}

impl Upkeep {
    /// Runs until dropped.
    pub(super) async fn run(self) {
        let mut seen: HashMap<CopysetId, Seen> = HashMap::new();
        let mut saved = self.book.all();
        loop {
            tokio::time::sleep(TURN).await;
            self.control.refresh_space();
            let pressure = self.wal.pressure();
            let pinned = if pressure.bytes > LOG_BYTES_MAX || pressure.no_space { pressure.oldest_groups } else { vec![] };
            for hosted in self.copysets.all() {
                let applied = hosted.group.applied_index();
                let last = seen.entry(hosted.copyset).or_insert_with(|| Seen { applied, at: clock::now() });
                let entries = applied.saturating_sub(last.applied);
                let due = hosted.store.checkpoint_due()
                    || entries >= CHECKPOINT_ENTRIES
                    || (entries > 0 && last.at.elapsed() >= CHECKPOINT_INTERVAL)
                    || pinned.contains(&u64::from(hosted.copyset.0));
                if due {
                    *last = Seen { applied, at: clock::now() };
                    checkpoint(&hosted).await;
                }
            }
            let now = self.book.all();
            if now != saved {
                save_book(&*self.meta, &now);
                saved = now;
            }
        }
    }
}

/// Checkpoints a replica; a failure is the replica's own end and is reported by its state.
pub(super) async fn checkpoint(hosted: &Hosted) {
    if let Err(error) = hosted.group.checkpoint().await {
        tracing::warn!(copyset = %hosted.copyset, %error, "checkpoint");
    }
}

fn save_book(meta: &dyn MetaStore, peers: &[(u32, SocketAddr)]) {
    let mut batch = Batch::new();
    let bytes = postcard::to_stdvec(peers).expect("addresses always encode");
    batch.put(TABLE_BOOK, BOOK_KEY, &bytes);
    if let Err(error) = meta.write(batch, Durability::Deferred) {
        tracing::warn!(error = &error as &dyn std::error::Error, "keep the address book");
    }
}

/// What was kept; nothing when there is none or it is unreadable, since the MDS tells it anyway.
pub(super) fn load_book(meta: &dyn MetaStore) -> Vec<(u32, SocketAddr)> {
    let row = meta.get(TABLE_BOOK, BOOK_KEY).ok().flatten();
    row.and_then(|bytes| postcard::from_bytes(&bytes).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_disk::MemStore;

    #[test]
    fn the_address_book_survives() {
        let meta = MemStore::new();
        assert_eq!(load_book(&meta), vec![]);
        let peers = vec![(1, "127.0.0.1:7100".parse().expect("an address"))];
        save_book(&meta, &peers);
        assert_eq!(load_book(&meta), peers);
    }
}
