//! Finding what UUIDs and users mean: the MDS knows volumes by their paths, UUIDs have their numbers.
//!
//! Invariant: a path that is remembered is a hint: whatever is found by it is checked against the volume's number. Costs: a volume that is not remembered
//! costs a listing of all volumes; a list of a user's snapshots one call for each volume that has any.

use super::Curve;
use super::code::Code;
use futures_util::{StreamExt, TryStreamExt, stream};
use ogee_common::limits::CURVE_PATHS_MAX;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds as m;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Calls of the MDS at once for one request.
const CALLS_PARALLEL: usize = 8;

/// Paths by volumes' numbers.
#[derive(Debug, Default)]
pub(super) struct Paths(Mutex<HashMap<u64, String>>);

impl Paths {
    fn get(&self, volume: u64) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&volume).cloned()
    }

    /// Remembers where a volume is; when there are too many, all others are forgotten.
    pub(super) fn put(&self, volume: &m::Volume) {
        let mut paths = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if paths.len() >= CURVE_PATHS_MAX {
            paths.clear();
        }
        paths.insert(volume.id, volume.path.clone());
    }
}

/// Whether a user may see and change a volume. One without an owner is everybody's.
pub(super) fn is_of(volume: &m::Volume, user: &str) -> bool {
    volume.owner.is_empty() || volume.owner == user
}

impl Curve {
    /// A volume by its path.
    ///
    /// # Errors
    /// The MDS does not answer.
    pub(super) async fn volume_at(&self, path: &str) -> Result<Option<m::Volume>, Code> {
        match self.mds.stat_volume(m::StatVolumeRequest { path: path.to_owned() }).await {
            Ok(volume) => {
                self.paths.put(&volume);
                Ok(Some(volume))
            }
            // A folder of this name is no volume.
            Err(e) if matches!(e.kind, MdsErrorKind::NotFound | MdsErrorKind::InvalidArgument) => Ok(None),
            Err(e) => Err(Code::of("look for a volume", &e)),
        }
    }

    /// A volume by its number.
    ///
    /// # Errors
    /// The MDS does not answer.
    pub(super) async fn volume(&self, id: u64) -> Result<Option<m::Volume>, Code> {
        if let Some(path) = self.paths.get(id)
            && let Some(volume) = self.volume_at(&path).await?.filter(|v| v.id == id)
        {
            return Ok(Some(volume));
        }
        let mut start_after = String::new();
        loop {
            let page = self.page(start_after).await?;
            if let Some(found) = page.volumes.iter().find(|v| v.id == id && !v.directory) {
                return Ok(self.volume_at(&found.path).await?.filter(|v| v.id == id));
            }
            match page.volumes.last() {
                Some(last) if page.more => start_after = last.path.clone(),
                _ => return Ok(None),
            }
        }
    }

    async fn page(&self, start_after: String) -> Result<m::ListVolumesReply, Code> {
        let request = m::ListVolumesRequest { directory: String::new(), recursive: true, start_after, limit: 0 };
        self.mds.list_volumes(request).await.map_err(|e| Code::of("list volumes", &e))
    }

    /// All volumes that suit, in the order of their paths.
    ///
    /// # Errors
    /// The MDS does not answer.
    pub(super) async fn volumes(&self, suits: impl Fn(&m::Volume) -> bool) -> Result<Vec<m::Volume>, Code> {
        let (mut all, mut start_after) = (vec![], String::new());
        loop {
            let page = self.page(start_after).await?;
            let last = page.volumes.last().map(|v| v.path.clone());
            all.extend(page.volumes.into_iter().filter(|v| !v.directory && suits(v)));
            match last {
                Some(last) if page.more => start_after = last,
                _ => return Ok(all),
            }
        }
    }

    /// The snapshots of a volume; none if there is no such volume.
    ///
    /// # Errors
    /// The MDS does not answer.
    pub(super) async fn snapshots_of(&self, path: &str) -> Result<Vec<m::Snapshot>, Code> {
        match self.mds.list_snapshots(m::ListSnapshotsRequest { path: path.to_owned() }).await {
            Ok(list) => Ok(list.snapshots),
            Err(e) if matches!(e.kind, MdsErrorKind::NotFound | MdsErrorKind::InvalidArgument) => Ok(vec![]),
            Err(e) => Err(Code::of("list snapshots", &e)),
        }
    }

    /// A snapshot, with its volume.
    ///
    /// # Errors
    /// The MDS does not answer.
    pub(super) async fn snapshot(&self, volume: u64, snapshot: u64) -> Result<Option<(m::Volume, m::Snapshot)>, Code> {
        let Some(volume) = self.volume(volume).await? else { return Ok(None) };
        let found = self.snapshots_of(&volume.path).await?.into_iter().find(|s| s.id == snapshot);
        Ok(found.map(|s| (volume, s)))
    }

    /// The snapshots of all these volumes, in their order.
    ///
    /// # Errors
    /// The MDS does not answer.
    pub(super) async fn snapshots_of_all(&self, volumes: Vec<m::Volume>) -> Result<Vec<(m::Volume, m::Snapshot)>, Code> {
        let mut with = volumes;
        with.retain(|v| v.snapshots > 0);
        let with = with.into_iter().map(|volume| async move {
            let list = self.snapshots_of(&volume.path).await?;
            Ok::<_, Code>(list.into_iter().map(|s| (volume.clone(), s)).collect::<Vec<_>>())
        });
        let lists: Vec<Vec<_>> = stream::iter(with).buffered(CALLS_PARALLEL).try_collect().await?;
        Ok(lists.into_iter().flatten().collect())
    }

    /// These volumes with the progress of their flattens; those that went meanwhile are left out.
    ///
    /// # Errors
    /// The MDS does not answer.
    pub(super) async fn in_full(&self, volumes: Vec<m::Volume>) -> Result<Vec<m::Volume>, Code> {
        let each = volumes.into_iter().map(|volume| async move {
            // One that stands on nothing has no flatten.
            if volume.depth == 0 {
                return Ok(Some(volume));
            }
            let found = self.volume_at(&volume.path).await?;
            Ok::<_, Code>(found.filter(|v| v.id == volume.id))
        });
        let found: Vec<Option<_>> = stream::iter(each).buffered(CALLS_PARALLEL).try_collect().await?;
        Ok(found.into_iter().flatten().collect())
    }
}
