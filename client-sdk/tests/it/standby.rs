//! A volume that is made ready beside the process that writes it, and attached when that one has left.

use crate::{Fixture, eventually, pattern, within, write};
use ogee_client::{BlockDevice, Cluster, ClusterConfig, IoErrorKind, OpenError, OpenMode, StandbyVolume, Volume};
use ogee_common::name::VolumeRef;
use ogee_proto::MdsErrorKind;
use std::num::NonZeroU64;

fn name() -> VolumeRef {
    VolumeRef::parse("vol").expect("a valid name")
}

/// One of two processes of the same client.
async fn process(f: &Fixture) -> Cluster {
    let config = ClusterConfig { client: NonZeroU64::new(7), ..f.mds.config() };
    Cluster::connect(config).await.expect("connects")
}

async fn writer(cluster: &Cluster) -> Volume {
    Volume::open(cluster, &name(), OpenMode::ReadWrite { steal: false }).await.expect("the volume opens")
}

async fn standby(cluster: &Cluster) -> StandbyVolume {
    within(StandbyVolume::prepare(cluster, &name(), Some("disk7"))).await.expect("prepared")
}

#[tokio::test]
async fn it_takes_nothing_until_it_is_attached_and_then_goes_on() {
    let f = Fixture::new().await;
    let (old_process, new_process) = (process(&f).await, process(&f).await);
    let old = writer(&old_process).await;
    write(&old, 0, pattern(1, 512)).await;
    let epoch = f.mds.inner().volumes["vol"].volume.attach_epoch;
    let new = standby(&new_process).await;
    let queue = new.for_thread();
    within(queue.warm_up()).await;
    assert_eq!(f.mds.inner().volumes["vol"].volume.attach_epoch, epoch, "nothing is attached");
    let info = new.info();
    assert_eq!((info.size_bytes, info.read_only, info.serial.as_str()), (old.info().size_bytes, false, "disk7"));
    let early = within(queue.write(0, pattern(9, 512))).await.expect_err("not attached");
    assert_eq!(early.kind, IoErrorKind::Closed);
    write(&old, 512, pattern(2, 512)).await;

    old.leave();
    let late = within(BlockDevice::write(&old, 0, pattern(9, 512))).await.expect_err("left");
    assert_eq!(late.kind, IoErrorKind::Closed);
    assert!(f.mds.inner().detaches.is_empty(), "nothing is given back");
    let attached = within(new.attach()).await.expect("the same client");
    assert!(attached.attach_info().epoch.0 > epoch);
    let again = within(new.attach()).await.expect("attached");
    assert_eq!(again.attach_info(), attached.attach_info(), "once");
    assert_eq!(new.info().serial, "disk7");
    let data = within(queue.read(0, 1024)).await.expect("attached").to_vec();
    assert_eq!(data, [pattern(1, 512), pattern(2, 512)].concat());
    within(queue.write(0, pattern(3, 512))).await.expect("attached");
    within(attached.detach()).await.expect("detached");
    assert_eq!(f.mds.inner().detaches.len(), 1);
    assert_eq!(within(queue.read(0, 512)).await.expect_err("given back").kind, IoErrorKind::Closed);
}

#[tokio::test]
async fn it_is_refused_what_somebody_else_has_and_waits_for_an_mds() {
    let f = Fixture::new().await;
    let (old_process, new_process) = (process(&f).await, process(&f).await);
    let old = writer(&old_process).await;
    let new = standby(&new_process).await;
    old.leave();
    // Without an MDS it waits.
    f.mds.go_away();
    let before = f.mds.calls("attach_volume");
    let waiting = tokio::spawn({
        let new = new.clone();
        async move { new.attach().await.map(drop) }
    });
    eventually("another attempt", || f.mds.calls("attach_volume") > before + 1).await;
    assert!(!waiting.is_finished());
    f.mds.come_back();
    within(waiting).await.expect("no panic").expect("attached");
    // Stolen from it before the next one attaches.
    let next_process = process(&f).await;
    let next = standby(&next_process).await;
    new.leave();
    let thief = Volume::open(&f.cluster, &name(), OpenMode::ReadWrite { steal: true }).await.expect("stolen");
    let refused = within(next.attach()).await.expect_err("another client has it");
    let OpenError::Attach { source, .. } = refused else { panic!("{refused:?}") };
    assert!(matches!(source.kind, MdsErrorKind::Attached | MdsErrorKind::Fenced), "{source:?}");
    write(&thief, 0, pattern(4, 512)).await;
}
