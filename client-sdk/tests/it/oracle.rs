//! Random IO through several handles against the fake cluster gives what a device in memory gives.

use crate::chunkserver::Reaction;
use crate::mds::{GIB, SIZE};
use crate::{Fixture, pattern, read, within, write};
use bytes::Bytes;
use ogee_client::{BlockDevice, ExtentKind, MemoryDevice, ReadPiece};
use ogee_proto::data::{Opcode, Status};
use proptest::prelude::*;
use proptest::test_runner::Config;

#[derive(Debug, Clone)]
enum Step {
    Read { offset: u64, len: u32 },
    Write { offset: u64, len: u32, tag: u8 },
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64 },
    Flush,
    Extents { offset: u64, len: u64 },
    /// The next requests of a kind meet trouble.
    Trouble { opcode: Opcode, times: usize, which: u8 },
    MoveLeaders,
}

const SECTOR: u64 = 512;

/// Places near chunk and segment bounds and at the ends.
fn place(len_max: u64) -> impl Strategy<Value = (u64, u64)> {
    let base = prop_oneof![Just(0), Just(16 << 20), Just(GIB - (1 << 20)), Just(GIB), Just(SIZE - (3 << 20))];
    (base, 0u64..4096, 1..len_max / SECTOR).prop_map(|(base, sectors, len)| {
        let offset = (base + sectors * SECTOR).saturating_sub(1024 * SECTOR);
        (offset, (len * SECTOR).min(SIZE - offset))
    })
}

fn small(n: u64) -> u32 {
    u32::try_from(n).expect("a small length")
}

fn step() -> impl Strategy<Value = Step> {
    let io = || place(3 << 20);
    prop_oneof![
        4 => io().prop_map(|(offset, len)| Step::Read { offset, len: small(len) }),
        4 => (io(), any::<u8>()).prop_map(|((offset, len), tag)| Step::Write { offset, len: small(len), tag }),
        1 => place(40 << 20).prop_map(|(offset, len)| Step::Discard { offset, len }),
        1 => place(40 << 20).prop_map(|(offset, len)| Step::WriteZeroes { offset, len }),
        1 => Just(Step::Flush),
        2 => place(40 << 20).prop_map(|(offset, len)| Step::Extents { offset, len }),
        2 => (prop_oneof![Just(Opcode::Read), Just(Opcode::Write), Just(Opcode::OpenLayer), Just(Opcode::Zero), Just(Opcode::PageMap)], 1usize..4, 0u8..6)
            .prop_map(|(opcode, times, which)| Step::Trouble { opcode, times, which }),
        1 => Just(Step::MoveLeaders),
    ]
}

fn trouble(which: u8) -> Reaction {
    match which {
        0 => Reaction::Close,
        1 => Reaction::CloseAfter,
        2 => Reaction::Reply(Status::Overloaded, Bytes::new()),
        3 => Reaction::Reply(Status::NotLeader, Bytes::new()),
        4 => Reaction::Reply(Status::NotReady, Bytes::new()),
        _ => Reaction::Reply(Status::LayerNotOpen, Bytes::new()),
    }
}

async fn run(steps: Vec<(Step, usize)>) {
    let f = Fixture::new().await;
    let first = f.open().await;
    let handles = [first.clone(), first.for_thread(), first.for_thread()];
    let oracle = MemoryDevice::new(usize::try_from(SIZE).expect("fits"));
    for (step, handle) in steps {
        let v = &handles[handle];
        match step.clone() {
            Step::Read { offset, len } => {
                let want = oracle.read(offset, len).await.expect("in range").to_vec();
                assert!(read(v, offset, len).await == want, "{step:?}");
            }
            Step::Write { offset, len, tag } => {
                let data = pattern(tag, len as usize);
                oracle.write(offset, data.clone()).await.expect("in range");
                write(v, offset, data).await;
            }
            Step::Discard { offset, len } => {
                oracle.discard(offset, len).await.expect("in range");
                within(v.discard(offset, len)).await.expect("the discard succeeds");
            }
            Step::WriteZeroes { offset, len } => {
                oracle.write_zeroes(offset, len).await.expect("in range");
                within(v.write_zeroes(offset, len)).await.expect("write zeroes succeeds");
            }
            Step::Extents { offset, len } => {
                let mut at = offset;
                for extent in within(v.extents(offset, len, None)).await.expect("in range") {
                    let zeros = oracle.read(at, small(extent.len)).await.expect("in range").to_vec().iter().all(|b| *b == 0);
                    assert!(extent.kind == ExtentKind::Data || zeros, "{step:?}: {extent:?} at {at}");
                    at += extent.len;
                }
                assert!((offset + 1..=offset + len).contains(&at), "{step:?}");
            }
            Step::Flush => within(v.flush()).await.expect("the flush succeeds"),
            Step::Trouble { opcode, times, which } => f.data.script(opcode, times, trouble(which)),
            Step::MoveLeaders => f.data.move_leaders(),
        }
    }
    f.data.clear_rules();
    within(first.detach()).await.expect("detaches");
}

proptest! {
    #![proptest_config(Config { cases: 24, max_shrink_iters: 40, ..Config::default() })]
    #[test]
    fn random_io_agrees_with_memory(steps in prop::collection::vec((step(), 0usize..3), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(run(steps));
    }
}

#[tokio::test]
async fn payload_is_not_copied_and_unwritten_ranges_are_zeros() {
    let f = Fixture::new().await;
    let v = f.open().await;
    assert_eq!(v.info().size_bytes, SIZE);
    let hole = within(v.read(0, 8192)).await.expect("reads");
    assert_eq!(hole.pieces.as_slice(), [ReadPiece::Zeros(8192)]);
    assert_eq!(f.data.arrived(Opcode::Read), 0, "no chunkserver is asked for a segment without placement");
    write(&v, 4096, pattern(1, 4096)).await;
    let hole = within(v.read(1 << 20, 4096)).await.expect("reads");
    assert_eq!(hole.pieces.as_slice(), [ReadPiece::Zeros(4096)]);
    assert_eq!(f.data.arrived(Opcode::Read), 1);
}

#[tokio::test]
async fn a_large_io_is_split_and_runs_side_by_side() {
    let f = Fixture::new().await;
    let v = f.open().await;
    let data = pattern(9, 40 << 20);
    write(&v, GIB - (20 << 20) + 512, data.clone()).await;
    assert!(read(&v, GIB - (20 << 20) + 512, 40 << 20).await == data);
    let s = v.stats();
    assert_eq!((s.write.ops, s.write.bytes, s.read.ops, s.read.bytes), (1, 40 << 20, 1, 40 << 20));
    assert_eq!((s.inflight, s.write.errors, s.read.errors), (0, 0, 0));
    assert!(f.data.arrived(Opcode::Write) >= 41);
}

/// Front ends keep one future per request in flight; it must not cost a page.
#[tokio::test]
async fn the_future_of_an_io_is_small() {
    let f = Fixture::new().await;
    let v = f.open().await;
    let sizes = [
        std::mem::size_of_val(&v.read(0, 4096)),
        std::mem::size_of_val(&v.write(0, Bytes::new())),
        std::mem::size_of_val(&v.flush()),
    ];
    assert!(sizes.iter().all(|size| *size < 4096), "{sizes:?}");
}
