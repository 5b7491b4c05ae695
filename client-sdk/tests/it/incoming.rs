//! Volumes that are attached when their guest starts: who is taken from, who is refused, what waits and what ends.

use crate::mds::SIZE;
use crate::{Fixture, eventually, pattern, read, within, write};
use ogee_client::{Arrival, BlockDevice, Cluster, IncomingEnd, IncomingVolume, IoErrorKind, OpenError};
use ogee_common::name::VolumePath;
use ogee_proto::MdsErrorKind;
use std::time::Duration;

/// Another host: a cluster connection, so another client, and the volume that it expects.
async fn destination(f: &Fixture) -> (Cluster, IncomingVolume) {
    let cluster = Cluster::connect(f.mds.config()).await.expect("connects");
    let volume = look_up(&cluster).await;
    (cluster, volume)
}

async fn look_up(cluster: &Cluster) -> IncomingVolume {
    IncomingVolume::look_up(cluster, &VolumePath::parse("vol").expect("valid"), None).await.expect("there")
}

async fn kind_of_write(device: &IncomingVolume) -> Result<(), IoErrorKind> {
    within(device.write(0, pattern(9, 512))).await.map_err(|error| error.kind)
}

#[tokio::test]
async fn the_source_keeps_the_volume_until_the_guest_starts_and_loses_it_then() {
    let f = Fixture::new().await;
    let source = f.open().await;
    write(&source, 0, pattern(1, 512)).await;
    let (_cluster, incoming) = destination(&f).await;
    assert_eq!(incoming.info(), source.info());
    assert_eq!(kind_of_write(&incoming).await, Err(IoErrorKind::Closed), "no guest has started");
    write(&source, 512, pattern(2, 512)).await;
    f.mds.inner().volumes.get_mut("vol").expect("there").volume.size_bytes = SIZE + 4096;
    let mut sizes = incoming.resized();
    incoming.guest_starts(Arrival::New);
    incoming.guest_starts(Arrival::New);
    let queue = incoming.for_thread();
    let data = within(queue.read(0, 1024)).await.expect("waits for the attach").to_vec();
    assert_eq!(data, [pattern(1, 512), pattern(2, 512)].concat());
    within(sizes.changed()).await.expect("the device lives");
    assert_eq!(incoming.info().size_bytes, SIZE + 4096, "resized meanwhile");
    within(queue.write(0, pattern(3, 512))).await.expect("ours now");
    let late = within(ogee_client::BlockDevice::write(&source, 0, pattern(4, 512))).await.expect_err("fenced");
    assert_eq!(late.kind, IoErrorKind::Fenced);
    assert_eq!(within(queue.read(0, 512)).await.expect("ours").to_vec(), pattern(3, 512));
    incoming.guest_left();
    assert_eq!(within(incoming.detach()).await.expect("detached"), IncomingEnd::GivenBack);
    let again = f.open().await;
    assert_eq!(read(&again, 0, 512).await, pattern(3, 512));
}

#[tokio::test]
async fn a_guest_that_comes_back_takes_from_nobody() {
    let f = Fixture::new().await;
    let holder = f.open().await;
    let (_cluster, stale) = destination(&f).await;
    stale.guest_starts(Arrival::Back);
    assert_eq!(kind_of_write(&stale).await, Err(IoErrorKind::Fenced));
    write(&holder, 0, pattern(1, 512)).await;
    // Not even when the volume is free: somebody else may have used it meanwhile.
    stale.guest_left();
    holder.detach().await.expect("detached");
    let (_cluster, late) = destination(&f).await;
    for device in [stale.clone(), late] {
        let calls = f.mds.inner().volumes["vol"].volume.attach_epoch;
        device.guest_starts(Arrival::Back);
        assert_eq!(kind_of_write(&device.for_thread()).await, Err(IoErrorKind::Fenced));
        assert_eq!(f.mds.inner().volumes["vol"].volume.attach_epoch, calls, "nothing was attached");
    }
    stale.guest_left();
    stale.guest_starts(Arrival::New);
    assert_eq!(kind_of_write(&stale.for_thread()).await, Ok(()), "a new guest is served");
}

#[tokio::test]
async fn a_daemon_that_ends_under_its_guest_leaves_the_volume_to_the_next_one() {
    let f = Fixture::new().await;
    let (cluster, first) = destination(&f).await;
    first.guest_starts(Arrival::New);
    assert_eq!(kind_of_write(&first).await, Ok(()));
    assert_eq!(within(first.detach()).await.expect("ended"), IncomingEnd::Kept);
    assert!(f.mds.inner().detaches.is_empty());
    // The next daemon is the same client.
    let next = look_up(&cluster).await;
    next.guest_starts(Arrival::Back);
    assert_eq!(kind_of_write(&next).await, Ok(()));
    assert_eq!(kind_of_write(&first).await, Err(IoErrorKind::Fenced));
    // Lost to another host, it is not served again, until a new guest is moved here.
    let (_other, elsewhere) = destination(&f).await;
    elsewhere.guest_starts(Arrival::New);
    assert_eq!(kind_of_write(&elsewhere).await, Ok(()));
    assert_eq!(kind_of_write(&next).await, Err(IoErrorKind::Fenced));
    next.guest_left();
    next.guest_starts(Arrival::Back);
    assert_eq!(kind_of_write(&next.for_thread()).await, Err(IoErrorKind::Fenced));
    assert_eq!(kind_of_write(&elsewhere).await, Ok(()));
    next.guest_left();
    next.guest_starts(Arrival::New);
    assert_eq!(kind_of_write(&next.for_thread()).await, Ok(()));
    assert_eq!(kind_of_write(&elsewhere).await, Err(IoErrorKind::Fenced));
}

#[tokio::test]
async fn io_waits_for_an_mds_and_an_attempt_ends_with_its_guest() {
    let f = Fixture::new().await;
    let source = f.open().await;
    write(&source, 0, pattern(1, 512)).await;
    let (_cluster, incoming) = destination(&f).await;
    f.mds.go_away();
    incoming.guest_starts(Arrival::New);
    let queue = incoming.for_thread();
    let waiting = tokio::spawn(async move { queue.write(0, pattern(5, 512)).await });
    eventually("an attempt to attach", || f.mds.calls("attach_volume") > 1).await;
    assert!(!waiting.is_finished());
    incoming.guest_left();
    let ended = within(waiting).await.expect("no panic").expect_err("its guest is gone");
    assert_eq!(ended.kind, IoErrorKind::Closed);
    f.mds.come_back();
    write(&source, 0, pattern(2, 512)).await;
    assert_eq!(within(incoming.detach()).await.expect("ended"), IncomingEnd::Unknown, "an attempt may have been carried out");
    let epoch = f.mds.inner().volumes["vol"].volume.attach_epoch;
    assert_eq!(epoch, source.attach_info().epoch.0, "the volume is not taken for a guest that is gone");

    // With an MDS in time the guest sees a pause and no error.
    f.mds.go_away();
    incoming.guest_starts(Arrival::New);
    let queue = incoming.for_thread();
    let waiting = tokio::spawn(async move { queue.write(0, pattern(5, 512)).await });
    let before = f.mds.calls("attach_volume");
    eventually("another attempt", || f.mds.calls("attach_volume") > before).await;
    f.mds.come_back();
    within(waiting).await.expect("no panic").expect("written");
}

#[tokio::test]
async fn what_cannot_be_served_is_said_at_once_or_in_time() {
    let f = Fixture::with(|config| config.io_timeout = Some(Duration::from_millis(50))).await;
    let error = IncomingVolume::look_up(&f.cluster, &VolumePath::parse("nobody").expect("valid"), None).await.expect_err("unknown");
    assert!(matches!(error, OpenError::Attach { source, .. } if source.kind == MdsErrorKind::NotFound));
    let incoming = look_up(&f.cluster).await;
    assert_eq!(within(incoming.detach()).await.expect("ended"), IncomingEnd::NeverAttached);
    f.mds.inner().fail.insert("attach_volume", MdsErrorKind::Unavailable);
    incoming.guest_starts(Arrival::New);
    assert_eq!(kind_of_write(&incoming).await, Err(IoErrorKind::TimedOut));
    incoming.guest_left();
    f.mds.inner().fail.insert("attach_volume", MdsErrorKind::NotFound);
    incoming.guest_starts(Arrival::New);
    // The answer may take longer than an IO does.
    let refused = async {
        loop {
            match kind_of_write(&incoming).await {
                Err(IoErrorKind::TimedOut) => {}
                other => return other,
            }
        }
    };
    assert_eq!(within(refused).await, Err(IoErrorKind::Fenced), "deleted meanwhile");
    f.mds.inner().volumes.get_mut("vol").expect("there").volume.size_bytes = 1000;
    let error = IncomingVolume::look_up(&f.cluster, &VolumePath::parse("vol").expect("valid"), None).await.expect_err("an odd size");
    assert!(matches!(error, OpenError::BadGrant { field: "size", .. }));
}
