//! Three nodes: the leader dies again and again, and nothing that was answered is lost.

mod cluster;

use cluster::{Client, Cluster, Fleet, GIB, attach, create, kind, now, poll, snapshot_of, watch};
use ogee_proto::MdsErrorKind;
use ogee_proto::mds::attach_event::Event;
use ogee_proto::mds::{self as m};
use std::collections::BTreeSet;
use std::time::Duration;

/// Creates a volume at whichever node leads; a name that is taken was made by an attempt without an answer.
async fn create_anywhere(cluster: &Cluster, path: &str) {
    poll("a volume to be created", || async {
        let (_, mut c) = cluster.leader().await;
        match c.create_volume(create(path, GIB)).await {
            Ok(_) => Some(()),
            Err(e) if kind(&e) == Some(MdsErrorKind::AlreadyExists) => Some(()),
            Err(_) => None,
        }
    })
    .await;
}

async fn paths(c: &mut Client) -> BTreeSet<String> {
    let request =
        m::ListVolumesRequest { directory: String::new(), recursive: true, start_after: String::new(), limit: 0 };
    let list = c.list_volumes(request).await.expect("list").into_inner();
    list.volumes.into_iter().map(|v| v.path).collect()
}

#[tokio::test]
async fn a_leader_that_dies_takes_nothing_along() {
    let mut cluster = Cluster::start(3);
    let _fleet = Fleet::start(&cluster, 2).await;
    let mut expected = BTreeSet::new();
    for round in 0..4 {
        for n in 0..10 {
            let path = format!("r{round}-v{n}");
            create_anywhere(&cluster, &path).await;
            expected.insert(path);
        }
        let (leader, mut c) = cluster.leader().await;
        let grant = c.attach_volume(attach("r0-v0", 5, false)).await.expect("attach").into_inner();
        let mut stream = c.watch_attach(watch(&grant, 5)).await.expect("watch").into_inner();
        assert!(stream.message().await.expect("stream").is_some());
        let began = now();
        cluster.nodes[leader].kill();
        assert!(!matches!(stream.message().await, Ok(Some(_))), "the stream ends with its node");
        let (next, mut c) = cluster.leader().await;
        println!("round {round}: another leader after {:?}", began.elapsed());
        assert_ne!(next, leader);
        assert_eq!(paths(&mut c).await, expected);
        // The attach is known at the new leader: its client comes back, another one is refused.
        let other = c.attach_volume(attach("r0-v0", 6, false)).await.expect_err("it may come back");
        assert_eq!(kind(&other), Some(MdsErrorKind::Unavailable));
        let mut stream = c.watch_attach(watch(&grant, 5)).await.expect("watch").into_inner();
        let first = stream.message().await.expect("stream").and_then(|e| e.event);
        assert!(matches!(first, Some(Event::State(_))));
        let other = c.attach_volume(attach("r0-v0", 6, false)).await.expect_err("it is back");
        assert_eq!(kind(&other), Some(MdsErrorKind::Attached));
        cluster.restart(leader);
    }
}

#[tokio::test]
async fn a_node_that_was_away_catches_up_and_can_lead() {
    let mut cluster = Cluster::start(3);
    let _fleet = Fleet::start(&cluster, 2).await;
    let (leader, mut c) = cluster.leader().await;
    let away = (leader + 1) % 3;
    cluster.nodes[away].stop().expect("stop");
    for n in 0..30 {
        c.create_volume(create(&format!("v{n}"), GIB)).await.expect("two of three are enough");
    }
    let snapshot = c.create_snapshot(snapshot_of("v0", "s")).await.expect("snapshot").into_inner();
    cluster.restart(away);
    // The third node goes, so that the one that was away has to have everything.
    let third = (leader + 2) % 3;
    cluster.nodes[third].kill();
    let (_, mut c) = cluster.leader().await;
    create_anywhere(&cluster, "after").await;
    assert_eq!(paths(&mut c).await.len(), 31);
    cluster.restart(third);
    cluster.nodes[leader].kill();
    let (_, mut c) = cluster.leader().await;
    assert_eq!(paths(&mut c).await.len(), 31);
    let list = c.list_snapshots(m::ListSnapshotsRequest { path: "v0".into() }).await.expect("list").into_inner();
    assert_eq!(list.snapshots, vec![snapshot]);
}

#[tokio::test]
async fn a_minority_answers_nothing() {
    let mut cluster = Cluster::start(3);
    let (leader, mut c) = cluster.leader().await;
    for at in (0..3).filter(|at| *at != leader) {
        cluster.nodes[at].kill();
    }
    // Its lease ends; from then on it refuses instead of answering what may be old.
    poll("the lease to end", || {
        let mut c = c.clone();
        async move {
            let ask = tokio::time::timeout(Duration::from_secs(10), c.cluster_status(m::Empty {})).await;
            ask.expect("an answer in time").err()
        }
    })
    .await;
    let refused = c.create_volume(create("a", GIB)).await.expect_err("no majority");
    assert!(matches!(kind(&refused), Some(MdsErrorKind::Unavailable | MdsErrorKind::NotLeader)), "{refused:?}");
}
