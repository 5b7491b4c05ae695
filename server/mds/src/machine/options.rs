//! Options of volumes: the size of their logical sectors, and the limits that their clients apply to themselves.
//!
//! Kept in a table of their own, so that rows of older builds need no new version: no row means the default options, and
//! a volume that has these again has no row. Invariants: the sector size is chosen when the volume is made and never
//! changes; a clone has its source's, because the data on it was laid out for it; limits belong to whoever uses a
//! volume, so a clone begins without any, and a rollback keeps them. Ranges were checked where they entered.

use super::command::Outcome;
use super::row::{VolumeOptionsRow, VolumeRow};
use super::tx::Tx;
use super::{Step, info, namespace};
use ogee_common::id::VolumeId;
use ogee_common::qos::LimitChanges;

/// The options of a volume.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn of(tx: &Tx<'_>, id: VolumeId) -> Step<VolumeOptionsRow> {
    Ok(tx.get(&id)?.unwrap_or_default())
}

/// Sets the options of a volume.
pub(crate) fn put(tx: &mut Tx<'_>, id: VolumeId, options: VolumeOptionsRow) {
    if options == VolumeOptionsRow::default() {
        tx.delete::<VolumeOptionsRow>(&id);
    } else {
        tx.put(&id, &options);
    }
}

/// Sets some limits of a volume. Attached or not makes no difference: the leader tells the client.
///
/// # Errors
/// `NotFound`, `InvalidArgument` for a folder.
pub(crate) fn set_limits(tx: &mut Tx<'_>, path: &str, changes: &LimitChanges) -> Step<Outcome> {
    let (id, row): (VolumeId, VolumeRow) = namespace::volume(tx, path)?;
    let mut options = of(tx, id)?;
    options.limits = changes.apply(options.limits);
    put(tx, id, options);
    Ok(Outcome::Volume(Box::new(info::volume(tx, id, &row)?)))
}
