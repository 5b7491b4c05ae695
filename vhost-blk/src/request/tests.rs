//! Tests of the parser against virtio-queue's mock of a driver.

use super::*;
use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

const MEMORY_BYTES: usize = 1 << 20;
const HEADER_AT: u64 = 0x1_0000;
const DATA_AT: u64 = 0x2_0000;
const STATUS_AT: u64 = 0x1_8000;
const WRITE: u16 = 2;
const NEXT: u16 = 1;

#[test]
fn the_flags_are_those_of_the_specification() {
    assert_eq!((u32::from(WRITE), u32::from(NEXT)), (VRING_DESC_F_WRITE, VRING_DESC_F_NEXT));
}

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).unwrap()
}

fn header(memory: &GuestMemoryMmap, kind: u32, sector: u64) {
    memory.write_obj(kind.to_le(), GuestAddress(HEADER_AT)).unwrap();
    memory.write_obj(0xdead_beef_u32, GuestAddress(HEADER_AT + 4)).unwrap();
    memory.write_obj(sector.to_le(), GuestAddress(HEADER_AT + 8)).unwrap();
}

fn range_at(memory: &GuestMemoryMmap, at: u64, sector: u64, count: u32, flags: u32) {
    memory.write_obj(sector.to_le(), GuestAddress(at)).unwrap();
    memory.write_obj(count.to_le(), GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags.to_le(), GuestAddress(at + 12)).unwrap();
}

/// Parses a chain of (address, bytes, flags); NEXT is set as needed.
fn parse_chain(memory: &GuestMemoryMmap, chain: &[Piece]) -> Parsed {
    let queue = MockSplitQueue::new(memory, 256);
    let descriptors: Vec<RawDescriptor> =
        chain.iter().map(|(at, len, flags)| Descriptor::new(*at, *len, *flags, 0).into()).collect();
    parse(queue.build_desc_chain(&descriptors).unwrap())
}

fn request(parsed: Parsed) -> Request {
    match parsed {
        Parsed::Request(request) => request,
        other => panic!("not a request: {other:?}"),
    }
}

fn refusal(parsed: Parsed) -> Refusal {
    match parsed {
        Parsed::Refused { refusal, .. } => refusal,
        other => panic!("not refused with a place for the answer: {other:?}"),
    }
}

/// Address, bytes and flags of a descriptor.
type Piece = (u64, u32, u16);

const HEADER: Piece = (HEADER_AT, 16, 0);
const STATUS: Piece = (STATUS_AT, 1, WRITE);

#[test]
fn read_spans_segments() {
    let memory = memory();
    header(&memory, VIRTIO_BLK_T_IN, 7);
    let parsed = parse_chain(&memory, &[HEADER, (DATA_AT, 512, WRITE), (DATA_AT + 0x1000, 1024, WRITE), STATUS]);
    let request = request(parsed);
    assert_eq!(request.operation, Operation::Read { offset: 7 * 512, len: 1536 });
    assert_eq!(request.operation.payload_bytes(), 1536);
    assert_eq!(request.reply.status, GuestAddress(STATUS_AT));
    assert_eq!(request.reply.data.len(), 1536);
}

#[test]
fn status_may_share_a_segment_with_the_data() {
    let memory = memory();
    header(&memory, VIRTIO_BLK_T_IN, 0);
    let request = request(parse_chain(&memory, &[HEADER, (DATA_AT, 513, WRITE)]));
    assert_eq!(request.operation, Operation::Read { offset: 0, len: 512 });
    assert_eq!(request.reply.status, GuestAddress(DATA_AT + 512));
}

#[test]
fn write_copies_its_data_whatever_the_framing() {
    let memory = memory();
    header(&memory, VIRTIO_BLK_T_OUT, 3);
    let data: Vec<u8> = (0..1024_u32).map(|i| i.to_le_bytes()[0] ^ 0x5a).collect();
    memory.write_slice(&data, GuestAddress(HEADER_AT + 16)).unwrap();
    let framings: [&[Piece]; 3] = [
        &[(HEADER_AT, 16 + 1024, 0), STATUS],
        &[(HEADER_AT, 5, 0), (HEADER_AT + 5, 20, 0), (HEADER_AT + 25, 0, 0), (HEADER_AT + 25, 1015, 0), STATUS],
        &[HEADER, (HEADER_AT + 16, 1024, 0), STATUS],
    ];
    for framing in framings {
        let operation = request(parse_chain(&memory, framing)).operation;
        assert_eq!(operation, Operation::Write { offset: 3 * 512, data: data.clone().into() }, "{framing:?}");
    }
    let Operation::Write { data: owned, .. } = request(parse_chain(&memory, framings[2])).operation else {
        panic!("not a write")
    };
    memory.write_slice(&[0; 1024], GuestAddress(HEADER_AT + 16)).unwrap();
    assert_eq!(owned, data, "the data stays what it was when the request was taken");
}

#[test]
fn flush_and_id_and_unknown_types() {
    let memory = memory();
    header(&memory, VIRTIO_BLK_T_FLUSH, 0);
    assert_eq!(request(parse_chain(&memory, &[HEADER, STATUS])).operation, Operation::Flush);
    header(&memory, VIRTIO_BLK_T_GET_ID, 0);
    assert_eq!(request(parse_chain(&memory, &[HEADER, (DATA_AT, 20, WRITE), STATUS])).operation, Operation::GetId);
    header(&memory, 99, 0);
    let refusal = refusal(parse_chain(&memory, &[HEADER, STATUS]));
    assert!(matches!(refusal, Refusal::UnknownType { kind: 99 }));
    assert_eq!(refusal.status().byte(), 2);
}

#[test]
fn discard_and_write_zeroes_take_ranges() {
    let memory = memory();
    range_at(&memory, DATA_AT, 8, 16, 0);
    range_at(&memory, DATA_AT + 16, 100, 0, 0);
    let chain = [HEADER, (DATA_AT, 32, 0), STATUS];
    let ranges =
        smallvec::smallvec![ByteRange { offset: 4096, len: 8192 }, ByteRange { offset: 51_200, len: 0 }];
    header(&memory, VIRTIO_BLK_T_DISCARD, 0);
    assert_eq!(request(parse_chain(&memory, &chain)).operation, Operation::Discard(SmallVec::clone(&ranges)));
    header(&memory, VIRTIO_BLK_T_WRITE_ZEROES, 0);
    assert_eq!(request(parse_chain(&memory, &chain)).operation, Operation::WriteZeroes(ranges));

    range_at(&memory, DATA_AT, 8, 16, 1);
    assert!(matches!(request(parse_chain(&memory, &chain)).operation, Operation::WriteZeroes(_)), "unmap is allowed");
    header(&memory, VIRTIO_BLK_T_DISCARD, 0);
    let unmap = refusal(parse_chain(&memory, &chain));
    assert!(matches!(unmap, Refusal::UnknownFlags { flags: 1 }));
    assert_eq!(unmap.status(), Status::Unsupported);
    header(&memory, VIRTIO_BLK_T_WRITE_ZEROES, 0);
    range_at(&memory, DATA_AT, 8, 16, 2);
    assert!(matches!(refusal(parse_chain(&memory, &chain)), Refusal::UnknownFlags { flags: 2 }));
    range_at(&memory, DATA_AT, 8, VHOST_ZERO_SECTORS_MAX + 1, 0);
    assert!(matches!(refusal(parse_chain(&memory, &chain)), Refusal::Sectors { .. }));
    for len in [0, 15, 17, 16 * (VHOST_ZERO_RANGES_MAX + 1)] {
        let parsed = parse_chain(&memory, &[HEADER, (DATA_AT, len, 0), STATUS]);
        assert!(matches!(refusal(parsed), Refusal::DataLen { .. }), "{len} bytes of ranges");
    }
}

#[test]
fn data_of_a_wrong_length_or_direction_is_refused() {
    let memory = memory();
    for (kind, chain) in [
        (VIRTIO_BLK_T_IN, vec![HEADER, STATUS]),
        (VIRTIO_BLK_T_IN, vec![HEADER, (DATA_AT, 511, WRITE), STATUS]),
        (VIRTIO_BLK_T_IN, vec![HEADER, (DATA_AT, 512, 0), STATUS]),
        (VIRTIO_BLK_T_OUT, vec![HEADER, STATUS]),
        (VIRTIO_BLK_T_OUT, vec![HEADER, (DATA_AT, 513, 0), STATUS]),
        (VIRTIO_BLK_T_OUT, vec![HEADER, (DATA_AT, 512, WRITE), STATUS]),
    ] {
        header(&memory, kind, 0);
        let refusal = refusal(parse_chain(&memory, &chain));
        assert!(matches!(refusal, Refusal::DataLen { .. }), "{kind} {chain:?}: {refusal}");
        assert_eq!(refusal.status().byte(), 1);
    }
}

#[test]
fn more_than_the_io_limit_is_refused_before_anything_is_allocated() {
    let memory = memory();
    let piece = 512 * 1024;
    let pieces = IO_BYTES_MAX / piece;
    for (kind, flags) in [(VIRTIO_BLK_T_IN, WRITE), (VIRTIO_BLK_T_OUT, 0)] {
        header(&memory, kind, 0);
        // The segments overlap: guest memory is much smaller than what they add up to.
        let mut chain = vec![HEADER];
        chain.extend((0..pieces).map(|_| (DATA_AT, piece, flags)));
        chain.push(STATUS);
        assert_eq!(request(parse_chain(&memory, &chain)).operation.payload_bytes(), IO_BYTES_MAX as usize);
        chain.insert(1, (DATA_AT, 512, flags));
        assert!(matches!(refusal(parse_chain(&memory, &chain)), Refusal::DataLen { .. }));
    }
}

#[test]
fn sectors_beyond_64_bits_are_refused() {
    let memory = memory();
    for sector in [u64::MAX, u64::MAX / 512 + 1, u64::MAX / 512] {
        header(&memory, VIRTIO_BLK_T_IN, sector);
        let parsed = parse_chain(&memory, &[HEADER, (DATA_AT, 1024, WRITE), STATUS]);
        assert!(matches!(refusal(parsed), Refusal::Sectors { .. }), "sector {sector:#x}");
    }
}

#[test]
fn chains_without_a_place_for_the_status_are_unanswerable() {
    let memory = memory();
    header(&memory, VIRTIO_BLK_T_FLUSH, 0);
    let cases: [(&[Piece], &str); 5] = [
        (&[HEADER], "no writable byte"),
        (&[HEADER, (STATUS_AT, 0, WRITE)], "no writable byte"),
        (&[HEADER, STATUS, HEADER], "readable descriptor after"),
        (&[HEADER, (MEMORY_BYTES as u64, 1, WRITE)], "not guest memory"),
        (&[(u64::MAX - 3, 16, 0), STATUS], "not guest memory"),
    ];
    for (chain, why) in cases {
        match parse_chain(&memory, chain) {
            Parsed::Unanswerable(refusal) => assert!(refusal.to_string().contains(why), "{chain:?}: {refusal}"),
            other => panic!("{chain:?}: {other:?}"),
        }
    }
    let short = refusal(parse_chain(&memory, &[(HEADER_AT, 15, 0), STATUS]));
    assert!(matches!(short, Refusal::ShortHeader { len: 15 }));
}

#[test]
fn loops_and_broken_links_end() {
    let memory = memory();
    header(&memory, VIRTIO_BLK_T_FLUSH, 0);
    let queue = MockSplitQueue::new(&memory, 16);
    for (flags, next) in [(NEXT, 0), (NEXT, 99), (NEXT | WRITE, 0)] {
        let descriptors = [RawDescriptor::from(Descriptor::new(HEADER_AT, 16, flags, next))];
        let chain = queue.build_multiple_desc_chains(&descriptors).unwrap();
        assert!(matches!(parse(chain), Parsed::Unanswerable(Refusal::Truncated { .. })), "{flags} {next}");
    }
}

#[test]
fn indirect_tables_work_and_nested_ones_do_not() {
    let memory = memory();
    header(&memory, VIRTIO_BLK_T_IN, 1);
    let table = 0x8000_u64;
    let put = |index: u64, (at, len, flags): (u64, u32, u16), next: u16| {
        let raw = RawDescriptor::from(Descriptor::new(at, len, flags, next));
        memory.write_obj(raw, GuestAddress(table + index * 16)).unwrap();
    };
    put(0, (HEADER_AT, 16, NEXT), 1);
    put(1, (DATA_AT, 4096, NEXT | WRITE), 2);
    put(2, STATUS, 0);
    let queue = MockSplitQueue::new(&memory, 16);
    let indirect = u16::try_from(VRING_DESC_F_INDIRECT).unwrap();
    let build = |len| {
        let descriptors = [RawDescriptor::from(Descriptor::new(table, len, indirect, 0))];
        parse(queue.build_multiple_desc_chains(&descriptors).unwrap())
    };
    assert_eq!(request(build(48)).operation, Operation::Read { offset: 512, len: 4096 });
    assert!(matches!(build(32), Parsed::Unanswerable(Refusal::Truncated { .. })), "table ends before the chain");
    assert!(matches!(build(47), Parsed::Unanswerable(Refusal::Truncated { .. })), "no whole number of descriptors");
    put(1, (table, 48, indirect), 0);
    assert!(matches!(build(48), Parsed::Unanswerable(Refusal::Truncated { .. })), "nested");
}

#[test]
fn chains_of_too_many_descriptors_are_refused() {
    let memory = memory();
    header(&memory, VIRTIO_BLK_T_IN, 1);
    let table = 0x8_0000_u64;
    let count = u16::try_from(VHOST_CHAIN_DESCRIPTORS_MAX).unwrap() + 1;
    for index in 0..count {
        let raw = RawDescriptor::from(Descriptor::new(HEADER_AT, 16, NEXT, index + 1));
        memory.write_obj(raw, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }
    let queue = MockSplitQueue::new(&memory, 16);
    let indirect = u16::try_from(VRING_DESC_F_INDIRECT).unwrap();
    let descriptors = [RawDescriptor::from(Descriptor::new(table, u32::from(count) * 16, indirect, 0))];
    let parsed = parse(queue.build_multiple_desc_chains(&descriptors).unwrap());
    assert!(matches!(parsed, Parsed::Unanswerable(Refusal::Truncated { descriptors: 1025 })), "{parsed:?}");
}

proptest! {
    /// Whatever the chain: no panic, and a request keeps what its documentation promises.
    #[test]
    fn any_chain_is_parsed_or_refused(
        kind in prop_oneof![0_u32..16, any::<u32>()],
        sector in prop_oneof![0_u64..4096, any::<u64>()],
        chain in prop::collection::vec(
            (
                prop_oneof![Just(HEADER_AT), Just(DATA_AT), any::<u64>()],
                prop_oneof![Just(1_u32), Just(16), Just(512), 0..5000_u32, any::<u32>()],
                prop_oneof![Just(0_u16), Just(WRITE)],
            ),
            0..8,
        ),
    ) {
        let memory = memory();
        header(&memory, kind, sector);
        let mut all = vec![HEADER];
        all.extend(chain);
        if let Parsed::Request(request) = parse_chain(&memory, &all) {
            prop_assert!(request.operation.payload_bytes() <= IO_BYTES_MAX as usize);
            match &request.operation {
                Operation::Read { offset, len } => {
                    prop_assert!(offset.is_multiple_of(512) && len.is_multiple_of(512) && *len > 0);
                    prop_assert_eq!(request.reply.data.len(), u64::from(*len));
                }
                Operation::Write { offset, data } => {
                    prop_assert!(offset.is_multiple_of(512) && data.len().is_multiple_of(512) && !data.is_empty());
                }
                Operation::Discard(ranges) | Operation::WriteZeroes(ranges) => {
                    prop_assert!(ranges.iter().all(|range| range.offset.checked_add(range.len).is_some()));
                }
                Operation::Flush | Operation::GetId => {}
            }
            request.reply.write_status(&memory, Status::Ok.byte()).expect("the status byte is guest memory");
        }
    }
}
