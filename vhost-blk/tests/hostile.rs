//! A hostile guest: rings full of garbage, also changed while the daemon reads them, and garbage submitted again after a
//! death. The daemon answers or leaves them alone, goes on serving its other queues, and stops when asked to.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "test code")]
#![allow(dead_code, reason = "each test file uses a part of the support module")]

mod support;

use ogee_client::MemoryDevice;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::sync::atomic::{AtomicBool, Ordering};
use support::TestServer;
use support::driver::{
    EVENT_IDX, Guest, INDIRECT, Inflight, MEMORY_BYTES, NEXT, QUEUE_SIZE, Ring, VERSION_1, WRITE, connect_with,
};
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;

const GET_ID: u32 = 8;
const OK: u8 = 0;
const MIB: usize = 1 << 20;
const FEATURES: u64 = VERSION_1 | EVENT_IDX;
/// Where the garbage points to: tables of descriptors and headers of requests.
const TABLE: u64 = 0x2_0000;
const HEADER: u64 = 0x8000;

/// One descriptor, most of them nearly right.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        4 => (0..8_u64).prop_map(|i| HEADER + i * 64),
        4 => (0..64_u64).prop_map(|i| 0x4_0000 + i * 4096),
        3 => (0..4_u64).prop_map(|i| TABLE + i * 16),
        1 => Just(MEMORY_BYTES - 8),
        1 => Just(MEMORY_BYTES),
        1 => Just(u64::MAX - 4),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => Just(16_u32), 3 => Just(1), 3 => Just(512), 3 => Just(4096), 2 => Just(64), 1 => Just(0), 1 => Just(1 << 24),
        1 => Just(u32::MAX), 1 => any::<u32>(),
    ];
    let flags = prop_oneof![
        4 => Just(NEXT), 3 => Just(NEXT | WRITE), 3 => Just(WRITE), 2 => Just(INDIRECT), 1 => Just(0), 1 => any::<u16>(),
    ];
    let next = prop_oneof![6 => 0..16_u16, 1 => 0..QUEUE_SIZE, 1 => any::<u16>()];
    (address, len, flags, next)
}

#[derive(Debug, Clone)]
struct Garbage {
    ring: Vec<(u64, u32, u16, u16)>,
    table: Vec<(u64, u32, u16, u16)>,
    headers: Vec<(u32, u64)>,
    heads: Vec<u16>,
    /// Added to the available index beyond the heads.
    runs_ahead: u16,
}

fn garbage() -> impl Strategy<Value = Garbage> {
    let kind = prop_oneof![6 => 0..16_u32, 1 => any::<u32>()];
    let sector = prop_oneof![6 => 0..4096_u64, 1 => any::<u64>()];
    let head = prop_oneof![8 => 0..16_u16, 1 => any::<u16>()];
    let ahead = prop_oneof![8 => Just(0_u16), 1 => any::<u16>()];
    (
        prop::collection::vec(descriptor(), 16),
        prop::collection::vec(descriptor(), 8),
        prop::collection::vec((kind, sector), 8),
        prop::collection::vec(head, 1..40),
        ahead,
    )
        .prop_map(|(ring, table, headers, heads, runs_ahead)| Garbage { ring, table, headers, heads, runs_ahead })
}

impl Garbage {
    /// Writes everything but the available index into the part of ring 0.
    fn put(&self, guest: &Guest) {
        for (base, list) in [(0, &self.ring), (TABLE, &self.table)] {
            for (at, (address, len, flags, next)) in (base..).step_by(16).zip(list) {
                guest.put(at, RawDescriptor::from(Descriptor::new(*address, *len, *flags, *next)));
            }
        }
        for (at, (kind, sector)) in (HEADER..).step_by(64).zip(&self.headers) {
            guest.put(at, kind.to_le());
            guest.put(at + 8, sector.to_le());
        }
    }

    fn publish(&self, ring: &Ring<'_>) {
        for head in &self.heads {
            ring.publish(*head);
        }
        if self.runs_ahead > 0 {
            ring.set_avail_idx(u16::try_from(self.heads.len()).unwrap().wrapping_add(self.runs_ahead));
        }
        ring.kick();
    }
}

/// The neighbour on ring 1 is served as ever.
fn neighbour_is_well(ring: &mut Ring<'_>, guest: &Guest) {
    let data = ring.data();
    assert_eq!(ring.call(GET_ID, 0, &[(data, 20, WRITE)], true), (OK, 21));
    assert_eq!(&guest.bytes(data, 11), b"ogee-memory");
}

fn server() -> TestServer {
    TestServer::start(MemoryDevice::new(4 * MIB), 2)
}

fn run(cases: u32, check: impl Fn(Garbage)) {
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    runner
        .run(&garbage(), |garbage| {
            check(garbage);
            Ok(())
        })
        .unwrap();
}

#[test]
fn garbage_in_a_ring_hurts_nobody_else() {
    let server = server();
    let guest = Guest::new();
    let mut front = connect_with(server.path(), &guest, FEATURES, VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    let _inflight = Inflight::get(&mut front, 2);
    let mut good = Ring::start(&mut front, &guest, 1, FEATURES);
    let front = std::cell::RefCell::new(front);
    let good = std::cell::RefCell::new(&mut good);
    run(400, |garbage| {
        let mut front = front.borrow_mut();
        let bad = Ring::start(&mut front, &guest, 0, FEATURES);
        garbage.put(&guest);
        garbage.publish(&bad);
        neighbour_is_well(&mut good.borrow_mut(), &guest);
        // The ring stops whatever was in it, so the guest can be reset.
        front.get_vring_base(0).unwrap();
    });
}

#[test]
fn rings_that_change_while_they_are_read_hurt_nobody_else() {
    let server = server();
    let guest = Guest::new();
    let mut front = connect_with(server.path(), &guest, FEATURES, VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    let _inflight = Inflight::get(&mut front, 2);
    let mut good = Ring::start(&mut front, &guest, 1, FEATURES);
    let front = std::cell::RefCell::new(front);
    let good = std::cell::RefCell::new(&mut good);
    run(60, |garbage| {
        let mut front = front.borrow_mut();
        let bad = Ring::start(&mut front, &guest, 0, FEATURES);
        let mut other = garbage.clone();
        other.ring.rotate_left(3);
        other.table.rotate_left(1);
        other.headers.rotate_left(5);
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    garbage.put(&guest);
                    other.put(&guest);
                }
            });
            garbage.publish(&bad);
            for _ in 0..5 {
                neighbour_is_well(&mut good.borrow_mut(), &guest);
                bad.kick();
            }
            front.get_vring_base(0).unwrap();
            over.store(true, Ordering::Relaxed);
        });
    });
}

/// Garbage noted as in flight, its descriptors changed since, and a back end that submits it again.
#[test]
fn garbage_that_is_submitted_again_hurts_nobody_else() {
    let server = server();
    let guest = Guest::new();
    let shmfd = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    run(150, |garbage| {
        let mut front = connect_with(server.path(), &guest, FEATURES, shmfd);
        let inflight = Inflight::get(&mut front, 2);
        let mut good = Ring::start(&mut front, &guest, 1, FEATURES);
        neighbour_is_well(&mut good, &guest);
        drop(front);
        // What a front end may do to the memory: every byte of both records' entries (layout: `src/inflight.rs`).
        let mut bytes = Vec::new();
        for (i, (kind, sector)) in garbage.headers.iter().cycle().take(128).enumerate() {
            let noted = u64::from(kind.wrapping_add(u32::try_from(i).unwrap()) % 2 == 0);
            bytes.extend_from_slice(&(noted | u64::from(*kind) << 48).to_le_bytes());
            bytes.extend_from_slice(&sector.to_le_bytes());
        }
        std::os::unix::fs::FileExt::write_all_at(&inflight.file, &bytes, 16).unwrap();
        let mut front = connect_with(server.path(), &guest, FEATURES, shmfd);
        inflight.set(&mut front).unwrap();
        let base = good.used_idx();
        good.restart(&mut front, base);
        let bad = Ring::start(&mut front, &guest, 0, FEATURES);
        garbage.put(&guest);
        garbage.publish(&bad);
        neighbour_is_well(&mut good, &guest);
        front.get_vring_base(0).unwrap();
    });
}
