//! The rpcs of the MDS, one method each, with the messages of `mds.proto`.
//!
//! Used by the command line and by the volume. Invariant: a mutation whose first attempt had an unknown outcome and
//! whose retry was refused because the wish is already fulfilled (the name exists, the object is gone) succeeds: the
//! caller sees what is there. Any other refusal is returned as it is. Absent: parsing of names, policy.

use crate::mds_client::{MdsCallError, MdsClient};
use ogee_common::limits::{MDS_SLOW_ATTEMPT_TIMEOUT, SECTOR_BYTES};
use ogee_proto::{MdsErrorKind, volume_limits};
use ogee_proto::mds as m;

macro_rules! rpcs {
    ($($(#[$doc:meta])* $vis:vis $name:ident ( $request:ty ) -> $reply:ty ;)+) => {
        impl MdsClient {
            $(
                $(#[$doc])*
                ///
                /// # Errors
                /// [`MdsCallError`]; its kind says what to do.
                $vis async fn $name(&self, request: $request) -> Result<$reply, MdsCallError> {
                    self.call(stringify!($name), move |mut client| {
                        let request = request.clone();
                        async move { client.$name(request).await }
                    })
                    .await
                }
            )+
        }
    };
}

macro_rules! slow_rpcs {
    ($($name:ident $rpc:ident ( $request:ty ) -> $reply:ty ;)+) => {
        impl MdsClient {
            $(
                async fn $name(&self, request: $request) -> Result<$reply, MdsCallError> {
                    self.call_within(stringify!($rpc), MDS_SLOW_ATTEMPT_TIMEOUT, move |mut client| {
                        let request = request.clone();
                        async move { client.$rpc(request).await }
                    })
                    .await
                }
            )+
        }
    };
}

rpcs! {
    /// A volume by its path.
    pub stat_volume(m::StatVolumeRequest) -> m::Volume;
    /// One page of a folder's volumes and folders, or of the whole tree.
    pub list_volumes(m::ListVolumesRequest) -> m::ListVolumesReply;
    /// Grows a volume; an equal size is no error.
    pub extend_volume(m::ExtendVolumeRequest) -> m::Volume;
    /// Sets some of the limits of a volume; an attached client hears of it at once. Repeating it is no error.
    pub set_volume_limits(m::SetVolumeLimitsRequest) -> m::Volume;
    /// Has a volume copy what it reads from its ancestors, in the background, or stops that; repeating either is no error.
    pub flatten_volume(m::FlattenVolumeRequest) -> m::Volume;
    /// The snapshots of a volume, oldest first.
    pub list_snapshots(m::ListSnapshotsRequest) -> m::ListSnapshotsReply;
    /// Attaches a volume or snapshot. [`crate::Volume::open`] does this and everything that belongs to it.
    pub attach_volume(m::AttachVolumeRequest) -> m::AttachGrant;
    /// Gives up an attach. [`crate::Volume::detach`] does this when all IO is done.
    pub detach_volume(m::DetachVolumeRequest) -> m::Empty;
    /// The event stream of an attach.
    pub(crate) watch_attach(m::WatchAttachRequest) -> tonic::Streaming<m::AttachEvent>;
    /// Says that all writes are held and drained.
    pub(crate) ack_hold(m::AckHoldRequest) -> m::Empty;
    /// The placement of a range of segments.
    pub get_layout(m::GetLayoutRequest) -> m::Layout;
    /// Gives a segment its placement, if it has none.
    pub allocate_segment(m::AllocateSegmentRequest) -> m::Layout;
    /// Gives a chunkserver up, or takes it back.
    pub set_out(m::SetOutRequest) -> m::Empty;
    /// Forgets a chunkserver that is out and has no replicas.
    pub remove_chunkserver(m::RemoveChunkserverRequest) -> m::Empty;
    /// Has chunkservers scrub their data, or stop.
    pub order_scrub(m::OrderScrubRequest) -> m::OrderScrubReply;
    /// Makes a service task; with a key that is known already, the one that it made.
    pub create_service_task(m::CreateServiceTaskRequest) -> m::ServiceTask;
    /// A service task.
    pub stat_service_task(m::ServiceTaskRequest) -> m::ServiceTask;
    /// One page of the service tasks, in the order of their ids.
    pub list_service_tasks(m::ListServiceTasksRequest) -> m::ServiceTaskList;
    /// Wishes that a service task be given up; no error if it has ended.
    pub cancel_service_task(m::ServiceTaskRequest) -> m::ServiceTask;
    /// Takes a service task that nobody is at. If the answer is lost the task is free again after its lease.
    pub take_service_task(m::TakeServiceTaskRequest) -> m::TakeServiceTaskReply;
    /// Says that an owner is at a service task; refused as `fenced` if it is not its any more.
    pub renew_service_task(m::RenewServiceTaskRequest) -> m::ServiceTask;
    /// Notes what the next owner of a service task must know.
    pub note_service_task(m::NoteServiceTaskRequest) -> m::ServiceTask;
    /// Ends a service task, or gives it back; repeating it is no error.
    pub end_service_task(m::EndServiceTaskRequest) -> m::ServiceTask;
    /// Has service tasks made every so often, or changes that.
    pub set_schedule(m::SetScheduleRequest) -> m::Schedule;
    /// Ends that; the tasks stay.
    pub delete_schedule(m::DeleteScheduleRequest) -> m::Empty;
    /// One page of the schedules, in the order of their names.
    pub list_schedules(m::ListSchedulesRequest) -> m::ScheduleList;
    /// Says that a layer needs the backup that it stands on no more; repeating it is no error.
    pub complete_backup_parent(m::CompleteBackupParentRequest) -> m::Empty;
    /// One page of the layers that stand on backups, in the order of their numbers.
    pub list_backup_parents(m::ListBackupParentsRequest) -> m::BackupParentList;
    /// Replicas of copysets, with addresses.
    pub get_copysets(m::GetCopysetsRequest) -> m::CopysetList;
}

slow_rpcs! {
    create_volume_raw create_volume(m::CreateVolumeRequest) -> m::Volume;
    delete_volume_raw delete_volume(m::DeleteVolumeRequest) -> m::Empty;
    rename_volume_raw rename_volume(m::RenameVolumeRequest) -> m::Volume;
    create_snapshot_group_raw create_snapshot_group(m::CreateSnapshotGroupRequest) -> m::SnapshotGroup;
    create_snapshot_raw create_snapshot(m::CreateSnapshotRequest) -> m::Snapshot;
    delete_snapshot_raw delete_snapshot(m::DeleteSnapshotRequest) -> m::Empty;
    clone_volume_raw clone_volume(m::CloneVolumeRequest) -> m::Volume;
    rollback_volume_raw rollback_volume(m::RollbackVolumeRequest) -> m::Volume;
    create_lazy_volume_raw create_lazy_volume(m::CreateLazyVolumeRequest) -> m::Volume;
    create_pool_raw create_pool(m::CreatePoolRequest) -> m::Pool;
}

/// Whether a refusal says that an earlier attempt of the same call was carried out.
fn already_done(error: &MdsCallError, kind: MdsErrorKind) -> bool {
    error.outcome_unknown && error.kind == kind
}

impl MdsClient {
    /// Makes an empty volume.
    ///
    /// # Errors
    /// `already-exists`, `not-found` (parent folder or pool), `invalid-argument` (also when the MDS is of an older build
    /// and left options out that it does not know; the volume is there then), `limit`, `unavailable`.
    pub async fn create_volume(&self, request: m::CreateVolumeRequest) -> Result<m::Volume, MdsCallError> {
        let asked = (request.sector_bytes.max(SECTOR_BYTES), volume_limits(request.limits.as_ref()));
        let volume = self.create_volume_once(request).await?;
        if asked == (volume.sector_bytes.max(SECTOR_BYTES), volume_limits(volume.limits.as_ref())) {
            return Ok(volume);
        }
        let message = "the volume was made without its sector size or limits: the MDS is of an older build".to_owned();
        let kind = MdsErrorKind::InvalidArgument;
        Err(MdsCallError { kind, rpc: "create_volume", message, outcome_unknown: false })
    }

    async fn create_volume_once(&self, request: m::CreateVolumeRequest) -> Result<m::Volume, MdsCallError> {
        let (path, size) = (request.path.clone(), request.size_bytes);
        match self.create_volume_raw(request).await {
            Err(e) if already_done(&e, MdsErrorKind::AlreadyExists) => {
                let volume = self.stat_volume(m::StatVolumeRequest { path }).await?;
                if volume.size_bytes == size { Ok(volume) } else { Err(e) }
            }
            other => other,
        }
    }

    /// Deletes a volume that is detached and has neither snapshots nor clones.
    ///
    /// # Errors
    /// `not-found`, `attached`, `in-use`, `wrong-owner`, `unavailable`.
    pub async fn delete_volume(&self, request: m::DeleteVolumeRequest) -> Result<(), MdsCallError> {
        match self.delete_volume_raw(request).await {
            Err(e) if !already_done(&e, MdsErrorKind::NotFound) => Err(e),
            _ => Ok(()),
        }
    }

    /// Moves a volume to another path.
    ///
    /// # Errors
    /// `not-found`, `already-exists`, `invalid-argument`, `unavailable`.
    pub async fn rename_volume(&self, request: m::RenameVolumeRequest) -> Result<m::Volume, MdsCallError> {
        let path = request.new_path.clone();
        match self.rename_volume_raw(request).await {
            Err(e) if already_done(&e, MdsErrorKind::NotFound) => {
                self.stat_volume(m::StatVolumeRequest { path }).await.map_err(|_| e)
            }
            other => other,
        }
    }

    /// Takes an exact snapshot; may hold the writes of an attached client for some milliseconds.
    ///
    /// # Errors
    /// `not-found`, `already-exists`, `invalid-argument`, `unavailable`.
    pub async fn create_snapshot(&self, request: m::CreateSnapshotRequest) -> Result<m::Snapshot, MdsCallError> {
        let (path, name) = (request.path.clone(), request.name.clone());
        match self.create_snapshot_raw(request).await {
            Err(e) if already_done(&e, MdsErrorKind::AlreadyExists) => {
                let list = self.list_snapshots(m::ListSnapshotsRequest { path }).await?;
                list.snapshots.into_iter().find(|s| s.name == name).ok_or(e)
            }
            other => other,
        }
    }

    /// Takes snapshots of several volumes as one cut, all or none; may hold the writes of all their clients while the
    /// slowest of them drains. A cut that has a write has every write that was acknowledged before that one began.
    ///
    /// # Errors
    /// `not-found`, `already-exists`, `invalid-argument` (a volume named twice), `limit`, `in-use` (two or more clients
    /// do not answer), `unavailable`.
    pub async fn create_snapshot_group(
        &self,
        request: m::CreateSnapshotGroupRequest,
    ) -> Result<m::SnapshotGroup, MdsCallError> {
        let members = request.members.clone();
        match self.create_snapshot_group_raw(request).await {
            Err(e) if already_done(&e, MdsErrorKind::AlreadyExists) => self.find_group(&members).await?.ok_or(e),
            other => other,
        }
    }

    /// The group of which all these snapshots are, if they are of one.
    async fn find_group(
        &self,
        members: &[m::CreateSnapshotRequest],
    ) -> Result<Option<m::SnapshotGroup>, MdsCallError> {
        let mut snapshots: Vec<m::Snapshot> = vec![];
        for member in members {
            let list = self.list_snapshots(m::ListSnapshotsRequest { path: member.path.clone() }).await?;
            match list.snapshots.into_iter().find(|s| s.name == member.name) {
                Some(snapshot) if snapshot.group != 0 => snapshots.push(snapshot),
                _ => return Ok(None),
            }
        }
        let group = snapshots.first().map_or(0, |s| s.group);
        let whole = snapshots.iter().all(|s| s.group == group);
        Ok(whole.then_some(m::SnapshotGroup { group, snapshots }))
    }

    /// Makes a volume that stands on a backup.
    ///
    /// # Errors
    /// `already-exists`, `not-found` (pool), `invalid-argument`, `no-space`, `unavailable`; the call is unknown to an MDS of an older build.
    pub async fn create_lazy_volume(&self, request: m::CreateLazyVolumeRequest) -> Result<m::Volume, MdsCallError> {
        let path = request.volume.as_ref().map(|v| v.path.clone()).unwrap_or_default();
        let backup = request.backup.as_ref().map_or(0, |b| b.backup);
        match self.create_lazy_volume_raw(request).await {
            Err(e) if already_done(&e, MdsErrorKind::AlreadyExists) => {
                let volume = self.stat_volume(m::StatVolumeRequest { path }).await?;
                if volume.backup.as_ref().is_some_and(|b| b.backup == backup) { Ok(volume) } else { Err(e) }
            }
            other => other,
        }
    }

    /// Deletes a snapshot that has no children.
    ///
    /// # Errors
    /// `not-found`, `in-use`, `unavailable`.
    pub async fn delete_snapshot(&self, request: m::DeleteSnapshotRequest) -> Result<(), MdsCallError> {
        match self.delete_snapshot_raw(request).await {
            Err(e) if !already_done(&e, MdsErrorKind::NotFound) => Err(e),
            _ => Ok(()),
        }
    }

    /// Makes a lazy clone of a snapshot, or of the live volume when no snapshot is named.
    ///
    /// # Errors
    /// `not-found`, `already-exists`, `limit`, `unavailable`.
    pub async fn clone_volume(&self, request: m::CloneVolumeRequest) -> Result<m::Volume, MdsCallError> {
        let (path, source) = (request.new_path.clone(), request.path.clone());
        match self.clone_volume_raw(request).await {
            Err(e) if already_done(&e, MdsErrorKind::AlreadyExists) => {
                let volume = self.stat_volume(m::StatVolumeRequest { path }).await?;
                let parent = volume.parent.split('@').next().unwrap_or_default();
                if parent == source.trim_start_matches('/') { Ok(volume) } else { Err(e) }
            }
            other => other,
        }
    }

    /// Takes a volume back to a snapshot of it.
    ///
    /// # Errors
    /// `not-found`, `attached` (without `detach`), `limit`, `unavailable`.
    pub async fn rollback_volume(&self, request: m::RollbackVolumeRequest) -> Result<m::Volume, MdsCallError> {
        self.rollback_volume_raw(request).await
    }

    /// Makes a pool and its copysets.
    ///
    /// # Errors
    /// `already-exists`, `no-space` (too few zones or chunkservers), `invalid-argument`, `unavailable`.
    pub async fn create_pool(&self, request: m::CreatePoolRequest) -> Result<m::Pool, MdsCallError> {
        let name = request.name.clone();
        match self.create_pool_raw(request).await {
            Err(e) if already_done(&e, MdsErrorKind::AlreadyExists) => {
                let list = self.list_pools().await?;
                list.pools.into_iter().find(|p| p.name == name).ok_or(e)
            }
            other => other,
        }
    }

    /// Every chunkserver that ever registered.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn list_chunkservers(&self) -> Result<m::ChunkserverList, MdsCallError> {
        self.call("list_chunkservers", |mut c| async move { c.list_chunkservers(m::Empty {}).await }).await
    }

    /// Every pool.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn list_pools(&self) -> Result<m::PoolList, MdsCallError> {
        self.call("list_pools", |mut c| async move { c.list_pools(m::Empty {}).await }).await
    }

    /// Every copyset with replicas and the leader as last reported.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn list_copysets(&self) -> Result<m::CopysetList, MdsCallError> {
        self.call("list_copysets", |mut c| async move { c.list_copysets(m::Empty {}).await }).await
    }

    /// Replicas that move to other chunkservers.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn list_moves(&self) -> Result<m::MoveList, MdsCallError> {
        self.call("list_moves", |mut c| async move { c.list_moves(m::Empty {}).await }).await
    }

    /// How far the scrub of each chunkserver is.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn list_scrubs(&self) -> Result<m::ScrubList, MdsCallError> {
        self.call("list_scrubs", |mut c| async move { c.list_scrubs(m::Empty {}).await }).await
    }

    /// The cluster at a glance.
    ///
    /// # Errors
    /// `unavailable`.
    pub async fn cluster_status(&self) -> Result<m::ClusterStatusReply, MdsCallError> {
        self.call("cluster_status", |mut c| async move { c.cluster_status(m::Empty {}).await }).await
    }
}
