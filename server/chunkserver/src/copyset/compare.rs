//! Comparing what replicas say of their pages: bitmaps and checksums, row by row, while entries are applied.
//!
//! A row is a function of the log, so two replicas that have applied the same entries to it must say the same. Which rows may be
//! compared follows from indexes alone. Each side says what it had applied *before* it looked at its rows (they hold all of that)
//! and *after* (they hold nothing later), and of each row an index at or above its last change:
//!
//! - Both have the row: each had applied, before it looked, at least the other's last change of it. Then neither lacks an entry that
//!   the other's row holds, and they must be equal.
//! - Only we have it: the other had applied our last change, and we had applied, before we looked, everything it had when it was
//!   done: so a removal there would be one here too. Then it must have it.
//! - Only the other has it: left to the other's own comparison, because we look after it.
//!
//! Anything else is not judged now; the next round does. Rows with damaged pages are not judged: mending them is
//! [`super::repair`]'s. A row without any page is as good as none.
//!
//! Who is wrong is for the majority to say: when others, more than half of the group and two at least, agree with each other and not with us, this replica's records are
//! damaged, and it is to be rebuilt from them. A difference that no majority decides is reported and left alone.

use super::fetch::{DigestsAnswer, FetchRequest, RowDigest};
use crate::store::CopysetStore;
use crate::store::copyset_store::{Known, Loaded};
use crate::store::error::ChunkStoreError;
use crate::store::key::RowKey;
use ogee_common::limits::{COMPARE_ROWS_MAX, READ_REPAIR_PAUSE, READ_REPAIR_ROUNDS};
use ogee_raft::api::SnapshotSource;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a comparison of some rows came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Pairs of rows that were judged.
    pub judged: u64,
    /// Rows in which this replica differs from another.
    pub different: Vec<RowKey>,
    /// Of these, those in which the others agree with each other: this replica is wrong.
    pub outvoted: Vec<RowKey>,
}

impl CopysetStore {
    /// What the rows of a range hold.
    ///
    /// # Errors
    /// When a metadata row cannot be read.
    pub(crate) async fn digests(self: &Arc<Self>, after: Option<RowKey>, to: Option<RowKey>) -> Result<DigestsAnswer, ChunkStoreError> {
        let before = self.state().applied_index();
        let mut keys = self.rows_after(after, COMPARE_ROWS_MAX + 1);
        let complete = keys.len() <= COMPARE_ROWS_MAX || to.is_some_and(|to| keys[COMPARE_ROWS_MAX] > to);
        keys.truncate(COMPARE_ROWS_MAX);
        keys.retain(|key| to.is_none_or(|to| *key <= to));
        let mut loaded = Loaded::new();
        loop {
            let (mut rows, mut missing) = (vec![], vec![]);
            {
                let state = self.state();
                for key in &keys {
                    match self.known_row(&state, &loaded, *key) {
                        Known::Absent => {}
                        Known::Unknown => missing.push(*key),
                        Known::Row(row) if row.held().is_empty() => {}
                        Known::Row(row) => rows.push(RowDigest { key: *key, last_index: row.last_index, crc: row.digest() }),
                    }
                }
                if missing.is_empty() {
                    return Ok(DigestsAnswer { before, after: state.applied_index(), complete, rows });
                }
            }
            self.load_rows(missing, &mut loaded).await?;
        }
    }

    /// The other replicas agree with each other and not with this one: it ends, and is rebuilt from them.
    pub fn give_up_outvoted(&self) {
        self.note(&ChunkStoreError::Record { what: "a record that the other replicas agree on" });
    }

    /// Compares the rows of a range with those of the other replicas. The range holds at most [`COMPARE_ROWS_MAX`] rows of ours.
    ///
    /// # Errors
    /// When an own metadata row cannot be read.
    pub async fn compare(
        self: &Arc<Self>,
        after: Option<RowKey>,
        to: Option<RowKey>,
        others: &[impl SnapshotSource],
    ) -> Result<Comparison, ChunkStoreError> {
        let mut answers = vec![];
        for other in others {
            let answer = other.fetch(FetchRequest::Digests { after, to }.encode()).await;
            let answer = answer.map_err(|e| e.to_string()).and_then(|a| DigestsAnswer::decode(&a).map_err(|e| e.to_string()));
            match answer {
                Ok(answer) => answers.push(answer),
                Err(error) => tracing::debug!(target: "scrub", copyset = self.id().0, error, "a replica is not compared"),
            }
        }
        let mut own = self.digests(after, to).await?;
        let newest = answers.iter().map(|a| a.after).max().unwrap_or(0);
        for _ in 0..READ_REPAIR_ROUNDS {
            if own.before >= newest {
                break;
            }
            tokio::time::sleep(READ_REPAIR_PAUSE).await;
            own = self.digests(after, to).await?;
        }
        Ok(judge(&own, &answers, others.len() + 1))
    }
}

/// Judges our rows by those of others that answered, of a group of so many replicas.
fn judge(own: &DigestsAnswer, others: &[DigestsAnswer], replicas: usize) -> Comparison {
    let rows: Vec<BTreeMap<RowKey, RowDigest>> = others.iter().map(|o| o.rows.iter().map(|r| (r.key, *r)).collect()).collect();
    let mut result = Comparison::default();
    for ours in &own.rows {
        let Some(crc) = ours.crc else { continue };
        // What each other that may be judged says: `Some(None)` that there is no such row.
        let said = others.iter().zip(&rows).filter_map(|(other, rows)| match rows.get(&ours.key) {
            Some(theirs) if own.before >= theirs.last_index && other.before >= ours.last_index => theirs.crc.map(Some),
            Some(_) => None,
            None => {
                let covered = other.complete || other.rows.last().is_some_and(|last| last.key > ours.key);
                (covered && other.before >= ours.last_index && own.before >= other.after).then_some(None)
            }
        });
        let said: Vec<Option<u32>> = said.collect();
        result.judged += said.len() as u64;
        let against: Vec<&Option<u32>> = said.iter().filter(|s| **s != Some(crc)).collect();
        if against.is_empty() {
            continue;
        }
        result.different.push(ours.key);
        if against.len() == said.len() && against.len() >= 2 && against.len() * 2 > replicas && against.windows(2).all(|w| w[0] == w[1]) {
            result.outvoted.push(ours.key);
        }
    }
    result
}
