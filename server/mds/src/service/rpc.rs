//! The gRPC trait: one line per call. What a call does is in the file of its subject; what a failure means, in `status`.

use super::{Core, names};
use crate::hub::EventStream;
use ogee_proto::mds::mds_server::Mds;
use ogee_proto::mds::{self as m};
use ogee_proto::net::Peer;
use std::sync::Arc;
use tonic::{Request, Response, Status};

/// The service of one node.
#[derive(Clone)]
pub(crate) struct MdsService(pub(crate) Arc<Core>);

type Reply<T> = Result<Response<T>, Status>;

/// Under TLS a call of a daemon needs a daemon's certificate.
fn refuse_clients<T>(call: &Request<T>) -> Result<(), Status> {
    match call.extensions().get::<Peer>() {
        Some(Peer::Client) => Err(Status::permission_denied("this call needs the certificate of a daemon, not of a client")),
        _ => Ok(()),
    }
}

macro_rules! calls {
    (
        named { $($named:ident($named_request:ident) -> $named_reply:ident;)+ }
        plain { $($plain:ident($plain_request:ident) -> $plain_reply:ident;)+ }
        daemons { $($daemons:ident($daemons_request:ident) -> $daemons_reply:ident;)+ }
        bare { $($bare:ident -> $bare_reply:ident;)+ }
    ) => {
        #[tonic::async_trait]
        impl Mds for MdsService {
            type WatchAttachStream = EventStream;

            $(async fn $named(&self, call: Request<m::$named_request>) -> Reply<m::$named_reply> {
                let id = names::request(&call)?;
                Ok(Response::new(self.0.$named(id, call.into_inner()).await?))
            })+

            $(async fn $plain(&self, call: Request<m::$plain_request>) -> Reply<m::$plain_reply> {
                Ok(Response::new(self.0.$plain(call.into_inner()).await?))
            })+

            $(async fn $daemons(&self, call: Request<m::$daemons_request>) -> Reply<m::$daemons_reply> {
                refuse_clients(&call)?;
                Ok(Response::new(self.0.$daemons(call.into_inner()).await?))
            })+

            $(async fn $bare(&self, _call: Request<m::Empty>) -> Reply<m::$bare_reply> {
                Ok(Response::new(self.0.$bare().await?))
            })+

            async fn watch_attach(&self, call: Request<m::WatchAttachRequest>) -> Reply<EventStream> {
                Ok(Response::new(self.0.watch_attach(call.into_inner()).await?))
            }
        }
    };
}

calls! {
    // A repetition of these with the same request id gets the answer of the first.
    named {
        create_volume(CreateVolumeRequest) -> Volume;
        delete_volume(DeleteVolumeRequest) -> Empty;
        rename_volume(RenameVolumeRequest) -> Volume;
        extend_volume(ExtendVolumeRequest) -> Volume;
        set_volume_limits(SetVolumeLimitsRequest) -> Volume;
        delete_snapshot(DeleteSnapshotRequest) -> Empty;
        clone_volume(CloneVolumeRequest) -> Volume;
        create_pool(CreatePoolRequest) -> Pool;
        create_lazy_volume(CreateLazyVolumeRequest) -> Volume;
    }
    plain {
        stat_volume(StatVolumeRequest) -> Volume;
        list_volumes(ListVolumesRequest) -> ListVolumesReply;
        create_snapshot(CreateSnapshotRequest) -> Snapshot;
        create_snapshot_group(CreateSnapshotGroupRequest) -> SnapshotGroup;
        list_snapshots(ListSnapshotsRequest) -> ListSnapshotsReply;
        rollback_volume(RollbackVolumeRequest) -> Volume;
        flatten_volume(FlattenVolumeRequest) -> Volume;
        attach_volume(AttachVolumeRequest) -> AttachGrant;
        detach_volume(DetachVolumeRequest) -> Empty;
        ack_hold(AckHoldRequest) -> Empty;
        get_layout(GetLayoutRequest) -> Layout;
        allocate_segment(AllocateSegmentRequest) -> Layout;
        get_copysets(GetCopysetsRequest) -> CopysetList;
        set_out(SetOutRequest) -> Empty;
        remove_chunkserver(RemoveChunkserverRequest) -> Empty;
        order_scrub(OrderScrubRequest) -> OrderScrubReply;
        create_service_task(CreateServiceTaskRequest) -> ServiceTask;
        stat_service_task(ServiceTaskRequest) -> ServiceTask;
        list_service_tasks(ListServiceTasksRequest) -> ServiceTaskList;
        cancel_service_task(ServiceTaskRequest) -> ServiceTask;
        take_service_task(TakeServiceTaskRequest) -> TakeServiceTaskReply;
        renew_service_task(RenewServiceTaskRequest) -> ServiceTask;
        note_service_task(NoteServiceTaskRequest) -> ServiceTask;
        end_service_task(EndServiceTaskRequest) -> ServiceTask;
        set_schedule(SetScheduleRequest) -> Schedule;
        delete_schedule(DeleteScheduleRequest) -> Empty;
        list_schedules(ListSchedulesRequest) -> ScheduleList;
        complete_backup_parent(CompleteBackupParentRequest) -> Empty;
        list_backup_parents(ListBackupParentsRequest) -> BackupParentList;
    }
    // Not for who has only a client's certificate.
    daemons {
        register_chunkserver(RegisterChunkserverRequest) -> RegisterChunkserverReply;
        heartbeat(HeartbeatRequest) -> HeartbeatReply;
    }
    bare {
        list_chunkservers -> ChunkserverList;
        list_pools -> PoolList;
        list_copysets -> CopysetList;
        list_moves -> MoveList;
        list_scrubs -> ScrubList;
        cluster_status -> ClusterStatusReply;
    }
}
