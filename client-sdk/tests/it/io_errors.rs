//! One test for each kind of IO error, and what does not become one.

use crate::chunkserver::Reaction;
use crate::mds::{LAYER, SIZE};
use crate::{Fixture, eventually, pattern, read, within, write};
use bytes::Bytes;
use ogee_client::{BlockDevice, IoError, IoErrorKind, NoSpacePolicy, OpenMode};
use ogee_proto::MdsErrorKind;
use ogee_proto::data::{Opcode, Status};
use ogee_proto::mds::attach_event::Event;
use ogee_proto::mds::Empty;
use std::time::Duration;

fn kind<T: std::fmt::Debug>(result: Result<T, IoError>) -> IoErrorKind {
    result.expect_err("the IO fails").kind
}

fn status(status: Status) -> Reaction {
    Reaction::Reply(status, Bytes::new())
}

#[tokio::test]
async fn invalid_input() {
    let f = Fixture::new().await;
    let v = f.open().await;
    assert_eq!(kind(v.read(1, 512).await), IoErrorKind::InvalidInput);
    assert_eq!(kind(v.read(0, (64 << 20) + 512).await), IoErrorKind::InvalidInput);
    assert_eq!(kind(v.write(SIZE, pattern(0, 512)).await), IoErrorKind::InvalidInput);
    assert_eq!(kind(v.discard(0, SIZE + 512).await), IoErrorKind::InvalidInput);
    assert!(within(v.write(0, Bytes::new())).await.is_ok());
    f.data.script(Opcode::Write, 1, status(Status::BadRequest));
    let error = within(v.write(0, pattern(0, 512))).await.expect_err("refused");
    assert_eq!(error.kind, IoErrorKind::InvalidInput);
    assert!(std::error::Error::source(&error).is_some_and(|s| s.to_string().contains("BadRequest")));
}

#[tokio::test]
async fn read_only() {
    let f = Fixture::new().await;
    let v = f.open_as("vol", OpenMode::ReadOnly).await;
    assert!(v.info().read_only);
    assert_eq!(kind(v.write(0, pattern(0, 512)).await), IoErrorKind::ReadOnly);
    assert_eq!(kind(v.discard(0, 512).await), IoErrorKind::ReadOnly);
    assert_eq!(kind(v.write_zeroes(0, 512).await), IoErrorKind::ReadOnly);
}

#[tokio::test]
async fn fenced_by_a_copyset_is_sticky_for_all_handles() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(1, 4096)).await;
    f.data.fence(LAYER, 99);
    assert_eq!(kind(within(v.read(0, 4096)).await), IoErrorKind::Fenced);
    f.data.forget_fences();
    let other = v.for_thread();
    assert_eq!(kind(other.write(0, pattern(2, 4096)).await), IoErrorKind::Fenced);
    assert_eq!(kind(v.flush().await), IoErrorKind::Fenced);
    assert_eq!(kind(v.discard(0, 512).await), IoErrorKind::Fenced);
    within(v.detach()).await.expect("a fenced volume detaches");
    assert_eq!(f.mds.calls("detach_volume"), 0, "there is nothing to give back");
}

/// Nobody but the MDS can say so where no copyset is asked; what the client knows of the layout is older.
#[tokio::test]
async fn a_client_that_was_taken_over_zeroes_nothing_where_nothing_is_placed() {
    let f = Fixture::new().await;
    let v = f.open().await;
    assert_eq!(read(&v, 0, 4096).await, vec![0; 4096]);
    within(v.discard(0, SIZE)).await.expect("still the writer");
    let asked = f.mds.calls("get_layout");
    within(v.write_zeroes(512, SIZE - 512)).await.expect("still the writer");
    assert_eq!(f.mds.calls("get_layout"), asked + 1, "one question for all segments");
    assert_eq!(f.mds.calls("allocate_segment"), 0, "zeros need no place");
    f.mds.inner().volumes.get_mut("vol").expect("a volume").volume.attach_epoch += 1;
    assert_eq!(kind(within(v.discard(0, SIZE)).await), IoErrorKind::Fenced);
    assert_eq!(kind(v.read(0, 512).await), IoErrorKind::Fenced, "it knows now");
}

/// Another writer had it placed meanwhile, and was given up again: what the MDS says counts, not what was known.
#[tokio::test]
async fn zeroes_go_where_the_mds_says_that_something_is() {
    let f = Fixture::new().await;
    let v = f.open().await;
    assert_eq!(read(&v, 0, 4096).await, vec![0; 4096]);
    f.mds.place(LAYER, 0);
    within(v.discard(0, SIZE)).await.expect("discarded");
    assert!(f.data.arrived(Opcode::Zero) >= 64, "every chunk of the placed segment");
}

#[tokio::test]
async fn fenced_by_the_mds() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    f.mds.send(Event::Detached(Empty {}));
    eventually("the fence", || f.mds.inner().subscriptions == 1 && futures_util::FutureExt::now_or_never(v.flush()).is_some_and(|r| r.is_err())).await;
    assert_eq!(kind(v.write(0, pattern(1, 512)).await), IoErrorKind::Fenced);
    assert_eq!(kind(v.read(0, 512).await), IoErrorKind::Fenced);
}

#[tokio::test]
async fn no_space_fails_or_waits_by_policy() {
    let f = Fixture::new().await;
    let v = f.open().await;
    f.data.script(Opcode::Write, 1, status(Status::NoSpace));
    assert_eq!(kind(within(v.write(0, pattern(1, 512))).await), IoErrorKind::NoSpace);
    f.mds.inner().fail.insert("allocate_segment", MdsErrorKind::NoSpace);
    assert_eq!(kind(within(v.write(1 << 30, pattern(1, 512))).await), IoErrorKind::NoSpace);

    let f = Fixture::with(|c| c.no_space = NoSpacePolicy::Wait).await;
    let v = f.open().await;
    f.data.script(Opcode::Write, 3, status(Status::NoSpace));
    write(&v, 0, pattern(1, 512)).await;
    assert_eq!(f.data.arrived(Opcode::Write), 4);
}

#[tokio::test]
async fn timed_out() {
    let f = Fixture::with(|c| c.io_timeout = Some(Duration::from_millis(300))).await;
    let v = f.open().await;
    write(&v, 0, pattern(1, 512)).await;
    f.data.state().copysets.values_mut().for_each(|c| c.leader = 0);
    assert_eq!(kind(within(v.write(0, pattern(2, 512))).await), IoErrorKind::TimedOut);
    assert_eq!(kind(within(v.read(0, 512)).await), IoErrorKind::TimedOut);
    f.data.state().copysets.values_mut().for_each(|c| c.leader = 2);
    assert_eq!(read(&v, 0, 512).await, pattern(1, 512), "it resumes by itself");
}

#[tokio::test]
async fn corrupt_reads_are_tried_again_and_then_fail() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(1, 8192)).await;
    f.data.script(Opcode::Read, 2, Reaction::Damage);
    assert_eq!(read(&v, 0, 8192).await, pattern(1, 8192));
    assert_eq!(v.stats().checksum_mismatches, 2);
    f.data.script(Opcode::Read, usize::MAX, Reaction::Damage);
    assert_eq!(kind(within(v.read(0, 8192)).await), IoErrorKind::Corrupt);
    f.data.clear_rules();
    f.data.script(Opcode::Read, usize::MAX, status(Status::Corrupt));
    assert_eq!(kind(within(v.read(0, 8192)).await), IoErrorKind::Corrupt);
}

#[tokio::test]
async fn a_write_that_was_damaged_on_the_way_is_sent_again() {
    let f = Fixture::new().await;
    let v = f.open().await;
    f.data.script(Opcode::Write, 2, status(Status::PayloadChecksum));
    write(&v, 512, pattern(1, 1024)).await;
    assert_eq!(read(&v, 512, 1024).await, pattern(1, 1024));
    f.data.script(Opcode::Write, usize::MAX, status(Status::PayloadChecksum));
    assert_eq!(kind(within(v.write(0, pattern(2, 512))).await), IoErrorKind::Corrupt);
}

#[tokio::test]
async fn closed() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(1, 512)).await;
    within(v.detach()).await.expect("detaches");
    assert_eq!(kind(v.read(0, 512).await), IoErrorKind::Closed);
    assert_eq!(kind(v.for_thread().write(0, pattern(1, 512)).await), IoErrorKind::Closed);
    assert_eq!(kind(v.flush().await), IoErrorKind::Closed);

    let v = f.open().await;
    f.data.drop_layer(LAYER);
    assert_eq!(kind(within(v.read(0, 512)).await), IoErrorKind::Closed);
}
