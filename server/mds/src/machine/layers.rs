//! Layers: ancestry, where their chunks lie, and how they end.
//!
//! **Placement by reference.** A segment row carries the seq at which its layer placed it. The placement of segment `i` of
//! a layer is its own row, else the row that its parent shows at the parent seq: the parent's own row if that was placed
//! at or before the parent seq, else the grandparent's, and so on. So a clone copies no row, and wherever an ancestor
//! can have data that the layer reads, the layer's chunk lies in the same copysets. An ancestor that places the segment
//! *later* has only data of later seqs there, which the layer never reads; the layer then places the segment by itself.
//! Rows are never changed, so a placement once seen stays. An own row exists only where no ancestor shows one; when a layer lets go
//! of its parent ([`super::flatten`]), it gets rows of its own with seq 0 and the same copysets for what it saw of others'.
//!
//! **Life.** A layer lives while it is a head or has a snapshot row; every child stands on a snapshot row (hidden if
//! people may not see it). When the last of them goes, a task deletes its chunks in every copyset it may have some in, its hold on its
//! parent ends at once, and its rows go when the task is done. **INV** no rows of a layer remain after its task.

use super::Step;
use super::row::{
    BackupRow, ChildRow, LayerRow, LayerSnapshotRow, ParentRef, PoolRow, SegmentRow, SnapshotRow, TaskEffect, TaskKind, TaskRow,
};
use super::tx::Tx;
use super::{flatten, snapshots, tasks};
use ogee_common::id::{CopysetId, LayerId, PoolId, SegmentIndex, VolumeId, VolumeSeq};
use ogee_proto::data::SEALED_FOR_GOOD;
use std::collections::{BTreeMap, BTreeSet};

/// Rows read at once.
const PAGE_ROWS: usize = 512;

/// The first layer of an empty volume.
pub(crate) fn first(volume: VolumeId, pool: PoolId) -> LayerRow {
    LayerRow {
        volume,
        pool,
        seq: VolumeSeq(1),
        parent: None,
        depth: 0,
        head: true,
        snapshots: 0,
        segments: 0,
        inherited: 0,
        unclean: false,
        min_seq: VolumeSeq(0),
        seals: 0,
        confirming: 0,
        dropping: false,
    }
}

/// The parents of a layer with the seqs to read them at, nearest first.
pub(crate) fn ancestry(tx: &Tx<'_>, layer: &LayerRow) -> Step<Vec<ParentRef>> {
    let mut chain = vec![];
    let mut next = layer.parent;
    while let Some(parent) = next {
        chain.push(parent);
        next = tx.expect::<LayerRow>(&parent.layer)?.parent;
    }
    Ok(chain)
}

/// How many layers lie below a layer now.
pub(crate) fn depth(tx: &Tx<'_>, layer: &LayerRow) -> Step<u32> {
    Ok(u32::try_from(ancestry(tx, layer)?.len()).expect("a depth is bounded"))
}

/// The layer itself, where every row counts, and its parents.
fn sources(tx: &Tx<'_>, id: LayerId, layer: &LayerRow) -> Step<Vec<ParentRef>> {
    let mut sources = vec![ParentRef { layer: id, seq: VolumeSeq(u64::MAX) }];
    sources.extend(ancestry(tx, layer)?);
    Ok(sources)
}

/// The placements of `count` segments from `first`, by index.
pub(crate) fn placement(
    tx: &Tx<'_>,
    id: LayerId,
    layer: &LayerRow,
    first: SegmentIndex,
    count: u32,
) -> Step<BTreeMap<SegmentIndex, SegmentRow>> {
    let end = SegmentIndex(first.0.saturating_add(count));
    let mut found = BTreeMap::new();
    for source in sources(tx, id, layer)? {
        let (from, to) = ((source.layer, first), (source.layer, end));
        for ((_, index), row) in tx.scan_range::<SegmentRow>(&from, &to, count as usize)? {
            if row.seq <= source.seq {
                // What an ancestor still seals is open for the child, which is another layer to the copysets.
                let sealing = row.sealing.filter(|_| source.layer == id);
                found.entry(index).or_insert(SegmentRow { sealing, ..row });
            }
        }
        if found.len() == count as usize {
            break;
        }
    }
    Ok(found)
}

/// Every copyset in which a layer may have chunks or a fence.
pub(crate) fn copysets(tx: &Tx<'_>, id: LayerId, layer: &LayerRow) -> Step<BTreeSet<CopysetId>> {
    let all = tx.expect::<PoolRow>(&layer.pool)?.copysets as usize;
    let mut found = BTreeSet::new();
    for source in sources(tx, id, layer)? {
        let mut after = None;
        loop {
            let page = tx.scan::<SegmentRow>(&source.layer, after.as_ref(), PAGE_ROWS)?;
            for (_, row) in &page {
                if row.seq <= source.seq {
                    found.extend(row.copysets.iter().copied());
                }
            }
            match page.last() {
                // Once the whole pool is in, no further row can add anything.
                Some((key, _)) if found.len() < all => after = Some(*key),
                _ => break,
            }
        }
        if found.len() >= all {
            break;
        }
    }
    Ok(found)
}

/// Takes a head from its client in every copyset: the client may hear of no MDS and go on writing, and what it is told was
/// written must not be lost with the head. The operation that does this waits for [`is_fenced`].
pub(crate) fn fence_head(tx: &mut Tx<'_>, id: LayerId) -> Step<()> {
    let copysets = copysets(tx, id, &tx.expect(&id)?)?;
    tasks::create(tx, id, TaskKind::Seal(SEALED_FOR_GOOD), TaskEffect::None, &copysets)?;
    Ok(())
}

/// Whether every copyset has done what [`fence_head`] asked for with former heads of the volume. Until then nobody may attach it.
pub(crate) fn is_fenced(tx: &Tx<'_>, volume: VolumeId) -> Step<bool> {
    let mut after = None;
    loop {
        let page = tx.scan::<TaskRow>(&(), after.as_ref(), PAGE_ROWS)?;
        for (_, task) in page.iter().filter(|(_, task)| task.kind == TaskKind::Seal(SEALED_FOR_GOOD)) {
            if tx.get::<LayerRow>(&task.layer)?.is_some_and(|layer| layer.volume == volume) {
                return Ok(false);
            }
        }
        match page.last() {
            Some((key, _)) if page.len() == PAGE_ROWS => after = Some(*key),
            _ => return Ok(true),
        }
    }
}

/// Ends a layer's time as head of its volume.
pub(crate) fn retire_head(tx: &mut Tx<'_>, id: LayerId) -> Step<()> {
    flatten::cancel(tx, id)?;
    let mut layer: LayerRow = tx.expect(&id)?;
    layer.head = false;
    tx.put(&id, &layer);
    drop_unused(tx, id, layer)
}

/// Deletes a layer if it is neither head nor has a snapshot.
pub(crate) fn drop_unused(tx: &mut Tx<'_>, id: LayerId, mut layer: LayerRow) -> Step<()> {
    if layer.head || layer.snapshots > 0 || layer.dropping {
        return Ok(());
    }
    let copysets = copysets(tx, id, &layer)?;
    layer.dropping = true;
    let parent = layer.parent.take();
    tx.put(&id, &layer);
    tx.delete::<BackupRow>(&id);
    tasks::create(tx, id, TaskKind::DropLayer, TaskEffect::LayerGone, &copysets)?;
    match parent {
        Some(parent) => leave_parent(tx, id, layer.volume, parent),
        None => Ok(()),
    }
}

/// Makes `child` stand on a snapshot.
pub(crate) fn join_parent(tx: &mut Tx<'_>, child: LayerId, volume: VolumeId, parent: ParentRef) -> Step<()> {
    let LayerSnapshotRow(id) = tx.expect(&(parent.layer, parent.seq))?;
    let mut snapshot: SnapshotRow = tx.expect(&id)?;
    if snapshot.volume == volume {
        snapshot.rollbacks += 1;
    } else {
        snapshot.clones += 1;
    }
    tx.put(&(parent.layer, parent.seq, child), &ChildRow);
    snapshots::settle(tx, id, &snapshot);
    tx.put(&id, &snapshot);
    Ok(())
}

/// Ends a child's hold on its parent; a hidden snapshot goes with the last one. Recursion ends at the depth of the
/// ancestry, which is bounded.
pub(crate) fn leave_parent(tx: &mut Tx<'_>, child: LayerId, volume: VolumeId, parent: ParentRef) -> Step<()> {
    let LayerSnapshotRow(id) = tx.expect(&(parent.layer, parent.seq))?;
    let mut snapshot: SnapshotRow = tx.expect(&id)?;
    if snapshot.volume == volume {
        snapshot.rollbacks -= 1;
    } else {
        snapshot.clones -= 1;
    }
    tx.delete::<ChildRow>(&(parent.layer, parent.seq, child));
    tx.put(&id, &snapshot);
    if snapshot.hidden && snapshot.clones + snapshot.rollbacks == 0 {
        snapshots::remove(tx, id, &snapshot)?;
    }
    Ok(())
}

/// Removes every row of a layer whose chunks are gone.
pub(crate) fn forget(tx: &mut Tx<'_>, id: LayerId) -> Step<()> {
    loop {
        let page = tx.scan::<SegmentRow>(&id, None, PAGE_ROWS)?;
        if page.is_empty() {
            break;
        }
        for (key, _) in page {
            tx.delete::<SegmentRow>(&key);
        }
    }
    tx.delete::<LayerRow>(&id);
    Ok(())
}
