//! Builds a descriptor chain from the fuzzer's bytes, mostly a valid request with rare flips, and parses it.
//!
//! Random bytes alone would nearly always stop at the header. So the bytes choose a request type, a framing and a few
//! mutations; every chain goes through guest memory and the available ring as a driver's would. The target checks what the
//! parser promises of a request and answers it, so that a bad address in the answer is found as well.

use ogee_common::limits::{IO_BYTES_MAX, VHOST_ZERO_SECTORS_MAX};
use ogee_vhost_blk::{Operation, Parsed, Status, parse};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueOwnedT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const MEMORY_BYTES: usize = 1 << 20;
const QUEUE_SIZE: u16 = 64;
const HEADER_AT: u64 = 0x1_0000;
const STATUS_AT: u64 = 0x1_1000;
const TABLE_AT: u64 = 0x1_2000;
const DATA_AT: u64 = 0x2_0000;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The fuzzer's bytes, one choice after the other; zeros after the end.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.byte()))
    }

    /// The low half of a word.
    fn half(&mut self) -> u32 {
        u32::try_from(self.word() & u64::from(u32::MAX)).expect("masked")
    }

    /// True for one value in 32.
    fn rarely(&mut self) -> bool {
        self.byte() % 32 == 31
    }
}

type Piece = (u64, u32, u16);

fn count(n: u64) -> u32 {
    u32::try_from(n).expect("a short chain")
}

/// A valid chain for the chosen type, its header and ranges in memory.
fn valid_chain(memory: &GuestMemoryMmap, choices: &mut Choices<'_>) -> Vec<Piece> {
    let kind = [0_u32, 1, 4, 8, 11, 13][usize::from(choices.byte() % 6)];
    let kind = if choices.rarely() { choices.half() } else { kind };
    let sector = if choices.rarely() { choices.word() } else { u64::from(choices.byte()) };
    memory.write_obj(kind.to_le(), GuestAddress(HEADER_AT)).expect("header is in memory");
    memory.write_obj(sector.to_le(), GuestAddress(HEADER_AT + 8)).expect("header is in memory");
    let mut chain = vec![(HEADER_AT, 16, 0)];
    let pieces = u64::from(choices.byte() % 8);
    match kind {
        0 | 1 => {
            let flags = if kind == 0 { WRITE } else { 0 };
            chain.extend((0..=pieces).map(|i| (DATA_AT + i * 0x1000, 512 * (u32::from(choices.byte() % 8) + 1), flags)));
        }
        8 => chain.push((DATA_AT, 20, WRITE)),
        11 | 13 => {
            for i in 0..=pieces {
                let at = DATA_AT + i * 16;
                let sectors = if choices.rarely() { choices.half() } else { u32::from(choices.byte()) };
                let flags = if choices.rarely() { choices.half() } else { 0 };
                memory.write_obj(choices.word().to_le() >> 16, GuestAddress(at)).expect("ranges are in memory");
                memory.write_obj(sectors.to_le(), GuestAddress(at + 8)).expect("ranges are in memory");
                memory.write_obj(flags.to_le(), GuestAddress(at + 12)).expect("ranges are in memory");
            }
            chain.push((DATA_AT, count(pieces + 1) * 16, 0));
        }
        _ => {}
    }
    chain.push((STATUS_AT, 1, WRITE));
    chain
}

/// Rare flips of addresses, lengths, directions and order, and other framings of the same bytes.
fn mutate(chain: &mut Vec<Piece>, choices: &mut Choices<'_>) {
    let mut i = 0;
    while i < chain.len() {
        let (at, len, flags) = chain[i];
        match choices.byte() {
            248 => chain[i].0 = choices.word(),
            249 => chain[i].1 = choices.half(),
            250 => chain[i].2 ^= WRITE,
            251 => chain[i].1 = u32::from(choices.byte()),
            252 => chain.swap(i, 0),
            253 => {
                chain.remove(i);
            }
            200..=231 if len > 1 && chain.len() < 32 => {
                let cut = u32::from(choices.byte()) % len;
                chain[i].1 = cut;
                chain.insert(i + 1, (at.wrapping_add(u64::from(cut)), len - cut, flags));
                i += 1;
            }
            _ => {}
        }
        i += 1;
    }
}

/// Writes the chain's descriptors from `table` on; the last has no NEXT unless flipped.
fn store(memory: &GuestMemoryMmap, table: u64, chain: &[Piece], choices: &mut Choices<'_>) {
    for (i, (at, len, flags)) in chain.iter().enumerate() {
        let last = i + 1 == chain.len();
        let mut flags = if last { *flags } else { *flags | NEXT };
        let mut next = u16::try_from(i).expect("a short chain") + 1;
        if choices.rarely() {
            flags ^= 1 << (choices.byte() % 4);
            next = u16::from(choices.byte());
        }
        let raw = RawDescriptor::from(Descriptor::new(*at, *len, flags, next));
        memory.write_obj(raw, GuestAddress(table + i as u64 * 16)).expect("table is in memory");
    }
}

fn check(memory: &GuestMemoryMmap, parsed: Parsed) {
    let reply = match parsed {
        Parsed::Request(request) => {
            assert!(request.operation.payload_bytes() <= IO_BYTES_MAX as usize);
            match &request.operation {
                Operation::Read { offset, len } => {
                    assert!(*len > 0 && len.is_multiple_of(512) && offset.is_multiple_of(512));
                    assert_eq!(request.reply.data.len(), u64::from(*len));
                }
                Operation::Write { offset, data } => {
                    assert!(!data.is_empty() && data.len().is_multiple_of(512) && offset.is_multiple_of(512));
                }
                Operation::Discard(ranges) | Operation::WriteZeroes(ranges) => {
                    for range in ranges {
                        assert!(range.offset.checked_add(range.len).is_some());
                        assert!(range.len <= u64::from(VHOST_ZERO_SECTORS_MAX) * 512);
                    }
                }
                Operation::Flush | Operation::GetId => {}
            }
            request.reply
        }
        Parsed::Refused { reply, .. } => reply,
        Parsed::Unanswerable(_) => return,
    };
    reply.write_bytes(memory, &[0; 8192]).expect("reply segments were checked");
    reply.write_status(memory, Status::Ok.byte()).expect("status was checked");
}

/// The target.
pub(super) fn run(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("1 MiB of memory");
    let ring = MockSplitQueue::new(&memory, QUEUE_SIZE);
    let mut chain = valid_chain(&memory, &mut choices);
    mutate(&mut chain, &mut choices);
    let indirect = choices.byte() % 2 == 1;
    if indirect {
        store(&memory, TABLE_AT, &chain, &mut choices);
        let len = count(chain.len() as u64) * 16;
        let len = if choices.rarely() { choices.half() } else { len };
        let head = RawDescriptor::from(Descriptor::new(TABLE_AT, len, INDIRECT, 0));
        memory.write_obj(head, ring.desc_table_addr()).expect("table is in memory");
    } else {
        store(&memory, ring.desc_table_addr().0, &chain, &mut choices);
    }
    let head = if choices.rarely() { u16::from(choices.byte()) } else { 0 };
    memory.write_obj(head, GuestAddress(ring.avail_addr().0 + 4)).expect("ring is in memory");
    memory.write_obj(1_u16, GuestAddress(ring.avail_addr().0 + 2)).expect("ring is in memory");
    let mut queue: Queue = ring.create_queue().expect("mock queue is valid");
    let Some(chain) = queue.iter(&memory).ok().and_then(|mut heads| heads.next()) else { return };
    check(&memory, parse(chain));
}
