//! Calls about snapshots, clones and rollback. Those of several commands run in a task of their own, in the volume's turn.

use super::hold::snapshot;
use super::status::CallError;
use super::{Core, names, volumes};
use crate::machine::command::Command;
use crate::machine::row::{SnapshotRow, SnapshotState, VolumeRow};
use crate::machine::{groups, info, layers, namespace, snapshots};
use crate::refusal::Refusal;
use ogee_common::id::{VolumeId, VolumeSnapshotId};
use ogee_proto::mds;
use std::sync::Arc;
use std::time::Duration;

/// A snapshot that is being sealed is waited for this long: ten heartbeats.
const READY_TIMEOUT: Duration = Duration::from_secs(5);

type Id = Option<[u8; 16]>;

/// Runs to its end also when the caller goes away.
pub(super) async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, CallError>> + Send + 'static,
) -> Result<T, CallError> {
    tokio::spawn(work).await.unwrap_or(Err(CallError::Ending))
}

impl Core {
    pub(super) fn volume_at(&self, path: &str) -> Result<VolumeId, CallError> {
        self.read(|tx| Ok(namespace::volume(tx, path)?.0))
    }

    pub(crate) async fn create_snapshot(
        self: &Arc<Self>,
        r: mds::CreateSnapshotRequest,
    ) -> Result<mds::Snapshot, CallError> {
        let (path, name) = (names::path("path", &r.path)?, names::snapshot(&r.name)?);
        self.lead().await?;
        let volume = self.volume_at(&path)?;
        let core = self.clone();
        let info = detached(async move {
            let _turn = core.ops.wait(volume).await;
            core.snapshot_head(volume, Some(&name)).await
        });
        Ok(info.await?.into())
    }

    pub(crate) async fn list_snapshots(
        &self,
        r: mds::ListSnapshotsRequest,
    ) -> Result<mds::ListSnapshotsReply, CallError> {
        let path = names::path("path", &r.path)?;
        self.lead().await?;
        let list = self.read(|tx| info::snapshots(tx, &path))?;
        Ok(mds::ListSnapshotsReply { snapshots: list.into_iter().map(Into::into).collect() })
    }

    pub(crate) async fn delete_snapshot(&self, id: Id, r: mds::DeleteSnapshotRequest) -> Result<mds::Empty, CallError> {
        let (path, name) = (names::path("path", &r.path)?, names::snapshot(&r.name)?);
        self.lead().await?;
        let _turn = self.ops.wait(self.volume_at(&path)?).await;
        self.propose(id, Command::DeleteSnapshot { path, name }).await?;
        Ok(mds::Empty {})
    }

    pub(crate) async fn clone_volume(
        self: &Arc<Self>,
        id: Id,
        r: mds::CloneVolumeRequest,
    ) -> Result<mds::Volume, CallError> {
        let path = names::path("path", &r.path)?;
        let named = if r.source_snapshot.is_empty() { None } else { Some(names::snapshot(&r.source_snapshot)?) };
        let new_path = names::path("new path", &r.new_path)?;
        let (owner, create_parents) = (names::owner(&r.owner)?, r.create_parents);
        self.lead().await?;
        let volume = self.volume_at(&path)?;
        if let Some(name) = named {
            let snapshot = self.read(|tx| Ok(snapshots::named(tx, volume, &path, &name)?.0))?;
            self.wait_ready(snapshot).await?;
            let command = Command::CloneVolume { snapshot, new_path, owner, create_parents };
            return self.described(volumes::volume(self.propose(id, command).await?)?);
        }
        // A snapshot for a name that is taken would only be thrown away again.
        self.refuse_taken(&new_path)?;
        let core = self.clone();
        let info = detached(async move {
            let _turn = core.ops.wait(volume).await;
            let hidden = core.snapshot_head(volume, None).await?;
            core.wait_ready(hidden.id).await?;
            let command = Command::CloneVolume { snapshot: hidden.id, new_path, owner, create_parents };
            volumes::volume(core.propose(id, command).await?)
        });
        self.described(info.await?)
    }

    fn refuse_taken(&self, path: &str) -> Result<(), CallError> {
        match self.volume_at(path) {
            Ok(_) => Err(Refusal::PathTaken { path: path.to_owned() }.into()),
            Err(e) if e.is_refusal(|r| matches!(r, Refusal::NoSuchVolume { .. })) => Ok(()),
            Err(e) => Err(e),
        }
    }

    async fn wait_ready(&self, id: VolumeSnapshotId) -> Result<(), CallError> {
        let ready = |tx: &crate::machine::tx::Tx<'_>| {
            let row: SnapshotRow = tx.get(&id)?.ok_or(Refusal::SnapshotGone)?;
            Ok((row.state == SnapshotState::Ready).then_some(()))
        };
        self.wait_for_tasks("sealing the copysets", READY_TIMEOUT, ready).await
    }

    pub(crate) async fn rollback_volume(
        self: &Arc<Self>,
        r: mds::RollbackVolumeRequest,
    ) -> Result<mds::Volume, CallError> {
        let (path, name) = (names::path("path", &r.path)?, names::snapshot(&r.snapshot)?);
        self.lead().await?;
        let core = self.clone();
        let info = detached(async move {
            let volume = core.volume_at(&path)?;
            let _turn = core.ops.wait(volume).await;
            let snapshot = core.read(|tx| Ok(snapshots::named(tx, volume, &path, &name)?.0))?;
            core.wait_ready(snapshot).await?;
            let row: VolumeRow = core.read(|tx| Ok(tx.get(&volume)?.ok_or(Refusal::VolumeGone)?))?;
            let ends = row.attached.filter(|_| r.detach).map(|a| a.epoch);
            let info = volumes::volume(core.propose(None, Command::RollbackVolume { path, snapshot: name, ends }).await?)?;
            if let Some(epoch) = ends {
                core.hub.ended(volume, epoch);
                let fenced = |tx: &crate::machine::tx::Tx<'_>| Ok(layers::is_fenced(tx, volume)?.then_some(()));
                core.wait_for_tasks("fencing the detached client (the rollback is done)", READY_TIMEOUT, fenced).await?;
            }
            Ok(info)
        });
        self.described(info.await?)
    }

    /// Looks after snapshots that another leader, or a failed operation, left half-made.
    ///
    /// # Errors
    /// Those of the commands; what is left is looked after the next time.
    pub(crate) async fn settle_snapshots(&self) -> Result<(), CallError> {
        use crate::machine::row::UnsettledRow;
        let unsettled = self.read(|tx| Ok(tx.scan::<UnsettledRow>(&(), None, UNSETTLED_MAX)?))?;
        for (id, UnsettledRow) in unsettled {
            let Some(row) = self.read(|tx| Ok(tx.get::<SnapshotRow>(&id)?))? else { continue };
            // Whoever makes it has the volume's turn.
            let Some(_turn) = self.ops.try_now(row.volume) else { continue };
            let Some(row) = self.read(|tx| Ok(tx.get::<SnapshotRow>(&id)?))? else { continue };
            if row.hidden && row.clones + row.rollbacks == 0 {
                self.propose(None, Command::ReapSnapshot { snapshot: id }).await?;
            } else if let Some(group) = self.read(|tx| groups::under_way(tx, id))? {
                self.propose(None, Command::DropGroup { group }).await?;
            } else if row.state == SnapshotState::Confirming {
                snapshot(self.propose(None, Command::SealSnapshot { snapshot: id }).await?)?;
            }
        }
        Ok(())
    }
}

/// Half-made snapshots looked after at once.
const UNSETTLED_MAX: usize = 64;
