//! One node over real gRPC, with chunkservers that only heartbeat.

mod cluster;

use cluster::{Cluster, Fleet, GIB, allocate, attach, create, kind, poll, refused, snapshot_of};
use ogee_common::limits::CHUNKS_PER_SEGMENT;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds::layer_task::Kind;
use ogee_proto::mds::{self as m};
use ogee_proto::net::Network;
use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

fn stat(path: &str) -> m::StatVolumeRequest {
    m::StatVolumeRequest { path: path.into() }
}

fn layout(layer: u64) -> m::GetLayoutRequest {
    m::GetLayoutRequest { layer, first: 0, count: 64, ..Default::default() }
}

fn clone_of(path: &str, source_snapshot: &str, new_path: &str) -> m::CloneVolumeRequest {
    m::CloneVolumeRequest {
        path: path.into(),
        source_snapshot: source_snapshot.into(),
        new_path: new_path.into(),
        owner: String::new(),
        create_parents: true,
    }
}

#[tokio::test]
async fn a_golden_image_is_cloned_rolled_back_and_removed() {
    let cluster = Cluster::start(1);
    let fleet = Fleet::start(&cluster, 8).await;
    let (_, mut c) = cluster.leader().await;
    c.create_volume(create("images/golden", 4 * GIB)).await.expect("create");
    let grant = c.attach_volume(attach("images/golden", 1, false)).await.expect("attach").into_inner();
    let placed = c.allocate_segment(allocate(&grant, 0)).await.expect("allocate").into_inner();
    assert_eq!(placed.segments[0].copysets.len(), CHUNKS_PER_SEGMENT as usize);
    assert_eq!(placed.segments[0].copysets.iter().collect::<BTreeSet<_>>().len(), 8, "every copyset has its share");
    let volume = grant.volume.as_ref().expect("volume").id;
    let detach = m::DetachVolumeRequest { volume, epoch: grant.epoch, unclean: false };
    c.detach_volume(detach).await.expect("detach");
    let snapshot = c.create_snapshot(snapshot_of("images/golden", "v1")).await.expect("snapshot").into_inner();
    assert_eq!((snapshot.ready, &snapshot.hold[..], snapshot.seq), (true, "detached", 1));

    let clone = c.clone_volume(clone_of("images/golden", "v1", "vms/web")).await.expect("clone").into_inner();
    assert_eq!((&clone.parent[..], clone.depth, clone.allocated_segments), ("images/golden@v1", 1, 1));
    let of_clone = c.get_layout(layout(clone.layer)).await.expect("layout").into_inner();
    assert_eq!(of_clone.segments, placed.segments, "the clone lies where its parent does");
    let mine = c.attach_volume(attach("vms/web", 2, false)).await.expect("attach").into_inner();
    assert_eq!(mine.ancestry, vec![m::Ancestor { layer: grant.layer, seq: 1 }]);
    let copysets = m::GetCopysetsRequest { ids: placed.segments[0].copysets.clone() };
    let copysets = c.get_copysets(copysets).await.expect("copysets").into_inner().copysets;
    assert!(copysets.iter().all(|c| c.replicas.len() == 3 && c.replicas.iter().all(|r| !r.addr.is_empty())));
    c.detach_volume(m::DetachVolumeRequest { volume: clone.id, epoch: mine.epoch, unclean: false }).await.expect("detach");

    c.create_snapshot(snapshot_of("vms/web", "clean")).await.expect("snapshot");
    let rollback =
        m::RollbackVolumeRequest { path: "vms/web".into(), snapshot: "clean".into(), detach: false };
    let back = c.rollback_volume(rollback).await.expect("rollback").into_inner();
    assert!(back.layer != clone.layer && back.depth == 2);
    let live = c.clone_volume(clone_of("vms/web", "", "vms/copy")).await.expect("clone of a live volume").into_inner();
    assert_eq!((&live.parent[..], live.depth), ("vms/web", 3));
    let (why, text) = refused(c.delete_volume(m::DeleteVolumeRequest { path: "vms/web".into(), owner: String::new() }).await);
    assert_eq!((why, text.contains("clean")), (MdsErrorKind::InUse, true), "{text}");

    for path in ["vms/copy", "vms/web", "images/golden"] {
        for name in ["clean", "v1"] {
            let _ = c.delete_snapshot(m::DeleteSnapshotRequest { path: path.into(), name: name.into() }).await;
        }
        let delete = m::DeleteVolumeRequest { path: path.into(), owner: String::new() };
        c.delete_volume(delete).await.unwrap_or_else(|e| panic!("{path}: {e}"));
    }
    poll("the copysets to delete everything", || {
        let mut c = c.clone();
        async move { (c.cluster_status(m::Empty {}).await.ok()?.into_inner().tasks == 0).then_some(()) }
    })
    .await;
    for layer in [grant.layer, clone.layer, back.layer, live.layer] {
        assert!(matches!(fleet.done(layer).last(), Some(Kind::DropLayer(_))), "layer {layer}");
        assert_eq!(refused(c.get_layout(layout(layer)).await).0, MdsErrorKind::NotFound);
    }
}

#[tokio::test]
async fn replicas_are_made_once_and_never_again_from_nothing() {
    let cluster = Cluster::start(1);
    let fleet = Fleet::start(&cluster, 4).await;
    let (_, mut c) = cluster.leader().await;
    let server = fleet.servers[0].clone();
    poll("all replicas", || async { (server.replicas.lock().expect("lock").len() == 4).then_some(()) }).await;
    let beats = server.beats.load(Ordering::SeqCst);
    poll("two more heartbeats", || async { (server.beats.load(Ordering::SeqCst) > beats + 2).then_some(()) }).await;
    let made = server.created.lock().expect("lock").len();
    // The disk loses everything but its identity.
    server.replicas.lock().expect("lock").clear();
    let beats = server.beats.load(Ordering::SeqCst);
    poll("two more heartbeats", || async { (server.beats.load(Ordering::SeqCst) > beats + 2).then_some(()) }).await;
    assert_eq!(server.created.lock().expect("lock").len(), made, "a lost replica was made from nothing");
    let servers = c.list_chunkservers(m::Empty {}).await.expect("list").into_inner().chunkservers;
    assert_eq!(servers.iter().map(|s| (&s.state[..], s.copysets)).collect::<Vec<_>>(), [("up", 4); 3]);
    let pools = c.list_pools(m::Empty {}).await.expect("list").into_inner().pools;
    assert_eq!((pools[0].zones, pools[0].chunkservers, pools[0].copysets), (3, 3, 4));
    let copysets = c.list_copysets(m::Empty {}).await.expect("list").into_inner().copysets;
    assert!(copysets.iter().all(|c| c.leader == c.id % 3 + 1));
    let status = c.cluster_status(m::Empty {}).await.expect("status").into_inner();
    assert_eq!((status.copysets, status.copysets_with_leader, status.chunkservers_up), (4, 4, 3));
}

#[tokio::test]
async fn a_repeated_request_is_answered_but_not_repeated() {
    let cluster = Cluster::start(1);
    let _fleet = Fleet::start(&cluster, 1).await;
    let (_, mut c) = cluster.leader().await;
    let request = || {
        let mut request = tonic::Request::new(create("a", GIB));
        request.metadata_mut().insert("ogee-request", "00112233445566778899aabbccddeeff".parse().expect("value"));
        request
    };
    let first = c.create_volume(request()).await.expect("create").into_inner();
    assert_eq!(c.create_volume(request()).await.expect("the same").into_inner(), first);
    assert_eq!(refused(c.create_volume(create("a", GIB)).await).0, MdsErrorKind::AlreadyExists);
}

#[tokio::test]
async fn volumes_are_found_listed_renamed_and_grown() {
    let cluster = Cluster::start(1);
    let _fleet = Fleet::start(&cluster, 1).await;
    let (_, mut c) = cluster.leader().await;
    for path in ["a", "f/b", "f/c"] {
        c.create_volume(create(path, GIB)).await.expect("create");
    }
    let rename = m::RenameVolumeRequest { path: "a".into(), new_path: "g/a".into(), create_parents: true };
    c.rename_volume(rename).await.expect("rename");
    assert_eq!(refused(c.stat_volume(stat("a")).await).0, MdsErrorKind::NotFound);
    c.extend_volume(m::ExtendVolumeRequest { path: "g/a".into(), size_bytes: 2 * GIB }).await.expect("extend");
    assert_eq!(c.stat_volume(stat("/g/a")).await.expect("stat").into_inner().size_bytes, 2 * GIB);
    let mut found = vec![];
    let mut start_after = String::new();
    loop {
        let page = m::ListVolumesRequest { directory: "/".into(), recursive: true, start_after, limit: 2 };
        let page = c.list_volumes(page).await.expect("list").into_inner();
        found.extend(page.volumes.iter().map(|v| (v.path.clone(), v.directory)));
        if !page.more {
            break;
        }
        start_after = page.volumes.last().expect("a page").path.clone();
    }
    let expected = [("f", true), ("f/b", false), ("f/c", false), ("g", true), ("g/a", false)];
    assert_eq!(found, expected.map(|(p, d)| (p.to_owned(), d)));
}

#[tokio::test]
async fn a_node_that_was_killed_or_stopped_has_everything() {
    let mut cluster = Cluster::start(1);
    let fleet = Fleet::start(&cluster, 2).await;
    let (_, mut c) = cluster.leader().await;
    let identity = c.cluster_status(m::Empty {}).await.expect("status").into_inner().cluster;
    for round in 0..4u64 {
        for n in 0..20 {
            c.create_volume(create(&format!("r{round}/v{n}"), GIB)).await.expect("create");
        }
        let grant = c.attach_volume(attach("r0/v0", round + 1, round > 0)).await.expect("attach").into_inner();
        assert_eq!(grant.epoch, round + 1, "epochs survive");
        if round % 2 == 0 {
            cluster.nodes[0].kill();
        } else {
            cluster.nodes[0].stop().expect("a clean stop");
        }
        cluster.restart(0);
        c = cluster.leader().await.1;
        let status = c.cluster_status(m::Empty {}).await.expect("status").into_inner();
        assert_eq!((status.volumes, status.cluster), (20 * (u32::try_from(round).expect("few") + 1), identity.clone()));
        let held = refused(c.attach_volume(attach("r0/v0", 99, false)).await);
        assert_eq!(held.0, MdsErrorKind::Unavailable, "a new leader gives the client time to come back");
    }
    drop(fleet);
}

#[tokio::test]
async fn a_wrong_directory_is_refused() {
    use ogee_mds::MdsError;
    let mut cluster = Cluster::start(1);
    cluster.leader().await;
    cluster.nodes[0].stop().expect("stop");
    let good = cluster.nodes[0].config.clone();
    let start = |config| {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listen");
        cluster::Node::start(listener, config).join()
    };
    let wiped = ogee_mds::MdsConfig { data_dir: good.data_dir.join("other"), bootstrap: false, ..good.clone() };
    assert!(matches!(start(wiped), Err(MdsError::NoIdentity(_))));
    let other = ogee_mds::MdsConfig { node: 2, ..good.clone() };
    assert!(matches!(start(other), Err(MdsError::OtherIdentity { node: 1, .. })));
    let invalid = ogee_mds::MdsConfig { node: 0, ..good.clone() };
    assert!(matches!(start(invalid), Err(MdsError::Config(_))));
    cluster.restart(0);
    cluster.leader().await;
    assert!(matches!(start(good), Err(MdsError::Failed { .. })), "another process has the directory");
}

#[tokio::test]
async fn a_stranger_at_the_door_does_no_harm() {
    use std::io::{Read as _, Write as _};
    let cluster = Cluster::start(1);
    let (_, mut c) = cluster.leader().await;
    let addr = cluster.addr(0);
    for first in [&b"OGOGOGOGOGOGOGOGOGOGOGOGOGOGOGOGOGOG"[..], b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"] {
        let closed = tokio::task::spawn_blocking(move || {
            let mut stream = std::net::TcpStream::connect(addr).expect("connect");
            stream.set_read_timeout(Some(cluster::DEADLINE)).expect("timeout");
            stream.write_all(first).expect("write");
            stream.shutdown(std::net::Shutdown::Write).expect("shutdown");
            let mut rest = vec![];
            // A reset is as good as an end.
            let _ = stream.read_to_end(&mut rest);
        });
        closed.await.expect("closed");
    }
    c.cluster_status(m::Empty {}).await.expect("the node serves");
    let hello = ogee_proto::data::HelloHead {
        version_min: 1,
        version_max: 1,
        role: ogee_proto::data::Role::Mds,
        process: 2,
        target: 1,
        session: ogee_common::id::SessionId(0),
        generation: ogee_common::id::ConnectionGeneration(0),
        cluster: [9; 16],
    };
    let refused = ogee_proto::link::Link::connect(&Network::default(), addr, &hello).await.map(|_| ());
    assert!(matches!(refused, Err(ogee_proto::link::LinkError::Refused { .. })), "{refused:?}");
    assert!(kind(&c.stat_volume(stat("x")).await.expect_err("nothing there")).is_some());
}
