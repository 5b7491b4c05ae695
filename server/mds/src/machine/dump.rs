//! The whole state as a Raft snapshot: every row of every table at one moment.
//!
//! A dump is cut into pages. One page travels in the manifest itself; of more, the manifest says how many, the sender
//! keeps the last dump in memory, and the receiver fetches them one by one. Invariants: all pages are of one moment, the
//! one that the applied row among them names; nothing is written at the receiver before every page has arrived and was decoded;
//! a page of an older dump is refused, and the install is tried again with a new manifest. Byte format: version byte, then postcard.

use super::row::{AppliedRow, Row as _, TABLES};
use super::tx::RowError;
use super::failed;
use bytes::Bytes;
use ogee_common::rng;
use ogee_disk::meta::{MetaStore, Row};
use ogee_raft::{MANIFEST_BYTES_MAX, SnapshotSource, StateMachineError};
use serde::{Deserialize, Serialize};

/// Version of manifests, pages and requests for them.
const VERSION: u8 = 1;
/// Row bytes after which a page is full; a row (a 4 MiB reply at most) and its head still fit into a manifest.
const PAGE_BYTES: usize = MANIFEST_BYTES_MAX / 4;
/// Pages of one dump that a receiver accepts: 64 GiB of metadata, more than any cluster has.
const PAGES_MAX: u32 = 1 << 16;

/// What a snapshot's manifest says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Manifest {
    /// Everything is here.
    Whole(Vec<DumpRow>),
    /// So many pages are to be fetched.
    Paged { dump: u64, pages: u32 },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct DumpRow {
    table: u8,
    key: Vec<u8>,
    value: Vec<u8>,
}

#[derive(Debug, Serialize, Deserialize)]
struct PageRequest {
    dump: u64,
    page: u32,
}

/// Why a manifest or a page is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum DumpError {
    #[error("malformed")]
    Malformed(#[from] postcard::Error),
    #[error("written by another version")]
    Version,
    #[error("a page of a dump that is gone")]
    Gone,
    #[error("{0} pages are too many")]
    TooMany(u32),
    #[error("it has a row of unknown table {0}")]
    UnknownTable(u8),
    #[error("it does not say how far the log is applied")]
    NoPosition,
}

/// The rows of one moment.
pub(super) struct Dump {
    id: u64,
    pages: Vec<Bytes>,
}

fn encode(value: &impl Serialize) -> Vec<u8> {
    postcard::to_extend(value, vec![VERSION]).expect("plain data always encodes")
}

fn decode<'b, T: Deserialize<'b>>(bytes: &'b [u8]) -> Result<T, DumpError> {
    match bytes.split_first() {
        Some((&VERSION, body)) => Ok(postcard::from_bytes(body)?),
        _ => Err(DumpError::Version),
    }
}

impl Dump {
    /// Copies the rows. Blocks for as long as reading them takes.
    pub(super) fn take(store: &dyn MetaStore) -> Result<Self, RowError> {
        let (mut pages, mut page, mut bytes) = (vec![], vec![], 0);
        store.dump(TABLES, &mut |table, key, value| {
            bytes += key.len() + value.len() + 16;
            page.push(DumpRow { table, key: key.to_vec(), value: value.to_vec() });
            if bytes >= PAGE_BYTES {
                pages.push(Bytes::from(encode(&std::mem::take(&mut page))));
                bytes = 0;
            }
            true
        })?;
        pages.push(Bytes::from(encode(&page)));
        Ok(Self { id: rng::nonzero_u64(), pages })
    }

    /// The manifest of the snapshot.
    pub(super) fn manifest(&self) -> Bytes {
        let manifest = match &self.pages[..] {
            [only] => Manifest::Whole(decode(only).expect("the page was encoded here")),
            pages => {
                let pages = u32::try_from(pages.len()).expect("pages of megabytes");
                Manifest::Paged { dump: self.id, pages }
            }
        };
        encode(&manifest).into()
    }

    /// The dump, if its pages will be asked for.
    pub(super) fn keep(self) -> Option<Self> {
        (self.pages.len() > 1).then_some(self)
    }
}

/// Answers a request for a page.
pub(super) fn page(dump: Option<&Dump>, request: &[u8]) -> Result<Bytes, DumpError> {
    let request: PageRequest = decode(request)?;
    let dump = dump.filter(|d| d.id == request.dump).ok_or(DumpError::Gone)?;
    dump.pages.get(request.page as usize).cloned().ok_or(DumpError::Gone)
}

/// Gathers the rows that a manifest promises.
pub(super) async fn receive(
    manifest: Bytes,
    source: &(impl SnapshotSource + 'static),
) -> Result<Vec<Row>, StateMachineError> {
    let bad = |e| failed("read a metadata snapshot", e);
    let rows = match decode(&manifest).map_err(bad)? {
        Manifest::Whole(rows) => rows,
        Manifest::Paged { pages, .. } if pages > PAGES_MAX => return Err(bad(DumpError::TooMany(pages))),
        Manifest::Paged { dump, pages } => {
            let mut rows: Vec<DumpRow> = vec![];
            for page in 0..pages {
                let page = source.fetch(encode(&PageRequest { dump, page }).into()).await?;
                rows.extend(decode::<Vec<DumpRow>>(&page).map_err(bad)?);
            }
            rows
        }
    };
    check(&rows).map_err(bad)?;
    Ok(rows.into_iter().map(|r| Row { table: r.table, key: r.key, value: r.value }).collect())
}

fn check(rows: &[DumpRow]) -> Result<(), DumpError> {
    if let Some(row) = rows.iter().find(|r| !TABLES.iter().any(|t| t.number == r.table)) {
        return Err(DumpError::UnknownTable(row.table));
    }
    match rows.iter().any(|r| r.table == AppliedRow::TABLE.number) {
        true => Ok(()),
        false => Err(DumpError::NoPosition),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::row::PoolNameRow;
    use crate::machine::tx::Tx;
    use ogee_common::id::PoolId;
    use ogee_disk::meta::{Durability, MemStore};

    struct Sender(Option<Dump>);

    impl SnapshotSource for Sender {
        async fn fetch(&self, request: Bytes) -> Result<Bytes, StateMachineError> {
            page(self.0.as_ref(), &request).map_err(|e| failed("fetch", e))
        }
    }

    fn store(rows: u32, name_bytes: usize) -> MemStore {
        let store = MemStore::new();
        let mut tx = Tx::new(&store);
        tx.put(&(), &AppliedRow { pos: Some((1, 2)), membership: vec![3] });
        for n in 0..rows {
            tx.put(&format!("{n:0name_bytes$}"), &PoolNameRow(PoolId(n)));
        }
        store.write(tx.into_batch(), Durability::Deferred).expect("write");
        store
    }

    async fn received(store: &MemStore) -> (usize, Vec<Row>) {
        let dump = Dump::take(store).expect("dump");
        let (manifest, pages) = (dump.manifest(), dump.pages.len());
        assert!(manifest.len() <= MANIFEST_BYTES_MAX);
        (pages, receive(manifest, &Sender(dump.keep())).await.expect("receive"))
    }

    #[tokio::test]
    async fn small_and_large_states_arrive_whole() {
        let (pages, rows) = received(&store(3, 10)).await;
        assert_eq!((pages, rows.len()), (1, 4));
        let (pages, rows) = received(&store(9_000, 1_000)).await;
        assert!(pages > 4, "{pages}");
        assert_eq!(rows.len(), 9_001);
    }

    #[tokio::test]
    async fn useless_snapshots_are_refused() {
        let large = Dump::take(&store(9_000, 1_000)).expect("dump");
        let other = Dump::take(&store(9_000, 1_000)).expect("dump");
        assert!(receive(large.manifest(), &Sender(Some(other))).await.is_err());
        assert!(receive(Bytes::from_static(&[9]), &Sender(None)).await.is_err());
        let foreign = Manifest::Whole(vec![DumpRow { table: 200, key: vec![], value: vec![] }]);
        assert!(receive(encode(&foreign).into(), &Sender(None)).await.is_err());
        let empty = Manifest::Whole(vec![]);
        assert!(receive(encode(&empty).into(), &Sender(None)).await.is_err());
        let huge = Manifest::Paged { dump: 1, pages: PAGES_MAX + 1 };
        assert!(receive(encode(&huge).into(), &Sender(None)).await.is_err());
    }
}
