//! Folders and names: looking up, creating, deleting, renaming, growing volumes.
//!
//! Invariants: a name in a folder is either one folder or one volume; a volume's row knows its folder and name, so its
//! path is found from its id; a folder is only removed when it is empty. Paths were parsed where they entered.

use super::command::{Outcome, VolumeInfo};
use super::info;
use super::row::{
    AttachRow, Counter, DirectoryRow, EntryRow, LayerRow, PoolNameRow, PoolRow, SnapshotNameRow, SnapshotRow,
    VolumeOptionsRow, VolumeRow,
};
use super::tx::Tx;
use super::{Step, layers, snapshots};
use crate::refusal::{Refusal, USERS_SHOWN_MAX};
use ogee_common::id::{AttachEpoch, DirectoryId, LayerId, PoolId, VolumeId, VolumeSeq, VolumeSnapshotId};
use ogee_common::limits::{PAGE_BYTES, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};

/// The folder that holds everything; it has no row.
pub(crate) const ROOT: DirectoryId = DirectoryId(1);

/// What is known of a volume before it exists.
pub(crate) struct NewVolume<'a> {
    pub(crate) path: &'a str,
    pub(crate) create_parents: bool,
    pub(crate) owner: String,
    pub(crate) size_bytes: u64,
    pub(crate) pool: PoolId,
    pub(crate) parent: String,
    pub(crate) now_unix_ms: u64,
    pub(crate) options: VolumeOptionsRow,
}

fn split(path: &str) -> (Vec<&str>, &str) {
    let mut parts: Vec<&str> = path.split('/').collect();
    let name = parts.pop().unwrap_or_default();
    (parts, name)
}

fn entry(tx: &Tx<'_>, directory: DirectoryId, name: &str) -> Step<Option<EntryRow>> {
    Ok(tx.get::<EntryRow>(&(directory, name.to_owned()))?)
}

/// The folder at a path (empty: the root).
///
/// # Errors
/// `NotFound`; `InvalidArgument` when a volume is in the way.
pub(crate) fn folder(tx: &Tx<'_>, parts: &[&str]) -> Step<DirectoryId> {
    let mut at = ROOT;
    for (depth, name) in parts.iter().enumerate() {
        let path = || parts[..=depth].join("/");
        at = match entry(tx, at, name)? {
            Some(EntryRow::Directory(id)) => id,
            Some(EntryRow::Volume(_)) => return Err(Refusal::NotAFolder { path: path() }.into()),
            None => return Err(Refusal::NoSuchFolder { path: path() }.into()),
        };
    }
    Ok(at)
}

fn folder_or_make(tx: &mut Tx<'_>, parts: &[&str], create_parents: bool) -> Step<DirectoryId> {
    let mut at = ROOT;
    for (depth, name) in parts.iter().enumerate() {
        if create_parents && entry(tx, at, name)?.is_none() {
            // The first number a counter gives is 1, which is the root's.
            let id = DirectoryId(tx.next_id(Counter::Directory)? + 1);
            tx.put(&(at, (*name).to_owned()), &EntryRow::Directory(id));
            tx.put(&id, &DirectoryRow { parent: at, name: (*name).to_owned() });
            at = id;
        } else {
            at = match entry(tx, at, name)? {
                Some(EntryRow::Directory(id)) => id,
                Some(EntryRow::Volume(_)) => {
                    return Err(Refusal::NotAFolder { path: parts[..=depth].join("/") }.into());
                }
                None => return Err(Refusal::NoSuchFolder { path: parts[..=depth].join("/") }.into()),
            };
        }
    }
    Ok(at)
}

/// The volume at a path.
///
/// # Errors
/// `NotFound`; `InvalidArgument` for a folder.
pub(crate) fn volume(tx: &Tx<'_>, path: &str) -> Step<(VolumeId, VolumeRow)> {
    let (parents, name) = split(path);
    let missing = || Refusal::NoSuchVolume { path: path.to_owned() };
    let directory = folder(tx, &parents).map_err(|e| e.replace_refusal(missing()))?;
    match entry(tx, directory, name)? {
        Some(EntryRow::Volume(id)) => Ok((id, tx.expect(&id)?)),
        Some(EntryRow::Directory(_)) => Err(Refusal::NotAVolume { path: path.to_owned() }.into()),
        None => Err(missing().into()),
    }
}

/// The path of a name in a folder.
pub(crate) fn path_of(tx: &Tx<'_>, directory: DirectoryId, name: &str) -> Step<String> {
    let mut names = vec![name.to_owned()];
    let mut at = directory;
    while at != ROOT {
        let row: DirectoryRow = tx.expect(&at)?;
        names.push(row.name);
        at = row.parent;
    }
    names.reverse();
    Ok(names.join("/"))
}

/// The pool with a name, or the only one when the name is empty.
///
/// # Errors
/// `NotFound`, `InvalidArgument`.
pub(crate) fn pool(tx: &Tx<'_>, name: &str) -> Step<PoolId> {
    if !name.is_empty() {
        let row: Option<PoolNameRow> = tx.get(&name.to_owned())?;
        return Ok(row.ok_or(Refusal::NoSuchPool { name: name.to_owned() })?.0);
    }
    match &tx.scan::<PoolRow>(&(), None, 2)?[..] {
        [] => Err(Refusal::NoPool.into()),
        [(id, _)] => Ok(*id),
        _ => Err(Refusal::PoolNotNamed.into()),
    }
}

/// Whether a volume may have this size.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn check_size(size_bytes: u64) -> Step<()> {
    let allowed = (VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&size_bytes);
    if allowed && size_bytes.is_multiple_of(u64::from(PAGE_BYTES)) {
        Ok(())
    } else {
        Err(Refusal::BadSize { size_bytes }.into())
    }
}

/// Puts a name, a volume and its first layer in place; `layer` says what the layer stands on.
pub(crate) fn insert(
    tx: &mut Tx<'_>,
    new: NewVolume<'_>,
    layer: impl FnOnce(VolumeId) -> LayerRow,
) -> Step<(VolumeId, LayerId)> {
    let (parents, name) = split(new.path);
    let directory = folder_or_make(tx, &parents, new.create_parents)?;
    if entry(tx, directory, name)?.is_some() {
        return Err(Refusal::PathTaken { path: new.path.to_owned() }.into());
    }
    let id = VolumeId(tx.next_id(Counter::Volume)?);
    let layer_id = LayerId(tx.next_id(Counter::Layer)?);
    tx.put(&layer_id, &layer(id));
    tx.put(&(directory, name.to_owned()), &EntryRow::Volume(id));
    let row = VolumeRow {
        directory,
        name: name.to_owned(),
        owner: new.owner,
        size_bytes: new.size_bytes,
        pool: new.pool,
        layer: layer_id,
        created_unix_ms: new.now_unix_ms,
        parent: new.parent,
        snapshots: 0,
        epoch: AttachEpoch(0),
        attached: None,
    };
    tx.put(&id, &row);
    if new.options != VolumeOptionsRow::default() {
        tx.put(&id, &new.options);
    }
    Ok((id, layer_id))
}

/// Makes an empty volume. `pool_name` may be empty when there is one pool.
///
/// # Errors
/// `AlreadyExists`, `NotFound`, `InvalidArgument`.
pub(crate) fn create(tx: &mut Tx<'_>, mut new: NewVolume<'_>, pool_name: &str) -> Step<Outcome> {
    check_size(new.size_bytes)?;
    new.pool = pool(tx, pool_name)?;
    let pool = new.pool;
    let (id, _) = insert(tx, new, |volume| layers::first(volume, pool))?;
    done(tx, id)
}

fn done(tx: &Tx<'_>, id: VolumeId) -> Step<Outcome> {
    let info: VolumeInfo = info::volume(tx, id, &tx.expect(&id)?)?;
    Ok(Outcome::Volume(Box::new(info)))
}

/// Deletes a volume that nothing uses, or an empty folder. Its layers go in the background.
///
/// # Errors
/// `NotFound`, `WrongOwner`, `Attached`, `InUse`.
pub(crate) fn delete(tx: &mut Tx<'_>, path: &str, owner: &str) -> Step<Outcome> {
    let (parents, name) = split(path);
    if let Ok(directory) = folder(tx, &parents)
        && let Some(EntryRow::Directory(id)) = entry(tx, directory, name)?
    {
        if !tx.scan::<EntryRow>(&id, None, 1)?.is_empty() {
            return Err(Refusal::FolderNotEmpty { path: path.to_owned() }.into());
        }
        tx.delete::<EntryRow>(&(directory, name.to_owned()));
        tx.delete::<DirectoryRow>(&id);
        return Ok(Outcome::Done);
    }
    let (id, row) = volume(tx, path)?;
    if !row.owner.is_empty() && row.owner != owner {
        return Err(Refusal::WrongOwner.into());
    }
    if let Some(AttachRow { epoch, description, .. }) = row.attached {
        return Err(Refusal::Attached { by: description, epoch }.into());
    }
    for (snapshot, hidden) in unused_snapshots(tx, id)? {
        snapshots::remove(tx, snapshot, &hidden)?;
    }
    tx.delete::<EntryRow>(&(row.directory, row.name));
    tx.delete::<VolumeRow>(&id);
    tx.delete::<VolumeOptionsRow>(&id);
    layers::retire_head(tx, row.layer)?;
    Ok(Outcome::Done)
}

/// The hidden snapshots of a volume on which nothing stands. Those that only its own layers stand on go with these.
///
/// # Errors
/// `InUse` when a visible snapshot exists, or a hidden one with a clone.
fn unused_snapshots(tx: &Tx<'_>, id: VolumeId) -> Step<Vec<(VolumeSnapshotId, SnapshotRow)>> {
    let (mut names, mut clones, mut unused) = (vec![], vec![], vec![]);
    let mut cloned = false;
    for ((_, name), SnapshotNameRow(snapshot)) in tx.scan::<SnapshotNameRow>(&id, None, usize::MAX)? {
        let row: SnapshotRow = tx.expect(&snapshot)?;
        cloned |= row.hidden && row.clones > 0;
        if !row.hidden {
            names.push(name);
        } else if row.clones > 0 && clones.len() <= USERS_SHOWN_MAX {
            clones.extend(info::users(tx, &row)?.0);
        } else if row.rollbacks == 0 {
            unused.push((snapshot, row));
        }
    }
    let shown = |mut list: Vec<String>| {
        let more = list.len() > USERS_SHOWN_MAX;
        list.truncate(USERS_SHOWN_MAX);
        (list, more)
    };
    if !names.is_empty() {
        let (names, more) = shown(names);
        return Err(Refusal::HasSnapshots { names, more }.into());
    }
    if cloned {
        let (volumes, more) = shown(clones);
        return Err(Refusal::HasClones { volumes, more }.into());
    }
    Ok(unused)
}

/// Gives a volume another path. Attached or not makes no difference: everything else refers to its id.
///
/// # Errors
/// `NotFound`, `AlreadyExists`, `InvalidArgument`.
pub(crate) fn rename(tx: &mut Tx<'_>, path: &str, new_path: &str, create_parents: bool) -> Step<Outcome> {
    let (id, mut row) = volume(tx, path)?;
    let (parents, name) = split(new_path);
    let directory = folder_or_make(tx, &parents, create_parents)?;
    if entry(tx, directory, name)?.is_some() {
        return Err(Refusal::PathTaken { path: new_path.to_owned() }.into());
    }
    tx.delete::<EntryRow>(&(row.directory, row.name));
    tx.put(&(directory, name.to_owned()), &EntryRow::Volume(id));
    (row.directory, row.name) = (directory, name.to_owned());
    tx.put(&id, &row);
    done(tx, id)
}

/// Grows a volume. The same size again is no error, so that a repeated request succeeds.
///
/// # Errors
/// `NotFound`, `InvalidArgument`.
pub(crate) fn extend(tx: &mut Tx<'_>, path: &str, size_bytes: u64) -> Step<Outcome> {
    let (id, mut row) = volume(tx, path)?;
    check_size(size_bytes)?;
    if size_bytes < row.size_bytes {
        return Err(Refusal::Shrink { from_bytes: row.size_bytes, to_bytes: size_bytes }.into());
    }
    row.size_bytes = size_bytes;
    tx.put(&id, &row);
    done(tx, id)
}

/// The seq that the head of a volume writes with.
pub(crate) fn head_seq(tx: &Tx<'_>, row: &VolumeRow) -> Step<VolumeSeq> {
    Ok(tx.expect::<LayerRow>(&row.layer)?.seq)
}
