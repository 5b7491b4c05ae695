//! Extents: holes, zeros and data by page, what changed since a snapshot, and older chunkservers.

use crate::chunkserver::Reaction;
use crate::mds::{FakeVolume, LAYER, SIZE};
use crate::{Fixture, eventually, pattern, within, write};
use bytes::Bytes;
use ogee_client::{BlockDevice, ExtentKind, Moment, OpenMode, Volume};
use ogee_common::id::{LayerId, VolumeSeq};
use ogee_proto::data::{Opcode, Status};
use ogee_proto::mds as m;

use ExtentKind::{Data, Hole, Zero};

const PAGE: u64 = 4096;
const CHUNK: u64 = 16 << 20;
const FIRST: Moment = Moment { layer: LayerId(LAYER), seq: VolumeSeq(1) };

/// Extents of the whole volume, joined: (bytes, kind, changed).
pub(crate) async fn map(v: &Volume, since: Option<Moment>) -> Vec<(u64, ExtentKind, bool)> {
    let mut all: Vec<(u64, ExtentKind, bool)> = vec![];
    let mut at = 0;
    while at < SIZE {
        let part = within(v.extents(at, SIZE - at, since)).await.expect("extents");
        assert!(!part.is_empty() && part.iter().all(|e| e.len > 0));
        at += part.iter().map(|e| e.len).sum::<u64>();
        for e in part {
            match all.last_mut().filter(|(_, kind, changed)| (*kind, *changed) == (e.kind, e.changed)) {
                Some((len, ..)) => *len += e.len,
                None => all.push((e.len, e.kind, e.changed)),
            }
        }
    }
    assert_eq!(at, SIZE, "no more than asked for");
    all
}

/// Takes a snapshot, as the MDS does, and waits until the client has its seq.
async fn snapshot(f: &Fixture, v: &Volume) {
    let seq = f.mds.commit_snapshot();
    f.mds.send_state();
    eventually("the new seq", || v.moments()[0].seq.0 == seq).await;
}

#[tokio::test]
async fn pages_are_data_zeros_or_never_written() {
    let f = Fixture::new().await;
    let v = f.open().await;
    assert_eq!(map(&v, None).await, [(SIZE, Hole, true)]);
    assert_eq!(map(&v, Some(FIRST)).await, [(SIZE, Hole, false)]);
    assert_eq!(f.data.arrived(Opcode::PageMap), 0, "nobody is asked for a segment without placement");
    write(&v, PAGE, pattern(1, 4096)).await;
    within(v.discard(3 * PAGE, PAGE)).await.expect("discarded");
    write(&v, CHUNK + 512, pattern(1, 512)).await;
    let pages = [(PAGE, Hole), (PAGE, Data), (PAGE, Hole), (PAGE, Zero), (CHUNK - 4 * PAGE, Hole), (PAGE, Data)];
    let mut expected: Vec<_> = pages.iter().map(|(len, kind)| (*len, *kind, true)).collect();
    expected.push((SIZE - CHUNK - PAGE, Hole, true));
    assert_eq!(map(&v, None).await, expected);
    let part = within(v.extents(PAGE + 512, 2 * PAGE, None)).await.expect("extents");
    let part: Vec<_> = part.iter().map(|e| (e.len, e.kind)).collect();
    assert_eq!(part, [(PAGE - 512, Data), (PAGE, Hole), (512, Zero)]);
    assert!(within(v.extents(SIZE, 512, None)).await.is_err());
}

#[tokio::test]
async fn space_is_what_is_written_and_comes_back_with_a_discard() {
    let f = Fixture::new().await;
    let v = f.open().await;
    let space = async |v: &Volume| {
        let mut told = vec![];
        let space = within(v.space(|done, of| told.push((done, of)))).await.expect("counted");
        let segments = u32::try_from(SIZE.div_ceil(1 << 30)).expect("few");
        assert_eq!(told, (1..=segments).map(|done| (done, segments)).collect::<Vec<_>>());
        (space.data_bytes, space.own_bytes)
    };
    assert_eq!(space(&v).await, (0, 0));
    assert_eq!(f.data.arrived(Opcode::PageMap), 0, "nobody is asked for a segment without placement");
    write(&v, PAGE, pattern(1, 8192)).await;
    write(&v, CHUNK + 512, pattern(1, 512)).await;
    assert_eq!(space(&v).await, (3 * PAGE, 3 * PAGE));
    assert_eq!(f.data.arrived(Opcode::PageMap), 64, "each chunk of the segment once");
    within(v.discard(2 * PAGE, PAGE)).await.expect("discarded");
    assert_eq!(space(&v).await, (2 * PAGE, 2 * PAGE));
    f.data.script(Opcode::PageMap, 2, Reaction::Reply(Status::NotLeader, Bytes::new()));
    assert_eq!(space(&v).await, (2 * PAGE, 2 * PAGE), "who is no leader is not counted");
    within(v.detach()).await.expect("detached");
    assert!(within(v.space(|_, _| ())).await.is_err());
}

#[tokio::test]
async fn the_first_extent_costs_one_question() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, 0, pattern(1, 4096)).await;
    let extents = within(v.extents(0, SIZE, None)).await.expect("extents");
    assert_eq!((extents.len(), f.data.arrived(Opcode::PageMap)), (2, 1), "it ends with the second extent");
    within(v.extents(PAGE, SIZE - PAGE, None)).await.expect("extents");
    assert_eq!(f.data.arrived(Opcode::PageMap), 1 + 64, "a whole segment of one kind");
}

#[tokio::test]
async fn changes_since_a_snapshot() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    write(&v, 0, pattern(1, 8192)).await;
    snapshot(&f, &v).await;
    let s1 = f.open_as("vol@s1", OpenMode::ReadOnly).await;
    assert_eq!(s1.moments(), [FIRST]);
    write(&v, PAGE, pattern(2, 4096)).await;
    write(&v, 5 * PAGE, pattern(3, 512)).await;
    let changed = [
        (PAGE, Data, false), (PAGE, Data, true), (3 * PAGE, Hole, false), (PAGE, Data, true), (SIZE - 6 * PAGE, Hole, false),
    ];
    assert_eq!(map(&v, Some(FIRST)).await, changed);
    snapshot(&f, &v).await;
    write(&v, 0, pattern(4, 4096)).await;
    let s2 = f.open_as("vol@s2", OpenMode::ReadOnly).await;
    assert_eq!(map(&s2, Some(FIRST)).await, changed, "what came later is not seen");
    assert_eq!(map(&s1, Some(FIRST)).await, [(2 * PAGE, Data, false), (SIZE - 2 * PAGE, Hole, false)]);
    let asked = f.data.arrived(Opcode::PageMap);
    // A later moment, and one of a foreign layer.
    for foreign in [s2.moments()[0], Moment { layer: LayerId(999), ..FIRST }] {
        assert!(map(&s1, Some(foreign)).await.iter().all(|(.., changed)| *changed), "{foreign:?}");
    }
    assert!(f.data.arrived(Opcode::PageMap) > asked, "the allocation is told all the same");
}

#[tokio::test]
async fn a_clone_is_seen_through_to_its_parent() {
    let f = Fixture::new().await;
    let v = f.open_watched().await;
    write(&v, 0, pattern(1, 8192)).await;
    snapshot(&f, &v).await;
    {
        let mut inner = f.mds.inner();
        let mut clone = FakeVolume { volume: inner.volumes["vol"].volume.clone(), ..Default::default() };
        (clone.volume.id, clone.volume.layer, clone.volume.seq) = (77, 78, 1);
        clone.ancestry = vec![m::Ancestor { layer: LAYER, seq: 1 }];
        inner.volumes.insert("clone".into(), clone);
    }
    f.mds.place(78, 0);
    let clone = f.open_as("clone", OpenMode::ReadWrite { steal: false }).await;
    assert_eq!(map(&clone, Some(FIRST)).await, [(2 * PAGE, Data, false), (SIZE - 2 * PAGE, Hole, false)]);
    let space = within(clone.space(|_, _| ())).await.expect("counted");
    assert_eq!((space.data_bytes, space.own_bytes), (2 * PAGE, 0), "all is its parent's");
    write(&clone, PAGE, pattern(2, 4096)).await;
    within(clone.discard(0, PAGE)).await.expect("discarded");
    let reader = f.open_as("clone", OpenMode::ReadOnly).await;
    for device in [&clone, &reader] {
        let expected = [(PAGE, Zero, true), (PAGE, Data, true), (SIZE - 2 * PAGE, Hole, false)];
        assert_eq!(map(device, Some(FIRST)).await, expected);
        assert_eq!(device.moments()[1], FIRST);
        let space = within(device.space(|_, _| ())).await.expect("counted");
        assert_eq!((space.data_bytes, space.own_bytes), (PAGE, PAGE), "one is masked, one is its own");
    }
}

#[tokio::test]
async fn an_older_chunkserver_is_not_asked_and_everything_counts() {
    let f = Fixture::new().await;
    f.data.state().version = Some(1);
    let v = f.open().await;
    write(&v, PAGE, pattern(1, 4096)).await;
    let segment = 1 << 30;
    assert_eq!(map(&v, Some(FIRST)).await, [(segment, Data, true), (SIZE - segment, Hole, false)]);
    assert_eq!(f.data.arrived(Opcode::PageMap), 0);
    assert_eq!(v.stats().retries, 0);
}

#[tokio::test]
async fn trouble_is_not_felt_and_what_makes_no_sense_is_an_error() {
    let f = Fixture::new().await;
    let v = f.open().await;
    write(&v, PAGE, pattern(1, 4096)).await;
    let expected = map(&v, None).await;
    let refuse = |status| Reaction::Reply(status, Bytes::new());
    let trouble = [Status::NotReady, Status::NotLeader, Status::LayerNotOpen, Status::Overloaded, Status::UnknownCopyset];
    for reaction in trouble.into_iter().map(refuse).chain([Reaction::Close, Reaction::SilentAfter]) {
        f.data.script(Opcode::PageMap, 2, reaction);
        assert_eq!(map(&v, None).await, expected);
    }
    f.data.script(Opcode::PageMap, 100, refuse(Status::Ok));
    assert!(within(v.extents(0, CHUNK, None)).await.is_err(), "an answer without pages");
    f.data.clear_rules();
    within(v.detach()).await.expect("detached");
    assert!(within(v.extents(0, CHUNK, None)).await.is_err());
}
