//! Exact snapshots and attaches, with clients that hold, do not answer, reconnect or are taken over.

mod cluster;

use cluster::{Client, Cluster, Fleet, GIB, allocate, attach, create, now, poll, refused, snapshot_of, watch};
use ogee_common::limits::HOLD_TIMEOUT;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds::attach_event::Event;
use ogee_proto::mds::{self as m, AttachState};
use tonic::Streaming;

async fn next(stream: &mut Streaming<m::AttachEvent>) -> Option<Event> {
    let message = tokio::time::timeout(cluster::DEADLINE, stream.message()).await.expect("an event in time");
    message.expect("a stream").and_then(|e| e.event)
}

async fn started(count: u32) -> (Cluster, Fleet, Client) {
    let cluster = Cluster::start(count);
    let fleet = Fleet::start(&cluster, 4).await;
    let (_, mut c) = cluster.leader().await;
    c.create_volume(create("a", 4 * GIB)).await.expect("create");
    (cluster, fleet, c)
}

fn volume(grant: &m::AttachGrant) -> u64 {
    grant.volume.as_ref().expect("volume").id
}

fn ack(grant: &m::AttachGrant, token: u64) -> m::AckHoldRequest {
    m::AckHoldRequest { volume: volume(grant), epoch: grant.epoch, token }
}

async fn ready(c: &Client, name: &str) -> m::Snapshot {
    poll("the snapshot to be ready", || {
        let mut c = c.clone();
        async move {
            let list = c.list_snapshots(m::ListSnapshotsRequest { path: "a".into() }).await.ok()?.into_inner();
            list.snapshots.into_iter().find(|s| s.name == name && s.ready)
        }
    })
    .await
}

#[tokio::test]
async fn a_client_that_holds_gives_an_exact_snapshot_at_once() {
    let (_cluster, _fleet, mut c) = started(1).await;
    let grant = c.attach_volume(attach("a", 7, false)).await.expect("attach").into_inner();
    let mut stream = c.watch_attach(watch(&grant, 7)).await.expect("watch").into_inner();
    let state = |seq, size_bytes| Some(Event::State(AttachState { seq, size_bytes, limits: Some(m::VolumeLimits::default()), complete: true }));
    assert_eq!(next(&mut stream).await, state(1, 4 * GIB));
    let mut taker = c.clone();
    let taken = tokio::spawn(async move { taker.create_snapshot(snapshot_of("a", "s1")).await });
    let Some(Event::Hold(token)) = next(&mut stream).await else { panic!("no hold") };
    // A change of size meanwhile does not let the client go.
    c.extend_volume(m::ExtendVolumeRequest { path: "a".into(), size_bytes: 5 * GIB }).await.expect("extend");
    c.ack_hold(ack(&grant, token)).await.expect("ack");
    assert_eq!(next(&mut stream).await, state(2, 5 * GIB));
    let snapshot = taken.await.expect("task").expect("snapshot").into_inner();
    assert_eq!((snapshot.ready, &snapshot.hold[..], snapshot.seq), (true, "held", 1));
    assert_eq!(refused(c.ack_hold(ack(&grant, token)).await).0, MdsErrorKind::NotFound, "it is over");
    c.extend_volume(m::ExtendVolumeRequest { path: "a".into(), size_bytes: 6 * GIB }).await.expect("extend");
    assert_eq!(next(&mut stream).await, state(2, 6 * GIB));
}

#[tokio::test]
async fn a_client_that_does_not_answer_is_bypassed() {
    let (_cluster, fleet, mut c) = started(1).await;
    let grant = c.attach_volume(attach("a", 7, false)).await.expect("attach").into_inner();
    c.allocate_segment(allocate(&grant, 0)).await.expect("allocate");
    let mut stream = c.watch_attach(watch(&grant, 7)).await.expect("watch").into_inner();
    next(&mut stream).await;
    fleet.stick(true);
    let began = now();
    let snapshot = c.create_snapshot(snapshot_of("a", "s1")).await.expect("snapshot").into_inner();
    assert!(began.elapsed() >= HOLD_TIMEOUT);
    assert_eq!((snapshot.ready, &snapshot.hold[..]), (false, "bypassed"));
    assert!(matches!(next(&mut stream).await, Some(Event::Hold(_))));
    assert!(matches!(next(&mut stream).await, Some(Event::State(AttachState { seq: 2, .. }))));
    // Until the copysets are sealed, the snapshot is of no use, and no segment is placed in open copysets.
    let read = m::AttachVolumeRequest { snapshot: "s1".into(), read_only: true, ..attach("a", 8, false) };
    assert_eq!(refused(c.attach_volume(read.clone()).await).0, MdsErrorKind::Unavailable);
    assert_eq!(refused(c.allocate_segment(allocate(&grant, 1)).await).0, MdsErrorKind::Unavailable);
    let layout = m::GetLayoutRequest { layer: grant.layer, first: 0, count: 8, ..Default::default() };
    assert_eq!(c.get_layout(layout).await.expect("layout").into_inner().segments.len(), 1);
    fleet.stick(false);
    ready(&c, "s1").await;
    let kinds = fleet.done(grant.layer);
    assert!(!kinds.is_empty() && kinds.iter().all(|k| *k == m::layer_task::Kind::Seal(2)), "{kinds:?}");
    let reader = c.attach_volume(read).await.expect("attach").into_inner();
    assert_eq!((reader.epoch, reader.layer, reader.seq), (0, grant.layer, 1));
    let placed = poll("the sealed segment", || {
        let (mut c, request) = (c.clone(), allocate(&grant, 1));
        async move { c.allocate_segment(request).await.ok() }
    });
    assert_eq!(placed.await.into_inner().segments[0].index, 1);
}

#[tokio::test]
async fn a_new_stream_breaks_a_hold() {
    let (_cluster, _fleet, mut c) = started(1).await;
    let grant = c.attach_volume(attach("a", 7, false)).await.expect("attach").into_inner();
    let mut stream = c.watch_attach(watch(&grant, 7)).await.expect("watch").into_inner();
    next(&mut stream).await;
    let mut taker = c.clone();
    let taken = tokio::spawn(async move { taker.create_snapshot(snapshot_of("a", "s1")).await });
    let Some(Event::Hold(token)) = next(&mut stream).await else { panic!("no hold") };
    let mut again = c.watch_attach(watch(&grant, 7)).await.expect("watch").into_inner();
    assert!(matches!(next(&mut again).await, Some(Event::State(AttachState { seq: 1, .. }))));
    assert_eq!(refused(c.ack_hold(ack(&grant, token)).await).0, MdsErrorKind::NotFound);
    let snapshot = taken.await.expect("task").expect("snapshot").into_inner();
    assert_eq!(&snapshot.hold[..], "bypassed");
    assert_eq!(next(&mut stream).await, None, "the old stream ended");
}

#[tokio::test]
async fn an_attach_is_refused_while_its_holder_lives_and_can_be_stolen() {
    let (_cluster, _fleet, mut c) = started(1).await;
    let first = c.attach_volume(attach("a", 1, false)).await.expect("attach").into_inner();
    let mut stream = c.watch_attach(watch(&first, 1)).await.expect("watch").into_inner();
    next(&mut stream).await;
    let (why, text) = refused(c.attach_volume(attach("a", 2, false)).await);
    assert_eq!((why, text.contains("client 1")), (MdsErrorKind::Attached, true), "{text}");
    let again = c.attach_volume(attach("a", 1, false)).await.expect("the same client").into_inner();
    assert_eq!(again.epoch, first.epoch + 1);
    assert_eq!(next(&mut stream).await, Some(Event::Detached(m::Empty {})));
    let mut stream = c.watch_attach(watch(&again, 1)).await.expect("watch").into_inner();
    next(&mut stream).await;
    let stolen = c.attach_volume(attach("a", 2, true)).await.expect("steal").into_inner();
    assert_eq!(next(&mut stream).await, Some(Event::Detached(m::Empty {})));
    assert_eq!(next(&mut stream).await, None);
    assert_eq!(refused(c.watch_attach(watch(&again, 1)).await).0, MdsErrorKind::Fenced);
    assert_eq!(refused(c.watch_attach(watch(&stolen, 1)).await).0, MdsErrorKind::Fenced, "another client's attach");
    assert_eq!(refused(c.allocate_segment(allocate(&again, 0)).await).0, MdsErrorKind::Fenced);
    c.allocate_segment(allocate(&stolen, 0)).await.expect("the new holder places segments");
    // Who asks as the writer is told only while it is: what it zeroes without any copyset depends on it (ADR 0014).
    let as_writer = |grant: &m::AttachGrant, epoch| m::GetLayoutRequest { layer: grant.layer, first: 0, count: 2, volume: volume(grant), epoch };
    assert_eq!(refused(c.get_layout(as_writer(&again, again.epoch)).await).0, MdsErrorKind::Fenced);
    for epoch in [stolen.epoch, 0] {
        assert_eq!(c.get_layout(as_writer(&stolen, epoch)).await.expect("layout").into_inner().segments.len(), 1);
    }
    let of_no_volume = m::GetLayoutRequest { layer: stolen.layer, volume: volume(&stolen) + 1, ..as_writer(&stolen, stolen.epoch) };
    assert_eq!(refused(c.get_layout(of_no_volume).await).0, MdsErrorKind::NotFound);
    // Its stream was never opened; after the grace it counts as gone.
    let taken = poll("the dead holder to be replaced", || {
        let mut c = c.clone();
        async move { c.attach_volume(attach("a", 3, false)).await.ok() }
    });
    assert_eq!(taken.await.into_inner().epoch, stolen.epoch + 1);
}

#[tokio::test]
async fn only_its_own_client_resumes_an_attach() {
    let (_cluster, _fleet, mut c) = started(1).await;
    let resume = |client| m::AttachVolumeRequest { resume: true, ..attach("a", client, false) };
    let (why, text) = refused(c.attach_volume(resume(1)).await);
    assert_eq!((why, text.contains("any more")), (MdsErrorKind::Fenced, true), "{text}");
    let first = c.attach_volume(attach("a", 1, false)).await.expect("attach").into_inner();
    assert_eq!(refused(c.attach_volume(resume(2)).await).0, MdsErrorKind::Attached);
    let again = c.attach_volume(resume(1)).await.expect("resumed").into_inner();
    assert_eq!(again.epoch, first.epoch + 1);
    // Not even when the holder is dead and forgotten, or has given the volume back.
    let stolen = c.attach_volume(attach("a", 2, true)).await.expect("steal").into_inner();
    assert_eq!(refused(c.attach_volume(resume(1)).await).0, MdsErrorKind::Attached);
    let volume = stolen.volume.expect("a volume").id;
    let detach = m::DetachVolumeRequest { volume, epoch: stolen.epoch, unclean: false };
    c.detach_volume(detach).await.expect("detach");
    for client in [1, 2] {
        assert_eq!(refused(c.attach_volume(resume(client)).await).0, MdsErrorKind::Fenced);
    }
}

#[tokio::test]
async fn rollback_takes_the_volume_from_its_client() {
    let (_cluster, _fleet, mut c) = started(1).await;
    c.create_snapshot(snapshot_of("a", "s")).await.expect("snapshot");
    let grant = c.attach_volume(attach("a", 1, false)).await.expect("attach").into_inner();
    let mut stream = c.watch_attach(watch(&grant, 1)).await.expect("watch").into_inner();
    next(&mut stream).await;
    let rollback = |detach| m::RollbackVolumeRequest { path: "a".into(), snapshot: "s".into(), detach };
    assert_eq!(refused(c.rollback_volume(rollback(false)).await).0, MdsErrorKind::Attached);
    let back = c.rollback_volume(rollback(true)).await.expect("rollback").into_inner();
    assert!(!back.attached && back.attach_epoch > grant.epoch && back.layer != grant.layer);
    assert_eq!(next(&mut stream).await, Some(Event::Detached(m::Empty {})));
    let again = c.attach_volume(attach("a", 1, false)).await.expect("attach").into_inner();
    assert_eq!((again.layer, again.ancestry.len()), (back.layer, 1));
    let old = m::GetLayoutRequest { layer: grant.layer, first: 0, count: 1, volume: volume(&again), epoch: again.epoch };
    assert_eq!(refused(c.get_layout(old).await).0, MdsErrorKind::Fenced, "it does not write to that layer");
}

#[tokio::test]
async fn a_clone_of_an_attached_volume_holds_its_client() {
    let (_cluster, _fleet, mut c) = started(1).await;
    let grant = c.attach_volume(attach("a", 7, false)).await.expect("attach").into_inner();
    c.allocate_segment(allocate(&grant, 0)).await.expect("allocate");
    let mut stream = c.watch_attach(watch(&grant, 7)).await.expect("watch").into_inner();
    next(&mut stream).await;
    let request = m::CloneVolumeRequest {
        path: "a".into(),
        source_snapshot: String::new(),
        new_path: "b".into(),
        owner: String::new(),
        create_parents: false,
    };
    let (mut taker, sent) = (c.clone(), request.clone());
    let cloned = tokio::spawn(async move { taker.clone_volume(sent).await });
    let Some(Event::Hold(token)) = next(&mut stream).await else { panic!("no hold") };
    c.ack_hold(ack(&grant, token)).await.expect("ack");
    let clone = cloned.await.expect("task").expect("clone").into_inner();
    assert_eq!((clone.depth, clone.allocated_segments, &clone.parent[..]), (1, 1, "a"));
    assert!(matches!(next(&mut stream).await, Some(Event::State(AttachState { seq: 2, .. }))));
    assert_eq!(refused(c.clone_volume(request).await).0, MdsErrorKind::AlreadyExists, "without a hold");
    assert!(c.list_snapshots(m::ListSnapshotsRequest { path: "a".into() }).await.expect("list").into_inner().snapshots.is_empty());
}

/// New limits are told at once; while a hold is under way its end tells them, so that they do not let the client go.
#[tokio::test]
async fn limits_are_told_to_the_attached_client() {
    let (_cluster, _fleet, mut c) = started(1).await;
    let grant = c.attach_volume(attach("a", 7, false)).await.expect("attach").into_inner();
    let mut stream = c.watch_attach(watch(&grant, 7)).await.expect("watch").into_inner();
    let none = Some(m::VolumeLimits::default());
    assert!(matches!(next(&mut stream).await, Some(Event::State(AttachState { limits, .. })) if limits == none));
    let iops = |rate| Some(m::RateLimit { rate, ..Default::default() });
    let limits = |rate| Some(m::VolumeLimits { iops: iops(rate), ..Default::default() });
    let set = |limits| m::SetVolumeLimitsRequest { path: "a".into(), limits };
    let volume = c.set_volume_limits(set(limits(500))).await.expect("set").into_inner();
    assert_eq!((volume.limits, volume.sector_bytes), (limits(500), 512));
    assert!(matches!(next(&mut stream).await, Some(Event::State(AttachState { limits: told, .. })) if told == limits(500)));
    let mut taker = c.clone();
    let taken = tokio::spawn(async move { taker.create_snapshot(snapshot_of("a", "s1")).await });
    let Some(Event::Hold(token)) = next(&mut stream).await else { panic!("no hold") };
    c.set_volume_limits(set(limits(700))).await.expect("set");
    c.ack_hold(ack(&grant, token)).await.expect("ack");
    assert!(matches!(next(&mut stream).await, Some(Event::State(AttachState { seq: 2, limits: told, .. })) if told == limits(700)));
    assert_eq!(taken.await.expect("task").expect("snapshot").into_inner().hold, "held");
    // A client that was away hears of them first.
    let mut again = c.watch_attach(watch(&grant, 7)).await.expect("watch").into_inner();
    assert!(matches!(next(&mut again).await, Some(Event::State(AttachState { limits: told, .. })) if told == limits(700)));
    let wrong = m::VolumeLimits { read_bytes: iops(1), ..Default::default() };
    assert_eq!(refused(c.set_volume_limits(set(Some(wrong))).await).0, MdsErrorKind::InvalidArgument);
    let reader = m::AttachVolumeRequest { read_only: true, ..attach("a", 8, false) };
    let grant = c.attach_volume(reader).await.expect("attach").into_inner();
    assert_eq!(grant.volume.and_then(|v| v.limits), limits(700));
}

#[tokio::test]
async fn sector_sizes_are_chosen_once() {
    let (_cluster, _fleet, mut c) = started(1).await;
    let large = m::CreateVolumeRequest { sector_bytes: 4096, ..create("large", GIB) };
    assert_eq!(c.create_volume(large).await.expect("create").into_inner().sector_bytes, 4096);
    let odd = m::CreateVolumeRequest { sector_bytes: 1024, ..create("odd", GIB) };
    assert_eq!(refused(c.create_volume(odd).await).0, MdsErrorKind::InvalidArgument);
    c.create_snapshot(snapshot_of("large", "s")).await.expect("snapshot");
    let clone = m::CloneVolumeRequest {
        path: "large".into(),
        source_snapshot: "s".into(),
        new_path: "clone".into(),
        ..Default::default()
    };
    assert_eq!(c.clone_volume(clone).await.expect("clone").into_inner().sector_bytes, 4096);
    let listed = c.list_volumes(m::ListVolumesRequest::default()).await.expect("list").into_inner().volumes;
    let sectors: Vec<_> = listed.into_iter().map(|v| (v.path, v.sector_bytes)).collect();
    assert_eq!(sectors, [("a".into(), 512), ("clone".into(), 4096), ("large".into(), 4096)]);
}
