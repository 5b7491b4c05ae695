//! Death at every step of a request, seen by a back end that maps the memory anew; memory that is not ours.

use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;

fn area(queues: u16, size: u16) -> (VhostUserInflight, File) {
    InflightArea::create(queues, size).expect("new memory")
}

fn record(message: &VhostUserInflight, file: &File, index: usize) -> QueueRecord {
    let copy = file.try_clone().expect("a descriptor");
    InflightArea::map(message, copy).expect("our own memory").record(index).expect("a queue of it")
}

#[test]
fn new_memory_has_nothing_in_flight_wherever_the_ring_stands() {
    let (message, file) = area(3, 128);
    assert_eq!((message.num_queues, message.queue_size, message.mmap_offset), (3, 128, 0));
    for (index, used) in [(0, 0), (1, 500), (2, u16::MAX)] {
        assert_eq!(record(&message, &file, index).recover(used), [0_u16; 0]);
    }
    let mapped = InflightArea::map(&message, file).expect("our own memory");
    assert!(mapped.record(3).is_none());
}

#[test]
fn every_step_of_an_answer_may_be_the_last() {
    for steps in 0..4 {
        let (message, file) = area(1, 8);
        let mut dead = record(&message, &file, 0);
        dead.recover(65_535);
        let mut used: u16 = 65_535;
        for head in [5, 2, 7] {
            dead.taken(head);
        }
        if steps >= 1 {
            dead.answering(2);
        }
        if steps >= 2 {
            used = used.wrapping_add(1); // the used ring, which is guest memory
        }
        if steps >= 3 {
            dead.answered(2, used);
        }
        drop(dead);
        let mut next = record(&message, &file, 0);
        let expected: &[u16] = if steps >= 2 { &[5, 7] } else { &[5, 2, 7] };
        assert_eq!(next.recover(used), expected, "died after step {steps}");
        assert_eq!(next.recover(used), expected, "and died again before anything");
        next.taken(2);
        assert_eq!(record(&message, &file, 0).recover(used).last(), Some(&2), "a later chain comes after the old ones");
    }
}

#[test]
fn foreign_memory_is_refused() {
    let (message, file) = area(2, 64);
    let with = |change: fn(&mut VhostUserInflight)| {
        let mut changed = message;
        change(&mut changed);
        InflightArea::map(&changed, file.try_clone().expect("a descriptor")).expect_err("not our memory")
    };
    assert!(matches!(with(|m| m.num_queues = 65), InflightError::Shape { .. }));
    assert!(matches!(with(|m| m.queue_size = 2048), InflightError::Shape { .. }));
    assert!(matches!(with(|m| m.mmap_size = u64::MAX), InflightError::Size { .. }));
    assert!(matches!(with(|m| m.mmap_offset = 4096), InflightError::Short { .. }));
    assert!(matches!(with(|m| m.mmap_offset = u64::MAX), InflightError::Short { .. }));
    assert!(matches!(with(|m| m.mmap_offset = 1), InflightError::Short { .. }));
    let unsealed = File::from(memfd_create("t", MemfdFlags::ALLOW_SEALING).expect("a memfd"));
    unsealed.set_len(message.mmap_size).expect("room");
    assert!(matches!(InflightArea::map(&message, unsealed), Err(InflightError::NotSealed)));
    let zeros = File::from(memfd_create("t", MemfdFlags::ALLOW_SEALING).expect("a memfd"));
    zeros.set_len(message.mmap_size).expect("room");
    fcntl_add_seals(&zeros, SealFlags::SHRINK).expect("seals");
    assert!(matches!(InflightArea::map(&message, zeros), Err(InflightError::Layout { version: 0, .. })));
    let plain = tempfile::tempfile().expect("a file");
    plain.set_len(message.mmap_size).expect("room");
    assert!(matches!(InflightArea::map(&message, plain), Err(InflightError::Io { .. } | InflightError::NotSealed)));
}

#[derive(Debug, Clone)]
enum Step {
    Take,
    Answer(prop::sample::Index),
    /// Dies this many steps into an answer.
    Die(prop::sample::Index, u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Take),
        3 => any::<prop::sample::Index>().prop_map(Step::Answer),
        1 => (any::<prop::sample::Index>(), 0..3_u8).prop_map(|(i, n)| Step::Die(i, n)),
    ]
}

proptest! {
    /// Against a list: what was taken and is not in the used ring is what a successor finds, in order.
    #[test]
    fn a_successor_finds_exactly_what_is_unanswered(steps in prop::collection::vec(step(), 1..300), start: u16) {
        let (message, file) = area(1, 16);
        let mut used = start;
        let mut free: VecDeque<u16> = (0..16).collect();
        let mut open: Vec<u16> = Vec::new();
        let mut live = record(&message, &file, 0);
        live.recover(used);
        for step in steps {
            match step {
                Step::Take => {
                    if let Some(head) = free.pop_front() {
                        live.taken(head);
                        open.push(head);
                    }
                }
                Step::Answer(which) if !open.is_empty() => {
                    let head = open.remove(which.index(open.len()));
                    live.answering(head);
                    used = used.wrapping_add(1);
                    live.answered(head, used);
                    free.push_back(head);
                }
                Step::Die(which, depth) => {
                    if depth > 0 && !open.is_empty() {
                        let at = which.index(open.len());
                        live.answering(open[at]);
                        if depth > 1 {
                            used = used.wrapping_add(1);
                            free.push_back(open.remove(at));
                        }
                    }
                    live = record(&message, &file, 0);
                    prop_assert_eq!(&live.recover(used), &open);
                }
                Step::Answer(_) => {}
            }
        }
    }

    /// Whatever the memory holds, the heads are of the ring, once each.
    #[test]
    fn garbage_gives_heads_of_the_ring(bytes in prop::collection::vec(any::<u8>(), 16 + 16 * 16), used: u16) {
        let (message, file) = area(1, 16);
        let mut record = record(&message, &file, 0);
        for (at, byte) in bytes.iter().enumerate() {
            record.store(at, *byte);
        }
        let heads = record.recover(used);
        let mut unique = heads.clone();
        unique.sort_unstable();
        unique.dedup();
        prop_assert_eq!(unique.len(), heads.len());
        prop_assert!(heads.iter().all(|head| *head < 16));
        prop_assert_eq!(record.recover(used), heads);
    }
}
