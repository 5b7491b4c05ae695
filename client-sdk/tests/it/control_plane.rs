//! Calls to the MDS group: redirects, lost replies, refusals; opening volumes.

use crate::chunkserver::Chunkservers;
use crate::mds::FakeMds;
use crate::{Fixture, eventually, pattern, within, write};
use ogee_client::{BlockDevice, Cluster, ClusterConfig, OpenError, OpenMode, Volume};
use ogee_common::name::VolumeRef;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds::{CreateSnapshotGroupRequest, CreateSnapshotRequest, CreateVolumeRequest, DeleteVolumeRequest, StatVolumeRequest};

fn create(path: &str) -> CreateVolumeRequest {
    CreateVolumeRequest { path: path.into(), size_bytes: 1 << 20, ..Default::default() }
}

fn stat(path: &str) -> StatVolumeRequest {
    StatVolumeRequest { path: path.into() }
}

#[tokio::test]
async fn a_follower_redirects_to_the_leader_and_the_leader_may_change() {
    let data = Chunkservers::start(1).await;
    let mds = FakeMds::start(data, 2).await;
    let cluster = Cluster::connect(mds.config()).await.expect("the leader is found");
    let leader = mds.inner().nodes[1].clone();
    assert_eq!(cluster.mds().addrs()[0], leader);
    let before = mds.calls("stat_volume");
    cluster.mds().stat_volume(stat("vol")).await.expect("there");
    assert_eq!(mds.calls("stat_volume"), before + 1, "the leader is asked at once");
    mds.inner().leader = 0;
    cluster.mds().stat_volume(stat("vol")).await.expect("there");
    assert_eq!(cluster.mds().addrs()[0], mds.inner().nodes[0]);
}

#[tokio::test]
async fn a_dead_node_is_skipped() {
    let data = Chunkservers::start(1).await;
    let mds = FakeMds::start(data, 1).await;
    let mut config = mds.config();
    // Bound and closed again: nobody listens there.
    let dead = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("an address");
    config.mds.insert(0, dead.to_string());
    let cluster = within(Cluster::connect(config)).await.expect("the other node answers");
    within(cluster.mds().stat_volume(stat("vol"))).await.expect("there");
}

#[tokio::test]
async fn lost_replies_do_not_become_errors() {
    let f = Fixture::new().await;
    let mds = f.cluster.mds();
    f.mds.inner().lose.insert("create_volume", 1);
    assert_eq!(mds.create_volume(create("a")).await.expect("made").path, "a");
    assert_eq!(f.mds.calls("create_volume"), 2);
    f.mds.inner().lose.insert("delete_volume", 1);
    let delete = DeleteVolumeRequest { path: "a".into(), owner: String::new() };
    mds.delete_volume(delete.clone()).await.expect("gone");
    assert_eq!(mds.delete_volume(delete).await.expect_err("it is gone").kind, MdsErrorKind::NotFound);
    f.mds.inner().lose.insert("attach_volume", 1);
    let v = f.open().await;
    assert_eq!(v.attach_info().epoch.0, 2, "the second attempt's attach counts");
    write(&v, 0, pattern(1, 512)).await;
}

#[tokio::test]
async fn a_group_whose_reply_was_lost_is_recognised_and_only_that_one() {
    let f = Fixture::new().await;
    let mds = f.cluster.mds();
    let member = |path: &str, name: &str| CreateSnapshotRequest { path: path.into(), name: name.into() };
    let group = |name: &str| CreateSnapshotGroupRequest { members: vec![member("a", name), member("b", name)] };
    f.mds.inner().lose.insert("create_snapshot_group", 1);
    let made = mds.create_snapshot_group(group("s")).await.expect("made by the first attempt");
    assert_eq!(made.snapshots.iter().map(|s| (&s.volume_path[..], &s.name[..])).collect::<Vec<_>>(), [("a", "s"), ("b", "s")]);
    assert!(made.group != 0 && made.snapshots.iter().all(|s| s.group == made.group));
    assert_eq!(f.mds.calls("create_snapshot_group"), 2);
    let again = mds.create_snapshot_group(group("s")).await.expect_err("the names are taken");
    assert_eq!(again.kind, MdsErrorKind::AlreadyExists);
    // The reply was lost, but the snapshots that are there are of two groups.
    f.mds.inner().snapshots[1].group += 100;
    f.mds.inner().fail.insert("create_snapshot_group", MdsErrorKind::Unavailable);
    let (mds, fake) = (mds.clone(), f.mds.clone());
    let request = group("s");
    let call = tokio::spawn(async move { mds.create_snapshot_group(request).await });
    eventually("an attempt that failed", || fake.calls("create_snapshot_group") > 3).await;
    fake.inner().fail.clear();
    assert_eq!(call.await.expect("task").expect_err("another group's").kind, MdsErrorKind::AlreadyExists);
}

#[tokio::test]
async fn refusals_are_returned_at_once() {
    let f = Fixture::new().await;
    let error = f.cluster.mds().create_volume(create("vol")).await.expect_err("the name is taken");
    assert_eq!((error.kind, error.outcome_unknown), (MdsErrorKind::AlreadyExists, false));
    assert_eq!(f.mds.calls("create_volume"), 1);
    assert_eq!(error.to_string(), "create_volume: already-exists (refused: already-exists)");
    let error = Cluster::connect(ClusterConfig::default()).await.expect_err("no address");
    assert_eq!(error.kind, MdsErrorKind::InvalidArgument);
}

#[tokio::test]
async fn opening_says_why_it_failed() {
    let f = Fixture::new().await;
    let open = |name: &str, mode| {
        let (cluster, name) = (f.cluster.clone(), VolumeRef::parse(name).expect("valid"));
        async move { Volume::open(&cluster, &name, mode).await }
    };
    let write = OpenMode::ReadWrite { steal: false };
    let error = open("nobody", write).await.expect_err("no such volume");
    assert!(matches!(error, OpenError::Attach { source, .. } if source.kind == MdsErrorKind::NotFound));
    let error = open("vol@s1", write).await.expect_err("a snapshot");
    assert!(matches!(error, OpenError::SnapshotIsReadOnly { .. }));
    let first = open("vol", write).await.expect("opens");
    let other = Cluster::connect(f.mds.config()).await.expect("connects");
    let name = VolumeRef::parse("vol").expect("valid");
    let error = Volume::open(&other, &name, write).await.expect_err("attached");
    assert!(matches!(error, OpenError::Attach { source, .. } if source.kind == MdsErrorKind::Attached));
    let thief = Volume::open(&other, &name, OpenMode::ReadWrite { steal: true }).await.expect("stolen");
    crate::write(&thief, 0, pattern(1, 512)).await;
    let error = within(first.write(0, pattern(2, 512))).await.expect_err("fenced");
    assert_eq!(error.kind, ogee_client::IoErrorKind::Fenced);
    assert_eq!(crate::read(&thief, 0, 512).await, pattern(1, 512));
    f.mds.inner().volumes.get_mut("vol").expect("there").volume.size_bytes = 1000;
    let error = open("vol", OpenMode::ReadOnly).await.expect_err("an odd size");
    assert!(matches!(error, OpenError::BadGrant { field: "size", .. }));
}

#[tokio::test]
async fn a_dropped_volume_ends_its_stream() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    drop(v);
    eventually("the end of the stream", || {
        f.mds.send_state();
        f.mds.watchers() == 0
    })
    .await;
}
