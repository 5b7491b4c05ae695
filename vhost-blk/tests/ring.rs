//! End to end over a socket, one protocol step at a time: requests, stops, reconnects, faults and bad drivers.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "test code")]
#![allow(dead_code, reason = "each test file uses a part of the support module")]

mod support;

use ogee_client::{IoErrorKind, MemoryDevice};
use ogee_vhost_blk::{RequestKind, StopHandle, VhostBlkConfig, VhostBlkServer, serve};
use std::time::Duration;
use support::driver::{
    EVENT_IDX, Guest, QUEUE_SIZE, Ring, VERSION_1, WRITE, config, connect,
};
use support::fault::FaultDevice;
use support::{TestServer, wait_until};
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const MIB: usize = 1 << 20;

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..251).cycle().take(len).map(|i: u8| i ^ seed).collect()
}

/// A number for each ring.
fn seed_of(ring: usize) -> u8 {
    u8::try_from(ring).unwrap()
}

fn range(guest: &Guest, at: u64, sector: u64, count: u32, flags: u32) {
    guest.put(at, sector);
    guest.put(at + 8, count);
    guest.put(at + 12, flags);
}

/// Every request type, with and without indirect descriptors, with and without EVENT_IDX.
#[test]
fn every_request_type_works_in_every_ring_mode() {
    for (indirect, features) in [(false, VERSION_1), (true, VERSION_1), (false, VERSION_1 | EVENT_IDX), (true, !0)] {
        let server = TestServer::start(MemoryDevice::new(MIB), 1);
        let guest = Guest::new();
        let mut front = connect(server.path(), &guest, features);
        let mut ring = Ring::start(&mut front, &guest, 0, features);
        let data = ring.data();

        let written = pattern(7, 8192);
        guest.put_bytes(data, &written);
        assert_eq!(ring.call(OUT, 8, &[(data, 4096, 0), (data + 4096, 4096, 0)], indirect), (OK, 1));
        let back = data + 0x8000;
        assert_eq!(ring.call(IN, 8, &[(back, 512, WRITE), (back + 512, 7680, WRITE)], indirect), (OK, 8193));
        assert_eq!(guest.bytes(back, 8192), written);
        assert_eq!(ring.call(FLUSH, 0, &[], indirect), (OK, 1));

        assert_eq!(ring.call(GET_ID, 0, &[(back, 20, WRITE)], indirect), (OK, 21));
        assert_eq!(&guest.bytes(back, 20), b"ogee-memory\0\0\0\0\0\0\0\0\0");

        range(&guest, data, 8, 8, 0);
        assert_eq!(ring.call(DISCARD, 0, &[(data, 16, 0)], indirect), (OK, 1));
        range(&guest, data, 16, 1, 1);
        range(&guest, data + 16, 18, 1, 0);
        assert_eq!(ring.call(WRITE_ZEROES, 0, &[(data, 32, 0)], indirect), (OK, 1));
        assert_eq!(ring.call(IN, 8, &[(back, 8192, WRITE)], indirect), (OK, 8193));
        let mut expected = written;
        expected[0..4096].fill(0);
        expected[4096..4608].fill(0);
        expected[5120..5632].fill(0);
        assert_eq!(guest.bytes(back, 8192), expected);

        assert_eq!(ring.call(99, 0, &[], indirect), (UNSUPP, 1));
        assert_eq!(ring.call(IN, 0, &[(back, 100, WRITE)], indirect).0, IOERR);
        assert_eq!(ring.call(IN, MIB as u64 / 512, &[(back, 512, WRITE)], indirect).0, IOERR, "beyond the end");

        let counts = |kind| {
            let counts = server.stats.get(kind);
            (counts.requests, counts.bytes, counts.errors)
        };
        assert_eq!(counts(RequestKind::Read), (3, 16_384, 1));
        assert_eq!(counts(RequestKind::Write), (1, 8192, 0));
        assert_eq!(counts(RequestKind::Flush), (1, 0, 0));
        assert_eq!(counts(RequestKind::GetId), (1, 0, 0));
        assert_eq!(counts(RequestKind::Discard), (1, 4096, 0));
        assert_eq!(counts(RequestKind::WriteZeroes), (1, 1024, 0));
        assert_eq!(counts(RequestKind::Malformed), (2, 0, 2));
        assert_eq!(server.stats.connections(), 1);
        assert!(server.stats.is_connected());
        drop(front);
        wait_until("the front end is gone", || !server.stats.is_connected());
        server.end();
    }
}

#[test]
fn a_full_ring_is_answered_completely_and_out_of_order_submission_wraps() {
    let features = VERSION_1 | EVENT_IDX;
    let server = TestServer::start(MemoryDevice::new(MIB), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, features);
    let mut ring = Ring::start(&mut front, &guest, 0, features);
    let data = ring.data();
    for round in 0..40_u64 {
        let batch = QUEUE_SIZE / 8;
        let mut waiting = Vec::new();
        for i in 0..u64::from(batch) {
            let at = data + i * 4096;
            guest.put_bytes(at, &pattern((round * 16 + i).to_le_bytes()[0], 4096));
            waiting.push(ring.submit(OUT, i * 8, &[(at, 4096, 0)], i % 2 == 0).0);
        }
        ring.kick_if_wanted();
        for _ in 0..batch {
            ring.wait_used();
        }
        assert!(waiting.iter().all(|status| guest.get::<u8>(*status) == OK));
    }
    assert_eq!(server.stats.get(RequestKind::Write).requests, 640);
    assert_eq!(ring.used_idx(), 640);
}

#[test]
fn a_request_that_comes_while_others_wait_is_taken_at_once() {
    let device = FaultDevice::new(MemoryDevice::new(MIB));
    let server = TestServer::start(device.clone(), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1 | EVENT_IDX);
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1 | EVENT_IDX);
    let data = ring.data();
    device.hold(true);
    for i in 1..=10 {
        ring.submit(IN, i, &[(data, 512, WRITE)], false);
        ring.kick();
        wait_until("request at the device", || device.started() == i);
    }
    // The serial needs no device call, so it overtakes.
    let (status, head) = ring.submit(GET_ID, 0, &[(data, 20, WRITE)], false);
    ring.kick();
    assert_eq!(ring.wait_used().0, u32::from(head));
    assert_eq!(guest.get::<u8>(status), OK);
    assert_eq!(ring.used_idx(), 1);
    device.hold(false);
    for _ in 0..10 {
        ring.wait_used();
    }
}

#[test]
fn queues_work_in_parallel_and_wait_only_for_their_own_requests() {
    let device = FaultDevice::new(MemoryDevice::new(8 * MIB));
    let server = TestServer::start(device.clone(), 4);
    let guest = Guest::new();
    let features = VERSION_1 | EVENT_IDX;
    let mut front = connect(server.path(), &guest, features);
    assert_eq!(front.get_queue_num().unwrap(), 4);
    let mut rings: Vec<Ring<'_>> = (0..4).map(|index| Ring::start(&mut front, &guest, index, features)).collect();
    device.hold(true);
    for (i, ring) in rings.iter_mut().enumerate() {
        let data = ring.data();
        guest.put_bytes(data, &pattern(seed_of(i), 4096));
        ring.submit(OUT, i as u64 * 8, &[(data, 4096, 0)], false);
        ring.kick();
    }
    wait_until("all four queues at the device", || device.started() == 4);
    device.hold(false);
    std::thread::scope(|scope| {
        for ring in &mut rings {
            scope.spawn(|| {
                ring.wait_used();
                let data = ring.data() + 0x1_0000;
                for _ in 0..200 {
                    assert_eq!(ring.call(IN, ring.index as u64 * 8, &[(data, 4096, WRITE)], true), (OK, 4097));
                }
            });
        }
    });
    for (i, ring) in rings.iter().enumerate() {
        assert_eq!(guest.bytes(ring.data() + 0x1_0000, 4096), pattern(seed_of(i), 4096));
    }
}

#[test]
fn device_errors_fail_one_request_and_not_the_queue() {
    let device = FaultDevice::new(MemoryDevice::new(MIB));
    let server = TestServer::start(device.clone(), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    let data = ring.data();
    range(&guest, data + 4096, 0, 8, 0);
    let ranges = (data + 4096, 16, 0);
    for kind in [
        IoErrorKind::InvalidInput,
        IoErrorKind::ReadOnly,
        IoErrorKind::Fenced,
        IoErrorKind::NoSpace,
        IoErrorKind::TimedOut,
        IoErrorKind::Corrupt,
        IoErrorKind::Closed,
    ] {
        device.fail(Some(kind));
        assert_eq!(ring.call(IN, 0, &[(data, 512, WRITE)], false).0, IOERR);
        assert_eq!(ring.call(OUT, 0, &[(data, 512, 0)], false).0, IOERR);
        assert_eq!(ring.call(FLUSH, 0, &[], false).0, IOERR);
        assert_eq!(ring.call(DISCARD, 0, &[ranges], false).0, IOERR);
        assert_eq!(ring.call(WRITE_ZEROES, 0, &[ranges], false).0, IOERR);
        assert_eq!(ring.call(GET_ID, 0, &[(data, 20, WRITE)], false).0, OK);
        device.fail(None);
        assert_eq!(ring.call(OUT, 0, &[(data, 512, 0)], false).0, OK);
    }
    device.short_reads(true);
    guest.put_bytes(data, &[0xaa; 1024]);
    assert_eq!(ring.call(IN, 0, &[(data, 1024, WRITE)], false).0, IOERR, "a short answer is no answer");
    assert_eq!(guest.bytes(data, 1024), [0xaa; 1024], "and none of it is shown");
    assert_eq!(server.stats.get(RequestKind::Read).errors, 8);
}

#[test]
fn read_only_devices_say_so_and_refuse_writes() {
    let server = TestServer::start(MemoryDevice::with_data(vec![5; MIB], true), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    let offered = front.get_features().unwrap();
    assert_ne!(offered & 1 << 5, 0, "VIRTIO_BLK_F_RO");
    assert_eq!(offered & (1 << 13 | 1 << 14), 0, "no discard, no write-zeroes");
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    let data = ring.data();
    assert_eq!(ring.call(OUT, 0, &[(data, 512, 0)], false).0, IOERR);
    assert_eq!(ring.call(IN, 0, &[(data, 512, WRITE)], false), (OK, 513));
    assert_eq!(guest.bytes(data, 512), [5; 512]);
}

#[test]
fn configuration_is_served_checked_and_follows_a_resize() {
    let device = MemoryDevice::new(MIB);
    let server = TestServer::start(device.clone(), 3);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    for len in [57, 60] {
        let bytes = config(&mut front, 0, len).unwrap();
        assert_eq!(bytes.len(), len as usize);
        assert_eq!(bytes[0..8], 2048_u64.to_le_bytes());
        assert_eq!(bytes[34..36], [3, 0]);
    }
    device.resize(2 * MIB);
    assert_eq!(config(&mut front, 0, 8).unwrap(), 4096_u64.to_le_bytes());
    let flags = VhostUserConfigFlags::WRITABLE;
    front.set_config(32, flags, &[0]).unwrap();
    assert_eq!(config(&mut front, 32, 1).unwrap(), [0]);
    // Anything else is a mistake of the front end, not of its guest, and ends the connection; the next one starts with
    // the write cache on again.
    front.set_config(0, flags, &[1; 8]).unwrap_err();
    drop(front);
    let mut front = connect(server.path(), &guest, VERSION_1);
    assert_eq!(config(&mut front, 32, 1).unwrap(), [1]);
}

/// Firmware and then the operating system: rings are stopped and started on one connection.
#[test]
fn a_ring_stops_and_starts_again_on_one_connection() {
    let server = TestServer::start(MemoryDevice::new(MIB), 2);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    for round in 1..=5_u32 {
        let features = if round % 2 == 0 { VERSION_1 | EVENT_IDX | 1 << 30 } else { VERSION_1 | 1 << 30 };
        front.set_features(features).unwrap();
        let mut ring = Ring::start(&mut front, &guest, 0, features);
        let data = ring.data();
        for _ in 0..round {
            assert_eq!(ring.call(IN, 0, &[(data, 512, WRITE)], false), (OK, 513));
        }
        front.set_vring_enable(0, false).unwrap();
        assert_eq!(front.get_vring_base(0).unwrap(), round);
    }
}

#[test]
fn a_disabled_ring_takes_nothing_until_it_is_enabled() {
    let server = TestServer::start(MemoryDevice::new(MIB), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    let data = ring.data();
    assert_eq!(ring.call(IN, 0, &[(data, 512, WRITE)], false).0, OK);
    for _ in 0..3 {
        let before = ring.used_idx();
        front.set_vring_enable(0, false).unwrap();
        ring.submit(IN, 0, &[(data, 512, WRITE)], false);
        ring.kick();
        // Two round trips on the connection give the queue's thread time to do what it must not.
        config(&mut front, 0, 60).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(ring.used_idx(), before);
        front.set_vring_enable(0, true).unwrap();
        ring.wait_used();
    }
}

#[test]
fn get_vring_base_is_answered_after_the_requests_in_flight() {
    let device = FaultDevice::new(MemoryDevice::new(MIB));
    let server = TestServer::start(device.clone(), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    let data = ring.data();
    device.hold(true);
    for i in 0..5 {
        ring.submit(OUT, i, &[(data, 512, 0)], false);
    }
    ring.kick();
    wait_until("five writes at the device", || device.started() == 5);
    std::thread::scope(|scope| {
        let base = scope.spawn(|| front.get_vring_base(0).unwrap());
        // A request after the stop is not taken.
        ring.submit(OUT, 9, &[(data, 512, 0)], false);
        std::thread::sleep(Duration::from_millis(100));
        assert!(!base.is_finished(), "answered with requests in flight");
        assert_eq!(ring.used_idx(), 0);
        device.hold(false);
        let base = base.join().unwrap();
        assert!((5..=6).contains(&base), "{base}");
        assert_eq!(u32::from(ring.used_idx()), base, "all that was taken is answered before the reply");
    });
    // It goes on where it stopped.
    let base = ring.used_idx();
    ring.restart(&mut front, base);
    for _ in 0..6 {
        ring.wait_used();
    }
    assert_eq!(ring.used_idx(), 6);
}

/// A front end that goes away with requests in flight: they end at the device, guest memory is left alone, and the next
/// front end is served after that and may ask for the same again.
#[test]
fn a_front_end_that_leaves_gets_no_late_answers() {
    let device = FaultDevice::new(MemoryDevice::new(MIB));
    let server = TestServer::start(device.clone(), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    let data = ring.data();
    assert_eq!(ring.call(IN, 0, &[(data, 512, WRITE)], false).0, OK);
    device.hold(true);
    guest.put_bytes(data, &pattern(9, 512));
    let started = device.started();
    let (status, _) = ring.submit(OUT, 4, &[(data, 512, 0)], false);
    ring.kick();
    wait_until("write at the device", || device.started() == started + 1);
    drop(front);
    let path = server.path.clone();
    std::thread::scope(|scope| {
        let next = scope.spawn(|| connect(&path, &guest, VERSION_1));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!next.is_finished(), "the next front end waits for the write of the previous one");
        device.hold(false);
        let mut front = next.join().unwrap();
        assert_eq!(ring.used_idx(), 1);
        assert_eq!(guest.get::<u8>(status), 0xee, "no status was written");
        // As QEMU does: go on at the used index. The write is run again.
        ring.restart(&mut front, 1);
        ring.wait_used();
        assert_eq!(guest.get::<u8>(status), OK);
        assert_eq!(server.stats.get(RequestKind::Write).requests, 2);
        let back = data + 4096;
        assert_eq!(ring.call(IN, 4, &[(back, 512, WRITE)], false), (OK, 513));
        assert_eq!(guest.bytes(back, 512), pattern(9, 512));
    });
}

#[test]
fn front_ends_come_and_go_without_leaks() {
    let server = TestServer::start(MemoryDevice::new(MIB), 4);
    let guest = Guest::new();
    let open_files = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let visit = |how: usize| {
        let mut front = connect(server.path(), &guest, VERSION_1);
        if how > 0 {
            let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
            let data = ring.data();
            assert_eq!(ring.call(IN, 0, &[(data, 512, WRITE)], false).0, OK);
            if how > 1 {
                front.get_vring_base(0).unwrap();
            }
        }
    };
    visit(0);
    visit(1);
    visit(2);
    // Connecting again waits for the end of the previous one, so only one connection's files are open.
    drop(connect(server.path(), &guest, VERSION_1));
    let before = open_files();
    for round in 0..30 {
        visit(round % 3);
    }
    drop(std::os::unix::net::UnixStream::connect(server.path()).unwrap());
    drop(connect(server.path(), &guest, VERSION_1));
    wait_until("files closed again", || open_files() <= before + 8);
    assert!(server.stats.connections() >= 34);
    server.end();
}

#[test]
fn a_stop_while_connected_answers_what_is_in_flight_first() {
    let device = FaultDevice::new(MemoryDevice::new(MIB));
    let server = TestServer::start(device.clone(), 2);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    let mut ring = Ring::start(&mut front, &guest, 1, VERSION_1);
    let data = ring.data();
    device.hold(true);
    let (status, _) = ring.submit(OUT, 0, &[(data, 512, 0)], false);
    ring.kick();
    wait_until("write at the device", || device.started() == 1);
    server.stop.stop();
    std::thread::scope(|scope| {
        let ended = scope.spawn(|| server.end());
        assert!(!ended.is_finished());
        device.hold(false);
        ended.join().unwrap();
    });
    assert_eq!(ring.wait_used().1, 1);
    assert_eq!(guest.get::<u8>(status), OK);
    front.get_features().expect_err("the connection is closed");
}

#[test]
fn a_stop_gives_up_on_a_device_that_hangs() {
    let device = FaultDevice::new(MemoryDevice::new(MIB));
    let server =
        TestServer::start_with(device.clone(), |config| config.drain_timeout = Duration::from_millis(50));
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    let data = ring.data();
    device.hold(true);
    let (status, _) = ring.submit(OUT, 0, &[(data, 512, 0)], false);
    ring.kick();
    wait_until("write at the device", || device.started() == 1);
    // Also with the protocol thread inside of GET_VRING_BASE.
    std::thread::scope(|scope| {
        let base = scope.spawn(move || front.get_vring_base(0));
        std::thread::sleep(Duration::from_millis(50));
        server.end();
        base.join().unwrap().expect_err("no position is told for a ring with requests given up");
    });
    device.hold(false);
    assert_eq!(guest.get::<u8>(status), 0xee);
    assert_eq!(ring.used_idx(), 0);
}

#[test]
fn a_stop_without_a_front_end_and_before_serving_ends_at_once() {
    let server = TestServer::start(MemoryDevice::new(MIB), 1);
    server.end();
    let dir = tempfile::tempdir().unwrap();
    let stop = StopHandle::new().unwrap();
    stop.stop();
    stop.stop();
    serve(MemoryDevice::new(MIB), VhostBlkConfig::new(dir.path().join("s")), stop).unwrap();
}

#[test]
fn broken_rings_are_left_alone_until_they_are_reset() {
    let server = TestServer::start(MemoryDevice::new(MIB), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    let ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    let data = ring.data();
    // An index that runs ahead of the ring.
    ring.set_avail_idx(QUEUE_SIZE + 1);
    for _ in 0..10 {
        ring.kick();
    }
    assert_eq!(front.get_vring_base(0).unwrap(), 0);
    // A head out of range, a loop, a chain without status: given back or ignored, and the ring goes on.
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    ring.publish(QUEUE_SIZE + 5);
    ring.push_chain(&[(data, 16, 0)], false);
    ring.kick();
    assert_eq!(ring.wait_used().1, 0, "the chain without a status comes back");
    assert_eq!(ring.call(IN, 0, &[(data, 512, WRITE)], false).0, OK);
    assert_eq!(server.stats.get(RequestKind::Malformed).errors, 2);
}

#[test]
fn legacy_drivers_get_errors_and_nothing_breaks() {
    let server = TestServer::start(MemoryDevice::new(MIB), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, 0);
    let mut ring = Ring::start(&mut front, &guest, 0, 0);
    let data = ring.data();
    assert_eq!(ring.call(IN, 0, &[(data, 512, WRITE)], false).0, IOERR);
    drop(front);
    let mut front = connect(server.path(), &guest, VERSION_1);
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    assert_eq!(ring.call(IN, 0, &[(data, 512, WRITE)], false).0, OK);
}

#[test]
fn large_requests_and_many_segments_work() {
    let server = TestServer::start(MemoryDevice::new(8 * MIB), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    // Nothing but this ring uses memory from 1 MiB on.
    let data = 1 << 20;
    let written = pattern(3, 4 * MIB);
    guest.put_bytes(data, &written);
    assert_eq!(ring.call(OUT, 8, &[(data, 4 << 20, 0)], false), (OK, 1));
    guest.put_bytes(data, &vec![0xff; 4 * MIB]);
    let pieces: Vec<(u64, u32, u16)> = (0..60).map(|i| (data + i * 4096, 4096, WRITE)).collect();
    assert_eq!(ring.call(IN, 8, &pieces, true), (OK, 60 * 4096 + 1));
    assert_eq!(guest.bytes(data, 60 * 4096), written[..60 * 4096]);
    assert_eq!(ring.call(IN, 8, &[(data, 4 << 20, WRITE)], false), (OK, (4 << 20) + 1));
    assert_eq!(guest.bytes(data, 4 * MIB), written);
}

#[test]
fn the_configuration_is_validated_and_a_live_socket_is_not_taken() {
    let server = TestServer::start(MemoryDevice::new(MIB), 1);
    let bind = |change: &dyn Fn(&mut VhostBlkConfig)| {
        let mut config = VhostBlkConfig::new(server.path());
        change(&mut config);
        let bound = VhostBlkServer::bind(MemoryDevice::new(MIB), config, StopHandle::new().unwrap());
        bound.err().expect("must be refused").to_string()
    };
    assert!(bind(&|_| {}).contains("another process serves this socket"));
    assert!(bind(&|config| config.num_queues = 0).contains("1 to 64"));
    assert!(bind(&|config| config.num_queues = 65).contains("1 to 64"));
    assert!(bind(&|config| config.queue_size = 100).contains("power of two"));
    assert!(bind(&|config| config.queue_size = 2048).contains("1024"));
    // The live server was probed, not disturbed.
    let front = Frontend::connect(server.path(), 1).unwrap();
    front.set_owner().unwrap();
    assert_ne!(front.get_features().unwrap() & VERSION_1, 0);
}
