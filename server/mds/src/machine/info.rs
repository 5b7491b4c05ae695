//! What callers see of volumes and snapshots, and listings of the namespace. Reads only.
//!
//! Invariant: a listing is in path order with a folder before its content, so the last path of a page is where the
//! next page begins, whatever was created or deleted meanwhile.

use super::command::{SnapshotInfo, VolumeInfo};
use super::row::{
    ChildRow, EntryRow, GroupedRow, LayerRow, SnapshotNameRow, SnapshotRow, SnapshotState, VolumeOptionsRow, VolumeRow,
};
use super::tx::Tx;
use super::{Step, layers, namespace, options};
use crate::refusal::USERS_SHOWN_MAX;
use ogee_common::id::{DirectoryId, VolumeId, VolumeSnapshotId};

/// A volume as callers see it.
pub(crate) fn volume(tx: &Tx<'_>, id: VolumeId, row: &VolumeRow) -> Step<VolumeInfo> {
    let layer: LayerRow = tx.expect(&row.layer)?;
    Ok(VolumeInfo {
        id,
        path: namespace::path_of(tx, row.directory, &row.name)?,
        owner: row.owner.clone(),
        size_bytes: row.size_bytes,
        layer: row.layer,
        seq: layer.seq,
        created_unix_ms: row.created_unix_ms,
        parent: row.parent.clone(),
        allocated_segments: u64::from(layer.segments) + u64::from(layer.inherited),
        snapshots: row.snapshots,
        epoch: row.epoch,
        attached_by: row.attached.as_ref().map(|a| a.description.clone()),
        depth: layers::depth(tx, &layer)?,
        pool: row.pool,
    })
}

/// A snapshot as callers see it.
pub(crate) fn snapshot(tx: &Tx<'_>, id: VolumeSnapshotId, row: &SnapshotRow) -> Step<SnapshotInfo> {
    let volume: VolumeRow = tx.expect(&row.volume)?;
    Ok(SnapshotInfo {
        id,
        name: row.name.clone(),
        volume: row.volume,
        volume_path: namespace::path_of(tx, volume.directory, &volume.name)?,
        layer: row.layer,
        seq: row.seq,
        size_bytes: row.size_bytes,
        created_unix_ms: row.created_unix_ms,
        ready: row.state == SnapshotState::Ready,
        confirming: row.state == SnapshotState::Confirming,
        children: row.clones + row.rollbacks,
        hold: row.hold,
        group: tx.get::<GroupedRow>(&id)?.map(|GroupedRow(group)| group),
    })
}

/// The visible snapshots of a volume, oldest first; none of a group that is not confirmed, for it may yet go.
pub(crate) fn snapshots(tx: &Tx<'_>, path: &str) -> Step<Vec<SnapshotInfo>> {
    let (volume, _) = namespace::volume(tx, path)?;
    let mut list = vec![];
    for (_, SnapshotNameRow(id)) in tx.scan::<SnapshotNameRow>(&volume, None, usize::MAX)? {
        let row: SnapshotRow = tx.expect(&id)?;
        if !row.hidden {
            list.push(snapshot(tx, id, &row)?);
        }
    }
    list.retain(|s| !(s.confirming && s.group.is_some()));
    list.sort_by_key(|s| s.id);
    Ok(list)
}

/// The first volumes of others that stand on a snapshot, and whether there are more.
pub(crate) fn users(tx: &Tx<'_>, row: &SnapshotRow) -> Step<(Vec<String>, bool)> {
    let mut names = vec![];
    for ((_, _, child), ChildRow) in tx.scan::<ChildRow>(&(row.layer, row.seq), None, 4 * USERS_SHOWN_MAX)? {
        let layer: LayerRow = tx.expect(&child)?;
        if layer.volume == row.volume {
            continue;
        }
        if let Some(volume) = tx.get::<VolumeRow>(&layer.volume)? {
            names.push(namespace::path_of(tx, volume.directory, &volume.name)?);
        }
    }
    let more = row.clones as usize > names.len().min(USERS_SHOWN_MAX);
    names.truncate(USERS_SHOWN_MAX);
    Ok((names, more))
}

/// An entry of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Listed {
    /// A folder, by path.
    Folder(String),
    /// A volume, and its options.
    Volume(Box<VolumeInfo>, VolumeOptionsRow),
}

/// What to list.
pub(crate) struct Listing<'a> {
    /// The folder; empty: the root.
    pub(crate) directory: &'a str,
    /// Whether to go into folders.
    pub(crate) recursive: bool,
    /// Path of the last entry of the page before; empty: from the start.
    pub(crate) start_after: &'a str,
    /// Most entries.
    pub(crate) limit: usize,
}

/// Up to `limit` entries, and whether there are more.
///
/// # Errors
/// `NotFound`, `InvalidArgument` when the folder is a volume.
pub(crate) fn list(tx: &Tx<'_>, listing: &Listing<'_>) -> Step<(Vec<Listed>, bool)> {
    let parts: Vec<&str> = listing.directory.split('/').filter(|p| !p.is_empty()).collect();
    let directory = namespace::folder(tx, &parts)?;
    let prefix = if parts.is_empty() { String::new() } else { format!("{}/", parts.join("/")) };
    let after: Vec<&str> = match listing.start_after.strip_prefix(&prefix) {
        Some(rest) => rest.split('/').filter(|p| !p.is_empty()).collect(),
        None => vec![],
    };
    let mut walk = Walk { tx, recursive: listing.recursive, limit: listing.limit + 1, found: vec![] };
    walk.folder(directory, &prefix, &after)?;
    let mut found = walk.found;
    let more = found.len() > listing.limit;
    found.truncate(listing.limit);
    Ok((found, more))
}

struct Walk<'a, 'tx> {
    tx: &'a Tx<'tx>,
    recursive: bool,
    limit: usize,
    found: Vec<Listed>,
}

impl Walk<'_, '_> {
    /// Lists what lies behind `after`, which is relative to the folder. Recursion ends at the depth of a path.
    fn folder(&mut self, id: DirectoryId, prefix: &str, after: &[&str]) -> Step<()> {
        if let [name, rest @ ..] = after
            && self.recursive
            && let Some(EntryRow::Directory(inner)) = self.tx.get(&(id, (*name).to_owned()))?
        {
            self.folder(inner, &format!("{prefix}{name}/"), rest)?;
        }
        let mut last = after.first().map(|name| (id, (*name).to_owned()));
        while self.found.len() < self.limit {
            let page = self.tx.scan::<EntryRow>(&id, last.as_ref(), self.limit - self.found.len())?;
            for ((_, name), entry) in &page {
                self.entry(&format!("{prefix}{name}"), *entry)?;
            }
            match page.into_iter().next_back() {
                Some((key, _)) => last = Some(key),
                None => break,
            }
        }
        Ok(())
    }

    fn entry(&mut self, path: &str, entry: EntryRow) -> Step<()> {
        if self.found.len() >= self.limit {
            return Ok(());
        }
        match entry {
            EntryRow::Volume(id) => {
                let info = volume(self.tx, id, &self.tx.expect(&id)?)?;
                self.found.push(Listed::Volume(Box::new(info), options::of(self.tx, id)?));
                Ok(())
            }
            EntryRow::Directory(id) => {
                self.found.push(Listed::Folder(path.to_owned()));
                if self.recursive { self.folder(id, &format!("{path}/"), &[]) } else { Ok(()) }
            }
        }
    }
}
