//! The dirty log of a live migration: guest memory is copied, requests are run, memory is compared with the copy, and every page that
//! the back end changed must be in the log. The log comes and goes while rings run, as a front end does it.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "test code")]
#![allow(dead_code, reason = "each test file uses a part of the support module")]

mod support;

use ogee_client::{IoErrorKind, MemoryDevice};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use support::driver::{AVAIL, EVENT_IDX, Guest, MEMORY_BYTES, Ring, UNANSWERED, USED, VERSION_1, WRITE, connect_with};
use support::fault::FaultDevice;
use support::{TestServer, wait_until};
use vhost::vhost_user::Frontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const UNKNOWN: u32 = 77;
const MIB: usize = 1 << 20;
const PAGE: u64 = 4096;
const FEATURES: u64 = VERSION_1 | EVENT_IDX;
const PROTOCOL_FEATURES: u64 = 1 << 30;
const LOG_ALL: u64 = 1 << 26;
const LOG_BYTES: u64 = MEMORY_BYTES / PAGE / 8;
const SHMFD: VhostUserProtocolFeatures = VhostUserProtocolFeatures::LOG_SHMFD;

/// The log as a front end keeps it.
struct Log(File);

impl Log {
    fn new() -> Self {
        Self::with(LOG_BYTES, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)
    }

    fn with(bytes: u64, seals: SealFlags) -> Self {
        let file = File::from(memfd_create("log", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
        file.set_len(bytes).unwrap();
        fcntl_add_seals(&file, seals).unwrap();
        Self(file)
    }

    fn give(&self, front: &mut Frontend, bytes: u64) -> vhost::Result<()> {
        let region = VhostUserDirtyLogRegion { mmap_size: bytes, mmap_offset: 0, mmap_handle: self.0.as_raw_fd() };
        front.set_log_base(0, Some(region))
    }

    fn pages(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0_u8; usize::try_from(LOG_BYTES).unwrap()];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        (0..LOG_BYTES * 8).filter(|page| bytes[usize::try_from(page / 8).unwrap()] & 1 << (page % 8) != 0).collect()
    }

    fn clear(&self) {
        self.0.write_all_at(&vec![0; usize::try_from(LOG_BYTES).unwrap()], 0).unwrap();
    }
}

fn log_on(front: &mut Frontend, log: &Log, rings: &mut [Ring<'_>]) {
    log.give(front, LOG_BYTES).unwrap();
    front.set_features(FEATURES | PROTOCOL_FEATURES | LOG_ALL).unwrap();
    for ring in rings {
        ring.logged = true;
        ring.say_addresses(front);
    }
}

fn log_off(front: &mut Frontend, rings: &mut [Ring<'_>]) {
    front.set_features(FEATURES | PROTOCOL_FEATURES).unwrap();
    for ring in rings {
        ring.logged = false;
        ring.say_addresses(front);
    }
}

fn pages_of(ranges: &[(u64, u64)]) -> BTreeSet<u64> {
    ranges.iter().filter(|(_, len)| *len > 0).flat_map(|(at, len)| at / PAGE..=(at + len - 1) / PAGE).collect()
}

/// Pages that differ from the copy, without those that only the driver writes.
fn changed(guest: &Guest, copy: &[u8], rings: &[Ring<'_>]) -> BTreeSet<u64> {
    let now = guest.bytes(0, usize::try_from(MEMORY_BYTES).unwrap());
    let page = usize::try_from(PAGE).unwrap();
    let differs = now.chunks(page).zip(copy.chunks(page)).enumerate().filter(|(_, (now, then))| now != then);
    let drivers = |page: u64| rings.iter().any(|r| (r.base() + AVAIL..r.base() + USED).contains(&(page * PAGE)));
    differs.map(|(index, _)| index as u64).filter(|index| !drivers(*index)).collect()
}

fn all(guest: &Guest) -> Vec<u8> {
    guest.bytes(0, usize::try_from(MEMORY_BYTES).unwrap())
}

/// One request and what of guest memory its answer must touch, apart from the status and the used ring.
struct Case {
    what: &'static str,
    kind: u32,
    data: Vec<(u64, u32, u16)>,
    written: Vec<(u64, u64)>,
    before: fn(&FaultDevice),
}

fn cases(data: u64) -> Vec<Case> {
    let none: fn(&FaultDevice) = |_| {};
    let case = |what, kind, data, written| Case { what, kind, data, written, before: none };
    let far = data + 20 * PAGE;
    vec![
        case("read across pages", IN, vec![(data + 100, 8192, WRITE)], vec![(data + 100, 8192)]),
        case("scattered read", IN, vec![(data + 4000, 512, WRITE), (far + 10, 1024, WRITE)], vec![(data + 4000, 512), (far + 10, 1024)]),
        case("write", OUT, vec![(data, 4096, 0)], vec![]),
        case("flush", FLUSH, vec![], vec![]),
        case("id", GET_ID, vec![(far - 7, 20, WRITE)], vec![(far - 7, 20)]),
        case("unknown kind", UNKNOWN, vec![(data, 4096, WRITE)], vec![]),
        Case { before: |d| d.fail(Some(IoErrorKind::NoSpace)), ..case("failed read", IN, vec![(data, 4096, WRITE)], vec![]) },
        Case { before: |d| d.short_reads(true), ..case("short read", IN, vec![(data, 4096, WRITE)], vec![]) },
        case("discard", DISCARD, vec![(data, 16, 0)], vec![]),
    ]
}

#[test]
fn each_request_logs_the_pages_it_writes_and_no_others() {
    let device = FaultDevice::new(MemoryDevice::new(MIB));
    let server = TestServer::start(device.clone(), 2);
    let guest = Guest::new();
    let mut front = connect_with(server.path(), &guest, FEATURES, SHMFD);
    let mut rings = [Ring::start(&mut front, &guest, 1, FEATURES)];
    let data = rings[0].data();
    guest.put_bytes(data, &[7; 4096]);
    assert_eq!(rings[0].call(OUT, 0, &[(data, 4096, 0)], false).0, 0);
    let log = Log::new();
    log_on(&mut front, &log, &mut rings);
    let mut compared = 0;
    for round in 0..2 {
        for case in cases(data) {
            (case.before)(&device);
            guest.put_bytes(data, &vec![0x11; 32 * usize::try_from(PAGE).unwrap()]);
            log.clear();
            let (status, _) = rings[0].submit(case.kind, 8, &case.data, round == 1);
            let copy = all(&guest);
            // A loop that is awake does not wait for the kick, and may have answered before the copy.
            let was_quicker = copy[usize::try_from(status).unwrap()] != UNANSWERED;
            rings[0].kick();
            rings[0].wait_used();
            // Only a ring that stands writes nothing more.
            let base = u16::try_from(front.get_vring_base(1).unwrap()).unwrap();
            let changed = changed(&guest, &copy, &rings);
            let mut expected = pages_of(&case.written);
            expected.extend(pages_of(&[(status, 1), (rings[0].base() + USED, 6 + 8 * 128)]));
            let logged = log.pages();
            assert_eq!(logged, expected, "{}", case.what);
            assert!(changed.is_subset(&logged), "{}: {changed:?} changed", case.what);
            assert!(was_quicker || changed.contains(&(status / PAGE)), "{}: answered", case.what);
            compared += u32::from(!was_quicker);
            device.fail(None);
            device.short_reads(false);
            rings[0].restart(&mut front, base);
        }
    }
    assert!(compared > 0, "every answer was there before the copy");
    log_off(&mut front, &mut rings);
    log.clear();
    assert_eq!(rings[0].call(IN, 0, &[(data, 4096, WRITE)], false).0, 0);
    front.get_vring_base(1).unwrap();
    assert!(log.pages().is_empty(), "nothing is logged any more");
}

/// Requests are in flight, and being answered, at the moment at which the log comes; it is replaced and goes under load as well.
#[test]
fn a_log_that_comes_while_rings_run_misses_nothing_from_then_on() {
    const DEPTH: u64 = 16;
    let device = FaultDevice::new(MemoryDevice::new(MIB));
    let server = TestServer::start(device.clone(), 2);
    let guest = Guest::new();
    let mut front = connect_with(server.path(), &guest, FEATURES, SHMFD);
    let mut rings = [Ring::start(&mut front, &guest, 0, FEATURES), Ring::start(&mut front, &guest, 1, FEATURES)];
    for round in 0..120_u64 {
        let held = round % 3 == 0;
        device.hold(held);
        let started = device.started();
        for ring in &mut rings {
            let data = ring.data();
            guest.put_bytes(data, &vec![0xdd; usize::try_from(DEPTH * PAGE).unwrap()]);
            for slot in 0..DEPTH {
                ring.submit(IN, slot * 8, &[(data + slot * PAGE, 4096, WRITE)], slot % 2 == 0);
            }
            ring.kick();
        }
        if held {
            wait_until("requests at the device", || device.started() == started + 2 * DEPTH);
        }
        let (first, log) = (Log::new(), Log::new());
        log_on(&mut front, &first, &mut rings);
        // A larger log takes the place of the first, as when memory is added.
        log.give(&mut front, LOG_BYTES).unwrap();
        first.clear();
        let copy = all(&guest);
        device.hold(false);
        for ring in &mut rings {
            for _ in 0..DEPTH {
                ring.wait_used();
            }
        }
        let bases: Vec<u32> = (0..2).map(|index| front.get_vring_base(index).unwrap()).collect();
        let (changed, logged) = (changed(&guest, &copy, &rings), log.pages());
        let missing: Vec<_> = changed.difference(&logged).collect();
        assert!(missing.is_empty(), "round {round}: pages {missing:?} were written and are not in the log");
        assert!(!held || changed.len() as u64 >= 2 * DEPTH, "round {round}: only {changed:?} changed");
        assert!(first.pages().is_empty(), "the first log was used after the second took its place");
        for (ring, base) in rings.iter_mut().zip(bases) {
            ring.restart(&mut front, u16::try_from(base).unwrap());
        }
        log_off(&mut front, &mut rings);
    }
}

#[test]
fn a_log_that_cannot_be_trusted_ends_the_connection_and_nothing_else() {
    let server = TestServer::start(FaultDevice::new(MemoryDevice::new(MIB)), 1);
    let guest = Guest::new();
    let sealed = SealFlags::SHRINK | SealFlags::GROW;
    for (file_bytes, seals, bytes) in [
        (LOG_BYTES, SealFlags::GROW, LOG_BYTES), // could shrink
        (LOG_BYTES, sealed, LOG_BYTES + 1),      // longer than its file
        (LOG_BYTES, sealed, LOG_BYTES - 1),      // leaves out guest memory
        (LOG_BYTES, sealed, 1 << 40),
    ] {
        let mut front = connect_with(server.path(), &guest, FEATURES, SHMFD);
        Log::with(file_bytes, seals).give(&mut front, bytes).unwrap_err();
    }
    let mut front = connect_with(server.path(), &guest, FEATURES, SHMFD);
    let mut rings = [Ring::start(&mut front, &guest, 0, FEATURES)];
    let data = rings[0].data();
    log_on(&mut front, &Log::new(), &mut rings);
    assert_eq!(rings[0].call(IN, 0, &[(data, 512, WRITE)], false).0, 0);
}
