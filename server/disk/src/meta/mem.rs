//! [`MemStore`]: the metadata store in memory, for tests and simulation. It can lose what a power cut would lose.
//!
//! Invariant: after [`MemStore::power_cut`] it holds every synced batch and a prefix of the deferred ones, each whole.

use super::{Batch, Change, Durability, KeyValue, MetaStore, RowSink, StoreError, Table};
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Debug, Default)]
struct State {
    current: Map,
    durable: Map,
    deferred: Vec<Batch>,
}

/// An ordered map in memory with the durability rules of [`MetaStore`].
#[derive(Debug, Default)]
pub struct MemStore {
    state: Mutex<State>,
}

impl MemStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Batches that a power cut could lose now.
    #[must_use]
    pub fn deferred(&self) -> usize {
        self.lock().deferred.len()
    }

    /// Loses the deferred batches behind the first `keep`.
    pub fn power_cut(&self, keep: usize) {
        let mut state = self.lock();
        let kept: Vec<Batch> = state.deferred.drain(..).take(keep).collect();
        for batch in &kept {
            apply(&mut state.durable, batch);
        }
        state.current = state.durable.clone();
    }
}

fn apply(map: &mut Map, batch: &Batch) {
    for change in &batch.changes {
        match change {
            Change::Put(key, value) => {
                map.insert(key.clone(), value.clone());
            }
            Change::Delete(key) => {
                map.remove(key);
            }
            Change::DeleteRange(from, to) => {
                let inside = |k: &Vec<u8>| k >= from && to.as_ref().is_none_or(|to| k < to);
                map.retain(|k, _| !inside(k));
            }
        }
    }
}

fn sync(state: &mut State) {
    for batch in std::mem::take(&mut state.deferred) {
        apply(&mut state.durable, &batch);
    }
}

impl MetaStore for MemStore {
    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.lock().current.get(&table.key(key)).cloned())
    }

    fn scan(&self, table: Table, from: Bound<&[u8]>, to: Option<&[u8]>, limit: usize) -> Result<Vec<KeyValue>, StoreError> {
        let from = match from {
            Bound::Included(k) => Bound::Included(table.key(k)),
            Bound::Excluded(k) => Bound::Excluded(table.key(k)),
            Bound::Unbounded => Bound::Included(table.key(&[])),
        };
        let to = to.map_or_else(|| table.end(), |to| Some(table.key(to)));
        let state = self.lock();
        let rows = state.current.range((from, Bound::Unbounded));
        let rows = rows.take_while(|(k, _)| to.as_ref().is_none_or(|to| *k < to)).take(limit);
        Ok(rows.map(|(k, v)| (k[1..].to_vec(), v.clone())).collect())
    }

    fn write(&self, batch: Batch, durability: Durability) -> Result<(), StoreError> {
        let mut state = self.lock();
        apply(&mut state.current, &batch);
        state.deferred.push(batch);
        if durability == Durability::Synced {
            sync(&mut state);
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        sync(&mut self.lock());
        Ok(())
    }

    fn dump(&self, tables: &[Table], row: &mut RowSink<'_>) -> Result<(), StoreError> {
        let moment = self.lock().current.clone();
        let mut tables = tables.to_vec();
        tables.sort_unstable();
        for table in tables {
            for (key, value) in moment.range(table.key(&[])..).take_while(|(k, _)| k[0] == table.number) {
                if !row(table.number, &key[1..], value) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}
