//! Calls about volumes that stand on backups: making one, listing them, and that one is complete.

use super::status::CallError;
use super::volumes::volume;
use super::{Core, names};
use crate::machine::backups::{self, Listed, PLACEMENTS_MAX};
use crate::machine::command::{Command, Outcome};
use crate::liveness::Health;
use crate::machine::row::{BackupRow, ChunkserverRow, ClusterRow, CopysetRow, PoolNameRow, VolumeOptionsRow, VolumeRow};
use crate::machine::namespace;
use crate::refusal::Refusal;
use crate::segments;
use ogee_common::id::{ChunkserverId, LayerId, PoolId};
use ogee_common::limits::{BACKUP_BLOCK_BYTES_MAX, BACKUP_BLOCK_BYTES_MIN, SEGMENT_BYTES, VOLUME_BYTES_MAX};
use ogee_common::qos::VolumeLimits;
use ogee_common::rng;
use ogee_proto::data::PASTE_SINCE;
use ogee_proto::mds;
use std::collections::BTreeSet;

/// Layers of one page of a listing.
const LISTED_MAX: usize = 256;

/// From the state machine's words to those of `mds.proto`.
pub(super) fn message((layer, row, path): Listed) -> mds::BackupParent {
    mds::BackupParent {
        layer: layer.0,
        repository: row.repository,
        backup: row.backup,
        root: row.root.to_vec().into(),
        leaves: row.leaves.to_vec().into(),
        size_bytes: row.size_bytes,
        block_bytes: row.block_bytes,
        volume: path.unwrap_or_default(),
    }
}

/// What a call says of a backup, checked.
///
/// # Errors
/// `InvalidArgument`.
fn row_of(parent: &mds::BackupParent) -> Result<BackupRow, CallError> {
    let digest = |what, bytes: &[u8]| -> Result<[u8; 32], CallError> {
        bytes.try_into().map_err(|_| CallError::Argument { what, wanted: "32 bytes" })
    };
    let blocks = BACKUP_BLOCK_BYTES_MIN..=BACKUP_BLOCK_BYTES_MAX;
    if !blocks.contains(&parent.block_bytes) || !parent.block_bytes.is_power_of_two() {
        return Err(CallError::Argument { what: "block size", wanted: "256 KiB, 512 KiB or 1 MiB" });
    }
    if parent.size_bytes == 0 || parent.size_bytes > VOLUME_BYTES_MAX {
        return Err(CallError::Argument { what: "size of the backup", wanted: "1 byte to 64 TiB" });
    }
    Ok(BackupRow {
        repository: names::name("repository", &parent.repository)?,
        backup: names::id("backup", parent.backup)?,
        root: digest("root", &parent.root)?,
        leaves: digest("leaves", &parent.leaves)?,
        size_bytes: parent.size_bytes,
        block_bytes: parent.block_bytes,
    })
}

impl Core {
    /// Makes a volume that stands on a backup.
    pub(crate) async fn create_lazy_volume(
        &self,
        id: Option<[u8; 16]>,
        r: mds::CreateLazyVolumeRequest,
    ) -> Result<mds::Volume, CallError> {
        let missing = |what| CallError::Argument { what, wanted: "there must be one" };
        let (wish, parent) = (r.volume.ok_or(missing("volume"))?, r.backup.ok_or(missing("backup"))?);
        let (path, owner) = (names::path("path", &wish.path)?, names::owner(&wish.owner)?);
        let pool = if wish.pool.is_empty() { String::new() } else { names::name("pool", &wish.pool)? };
        let limits = names::limit_changes(wish.limits.as_ref())?.apply(VolumeLimits::NONE);
        let options = VolumeOptionsRow { sector_bytes: names::sector_bytes(wish.sector_bytes)?, limits };
        let backup = row_of(&parent)?;
        self.lead().await?;
        let pool_id = self.read(|tx| namespace::pool(tx, &pool))?;
        self.check_protocol(pool_id)?;
        let candidates = self.candidates(pool_id)?;
        let count = usize::try_from(backup.size_bytes.div_ceil(SEGMENT_BYTES)).unwrap_or(PLACEMENTS_MAX).min(PLACEMENTS_MAX);
        let choose = |_| segments::choose(&candidates, rng::nonzero_u64()).ok_or(CallError::NoRoom);
        let placements = (0..count).map(choose).collect::<Result<Vec<_>, _>>()?;
        let (size_bytes, create_parents) = (wish.size_bytes, wish.create_parents);
        let command = Command::CreateLazyVolume { path, size_bytes, owner, create_parents, pool, options, backup, placements };
        self.described(volume(self.propose(id, command).await?)?)
    }

    /// Refuses a pool in which a chunkserver would not understand pastes and masking zeroings: as a follower it would skip them, and nobody would notice.
    ///
    /// What chunkservers speak is in the leader's memory, from their heartbeats: it is about processes, not about the cluster's state, and a
    /// command of its own would stop MDS nodes of older builds at the first heartbeat. So the state machine cannot refuse; whoever does not lead any more
    /// cannot propose. Asked are those that have replicas of the pool, and those that are up and may get some.
    ///
    /// # Errors
    /// `InvalidArgument` for an older chunkserver; `Unavailable` while one with replicas was not heard of.
    fn check_protocol(&self, pool: PoolId) -> Result<(), CallError> {
        let (hosts, members) = self.read(|tx| {
            let copysets = tx.scan::<CopysetRow>(&(), None, usize::MAX)?;
            let of_pool = copysets.into_iter().filter(|(_, row)| row.pool == pool);
            let hosts: BTreeSet<ChunkserverId> = of_pool.flat_map(|(_, row)| row.replicas).map(|r| r.chunkserver).collect();
            let mut members = vec![];
            for (id, row) in tx.scan::<ChunkserverRow>(&(), None, usize::MAX)? {
                if tx.get::<PoolNameRow>(&row.pool)?.is_some_and(|PoolNameRow(id)| id == pool) {
                    members.push(id);
                }
            }
            Ok((hosts, members))
        })?;
        let (mut old, mut unheard) = (vec![], vec![]);
        for id in members.into_iter().chain(hosts.iter().copied()).collect::<BTreeSet<_>>() {
            match self.live.vitals(id).0.map(|v| v.protocol) {
                Some(version) if version >= u32::from(PASTE_SINCE) => {}
                _ if !hosts.contains(&id) && self.live.health(id) != Health::Up => {}
                Some(_) => old.push(id),
                None => unheard.push(id),
            }
        }
        if !old.is_empty() {
            return Err(CallError::OldChunkservers { chunkservers: old });
        }
        if unheard.is_empty() { Ok(()) } else { Err(CallError::Unheard { chunkservers: unheard }) }
    }

    /// A layer needs its backup no more; repeating it is no error.
    pub(crate) async fn complete_backup_parent(&self, r: mds::CompleteBackupParentRequest) -> Result<mds::Empty, CallError> {
        let layer = LayerId(names::id("layer", r.layer)?);
        match self.propose(None, Command::CompleteBackup { layer }).await? {
            Outcome::Done => {
                self.tell_complete(layer);
                Ok(mds::Empty {})
            }
            _ => Err(CallError::Answer(crate::machine::command::DecodeError::Trailing)),
        }
    }

    /// Tells the clients that write to something that stands on the layer. It only spares them the question: whoever does not hear of it asks when
    /// the backup is gone.
    fn tell_complete(&self, layer: LayerId) {
        for volume in self.hub.watched() {
            let stands = self.read(|tx| match tx.get::<VolumeRow>(&volume)? {
                Some(row) => Ok(backups::bottom(tx, row.layer)? == Some(layer)),
                None => Ok(false),
            });
            if stands.unwrap_or(false) {
                self.hub.refresh(volume, || self.current(volume));
            }
        }
    }

    /// The layers that stand on backups.
    pub(crate) async fn list_backup_parents(
        &self,
        r: mds::ListBackupParentsRequest,
    ) -> Result<mds::BackupParentList, CallError> {
        self.lead().await?;
        let (mut listed, cluster) = self.read(|tx| {
            let cluster: ClusterRow = tx.get(&())?.ok_or(Refusal::NotFormed)?;
            Ok((backups::list(tx, LayerId(r.after), LISTED_MAX + 1)?, cluster.cluster))
        })?;
        let more = listed.len() > LISTED_MAX;
        listed.truncate(LISTED_MAX);
        Ok(mds::BackupParentList { parents: listed.into_iter().map(message).collect(), more, cluster: cluster.to_vec().into() })
    }

    /// The backup that a layer stands on.
    ///
    /// # Errors
    /// Those of the rows only.
    pub(super) fn backup_below(&self, layer: LayerId) -> Result<Option<mds::BackupParent>, CallError> {
        self.read(|tx| Ok(backups::below(tx, layer)?.map(|(layer, row)| message((layer, row, None)))))
    }

    /// Refuses who cannot read backups a layer that stands on one.
    ///
    /// # Errors
    /// `InvalidArgument`.
    pub(super) fn check_reads_backups(&self, layer: LayerId) -> Result<(), CallError> {
        match self.backup_below(layer)? {
            Some(parent) => Err(Refusal::NeedsBackup { repository: parent.repository }.into()),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_backup_that_makes_sense_is_taken() {
        let good = mds::BackupParent {
            layer: 0,
            repository: "main".to_owned(),
            backup: 7,
            root: vec![1; 32].into(),
            leaves: vec![2; 32].into(),
            size_bytes: 1 << 30,
            block_bytes: 256 << 10,
            volume: String::new(),
        };
        assert_eq!(row_of(&good).expect("good").root, [1; 32]);
        let bad: [fn(&mut mds::BackupParent); 6] = [
            |p| p.repository = "a/b".to_owned(),
            |p| p.backup = 0,
            |p| p.root = vec![1; 31].into(),
            |p| p.leaves = vec![].into(),
            |p| p.size_bytes = 0,
            |p| p.block_bytes = 3 << 17,
        ];
        for change in bad {
            let mut parent = good.clone();
            change(&mut parent);
            assert!(row_of(&parent).is_err(), "{parent:?}");
        }
    }
}
