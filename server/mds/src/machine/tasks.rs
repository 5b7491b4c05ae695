//! Layer tasks: what every copyset of a layer must do once, in its own state machine.
//!
//! A task is handed to the leaders of its copysets in heartbeat replies until they report it done; what they report may
//! be repeated or late. Invariants: a task's effect happens when its last copyset is done, exactly once; in one copyset
//! the tasks of one layer are handed out one after the other, in order of their ids, so a layer is sealed before its
//! versions merge and both before it is deleted; a flatten, which takes long and gives way to all of them, is handed out beside
//! them; a task over no copyset takes effect at once.

use super::row::{Counter, LayerRow, SegmentRow, SnapshotRow, SnapshotState, TaskEffect, TaskKind, TaskRow, TaskTodoRow};
use super::tx::Tx;
use super::{Step, flatten, layers, snapshots};
use ogee_common::id::{CopysetId, LayerId};
use std::collections::BTreeSet;

/// Tasks of one copyset that are looked at for one heartbeat.
const TASKS_PER_COPYSET_MAX: usize = 64;

/// Makes a task; `None` when there is no copyset to do it and its effect has happened already.
pub(crate) fn create(
    tx: &mut Tx<'_>,
    layer: LayerId,
    kind: TaskKind,
    effect: TaskEffect,
    copysets: &BTreeSet<CopysetId>,
) -> Step<Option<u64>> {
    let remaining = u32::try_from(copysets.len()).expect("copyset ids have 32 bits");
    let row = TaskRow { layer, kind, effect, remaining };
    if copysets.is_empty() {
        finish(tx, None, &row)?;
        return Ok(None);
    }
    let id = tx.next_id(Counter::Task)?;
    for copyset in copysets {
        tx.put(&(*copyset, id), &TaskTodoRow);
    }
    tx.put(&id, &row);
    Ok(Some(id))
}

/// A copyset reports a task done; unknown pairs are old news.
pub(crate) fn done(tx: &mut Tx<'_>, id: u64, copyset: CopysetId) -> Step<()> {
    if tx.get::<TaskTodoRow>(&(copyset, id))?.is_none() {
        return Ok(());
    }
    tx.delete::<TaskTodoRow>(&(copyset, id));
    let mut row: TaskRow = tx.expect(&id)?;
    row.remaining -= 1;
    if row.remaining > 0 {
        tx.put(&id, &row);
        return Ok(());
    }
    tx.delete::<TaskRow>(&id);
    finish(tx, Some(id), &row)
}

fn finish(tx: &mut Tx<'_>, id: Option<u64>, task: &TaskRow) -> Step<()> {
    match task.effect {
        TaskEffect::None => Ok(()),
        TaskEffect::LayerGone => layers::forget(tx, task.layer),
        TaskEffect::Flattened => flatten::finish(tx, task.layer),
        TaskEffect::SegmentOpen(index) => {
            if let Some(mut row) = tx.get::<SegmentRow>(&(task.layer, index))? {
                row.sealing = None;
                tx.put(&(task.layer, index), &row);
            }
            Ok(())
        }
        TaskEffect::SnapshotReady(snapshot) => {
            if let (Some(_), Some(mut layer)) = (id, tx.get::<LayerRow>(&task.layer)?) {
                layer.seals -= 1;
                tx.put(&task.layer, &layer);
            }
            if let Some(mut row) = tx.get::<SnapshotRow>(&snapshot)?
                && id.is_none_or(|id| row.state == SnapshotState::Sealing(id))
            {
                row.state = SnapshotState::Ready;
                snapshots::settle(tx, snapshot, &row);
                tx.put(&snapshot, &row);
            }
            Ok(())
        }
    }
}

/// What a copyset may do now: its oldest task of each layer, and every flatten.
pub(crate) fn of_copyset(tx: &Tx<'_>, copyset: CopysetId) -> Step<Vec<(u64, TaskRow)>> {
    let mut layers = BTreeSet::new();
    let mut tasks = vec![];
    for ((_, id), TaskTodoRow) in tx.scan::<TaskTodoRow>(&copyset, None, TASKS_PER_COPYSET_MAX)? {
        let row: TaskRow = tx.expect(&id)?;
        if matches!(row.kind, TaskKind::Flatten { .. }) || layers.insert(row.layer) {
            tasks.push((id, row));
        }
    }
    Ok(tasks)
}
