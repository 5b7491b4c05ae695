//! [`Tx`]: typed access to the rows, with the changes of one command on top of the store. Also used, unchanged, to read.
//!
//! Invariants: reads see the command's own changes; nothing reaches the store before [`Tx::into_batch`], so a refused
//! command leaves no trace; iteration order is key order. A row that cannot be decoded is an error of the store, never
//! skipped. Not thread-safe by itself: [`super::Shared`] keeps commands and reads apart.

use super::key::KeyPart;
use super::row::{Counter, CounterRow, Row};
use ogee_disk::meta::{Batch, MetaStore, StoreError, Table, prefix_end};
use std::collections::BTreeMap;
use std::ops::Bound;

/// Why rows could not be read. The replica cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RowError {
    /// The store failed.
    #[error("access metadata rows")]
    Store(#[from] StoreError),
    /// A row holds something else than its table says.
    #[error("decode row of table {table:?}")]
    Decode {
        /// Where.
        table: &'static str,
        /// Why.
        #[source]
        source: postcard::Error,
    },
    /// A row was written by a newer build.
    #[error("row of table {table:?} has version {found}, this build knows {known}")]
    Version {
        /// Where.
        table: &'static str,
        /// The version byte.
        found: u8,
        /// The newest one known.
        known: u8,
    },
    /// A key or an empty value that no build writes.
    #[error("malformed row of table {table:?}")]
    Malformed {
        /// Where.
        table: &'static str,
    },
    /// A row that others refer to is missing.
    #[error("row of table {table:?} is missing though it is referred to")]
    Missing {
        /// Where.
        table: &'static str,
    },
    /// A command of the log cannot be read by this build.
    #[error("decode command of the log")]
    Command(#[from] super::command::DecodeError),
}

/// The rows as one command sees and changes them.
pub(crate) struct Tx<'a> {
    store: &'a dyn MetaStore,
    tables: BTreeMap<u8, Table>,
    changes: BTreeMap<(u8, Vec<u8>), Option<Vec<u8>>>,
}

/// The value bytes of a row.
pub(crate) fn encode_row<R: Row>(row: &R) -> Vec<u8> {
    let value = vec![R::VERSION];
    postcard::to_extend(row, value).expect("rows are plain data, which always encodes")
}

/// Reads the value bytes of a row.
///
/// # Errors
/// [`RowError`] when the bytes are not such a row.
pub(crate) fn decode_row<R: Row>(value: &[u8]) -> Result<R, RowError> {
    let table = R::TABLE.name;
    let (version, body) = value.split_first().ok_or(RowError::Malformed { table })?;
    if *version != R::VERSION {
        return Err(RowError::Version { table, found: *version, known: R::VERSION });
    }
    let (row, rest) = postcard::take_from_bytes(body).map_err(|source| RowError::Decode { table, source })?;
    if rest.is_empty() { Ok(row) } else { Err(RowError::Malformed { table }) }
}

impl<'a> Tx<'a> {
    /// A view of the store without changes.
    pub(crate) fn new(store: &'a dyn MetaStore) -> Self {
        Self { store, tables: BTreeMap::new(), changes: BTreeMap::new() }
    }

    /// The row with a key, if there is one.
    pub(crate) fn get<R: Row>(&self, key: &R::Key) -> Result<Option<R>, RowError> {
        let key = key.to_key();
        let stored;
        let value = match self.changes.get(&(R::TABLE.number, key.clone())) {
            Some(change) => change.as_deref(),
            None => {
                stored = self.store.get(R::TABLE, &key)?;
                stored.as_deref()
            }
        };
        value.map(decode_row).transpose()
    }

    /// The row with a key that another row refers to.
    pub(crate) fn expect<R: Row>(&self, key: &R::Key) -> Result<R, RowError> {
        self.get(key)?.ok_or(RowError::Missing { table: R::TABLE.name })
    }

    /// Sets a row.
    pub(crate) fn put<R: Row>(&mut self, key: &R::Key, row: &R) {
        self.tables.insert(R::TABLE.number, R::TABLE);
        self.changes.insert((R::TABLE.number, key.to_key()), Some(encode_row(row)));
    }

    /// Removes a row.
    pub(crate) fn delete<R: Row>(&mut self, key: &R::Key) {
        self.tables.insert(R::TABLE.number, R::TABLE);
        self.changes.insert((R::TABLE.number, key.to_key()), None);
    }

    /// Up to `limit` rows whose key begins with `prefix`, in key order, behind `after` if given.
    pub(crate) fn scan<R: Row>(
        &self,
        prefix: &impl KeyPart,
        after: Option<&R::Key>,
        limit: usize,
    ) -> Result<Vec<(R::Key, R)>, RowError> {
        let (prefix, after) = (prefix.to_key(), after.map(KeyPart::to_key));
        let from = match &after {
            Some(key) => Bound::Excluded(&key[..]),
            None => Bound::Included(&prefix[..]),
        };
        let rows = self.scan_bytes(R::TABLE, from, prefix_end(&prefix).as_deref(), limit)?;
        let table = R::TABLE.name;
        let decode = |(key, value): (Vec<u8>, Vec<u8>)| {
            let key = R::Key::from_key(&key).ok_or(RowError::Malformed { table })?;
            Ok((key, decode_row(&value)?))
        };
        rows.into_iter().map(decode).collect()
    }

    /// Up to `limit` rows with keys in `[from, to)`, in key order.
    pub(crate) fn scan_range<R: Row>(
        &self,
        from: &R::Key,
        to: &R::Key,
        limit: usize,
    ) -> Result<Vec<(R::Key, R)>, RowError> {
        let table = R::TABLE.name;
        let rows = self.scan_bytes(R::TABLE, Bound::Included(&from.to_key()), Some(&to.to_key()), limit)?;
        let decode = |(key, value): (Vec<u8>, Vec<u8>)| {
            let key = R::Key::from_key(&key).ok_or(RowError::Malformed { table })?;
            Ok((key, decode_row(&value)?))
        };
        rows.into_iter().map(decode).collect()
    }

    fn scan_bytes(
        &self,
        table: Table,
        from: Bound<&[u8]>,
        to: Option<&[u8]>,
        limit: usize,
    ) -> Result<Vec<ogee_disk::meta::KeyValue>, RowError> {
        let start = match from {
            Bound::Included(key) => Bound::Included((table.number, key.to_vec())),
            Bound::Excluded(key) => Bound::Excluded((table.number, key.to_vec())),
            Bound::Unbounded => Bound::Included((table.number, vec![])),
        };
        let inside = |key: &(u8, Vec<u8>)| key.0 == table.number && to.is_none_or(|to| key.1[..] < *to);
        let changes: Vec<_> =
            self.changes.range((start, Bound::Unbounded)).take_while(|(key, _)| inside(key)).collect();
        // At most one stored row is hidden per change, so this many stored rows are always enough.
        let stored = self.store.scan(table, from, to, limit.saturating_add(changes.len()))?;
        if changes.is_empty() {
            return Ok(stored);
        }
        let mut rows: BTreeMap<Vec<u8>, Vec<u8>> = stored.into_iter().collect();
        for ((_, key), change) in changes {
            match change {
                Some(value) => rows.insert(key.clone(), value.clone()),
                None => rows.remove(key),
            };
        }
        Ok(rows.into_iter().take(limit).collect())
    }

    /// The next id of a kind; the first is 1.
    pub(crate) fn next_id(&mut self, counter: Counter) -> Result<u64, RowError> {
        let key = counter as u8;
        let last = self.get::<CounterRow>(&key)?.map_or(0, |row| row.last);
        self.put(&key, &CounterRow { last: last + 1 });
        Ok(last + 1)
    }

    /// As [`Tx::next_id`] for ids of 32 bits.
    pub(crate) fn next_id32(&mut self, counter: Counter) -> Result<u32, RowError> {
        let id = self.next_id(counter)?;
        Ok(u32::try_from(id).expect("fewer than 2^32 chunkservers, pools and copysets are ever made"))
    }

    /// Rows changed so far.
    pub(crate) fn changed(&self) -> usize {
        self.changes.len()
    }

    /// The changes, to be written together.
    pub(crate) fn into_batch(self) -> Batch {
        let mut batch = Batch::new();
        for ((number, key), change) in &self.changes {
            let table = self.tables[number];
            match change {
                Some(value) => batch.put(table, key, value),
                None => batch.delete(table, key),
            }
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::super::row::PoolNameRow;
    use super::*;
    use ogee_common::id::PoolId;
    use ogee_disk::meta::{Durability, MemStore};
    use proptest::prelude::*;

    fn names(tx: &Tx<'_>, prefix: &str, after: Option<&str>, limit: usize) -> Vec<(String, u32)> {
        let rows = tx.scan::<PoolNameRow>(&prefix.to_owned(), after.map(str::to_owned).as_ref(), limit).expect("scan");
        rows.into_iter().map(|(k, r)| (k, r.0.0)).collect()
    }

    proptest! {
        #[test]
        fn a_scan_sees_the_commands_own_changes(
            stored in prop::collection::btree_map("[ab]{1,3}", 0u32..9, 0..12),
            changes in prop::collection::vec(("[ab]{1,3}", prop::option::of(0u32..9)), 0..12),
            prefix in "[ab]{0,2}",
            limit in 1usize..6,
            skip in 0usize..3,
        ) {
            let store = MemStore::new();
            let mut seed = Tx::new(&store);
            for (k, v) in &stored {
                seed.put(k, &PoolNameRow(PoolId(*v)));
            }
            store.write(seed.into_batch(), Durability::Deferred).expect("write");
            let mut model = stored;
            let mut tx = Tx::new(&store);
            for (k, v) in changes {
                match v {
                    Some(v) => { tx.put(&k, &PoolNameRow(PoolId(v))); model.insert(k, v); }
                    None => { tx.delete::<PoolNameRow>(&k); model.remove(&k); }
                }
            }
            let expected: Vec<_> = model.into_iter().filter(|(k, _)| k.starts_with(&prefix)).collect();
            prop_assert_eq!(names(&tx, &prefix, None, limit), expected.iter().take(limit).cloned().collect::<Vec<_>>());
            if let Some((after, _)) = expected.get(skip) {
                let rest: Vec<_> = expected[skip + 1..].iter().take(limit).cloned().collect();
                prop_assert_eq!(names(&tx, &prefix, Some(after), limit), rest.clone());
                let after = after.clone();
                let batch = tx.into_batch();
                store.write(batch, Durability::Deferred).expect("write");
                prop_assert_eq!(names(&Tx::new(&store), &prefix, Some(&after), limit), rest);
            }
        }
    }

    #[test]
    fn damaged_rows_are_errors() {
        for bad in [&[][..], &[9, 1], &[1], &[1, 1, 1]] {
            assert!(decode_row::<PoolNameRow>(bad).is_err(), "{bad:?}");
        }
        assert!(decode_row::<PoolNameRow>(&encode_row(&PoolNameRow(PoolId(7)))).is_ok());
    }

    #[test]
    fn ids_count_up_from_one() {
        let store = MemStore::new();
        let mut tx = Tx::new(&store);
        assert_eq!([tx.next_id(Counter::Layer).expect("id"), tx.next_id(Counter::Layer).expect("id")], [1, 2]);
        assert_eq!(tx.next_id32(Counter::Pool).expect("id"), 1);
        assert_eq!(tx.changed(), 2);
    }
}
