//! openraft's own suite on our log store: on an open log, and on one that is closed and recovered after every write.

use super::*;
use crate::types::{LogId, Reply, StoredMembership};
use crate::wal::WalOptions;
use ogee_disk::DataDir;
use openraft::storage::{EntryResponder, RaftSnapshotBuilder, RaftStateMachine};
use openraft::testing::log::{StoreBuilder, Suite};
use openraft::type_config::alias::{SnapshotMetaOf, SnapshotOf};
use openraft::{RaftLogReader, StorageError};
use std::sync::Arc;
use tokio::sync::Mutex;

/// A state machine that remembers where it is and nothing else, as the suite needs it.
#[derive(Debug, Default, Clone)]
struct Machine {
    applied: Option<LogId>,
    membership: StoredMembership,
    snapshot: Option<SnapshotMetaOf<TypeConfig>>,
}

#[derive(Clone)]
struct Shared(Arc<Mutex<Machine>>);

impl RaftSnapshotBuilder<TypeConfig> for Shared {
    type SnapshotData = Vec<u8>;

    async fn build_snapshot(&mut self) -> Result<SnapshotOf<TypeConfig, Vec<u8>>, io::Error> {
        let mut m = self.0.lock().await;
        let meta = SnapshotMetaOf::<TypeConfig> {
            last_log_id: m.applied,
            last_membership: m.membership.clone(),
        };
        m.snapshot = Some(meta.clone());
        Ok(SnapshotOf::<TypeConfig, Vec<u8>> { meta, snapshot: vec![] })
    }
}

impl RaftStateMachine<TypeConfig> for Shared {
    type SnapshotData = Vec<u8>;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let m = self.0.lock().await;
        Ok((m.applied, m.membership.clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<TypeConfig>, io::Error>> + Unpin + OptionalSend,
    {
        use futures_util::StreamExt as _;
        while let Some(item) = entries.next().await {
            let (entry, responder) = item?;
            let mut m = self.0.lock().await;
            m.applied = Some(entry.log_id);
            if let EntryPayload::Membership(members) = entry.payload {
                m.membership = StoredMembership::new(Some(entry.log_id), members);
            }
            if let Some(responder) = responder {
                responder.send(Reply::default());
            }
        }
        Ok(())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMetaOf<TypeConfig>, _data: Vec<u8>) -> Result<(), io::Error> {
        let mut m = self.0.lock().await;
        *m = Machine {
            applied: meta.last_log_id,
            membership: meta.last_membership.clone(),
            snapshot: Some(meta.clone()),
        };
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<SnapshotOf<TypeConfig, Vec<u8>>>, io::Error> {
        let meta = self.0.lock().await.snapshot.clone();
        Ok(meta.map(|meta| SnapshotOf::<TypeConfig, Vec<u8>> { meta, snapshot: vec![] }))
    }
}

fn options() -> WalOptions {
    // A cache of nothing: every read of a durable entry goes through the file.
    WalOptions { segment_bytes: 64 << 10, cache_bytes: 0, ..WalOptions::default() }
}

async fn open(path: &std::path::Path) -> LogStore {
    let dir = DataDir::open(path).expect("data directory");
    let wal = Wal::open(&dir, "wal", options()).await.expect("log");
    wal.open_group(7).expect("group")
}

struct Plain;

impl StoreBuilder<TypeConfig, LogStore, Shared, tempfile::TempDir> for Plain {
    async fn build(&self) -> Result<(tempfile::TempDir, LogStore, Shared), StorageError<TypeConfig>> {
        let temp = tempfile::tempdir().expect("temp dir");
        let store = open(temp.path()).await;
        Ok((temp, store, Shared(Arc::default())))
    }
}

#[tokio::test]
async fn suite() {
    Suite::test_all(Plain).await.expect("openraft's suite");
}

/// A log store that closes the log after every write and recovers it.
#[derive(Clone)]
struct Reopening {
    path: std::path::PathBuf,
    store: Arc<Mutex<Option<LogStore>>>,
}

impl Reopening {
    async fn current(&self) -> LogStore {
        self.store.lock().await.clone().expect("open")
    }

    async fn reopen(&self) {
        let mut slot = self.store.lock().await;
        let old = slot.take().expect("open");
        old.wal().close().await.expect("close");
        drop(old);
        *slot = Some(open(&self.path).await);
    }
}

impl RaftLogReader<TypeConfig> for Reopening {
    async fn try_get_log_entries<RB>(&mut self, range: RB) -> Result<Vec<Entry>, io::Error>
    where
        RB: RangeBounds<u64> + Clone + Debug + OptionalSend,
    {
        self.current().await.try_get_log_entries(range).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        self.current().await.read_vote().await
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        self.current().await.limited_get_log_entries(start, end).await
    }
}

impl RaftLogStorage<TypeConfig> for Reopening {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, io::Error> {
        self.current().await.get_log_state().await
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        self.current().await.save_vote(vote).await?;
        self.reopen().await;
        Ok(())
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<TypeConfig>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        self.current().await.append(entries, callback).await?;
        self.reopen().await;
        Ok(())
    }

    async fn truncate_after(&mut self, last_log_id: Option<LogId>) -> Result<(), io::Error> {
        self.current().await.truncate_after(last_log_id).await?;
        self.reopen().await;
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId) -> Result<(), io::Error> {
        self.current().await.purge(log_id).await?;
        self.reopen().await;
        Ok(())
    }
}

struct Reopened;

impl StoreBuilder<TypeConfig, Reopening, Shared, tempfile::TempDir> for Reopened {
    async fn build(&self) -> Result<(tempfile::TempDir, Reopening, Shared), StorageError<TypeConfig>> {
        let temp = tempfile::tempdir().expect("temp dir");
        let store = open(temp.path()).await;
        let store = Reopening { path: temp.path().to_owned(), store: Arc::new(Mutex::new(Some(store))) };
        Ok((temp, store, Shared(Arc::default())))
    }
}

#[tokio::test]
async fn suite_with_recovery_after_every_write() {
    Suite::test_all(Reopened).await.expect("openraft's suite");
}

#[tokio::test]
async fn a_long_stream_is_read_in_parts() {
    use futures_util::StreamExt as _;
    let temp = tempfile::tempdir().expect("temp dir");
    let dir = DataDir::open(temp.path()).expect("data directory");
    let options = WalOptions { segment_bytes: 8 << 20, cache_bytes: 0, ..WalOptions::default() };
    let wal = Wal::open(&dir, "wal", options).await.expect("log");
    let mut store = wal.open_group(1).expect("group");
    for index in 0..12u8 {
        let payload = EntryPayload::Normal(Command(Bytes::from(vec![index; 1 << 20])));
        let id = LogId { leader_id: 1.into(), index: u64::from(index) };
        store.append([Entry { log_id: id, payload }], IOFlushed::noop()).await.expect("append");
    }
    let limited = store.limited_get_log_entries(0, 12).await.expect("read");
    assert_eq!(limited.len(), WAL_READ_BYTES_MAX >> 20);
    let all: Vec<_> = store.entries_stream(0..12).await.collect().await;
    assert_eq!(all.len(), 12);
    for (i, entry) in (0u8..).zip(all) {
        let entry = entry.expect("entry");
        assert!(matches!(entry.payload, EntryPayload::Normal(c) if c.0.iter().all(|b| *b == i)));
    }
    wal.close().await.expect("close");
}
