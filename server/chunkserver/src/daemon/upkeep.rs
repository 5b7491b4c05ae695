//! Work that nobody waits for: checkpoints, so that the log can be purged; the watch over free space; the address book
//! kept over restarts.
//!
//! Invariant: one copyset is checkpointed at a time, so that flushes stay smooth. When which is due: [`super::schedule`].

use super::control::{Control, PeerBook};
use super::copysets::{Copysets, Hosted};
use super::schedule::{Due, LOG_BYTES_MAX, Now, Schedule};
use ogee_common::clock;
use ogee_disk::{Batch, Durability, MetaStore, Table};
use ogee_raft::Wal;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

/// The loop looks at everything this often.
const TURN: Duration = Duration::from_millis(250);
/// Key and table of the address book: for each chunkserver 4 bytes id, then the address as text, postcard.
const TABLE_BOOK: Table = Table::new(33, "address_book");
const BOOK_KEY: &[u8] = b"book";

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
        let mut schedule = Schedule::default();
        let mut saved = self.book.all();
        loop {
            tokio::time::sleep(TURN).await;
            self.control.refresh_space();
            for hosted in self.copysets.all() {
                hosted.end_if_failed().await;
            }
            for due in self.due(&mut schedule) {
                let (Due::Checkpoint(copyset) | Due::Trim(copyset)) = due;
                let Some(hosted) = self.copysets.get(copyset) else { continue };
                match due {
                    Due::Checkpoint(_) => {
                        hosted.store.flush_ahead().await;
                        checkpoint(&hosted).await;
                    }
                    Due::Trim(_) => trim(&hosted).await,
                }
            }
            let now = self.book.all();
            if now != saved {
                save_book(&*self.meta, &now);
                saved = now;
            }
        }
    }

    fn due(&self, schedule: &mut Schedule) -> Vec<Due> {
        let pressure = self.wal.pressure();
        let too_long = pressure.bytes > LOG_BYTES_MAX || pressure.no_space;
        let pinned = if too_long { pressure.oldest_groups } else { vec![] };
        let now = |hosted: &Hosted| Now {
            copyset: hosted.copyset,
            applied: hosted.group.applied_index(),
            asks: hosted.store.checkpoint_due(),
            pins: pinned.contains(&u64::from(hosted.copyset.0)),
        };
        let copysets: Vec<Now> = self.copysets.all().iter().map(now).collect();
        schedule.turn(clock::now(), self.wal.stats().bytes, &copysets)
    }
}

/// Gives up the tail of a replica's log.
async fn trim(hosted: &Hosted) {
    if let Err(error) = hosted.group.trim(0, 0).await {
        tracing::warn!(copyset = %hosted.copyset, %error, "trim log");
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
