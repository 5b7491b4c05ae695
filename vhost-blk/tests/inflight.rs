//! Requests in flight over the end of a back end, and what the back end says by itself. The death is a stop that gives
//! requests up: nothing of them is answered, as with a kill. Real kills: `vm-tests/tests/vhost_killed.rs`.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "test code")]
#![allow(dead_code, reason = "each test file uses a part of the support module")]

mod support;

use ogee_client::MemoryDevice;
use ogee_vhost_blk::RequestKind;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use support::driver::{EVENT_IDX, Guest, Inflight, QUEUE_SIZE, Ring, VERSION_1, WRITE, config, connect, connect_with};
use support::fault::FaultDevice;
use support::{TestServer, wait_until};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const OK: u8 = 0;
const MIB: usize = 1 << 20;
const FEATURES: u64 = VERSION_1 | EVENT_IDX;
const SHMFD: VhostUserProtocolFeatures = VhostUserProtocolFeatures::INFLIGHT_SHMFD;

fn start(device: &FaultDevice, queues: u16) -> TestServer {
    TestServer::start_with(device.clone(), |config| {
        config.num_queues = queues;
        config.drain_timeout = Duration::from_millis(1);
    })
}

fn tracked(server: &TestServer, guest: &Guest) -> Frontend {
    connect_with(server.path(), guest, FEATURES, SHMFD)
}

/// Ends a server with requests at a device that holds them; what it started there never ends.
fn die(server: TestServer, device: &FaultDevice, at_device: u64) -> FaultDevice {
    wait_until("requests at the device", || device.started() >= at_device);
    server.end();
    FaultDevice::new(device.memory.clone())
}

#[test]
fn requests_answered_out_of_order_are_not_run_again_and_none_is_left_out() {
    let dead = FaultDevice::new(MemoryDevice::new(MIB));
    let server = start(&dead, 2);
    let guest = Guest::new();
    let mut front = tracked(&server, &guest);
    let inflight = Inflight::get(&mut front, 2);
    let mut ring = Ring::start(&mut front, &guest, 1, FEATURES);
    let data = ring.data();
    assert_eq!(ring.call(GET_ID, 0, &[(data, 20, WRITE)], false).0, OK);
    dead.hold(true);
    let mut statuses = Vec::new();
    for i in 1..=4_u8 {
        let at = data + u64::from(i) * 4096;
        guest.put_bytes(at, &[i; 512]);
        statuses.push(ring.submit(OUT, u64::from(i), &[(at, 512, 0)], i % 2 == 0));
        // Overtakes the write: it needs no device.
        let (status, head) = ring.submit(GET_ID, 0, &[(data, 20, WRITE)], false);
        ring.kick();
        assert_eq!(ring.wait_used().0, u32::from(head));
        assert_eq!(guest.get::<u8>(status), OK);
    }
    let live = die(server, &dead, 4);
    assert!(statuses.iter().all(|(status, _)| guest.get::<u8>(*status) == 0xee));

    let server = start(&live, 2);
    let mut front = tracked(&server, &guest);
    inflight.set(&mut front).unwrap();
    let base = ring.used_idx();
    ring.restart(&mut front, base);
    let mut answered: Vec<u32> = (0..4).map(|_| ring.wait_used().0).collect();
    answered.sort_unstable();
    let mut expected: Vec<u32> = statuses.iter().map(|(_, head)| u32::from(*head)).collect();
    expected.sort_unstable();
    assert_eq!(answered, expected, "each once");
    assert!(statuses.iter().all(|(status, _)| guest.get::<u8>(*status) == OK));
    assert_eq!(live.offsets(), [512, 1024, 1536, 2048], "in the order of the guest");
    assert_eq!(server.stats.resubmitted(), 4);
    assert_eq!(server.stats.get(RequestKind::GetId).requests, 0);
    let back = data + 0x8000;
    assert_eq!(ring.call(IN, 1, &[(back, 2048, WRITE)], false), (OK, 2049));
    assert_eq!(guest.bytes(back, 2048), [[1; 512], [2; 512], [3; 512], [4; 512]].concat());
    assert_eq!(ring.used_idx(), 10);
}

#[test]
fn overlapping_requests_keep_their_order_and_others_do_not_wait() {
    let dead = FaultDevice::new(MemoryDevice::new(MIB));
    let server = start(&dead, 1);
    let guest = Guest::new();
    let mut front = tracked(&server, &guest);
    let inflight = Inflight::get(&mut front, 1);
    let mut ring = Ring::start(&mut front, &guest, 0, FEATURES);
    let data = ring.data();
    dead.hold(true);
    let range = data + 0x9000;
    guest.put(range, 6_u64);
    guest.put(range + 8, 2_u32);
    guest.put(range + 12, 0_u32);
    for (i, sector) in [(1_u8, 0_u64), (2, 1), (3, 4)] {
        let at = data + u64::from(i) * 4096;
        guest.put_bytes(at, &[i; 1024]);
        ring.submit(OUT, sector, &[(at, 1024, 0)], false);
    }
    ring.submit(FLUSH, 0, &[], false);
    ring.submit(DISCARD, 0, &[(range, 16, 0)], false);
    ring.kick();
    let live = die(server, &dead, 5);

    live.hold(true);
    let server = start(&live, 1);
    let mut front = tracked(&server, &guest);
    inflight.set(&mut front).unwrap();
    let base = ring.used_idx();
    ring.restart(&mut front, base);
    wait_until("the first write", || live.started() == 1);
    // A new request waits until the old ones are begun, so that it cannot overtake them.
    ring.submit(IN, 100, &[(data, 512, WRITE)], false);
    ring.kick();
    config(&mut front, 0, 8).unwrap();
    assert_eq!(live.offsets(), [0], "the second write overlaps the first");
    live.hold(false);
    for _ in 0..6 {
        ring.wait_used();
    }
    assert_eq!(live.offsets()[..4], [0, 512, 2048, 0]);
    let back = data + 0x8000;
    assert_eq!(ring.call(IN, 0, &[(back, 1536, WRITE)], false), (OK, 1537));
    assert_eq!(guest.bytes(back, 1536), [[1; 512], [2; 512], [2; 512]].concat());
}

/// Deaths in a row, a full ring each time, with positions that wrap.
#[test]
fn a_full_ring_survives_many_deaths() {
    let mut device = FaultDevice::new(MemoryDevice::new(MIB));
    let guest = Guest::new();
    let mut server = start(&device, 1);
    let mut front = tracked(&server, &guest);
    let inflight = Inflight::get(&mut front, 1);
    let mut ring = Ring::start(&mut front, &guest, 0, FEATURES);
    let data = ring.data();
    for round in 0..40_u64 {
        device.hold(true);
        let before = device.started();
        for i in 0..16 {
            let at = data + i * 4096;
            guest.put_bytes(at, &(round * 16 + i).to_le_bytes());
            ring.submit(OUT, i * 8, &[(at, 4096, 0)], round % 2 == 0);
        }
        ring.kick();
        // At least so many are noted; the rest may be or not.
        device = die(server, &device, before + round % 17);
        server = start(&device, 1);
        front = tracked(&server, &guest);
        inflight.set(&mut front).unwrap();
        let base = ring.used_idx();
        ring.restart(&mut front, base);
        let mut heads: Vec<u32> = (0..16).map(|_| ring.wait_used().0).collect();
        heads.sort_unstable();
        assert_eq!(heads, (0..16).map(|slot| slot * 8).collect::<Vec<_>>());
        assert_eq!(u64::from(ring.used_idx()), (round + 1) * 16);
        let mut offsets = device.offsets();
        offsets.sort_unstable();
        assert_eq!(offsets, (0..16).map(|i| i * 4096).collect::<Vec<_>>(), "each once");
    }
}

#[test]
fn in_flight_memory_is_kept_over_stops_and_starts_of_a_ring() {
    let device = FaultDevice::new(MemoryDevice::new(MIB));
    let server = start(&device, 1);
    let guest = Guest::new();
    let mut front = tracked(&server, &guest);
    let inflight = Inflight::get(&mut front, 1);
    let mut ring = Ring::start(&mut front, &guest, 0, FEATURES);
    let data = ring.data();
    for round in 1..=5_u16 {
        assert_eq!(ring.call(IN, 0, &[(data, 512, WRITE)], false).0, OK);
        assert_eq!(front.get_vring_base(0).unwrap(), u32::from(round));
        inflight.set(&mut front).unwrap();
        ring.restart(&mut front, round);
    }
    assert_eq!(ring.call(IN, 0, &[(data, 512, WRITE)], false).0, OK);
    assert_eq!(server.stats.resubmitted(), 0);
}

#[test]
fn foreign_in_flight_memory_ends_the_connection_and_nothing_else() {
    let device = FaultDevice::new(MemoryDevice::new(MIB));
    let server = start(&device, 1);
    let guest = Guest::new();
    let mut front = tracked(&server, &guest);
    let good = Inflight::get(&mut front, 1);
    let file = tempfile::tempfile().unwrap();
    file.set_len(good.message.mmap_size).unwrap();
    front.set_inflight_fd(&good.message, file.as_raw_fd()).unwrap_err();
    drop(front);
    for bad in [(1, 0, 1, QUEUE_SIZE), (1 << 40, 0, 1, 1024), (good.message.mmap_size, 0, 2, QUEUE_SIZE)] {
        let mut front = tracked(&server, &guest);
        let message = VhostUserInflight::new(bad.0, bad.1, bad.2, bad.3);
        front.set_inflight_fd(&message, good.file.as_raw_fd()).unwrap_err();
    }
    let mut front = tracked(&server, &guest);
    assert!(front.get_inflight_fd(&VhostUserInflight::new(0, 0, 65, QUEUE_SIZE)).is_err());
    let mut front = connect(server.path(), &guest, FEATURES);
    let mut ring = Ring::start(&mut front, &guest, 0, FEATURES);
    let data = ring.data();
    assert_eq!(ring.call(IN, 0, &[(data, 512, WRITE)], false).0, OK);
}

/// CONFIG_CHANGE_MSG on the channel of SET_BACKEND_REQ_FD.
#[test]
fn a_resize_is_told_to_the_front_end() {
    let device = MemoryDevice::new(MIB);
    let server = TestServer::start(device.clone(), 1);
    let guest = Guest::new();
    let mut front = connect_with(server.path(), &guest, FEATURES, VhostUserProtocolFeatures::BACKEND_REQ);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(support::PATIENCE)).unwrap();
    front.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    for size in [2 * MIB, 3 * MIB] {
        device.resize(size);
        let mut message = [0; 12];
        ours.read_exact(&mut message).unwrap();
        let words: Vec<u32> = message.chunks(4).map(|w| u32::from_ne_bytes(w.try_into().unwrap())).collect();
        assert_eq!(words, [2, 1, 0], "CONFIG_CHANGE_MSG, version 1, no body");
        let sectors = config(&mut front, 0, 8).unwrap();
        assert_eq!(sectors, (size as u64 / 512).to_le_bytes());
    }
    // A front end that closed its channel costs nothing.
    drop(ours);
    device.resize(4 * MIB);
    device.resize(5 * MIB);
    assert_eq!(config(&mut front, 0, 8).unwrap(), (5 * MIB as u64 / 512).to_le_bytes());
    drop(front);
    server.end();
}

#[test]
fn memory_beyond_the_end_of_its_file_is_refused() {
    let server = TestServer::start(MemoryDevice::new(MIB), 1);
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    for (memory_size, mmap_offset) in [(1 << 21, 0), (1 << 20, 4096), (4096, 1 << 30)] {
        let mut front = Frontend::connect(server.path(), 1).unwrap();
        front.set_owner().unwrap();
        let offered = front.get_features().unwrap();
        front.set_features(offered).unwrap();
        let protocol = front.get_protocol_features().unwrap();
        front.set_protocol_features(protocol & VhostUserProtocolFeatures::REPLY_ACK).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let info = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size,
            userspace_addr: 0x7000_0000_0000,
            mmap_offset,
            mmap_handle: file.as_raw_fd(),
        };
        front.set_mem_table(&[info]).unwrap_err();
    }
}
