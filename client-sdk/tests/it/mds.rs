//! A fake MDS: one or two gRPC nodes over one shared state, with scripted unavailability and lost replies.

use crate::chunkserver::Chunkservers;
use bytes::Bytes;
use ogee_client::ClusterConfig;
use ogee_proto::mds::attach_event::Event;
use ogee_proto::mds::mds_server::{Mds, MdsServer};
use ogee_proto::mds::*;
use ogee_proto::{ERROR_METADATA, LEADER_METADATA, MdsErrorKind};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status};

pub(crate) const CLUSTER: [u8; 16] = [7; 16];
pub(crate) const LAYER: u64 = 40;
pub(crate) const GIB: u64 = 1 << 30;
pub(crate) const SIZE: u64 = GIB + (32 << 20);

#[derive(Clone, Default)]
pub(crate) struct FakeVolume {
    pub(crate) volume: Volume,
    pub(crate) ancestry: Vec<Ancestor>,
    pub(crate) client: u64,
    pub(crate) backup: Option<BackupParent>,
}

#[derive(Default)]
pub(crate) struct Inner {
    pub(crate) volumes: BTreeMap<String, FakeVolume>,
    /// (layer, segment) -> copysets.
    pub(crate) layout: BTreeMap<(u64, u32), Vec<u32>>,
    watchers: Vec<mpsc::Sender<Result<AttachEvent, Status>>>,
    pub(crate) subscriptions: usize,
    pub(crate) unavailable: bool,
    pub(crate) leader: usize,
    pub(crate) nodes: Vec<String>,
    pub(crate) calls: HashMap<&'static str, usize>,
    /// The next so many replies of an rpc are lost after it was carried out.
    pub(crate) lose: HashMap<&'static str, usize>,
    pub(crate) fail: HashMap<&'static str, MdsErrorKind>,
    pub(crate) acks: Vec<u64>,
    pub(crate) snapshots: Vec<Snapshot>,
    /// Of each detach, whether it gave writes up.
    pub(crate) detaches: Vec<bool>,
    /// As if a volume had come to stand on a backup between a stat and what follows.
    pub(crate) stat_hides_backups: bool,
}

/// The shared state.
pub(crate) struct FakeMds {
    inner: Mutex<Inner>,
    pub(crate) data: Arc<Chunkservers>,
}

#[derive(Clone)]
struct Node {
    shared: Arc<FakeMds>,
    number: usize,
}

pub(crate) fn refuse(kind: MdsErrorKind) -> Status {
    let mut status = Status::failed_precondition(format!("refused: {}", kind.as_str()));
    status.metadata_mut().insert(ERROR_METADATA, kind.as_str().parse().expect("ascii"));
    status
}

impl FakeMds {
    /// Starts `nodes` nodes, the last of which leads, with a volume `vol` of [`SIZE`] bytes and layer [`LAYER`].
    pub(crate) async fn start(data: Arc<Chunkservers>, nodes: usize) -> Arc<Self> {
        let shared = Arc::new(Self { inner: Mutex::default(), data });
        for number in 0..nodes {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
            let addr = listener.local_addr().expect("an address").to_string();
            shared.inner().nodes.push(addr);
            let service = MdsServer::new(Node { shared: shared.clone(), number });
            let server = tonic::transport::Server::builder().add_service(service);
            tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        }
        shared.inner().leader = nodes - 1;
        let volume =
            Volume { id: 11, path: "vol".into(), size_bytes: SIZE, layer: LAYER, seq: 1, ..Default::default() };
        shared.inner().volumes.insert("vol".into(), FakeVolume { volume, ..Default::default() });
        shared
    }

    pub(crate) fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no test panics under the lock")
    }

    pub(crate) fn config(&self) -> ClusterConfig {
        let first = self.inner().nodes[0].clone();
        ClusterConfig { mds: vec![first], description: "test".into(), timing: crate::timing(), ..Default::default() }
    }

    pub(crate) fn calls(&self, rpc: &str) -> usize {
        self.inner().calls.get(rpc).copied().unwrap_or(0)
    }

    /// Sends an event to every open stream.
    pub(crate) fn send(&self, event: Event) {
        let event = AttachEvent { event: Some(event) };
        self.inner().watchers.retain(|w| w.try_send(Ok(event)).is_ok());
    }

    /// Raises the volume's seq, as the commit of a snapshot does. Says nothing to the clients.
    pub(crate) fn commit_snapshot(&self) -> u64 {
        let mut inner = self.inner();
        let volume = &mut inner.volumes.get_mut("vol").expect("the volume").volume;
        volume.seq += 1;
        volume.seq
    }

    pub(crate) fn send_state(&self) {
        let state = self.inner().state();
        self.send(Event::State(state));
    }

    /// No node answers, and all streams end.
    pub(crate) fn go_away(&self) {
        let mut inner = self.inner();
        inner.unavailable = true;
        inner.watchers.clear();
    }

    pub(crate) fn come_back(&self) {
        self.inner().unavailable = false;
    }

    /// Open event streams.
    pub(crate) fn watchers(&self) -> usize {
        self.inner().watchers.len()
    }

    pub(crate) fn place(&self, layer: u64, segment: u32) {
        self.inner().place(layer, segment);
    }
}

impl Inner {
    fn state(&self) -> AttachState {
        let volume = &self.volumes["vol"].volume;
        let complete = self.volumes["vol"].backup.is_none();
        AttachState { seq: volume.seq, size_bytes: volume.size_bytes, limits: volume.limits, complete }
    }

    fn place(&mut self, layer: u64, segment: u32) -> Layout {
        let copysets = (0..64).map(|slot| (slot + segment) % 4 + 1).collect();
        let copysets = self.layout.entry((layer, segment)).or_insert(copysets).clone();
        Layout { layer, segments: vec![Segment { index: segment, copysets }] }
    }
}

impl Node {
    /// Counts the call and refuses it if the script or the leadership says so.
    fn enter(&self, rpc: &'static str) -> Result<MutexGuard<'_, Inner>, Status> {
        let mut inner = self.shared.inner();
        *inner.calls.entry(rpc).or_default() += 1;
        if inner.unavailable {
            return Err(Status::unavailable("scripted"));
        }
        if inner.leader != self.number {
            let mut status = refuse(MdsErrorKind::NotLeader);
            let leader = inner.nodes[inner.leader].parse().expect("ascii");
            status.metadata_mut().insert(LEADER_METADATA, leader);
            return Err(status);
        }
        match inner.fail.get(rpc) {
            Some(kind) => Err(refuse(*kind)),
            None => Ok(inner),
        }
    }
}

fn reply<T>(mut inner: MutexGuard<'_, Inner>, rpc: &'static str, value: T) -> Result<Response<T>, Status> {
    match inner.lose.get_mut(rpc) {
        Some(left) if *left > 0 => {
            *left -= 1;
            Err(Status::unavailable("the reply was lost"))
        }
        _ => Ok(Response::new(value)),
    }
}

type Answer<T> = Result<Response<T>, Status>;

fn absent<T>() -> Answer<T> {
    Err(Status::unimplemented("not in this fake"))
}

#[tonic::async_trait]
impl Mds for Node {
    async fn create_volume(&self, r: Request<CreateVolumeRequest>) -> Answer<Volume> {
        let mut inner = self.enter("create_volume")?;
        let r = r.into_inner();
        if inner.volumes.contains_key(&r.path) {
            return Err(refuse(MdsErrorKind::AlreadyExists));
        }
        let id = 100 + inner.volumes.len() as u64;
        let volume = Volume { id, path: r.path.clone(), size_bytes: r.size_bytes, ..Default::default() };
        inner.volumes.insert(r.path, FakeVolume { volume: volume.clone(), ..Default::default() });
        reply(inner, "create_volume", volume)
    }

    async fn delete_volume(&self, r: Request<DeleteVolumeRequest>) -> Answer<Empty> {
        let mut inner = self.enter("delete_volume")?;
        match inner.volumes.remove(&r.into_inner().path) {
            Some(_) => reply(inner, "delete_volume", Empty {}),
            None => Err(refuse(MdsErrorKind::NotFound)),
        }
    }

    async fn stat_volume(&self, r: Request<StatVolumeRequest>) -> Answer<Volume> {
        let inner = self.enter("stat_volume")?;
        let backup = |v: &FakeVolume| v.backup.clone().filter(|_| !inner.stat_hides_backups);
        let found = inner.volumes.get(&r.into_inner().path).map(|v| Volume { backup: backup(v), ..v.volume.clone() });
        found.map(Response::new).ok_or_else(|| refuse(MdsErrorKind::NotFound))
    }

    async fn attach_volume(&self, r: Request<AttachVolumeRequest>) -> Answer<AttachGrant> {
        let mut inner = self.enter("attach_volume")?;
        let r = r.into_inner();
        let Some(v) = inner.volumes.get_mut(&r.path) else { return Err(refuse(MdsErrorKind::NotFound)) };
        if v.backup.is_some() && !r.reads_backups {
            return Err(refuse(MdsErrorKind::InvalidArgument));
        }
        if !r.read_only {
            if v.client != 0 && v.client != r.client && !r.steal {
                return Err(refuse(MdsErrorKind::Attached));
            }
            if r.resume && v.client != r.client {
                return Err(refuse(MdsErrorKind::Fenced));
            }
            v.client = r.client;
            v.volume.attach_epoch += 1;
        }
        let seq = r.snapshot.strip_prefix('s').and_then(|s| s.parse().ok()).unwrap_or(v.volume.seq);
        let grant = AttachGrant {
            volume: Some(v.volume.clone()),
            layer: v.volume.layer,
            seq,
            epoch: if r.read_only { 0 } else { v.volume.attach_epoch },
            size_bytes: v.volume.size_bytes,
            ancestry: v.ancestry.clone(),
            cluster: Bytes::copy_from_slice(&CLUSTER),
            backup: v.backup.clone(),
        };
        reply(inner, "attach_volume", grant)
    }

    async fn detach_volume(&self, r: Request<DetachVolumeRequest>) -> Answer<Empty> {
        let mut inner = self.enter("detach_volume")?;
        self.shared.data.mark("detach");
        let r = r.into_inner();
        inner.detaches.push(r.unclean);
        inner.volumes.values_mut().filter(|v| v.volume.id == r.volume).for_each(|v| v.client = 0);
        reply(inner, "detach_volume", Empty {})
    }

    type WatchAttachStream = ReceiverStream<Result<AttachEvent, Status>>;

    async fn watch_attach(&self, _r: Request<WatchAttachRequest>) -> Answer<Self::WatchAttachStream> {
        let mut inner = self.enter("watch_attach")?;
        let (tx, rx) = mpsc::channel(16);
        let state = AttachEvent { event: Some(Event::State(inner.state())) };
        tx.try_send(Ok(state)).expect("an empty channel has room");
        inner.watchers.push(tx);
        inner.subscriptions += 1;
        Ok(Response::new(ReceiverStream::new(rx)))
    }

    async fn ack_hold(&self, r: Request<AckHoldRequest>) -> Answer<Empty> {
        let mut inner = self.enter("ack_hold")?;
        self.shared.data.mark("ack");
        inner.acks.push(r.into_inner().token);
        reply(inner, "ack_hold", Empty {})
    }

    async fn get_layout(&self, r: Request<GetLayoutRequest>) -> Answer<Layout> {
        let inner = self.enter("get_layout")?;
        let r = r.into_inner();
        if r.epoch != 0 && inner.volumes.values().any(|v| v.volume.id == r.volume && v.volume.attach_epoch != r.epoch) {
            return Err(refuse(MdsErrorKind::Fenced));
        }
        let range = (r.layer, r.first)..(r.layer, r.first + r.count);
        let segment = |((_, index), copysets): (&(u64, u32), &Vec<u32>)| Segment {
            index: *index,
            copysets: copysets.clone(),
        };
        let segments = inner.layout.range(range).map(segment).collect();
        reply(inner, "get_layout", Layout { layer: r.layer, segments })
    }

    async fn allocate_segment(&self, r: Request<AllocateSegmentRequest>) -> Answer<Layout> {
        let mut inner = self.enter("allocate_segment")?;
        let r = r.into_inner();
        let layout = inner.place(r.layer, r.index);
        reply(inner, "allocate_segment", layout)
    }

    async fn get_copysets(&self, r: Request<GetCopysetsRequest>) -> Answer<CopysetList> {
        let inner = self.enter("get_copysets")?;
        let addrs = self.shared.data.addrs();
        let replica = |(id, addr): (&u32, &std::net::SocketAddr)| Replica {
            replica: u64::from(*id),
            chunkserver: *id,
            addr: addr.to_string(),
        };
        let replicas: Vec<Replica> = addrs.iter().map(replica).collect();
        let copyset = |id: u32| Copyset { id, replicas: replicas.clone(), ..Default::default() };
        let copysets = r.into_inner().ids.into_iter().map(copyset).collect();
        reply(inner, "get_copysets", CopysetList { copysets })
    }

    async fn cluster_status(&self, _: Request<Empty>) -> Answer<ClusterStatusReply> {
        let inner = self.enter("cluster_status")?;
        reply(inner, "cluster_status", ClusterStatusReply::default())
    }

    async fn rename_volume(&self, _: Request<RenameVolumeRequest>) -> Answer<Volume> {
        absent()
    }
    async fn create_lazy_volume(&self, _: Request<CreateLazyVolumeRequest>) -> Answer<Volume> {
        absent()
    }
    async fn complete_backup_parent(&self, _: Request<CompleteBackupParentRequest>) -> Answer<Empty> {
        absent()
    }
    async fn list_backup_parents(&self, r: Request<ListBackupParentsRequest>) -> Answer<BackupParentList> {
        let inner = self.enter("list_backup_parents")?;
        let after = r.into_inner().after;
        let parents = inner.volumes.values().filter_map(|v| v.backup.clone()).filter(|parent| parent.layer > after).collect();
        reply(inner, "list_backup_parents", BackupParentList { parents, more: false, cluster: Bytes::copy_from_slice(&CLUSTER) })
    }
    async fn list_volumes(&self, _: Request<ListVolumesRequest>) -> Answer<ListVolumesReply> {
        absent()
    }
    async fn extend_volume(&self, _: Request<ExtendVolumeRequest>) -> Answer<Volume> {
        absent()
    }
    async fn set_volume_limits(&self, _: Request<SetVolumeLimitsRequest>) -> Answer<Volume> {
        absent()
    }
    async fn create_snapshot(&self, _: Request<CreateSnapshotRequest>) -> Answer<Snapshot> {
        absent()
    }
    async fn create_snapshot_group(&self, r: Request<CreateSnapshotGroupRequest>) -> Answer<SnapshotGroup> {
        let mut inner = self.enter("create_snapshot_group")?;
        let members = r.into_inner().members;
        if members.iter().any(|m| inner.snapshots.iter().any(|s| s.volume_path == m.path && s.name == m.name)) {
            return Err(refuse(MdsErrorKind::AlreadyExists));
        }
        let group = inner.snapshots.len() as u64 + 1;
        let made = members.into_iter().map(|m| Snapshot { name: m.name, volume_path: m.path, group, ..Default::default() });
        let snapshots: Vec<Snapshot> = made.collect();
        inner.snapshots.extend(snapshots.clone());
        reply(inner, "create_snapshot_group", SnapshotGroup { group, snapshots })
    }
    async fn list_snapshots(&self, r: Request<ListSnapshotsRequest>) -> Answer<ListSnapshotsReply> {
        let inner = self.enter("list_snapshots")?;
        let path = r.into_inner().path;
        let snapshots = inner.snapshots.iter().filter(|s| s.volume_path == path).cloned().collect();
        reply(inner, "list_snapshots", ListSnapshotsReply { snapshots })
    }
    async fn delete_snapshot(&self, _: Request<DeleteSnapshotRequest>) -> Answer<Empty> {
        absent()
    }
    async fn clone_volume(&self, _: Request<CloneVolumeRequest>) -> Answer<Volume> {
        absent()
    }
    async fn flatten_volume(&self, _: Request<FlattenVolumeRequest>) -> Answer<Volume> {
        absent()
    }
    async fn rollback_volume(&self, _: Request<RollbackVolumeRequest>) -> Answer<Volume> {
        absent()
    }
    async fn register_chunkserver(&self, _: Request<RegisterChunkserverRequest>) -> Answer<RegisterChunkserverReply> {
        absent()
    }
    async fn heartbeat(&self, _: Request<HeartbeatRequest>) -> Answer<HeartbeatReply> {
        absent()
    }
    async fn list_chunkservers(&self, _: Request<Empty>) -> Answer<ChunkserverList> {
        absent()
    }
    async fn create_pool(&self, _: Request<CreatePoolRequest>) -> Answer<Pool> {
        absent()
    }
    async fn list_pools(&self, _: Request<Empty>) -> Answer<PoolList> {
        absent()
    }
    async fn list_copysets(&self, _: Request<Empty>) -> Answer<CopysetList> {
        absent()
    }
    async fn set_out(&self, _: Request<SetOutRequest>) -> Answer<Empty> {
        absent()
    }
    async fn remove_chunkserver(&self, _: Request<RemoveChunkserverRequest>) -> Answer<Empty> {
        absent()
    }
    async fn list_moves(&self, _: Request<Empty>) -> Answer<MoveList> {
        absent()
    }
    async fn order_scrub(&self, _: Request<OrderScrubRequest>) -> Answer<OrderScrubReply> {
        absent()
    }
    async fn list_scrubs(&self, _: Request<Empty>) -> Answer<ScrubList> {
        absent()
    }
    async fn create_service_task(&self, _: Request<CreateServiceTaskRequest>) -> Answer<ServiceTask> {
        absent()
    }
    async fn stat_service_task(&self, _: Request<ServiceTaskRequest>) -> Answer<ServiceTask> {
        absent()
    }
    async fn list_service_tasks(&self, _: Request<ListServiceTasksRequest>) -> Answer<ServiceTaskList> {
        absent()
    }
    async fn cancel_service_task(&self, _: Request<ServiceTaskRequest>) -> Answer<ServiceTask> {
        absent()
    }
    async fn take_service_task(&self, _: Request<TakeServiceTaskRequest>) -> Answer<TakeServiceTaskReply> {
        absent()
    }
    async fn renew_service_task(&self, _: Request<RenewServiceTaskRequest>) -> Answer<ServiceTask> {
        absent()
    }
    async fn note_service_task(&self, _: Request<NoteServiceTaskRequest>) -> Answer<ServiceTask> {
        absent()
    }
    async fn end_service_task(&self, _: Request<EndServiceTaskRequest>) -> Answer<ServiceTask> {
        absent()
    }
    async fn set_schedule(&self, _: Request<SetScheduleRequest>) -> Answer<Schedule> {
        absent()
    }
    async fn delete_schedule(&self, _: Request<DeleteScheduleRequest>) -> Answer<Empty> {
        absent()
    }
    async fn list_schedules(&self, _: Request<ListSchedulesRequest>) -> Answer<ScheduleList> {
        absent()
    }
}
