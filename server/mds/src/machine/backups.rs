//! Volumes that stand on a backup: lazy restores (ADR 0016).
//!
//! ```text
//!            CreateLazyVolume                CompleteBackup
//!   (none) ──────────────────> hydrating ─────────────────────> an ordinary layer
//!                                  └── the layer goes: so does the row
//! ```
//!
//! The row belongs to the volume's first layer; snapshots, clones and rollbacks have it at the bottom of their ancestry and stand on the
//! backup as well. Invariants:
//! - **Every segment that the backup reaches into is placed when the volume is made**, with seq 0. So all that ever stands on the layer has these
//!   copysets, what is pasted into the layer lies where its children look, and no seal, fence or deletion misses a copyset: none is
//!   added later (see [`super::layers`] on both).
//! - Only who says that it can read backups attaches, and nothing on such a layer is flattened: a page that nobody has pasted would read as zeros.
//! - The row goes once every page with data is in the layer; the command is its hydrator's, and repeating it is no error.

use super::command::Outcome;
use super::namespace::{self, NewVolume};
use super::row::{BackupRow, CopysetRow, LayerRow, SegmentRow, VolumeRow};
use super::tx::Tx;
use super::{Step, info, layers};
use crate::refusal::Refusal;
use ogee_common::id::{CopysetId, LayerId, SegmentIndex, VolumeSeq};
use ogee_common::limits::{CHUNKS_PER_SEGMENT, SEGMENT_BYTES};
use std::collections::BTreeSet;

/// Placements that a volume's segments take in turn: the command stays small, whatever the volume's size.
pub(crate) const PLACEMENTS_MAX: usize = 64;

/// Makes a volume that stands on a backup.
///
/// # Errors
/// As [`namespace::create`]; `InvalidArgument` for copysets that are not 64 of its pool for each placement, or a backup that is larger.
pub(crate) fn create(
    tx: &mut Tx<'_>,
    mut new: NewVolume<'_>,
    pool_name: &str,
    backup: &BackupRow,
    placements: &[Vec<CopysetId>],
) -> Step<Outcome> {
    namespace::check_size(new.size_bytes)?;
    new.pool = namespace::pool(tx, pool_name)?;
    let pool = new.pool;
    if backup.size_bytes > new.size_bytes {
        return Err(Refusal::BadSize { size_bytes: new.size_bytes }.into());
    }
    let distinct: BTreeSet<CopysetId> = placements.iter().flatten().copied().collect();
    for id in &distinct {
        if tx.get::<CopysetRow>(id)?.is_none_or(|row| row.pool != pool) {
            return Err(Refusal::ForeignCopyset(*id).into());
        }
    }
    if placements.is_empty() || placements.iter().any(|p| p.len() != CHUNKS_PER_SEGMENT as usize) {
        return Err(Refusal::PlanOutdated.into());
    }
    let segments = u32::try_from(backup.size_bytes.div_ceil(SEGMENT_BYTES)).expect("volumes are bounded");
    let (volume, layer) = namespace::insert(tx, new, |volume| LayerRow { segments, ..layers::first(volume, pool) })?;
    for (index, copysets) in (0..segments).map(SegmentIndex).zip(placements.iter().cycle()) {
        tx.put(&(layer, index), &SegmentRow { copysets: copysets.clone(), seq: VolumeSeq(0), sealing: None });
    }
    tx.put(&layer, backup);
    Ok(Outcome::Volume(Box::new(info::volume(tx, volume, &tx.expect(&volume)?)?)))
}

/// The backup that a layer stands on, itself or by the last of its ancestors, and that one. None for a layer that is gone.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn below(tx: &Tx<'_>, layer: LayerId) -> Step<Option<(LayerId, BackupRow)>> {
    let Some(bottom) = bottom(tx, layer)? else { return Ok(None) };
    Ok(tx.get::<BackupRow>(&bottom)?.map(|row| (bottom, row)))
}

/// The last of a layer's ancestors, or the layer without one. None for a layer that is gone.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn bottom(tx: &Tx<'_>, layer: LayerId) -> Step<Option<LayerId>> {
    let Some(row) = tx.get::<LayerRow>(&layer)? else { return Ok(None) };
    Ok(Some(layers::ancestry(tx, &row)?.last().map_or(layer, |parent| parent.layer)))
}

/// Refuses what would make missing pages read as zeros.
///
/// # Errors
/// `InUse`.
pub(crate) fn refuse_hydrating(tx: &Tx<'_>, layer: LayerId) -> Step<()> {
    match below(tx, layer)? {
        Some((_, row)) => Err(Refusal::Hydrating { repository: row.repository, backup: row.backup }.into()),
        None => Ok(()),
    }
}

/// Whether any layer stands on a backup.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn is_any(tx: &Tx<'_>) -> Step<bool> {
    Ok(!tx.scan::<BackupRow>(&(), None, 1)?.is_empty())
}

/// The layer needs its backup no more. Of a layer that stands on none, or is gone, nothing is asked.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn complete(tx: &mut Tx<'_>, layer: LayerId) -> Step<Outcome> {
    tx.delete::<BackupRow>(&layer);
    Ok(Outcome::Done)
}

/// A layer that stands on a backup, and the path of the volume that it was made for, if that is still there.
pub(crate) type Listed = (LayerId, BackupRow, Option<String>);

/// The first layers behind `after` that stand on backups, in the order of their numbers.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn list(tx: &Tx<'_>, after: LayerId, limit: usize) -> Step<Vec<Listed>> {
    let rows = tx.scan::<BackupRow>(&(), Some(&after), limit)?;
    let described = |(layer, row): (LayerId, BackupRow)| -> Step<Listed> {
        let volume = tx.expect::<LayerRow>(&layer)?.volume;
        let path = match tx.get::<VolumeRow>(&volume)? {
            Some(volume) => Some(namespace::path_of(tx, volume.directory, &volume.name)?),
            None => None,
        };
        Ok((layer, row, path))
    };
    rows.into_iter().map(described).collect()
}
