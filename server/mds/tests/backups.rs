//! Volumes that stand on backups, over gRPC: who may attach, what the grant says, and that it ends.

mod cluster;

use cluster::{Client, Cluster, Fleet, GIB, attach, create, poll, refused, snapshot_of, watch};
use ogee_proto::MdsErrorKind;
use ogee_proto::data::{PASTE_SINCE, PROTOCOL_MAX};
use ogee_proto::mds as m;
use ogee_proto::mds::attach_event::Event;
use std::sync::atomic::Ordering;

fn parent() -> m::BackupParent {
    m::BackupParent {
        layer: 0,
        repository: "main".into(),
        backup: 7,
        root: vec![1; 32].into(),
        leaves: vec![2; 32].into(),
        size_bytes: 3 * GIB,
        block_bytes: 256 << 10,
        volume: String::new(),
    }
}

async fn started() -> (Cluster, Fleet, Client) {
    let cluster = Cluster::start(1);
    let fleet = Fleet::start(&cluster, 4).await;
    let (_, c) = cluster.leader().await;
    for at in 0..fleet.servers.len() {
        speaks(&fleet, at, PROTOCOL_MAX.into()).await;
    }
    (cluster, fleet, c)
}

/// From now on a chunkserver says that it speaks this version of the data protocol, and the MDS has heard it.
async fn speaks(fleet: &Fleet, at: usize, version: u32) {
    let server = &fleet.servers[at];
    server.protocol.store(version, Ordering::SeqCst);
    let before = server.beats.load(Ordering::SeqCst);
    poll("two heartbeats", || async move { (server.beats.load(Ordering::SeqCst) >= before + 2).then_some(()) }).await;
}

fn reader(path: &str, client: u64) -> m::AttachVolumeRequest {
    m::AttachVolumeRequest { reads_backups: true, ..attach(path, client, false) }
}

async fn backup_of(c: &mut Client, path: &str) -> Option<m::BackupParent> {
    c.stat_volume(m::StatVolumeRequest { path: path.into() }).await.expect("stat").into_inner().backup
}

#[tokio::test]
async fn who_cannot_read_backups_is_refused_until_the_layer_is_complete() {
    let (_cluster, _fleet, mut c) = started().await;
    let request = m::CreateLazyVolumeRequest { volume: Some(create("a", 4 * GIB)), backup: Some(parent()) };
    let made = c.create_lazy_volume(request.clone()).await.expect("create").into_inner();
    let expected = m::BackupParent { layer: made.layer, ..parent() };
    assert_eq!((made.backup.as_ref(), made.allocated_segments), (Some(&expected), 3));
    assert_eq!(refused(c.create_lazy_volume(request).await).0, MdsErrorKind::AlreadyExists);
    let bad = m::BackupParent { block_bytes: 4096, ..parent() };
    let bad = m::CreateLazyVolumeRequest { volume: Some(create("b", 4 * GIB)), backup: Some(bad) };
    assert_eq!(refused(c.create_lazy_volume(bad).await).0, MdsErrorKind::InvalidArgument);

    c.create_snapshot(snapshot_of("a", "s")).await.expect("snapshot");
    let clone = m::CloneVolumeRequest { path: "a".into(), source_snapshot: "s".into(), new_path: "c".into(), ..Default::default() };
    c.clone_volume(clone).await.expect("clone");
    let snapshot = m::AttachVolumeRequest { snapshot: "s".into(), read_only: true, ..attach("a", 8, false) };
    for request in [attach("a", 1, false), attach("c", 1, true), snapshot.clone()] {
        let (kind, text) = refused(c.attach_volume(request).await);
        assert_eq!((kind, text.contains("--repo-config")), (MdsErrorKind::InvalidArgument, true), "{text}");
    }
    let with_access = m::AttachVolumeRequest { reads_backups: true, ..snapshot.clone() };
    for request in [reader("a", 1), reader("c", 1), with_access] {
        let grant = c.attach_volume(request).await.expect("attach").into_inner();
        assert_eq!(grant.backup, Some(expected.clone()));
        let bottom = grant.ancestry.last().map_or(grant.layer, |a| a.layer);
        assert_eq!(bottom, made.layer, "the backup is below the last of the ancestry");
    }
    let flatten = m::FlattenVolumeRequest { path: "c".into(), cancel: false };
    assert_eq!(refused(c.flatten_volume(flatten.clone()).await).0, MdsErrorKind::InUse);
    let list = c.list_backup_parents(m::ListBackupParentsRequest { after: made.layer - 1 }).await.expect("list").into_inner();
    assert_eq!((list.parents, list.more, list.cluster.len()), (vec![m::BackupParent { volume: "a".into(), ..expected }], false, 16));

    for _ in 0..2 {
        c.complete_backup_parent(m::CompleteBackupParentRequest { layer: made.layer }).await.expect("complete, also twice");
    }
    assert_eq!((backup_of(&mut c, "a").await, backup_of(&mut c, "c").await), (None, None));
    let grant = c.attach_volume(attach("a", 1, false)).await.expect("anybody").into_inner();
    assert_eq!(grant.backup, None);
    c.attach_volume(snapshot).await.expect("anybody");
    c.flatten_volume(flatten).await.expect("nothing is missing");
}

/// Whether the next event of a stream says that what is attached is complete.
async fn told_complete(stream: &mut tonic::Streaming<m::AttachEvent>) -> bool {
    let message = tokio::time::timeout(cluster::DEADLINE, stream.message()).await.expect("an event in time");
    match message.expect("a stream").and_then(|e| e.event) {
        Some(Event::State(state)) => state.complete,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn clients_that_stand_on_the_layer_hear_that_it_is_complete() {
    let (_cluster, _fleet, mut c) = started().await;
    let made = [("a", parent()), ("b", m::BackupParent { backup: 8, ..parent() })];
    for (path, backup) in made {
        let request = m::CreateLazyVolumeRequest { volume: Some(create(path, 4 * GIB)), backup: Some(backup) };
        c.create_lazy_volume(request).await.expect("create");
    }
    let clone = m::CloneVolumeRequest { path: "a".into(), new_path: "c".into(), ..Default::default() };
    c.clone_volume(clone).await.expect("clone");
    let mut streams = vec![];
    for (path, client) in [("a", 1), ("b", 2), ("c", 3)] {
        let grant = c.attach_volume(reader(path, client)).await.expect("attach").into_inner();
        let mut stream = c.watch_attach(watch(&grant, client)).await.expect("watch").into_inner();
        assert!(!told_complete(&mut stream).await, "{path}");
        streams.push(stream);
    }
    let layer = backup_of(&mut c, "a").await.expect("a backup").layer;
    c.complete_backup_parent(m::CompleteBackupParentRequest { layer }).await.expect("complete");
    assert!(told_complete(&mut streams[0]).await && told_complete(&mut streams[2]).await, "the volume and its clone");
    c.extend_volume(m::ExtendVolumeRequest { path: "b".into(), size_bytes: 5 * GIB }).await.expect("extend");
    assert!(!told_complete(&mut streams[1]).await, "another backup");
}

#[tokio::test]
async fn no_volume_stands_on_a_backup_while_a_chunkserver_would_skip_its_entries() {
    let (_cluster, fleet, mut c) = started().await;
    let request = m::CreateLazyVolumeRequest { volume: Some(create("a", 4 * GIB)), backup: Some(parent()) };
    // One that does not say is of a build that does not know the question.
    for version in [u32::from(PASTE_SINCE) - 1, 0] {
        speaks(&fleet, 1, version).await;
        let (kind, text) = refused(c.create_lazy_volume(request.clone()).await);
        assert_eq!((kind, text.contains("upgrade all chunkservers")), (MdsErrorKind::InvalidArgument, true), "{text}");
    }
    c.create_volume(create("plain", 4 * GIB)).await.expect("others need nothing new");
    speaks(&fleet, 1, u32::from(PASTE_SINCE) + 1).await;
    c.create_lazy_volume(request).await.expect("all understand");
}
