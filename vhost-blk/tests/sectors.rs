//! What a guest is told of a device and may ask of it: logical sectors of 4,096 bytes, the serial, read-only devices that
//! several daemons share.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "test code")]
#![allow(dead_code, reason = "each test file uses a part of the support module")]

mod support;

use ogee_client::MemoryDevice;
use ogee_vhost_blk::RequestKind;
use support::TestServer;
use support::driver::{Guest, Ring, VERSION_1, WRITE, config, connect};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const MIB: usize = 1 << 20;

fn range(guest: &Guest, at: u64, sector: u64, count: u32) {
    guest.put(at, sector);
    guest.put(at + 8, count);
    guest.put(at + 12, 0_u32);
}

/// The units of the protocol stay 512 bytes (virtio 1.2, 5.2.5): capacity, sectors of requests, limits of discards.
#[test]
fn a_device_of_large_sectors_says_so_and_takes_only_whole_ones() {
    let server = TestServer::start(MemoryDevice::with_sectors(MIB, 4096), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    let space = config(&mut front, 0, 60).unwrap();
    assert_eq!(space[0..8], 2048_u64.to_le_bytes(), "capacity");
    assert_eq!(space[20..24], 4096_u32.to_le_bytes(), "blk_size");
    assert_eq!((space[24], space[25], &space[26..28]), (0, 0, &1_u16.to_le_bytes()[..]), "topology");
    assert_eq!(space[44..48], 8_u32.to_le_bytes(), "discard_sector_alignment");
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    let data = ring.data();
    guest.put_bytes(data, &[7; 8192]);
    assert_eq!(ring.call(OUT, 8, &[(data, 512, 0), (data + 512, 7680, 0)], false), (OK, 1), "framing is the driver's");
    assert_eq!(ring.call(FLUSH, 0, &[], false), (OK, 1));
    let back = data + 0x8000;
    assert_eq!(ring.call(IN, 16, &[(back, 4096, WRITE)], false), (OK, 4097));
    assert_eq!(guest.bytes(back, 4096), [7; 4096]);
    for (sector, len) in [(1, 4096), (8, 512), (8, 4608), (2047, 4096)] {
        assert_eq!(ring.call(IN, sector, &[(back, len, WRITE)], false).0, IOERR, "read of {len} at sector {sector}");
        assert_eq!(ring.call(OUT, sector, &[(data, len, 0)], false).0, IOERR, "write of {len} at sector {sector}");
    }
    for kind in [DISCARD, WRITE_ZEROES] {
        for (sector, count) in [(1, 8), (8, 1), (8, 9)] {
            range(&guest, data, sector, count);
            assert_eq!(ring.call(kind, 0, &[(data, 16, 0)], false).0, IOERR, "{count} sectors at {sector}");
        }
    }
    assert_eq!(ring.call(IN, 8, &[(back, 4096, WRITE)], false), (OK, 4097));
    assert_eq!(guest.bytes(back, 4096), [7; 4096], "what was refused changed nothing");
    range(&guest, data, 8, 8);
    assert_eq!(ring.call(DISCARD, 0, &[(data, 16, 0)], false), (OK, 1));
    range(&guest, data, 16, 8);
    assert_eq!(ring.call(WRITE_ZEROES, 0, &[(data, 16, 0)], false), (OK, 1));
    assert_eq!(ring.call(IN, 8, &[(back, 8192, WRITE)], false), (OK, 8193));
    assert_eq!(guest.bytes(back, 8192), [0; 8192]);
    assert_eq!(server.stats.get(RequestKind::Write).errors, 4);
    drop(front);
    server.end();
}

#[test]
fn a_device_of_small_sectors_has_large_physical_blocks() {
    let server = TestServer::start(MemoryDevice::new(MIB), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    let space = config(&mut front, 0, 60).unwrap();
    assert_eq!(space[20..24], 512_u32.to_le_bytes(), "blk_size");
    assert_eq!((space[24], space[25], &space[26..28]), (3, 0, &8_u16.to_le_bytes()[..]), "topology");
}

/// The write cache mode is the guest's to choose and changes nothing: what is answered is durable.
#[test]
fn flushes_and_writes_work_in_both_write_cache_modes() {
    let server = TestServer::start(MemoryDevice::new(MIB), 1);
    let guest = Guest::new();
    let mut front = connect(server.path(), &guest, VERSION_1);
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    let data = ring.data();
    for mode in [0, 1, 0] {
        front.set_config(32, VhostUserConfigFlags::WRITABLE, &[mode]).unwrap();
        assert_eq!(config(&mut front, 32, 1).unwrap(), [mode]);
        guest.put_bytes(data, &[mode + 1; 512]);
        assert_eq!(ring.call(OUT, 0, &[(data, 512, 0)], false), (OK, 1));
        assert_eq!(ring.call(FLUSH, 0, &[], false), (OK, 1));
        assert_eq!(ring.call(IN, 0, &[(data + 4096, 512, WRITE)], false), (OK, 513));
        assert_eq!(guest.bytes(data + 4096, 512), [mode + 1; 512]);
    }
}

/// Two daemons serve one device read-only, each to its own guest, with what both are told of it.
#[test]
fn a_read_only_device_is_shared() {
    let device = MemoryDevice::with_data(vec![9; MIB], true);
    let servers = [TestServer::start(device.clone(), 1), TestServer::start(device.clone(), 1)];
    let guests = [Guest::new(), Guest::new()];
    let mut fronts: Vec<_> = servers.iter().zip(&guests).map(|(s, g)| connect(s.path(), g, VERSION_1)).collect();
    let mut rings: Vec<_> = fronts.iter_mut().zip(&guests).map(|(f, g)| Ring::start(f, g, 0, VERSION_1)).collect();
    for _ in 0..3 {
        for (ring, guest) in rings.iter_mut().zip(&guests) {
            let data = ring.data();
            guest.put_bytes(data, &[0; 4096]);
            assert_eq!(ring.call(IN, 8, &[(data, 4096, WRITE)], false), (OK, 4097));
            assert_eq!(guest.bytes(data, 4096), [9; 4096]);
            assert_eq!(ring.call(OUT, 8, &[(data, 4096, 0)], false).0, IOERR);
            range(guest, data, 8, 8);
            assert_eq!(ring.call(DISCARD, 0, &[(data, 16, 0)], false).0, IOERR);
            assert_eq!(ring.call(GET_ID, 0, &[(data, 20, WRITE)], false), (OK, 21));
            assert_eq!(&guest.bytes(data, 11), b"ogee-memory");
        }
    }
    let written = device.counters().writes.load(std::sync::atomic::Ordering::Relaxed);
    assert_eq!(written, 6, "each refusal is the device's");
}
