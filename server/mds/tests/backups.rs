//! Volumes that stand on backups, over gRPC: who may attach, what the grant says, and that it ends.

mod cluster;

use cluster::{Client, Cluster, Fleet, GIB, attach, create, refused, snapshot_of};
use ogee_proto::MdsErrorKind;
use ogee_proto::mds as m;

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
    (cluster, fleet, c)
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
