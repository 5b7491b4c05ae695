//! Every kind of refusal, as a client sees it, with its gRPC code.

mod cluster;

use cluster::{Cluster, Fleet, GIB, allocate, attach, create, kind, leader_of, poll, registration, snapshot_of};
use ogee_proto::MdsErrorKind as K;
use ogee_proto::mds::{self as m};
use tonic::{Code, Status};

fn check<T: std::fmt::Debug>(result: Result<tonic::Response<T>, Status>, why: K, code: Code) -> Status {
    let status = result.expect_err("a refusal");
    assert_eq!((kind(&status), status.code()), (Some(why), code), "{status:?}");
    assert!(!status.message().is_empty());
    status
}

#[tokio::test]
async fn names_owners_and_arguments() {
    let cluster = Cluster::start(1);
    let _fleet = Fleet::start(&cluster, 1).await;
    let (_, mut c) = cluster.leader().await;
    let stat = m::StatVolumeRequest { path: "x".into() };
    check(c.stat_volume(stat).await, K::NotFound, Code::NotFound);
    let owned = m::CreateVolumeRequest { owner: "ann".into(), ..create("a", GIB) };
    c.create_volume(owned).await.expect("create");
    check(c.create_volume(create("a", GIB)).await, K::AlreadyExists, Code::AlreadyExists);
    let status = check(c.create_volume(create("a b", GIB)).await, K::InvalidArgument, Code::InvalidArgument);
    assert_eq!(status.message(), "bad path: ' ' is not allowed; use letters, digits, '.', '_' and '-'");
    check(c.create_volume(create("b", 1000)).await, K::InvalidArgument, Code::InvalidArgument);
    let reserved = snapshot_of("a", ".clone-1");
    check(c.create_snapshot(reserved).await, K::InvalidArgument, Code::InvalidArgument);
    let delete = m::DeleteVolumeRequest { path: "a".into(), owner: "bob".into() };
    check(c.delete_volume(delete).await, K::WrongOwner, Code::PermissionDenied);
}

#[tokio::test]
async fn users_fences_and_limits() {
    let cluster = Cluster::start(1);
    let fleet = Fleet::start(&cluster, 1).await;
    let (_, mut c) = cluster.leader().await;
    c.create_volume(create("a", GIB)).await.expect("create");
    let first = c.attach_volume(attach("a", 1, false)).await.expect("attach").into_inner();
    // A client that was just there may come back, so asking again later is right; one that is there is not waited for.
    check(c.attach_volume(attach("a", 2, false)).await, K::Unavailable, Code::Unavailable);
    let _stream = c.watch_attach(cluster::watch(&first, 1)).await.expect("watch");
    check(c.attach_volume(attach("a", 2, false)).await, K::Attached, Code::FailedPrecondition);
    c.attach_volume(attach("a", 2, true)).await.expect("steal");
    check(c.allocate_segment(allocate(&first, 0)).await, K::Fenced, Code::Aborted);
    let (volume, epoch) = (first.volume.as_ref().expect("volume").id, first.epoch);
    check(c.detach_volume(m::DetachVolumeRequest { volume, epoch, unclean: false }).await, K::Fenced, Code::Aborted);
    c.detach_volume(m::DetachVolumeRequest { volume, epoch: epoch + 1, unclean: false }).await.expect("detach");
    c.create_snapshot(snapshot_of("a", "s")).await.expect("snapshot");
    let delete = m::DeleteVolumeRequest { path: "a".into(), owner: String::new() };
    check(c.delete_volume(delete).await, K::InUse, Code::FailedPrecondition);
    let layout = m::GetLayoutRequest { layer: first.layer, first: 0, count: 5000, ..Default::default() };
    check(c.get_layout(layout).await, K::Limit, Code::OutOfRange);
    // What cannot be done now: a segment while nothing can seal it.
    fleet.stick(true);
    let grant = c.attach_volume(attach("a", 3, false)).await.expect("attach").into_inner();
    let placed = c.allocate_segment(allocate(&grant, 0)).await;
    check(placed, K::Unavailable, Code::Unavailable);
}

#[tokio::test]
async fn a_new_disk_at_the_address_of_an_old_one() {
    let cluster = Cluster::start(1);
    let (_, mut c) = cluster.leader().await;
    c.register_chunkserver(registration(1)).await.expect("register");
    c.register_chunkserver(m::RegisterChunkserverRequest { addr: registration(1).addr, ..registration(9) }).await.expect("register");
    let list = c.list_chunkservers(m::Empty {}).await.expect("list").into_inner().chunkservers;
    assert_eq!(list.iter().map(|s| &s.state[..]).collect::<Vec<_>>(), ["down", "up"], "the old one is gone before its silence is noticed");
}

#[tokio::test]
async fn room_and_identities() {
    let cluster = Cluster::start(1);
    let (_, mut c) = cluster.leader().await;
    c.register_chunkserver(registration(1)).await.expect("register");
    let pool = m::CreatePoolRequest { name: "default".into(), replicas: 3, copysets: 0 };
    check(c.create_pool(pool.clone()).await, K::NoSpace, Code::ResourceExhausted);
    let many = m::CreatePoolRequest { replicas: 1, copysets: 51, ..pool.clone() };
    check(c.create_pool(many).await, K::Limit, Code::OutOfRange);
    let nine = m::CreatePoolRequest { replicas: 9, ..pool.clone() };
    check(c.create_pool(nine).await, K::InvalidArgument, Code::InvalidArgument);
    let foreign = m::RegisterChunkserverRequest { cluster: vec![1; 16].into(), ..registration(2) };
    check(c.register_chunkserver(foreign).await, K::WrongCluster, Code::Unauthenticated);
    let beat = m::HeartbeatRequest { chunkserver: 1, uuid: vec![7; 16].into(), ..Default::default() };
    check(c.heartbeat(beat).await, K::WrongCluster, Code::Unauthenticated);
    // One replica on a disk that is full.
    c.create_pool(m::CreatePoolRequest { replicas: 1, ..pool }).await.expect("pool");
    let beat = m::HeartbeatRequest { chunkserver: 1, uuid: vec![1; 16].into(), free_bytes: 1, ..Default::default() };
    c.heartbeat(beat).await.expect("heartbeat");
    c.create_volume(create("a", GIB)).await.expect("create");
    let grant = c.attach_volume(attach("a", 1, false)).await.expect("attach").into_inner();
    check(c.allocate_segment(allocate(&grant, 0)).await, K::NoSpace, Code::ResourceExhausted);
}

#[tokio::test]
async fn a_follower_names_the_leader() {
    let cluster = Cluster::start(3);
    let (leader, _) = cluster.leader().await;
    let expected = cluster.addr(leader).to_string();
    for at in (0..3).filter(|at| *at != leader) {
        let mut c = cluster::client(cluster.addr(at));
        let named = poll("the follower to know the leader", || {
            let mut c = c.clone();
            async move { c.cluster_status(m::Empty {}).await.err().map(|e| leader_of(&e)).filter(|l| !l.is_empty()) }
        });
        assert_eq!(named.await, expected);
        let status = check(c.create_volume(create("a", GIB)).await, K::NotLeader, Code::FailedPrecondition);
        assert_eq!(leader_of(&status), expected);
    }
}
