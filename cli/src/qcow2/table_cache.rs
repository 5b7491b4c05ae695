//! A few L2 tables in memory, the least recently used one dropped first. Import reads an image front to back, so a
//! table is used many times in a row and then never again.

use std::collections::VecDeque;
use std::sync::Arc;

/// Tables held: 16 tables of at most 2 MiB are at most 32 MiB.
const TABLES_MAX: usize = 16;

/// L2 tables by their place in the file.
#[derive(Debug, Default)]
pub(super) struct TableCache {
    tables: VecDeque<(u64, Arc<[u64]>)>,
}

impl TableCache {
    /// The table at byte `offset` of the file, if it is held.
    pub(super) fn get(&mut self, offset: u64) -> Option<Arc<[u64]>> {
        let at = self.tables.iter().position(|(o, _)| *o == offset)?;
        let entry = self.tables.remove(at)?;
        let table = Arc::clone(&entry.1);
        self.tables.push_front(entry);
        Some(table)
    }

    /// Holds a table.
    pub(super) fn put(&mut self, offset: u64, table: Arc<[u64]>) {
        self.tables.truncate(TABLES_MAX - 1);
        self.tables.push_front((offset, table));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_table_goes_first() {
        let mut cache = TableCache::default();
        for i in 0..TABLES_MAX as u64 {
            cache.put(i, Arc::from([i]));
        }
        assert!(cache.get(0).is_some());
        cache.put(99, Arc::from([99]));
        assert_eq!(cache.tables.len(), TABLES_MAX);
        assert!(cache.get(0).is_some() && cache.get(99).is_some());
        assert!(cache.get(1).is_none(), "1 was used least recently");
    }
}
