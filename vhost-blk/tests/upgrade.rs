//! Hand-overs between two servers in one process, over one device: nothing of the front end's connection changes, requests in flight included; and every way in
//! which a hand-over does not come about. Real processes and a real attach: `vm-tests/tests/vhost_killed.rs`.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "test code")]
#![allow(dead_code, reason = "each test file uses a part of the support module")]

mod support;

use ogee_client::MemoryDevice;
use ogee_vhost_blk::{
    HandOverError, HandOverRefusal, HandOverTerms, ServeEnd, ServeError, StopHandle, TakenOver, Upgrade, VhostBlkConfig,
    VhostBlkServer, VhostBlkStats, WireError,
};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use support::driver::{EVENT_IDX, Guest, Inflight, QUEUE_SIZE, Ring, VERSION_1, WRITE, config, connect, connect_with};
use support::fault::FaultDevice;
use support::wait_until;
use tempfile::TempDir;
use vhost::VhostBackend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};

const IN: u32 = 0;
const OUT: u32 = 1;
const MIB: usize = 1 << 20;
const FEATURES: u64 = VERSION_1 | EVENT_IDX;
const SHMFD: VhostUserProtocolFeatures = VhostUserProtocolFeatures::INFLIGHT_SHMFD;
const SUBJECT: &str = "memory";

/// A server of one "process".
struct Daemon {
    stats: Arc<VhostBlkStats>,
    stop: StopHandle,
    thread: Option<JoinHandle<Result<ServeEnd, ServeError>>>,
}

impl Daemon {
    fn run(server: VhostBlkServer<FaultDevice>, stop: StopHandle) -> Self {
        let stats = server.stats();
        Self { stats, stop, thread: Some(std::thread::spawn(move || server.run())) }
    }

    fn first(dir: &TempDir, device: &FaultDevice, claim: bool) -> Self {
        let stop = StopHandle::new().unwrap();
        let mut server = VhostBlkServer::bind(device.clone(), shape(dir), stop.clone()).unwrap();
        let claim = claim.then(|| tempfile::tempfile().unwrap());
        server.allow_upgrade(HandOverTerms { subject: SUBJECT.to_owned(), client: 77, volume: 5, claim }).unwrap();
        Self::run(server, stop)
    }

    /// A second one takes over.
    fn take_over(dir: &TempDir, device: &FaultDevice) -> Result<Self, HandOverError> {
        // The one before may not be forgotten yet.
        let deadline = ogee_common::clock::now() + support::PATIENCE;
        let upgrade = loop {
            match Upgrade::begin(&shape(dir), SUBJECT) {
                Err(HandOverError::Refused(HandOverRefusal::Busy)) if ogee_common::clock::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => break other?.expect("a daemon runs"),
            }
        };
        assert_eq!(upgrade.client(), 77);
        let stop = StopHandle::new().unwrap();
        let TakenOver { server, claim } = upgrade.prepare(device.clone(), shape(dir), stop.clone())?.take()?;
        assert!(claim.is_some());
        Ok(Self::run(server, stop))
    }

    fn end(&mut self) -> ServeEnd {
        self.thread.take().expect("it runs").join().unwrap().unwrap()
    }

    fn stop(mut self) {
        self.stop.stop();
        assert_eq!(self.end(), ServeEnd::Stopped);
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn shape(dir: &TempDir) -> VhostBlkConfig {
    VhostBlkConfig { num_queues: 2, ..VhostBlkConfig::new(socket(dir)) }
}

fn socket(dir: &TempDir) -> PathBuf {
    dir.path().join("s")
}

fn upgrades(dir: &TempDir) -> PathBuf {
    dir.path().join("s.upgrade")
}

fn device() -> FaultDevice {
    FaultDevice::new(MemoryDevice::new(MIB))
}

fn write(guest: &Guest, ring: &mut Ring<'_>, sector: u64, fill: u8) {
    let data = ring.data();
    guest.put_bytes(data, &[fill; 512]);
    assert_eq!(ring.call(OUT, sector, &[(data, 512, 0)], false), (0, 1));
}

fn read(guest: &Guest, ring: &mut Ring<'_>, sector: u64) -> u8 {
    let data = ring.data();
    assert_eq!(ring.call(IN, sector, &[(data, 512, WRITE)], true), (0, 513));
    let got = guest.bytes(data, 512);
    assert!(got.iter().all(|byte| *byte == got[0]));
    got[0]
}

/// Everything that the protocol allows only if it was negotiated is still allowed.
fn still_negotiated(front: &mut Frontend, guest: &Guest) {
    assert_eq!(config(front, 34, 2).unwrap(), [2, 0], "CONFIG");
    assert_eq!(front.get_queue_num().unwrap(), 2, "MQ");
    assert_eq!(front.get_max_mem_slots().unwrap(), 509, "CONFIGURE_MEM_SLOTS");
    front.set_vring_enable(1, true).unwrap();
    let ring = Ring::start(front, guest, 1, FEATURES);
    front.set_vring_call(1, &ring.call).unwrap();
}

#[test]
fn a_front_end_does_not_notice_hand_overs() {
    let (dir, device, guest) = (tempfile::tempdir().unwrap(), device(), Guest::new());
    let mut daemon = Daemon::first(&dir, &device, true);
    assert_eq!(std::fs::metadata(upgrades(&dir)).unwrap().permissions().mode() & 0o777, 0o600);
    let mut front = connect_with(&socket(&dir), &guest, FEATURES, SHMFD);
    let _inflight = Inflight::get(&mut front, 2);
    let mut ring = Ring::start(&mut front, &guest, 0, FEATURES);
    front.set_config(32, vhost::vhost_user::message::VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
    for round in 1..=5 {
        write(&guest, &mut ring, 8, round);
        let next = Daemon::take_over(&dir, &device).unwrap();
        assert_eq!(daemon.end(), ServeEnd::HandedOver);
        daemon = next;
        assert_eq!(read(&guest, &mut ring, 8), round);
        write(&guest, &mut ring, 16, round);
        assert_eq!(config(&mut front, 32, 1).unwrap(), [0], "the write cache mode is kept");
    }
    still_negotiated(&mut front, &guest);
    assert_eq!(daemon.stats.connections(), 1);
    assert_eq!(daemon.stats.resubmitted(), 0);
    // A reconnection comes to the last one, and its end removes both sockets.
    drop((ring, front));
    let mut front = connect(&socket(&dir), &guest, FEATURES);
    let mut ring = Ring::start(&mut front, &guest, 0, FEATURES);
    assert_eq!(read(&guest, &mut ring, 16), 5);
    drop((ring, front));
    daemon.stop();
    assert!(!socket(&dir).exists() && !upgrades(&dir).exists());
}

#[test]
fn a_daemon_without_a_front_end_hands_its_socket_over() {
    let (dir, device, guest) = (tempfile::tempdir().unwrap(), device(), Guest::new());
    let mut old = Daemon::first(&dir, &device, true);
    let new = Daemon::take_over(&dir, &device).unwrap();
    assert_eq!(old.end(), ServeEnd::HandedOver);
    let mut front = connect(&socket(&dir), &guest, FEATURES);
    write(&guest, &mut Ring::start(&mut front, &guest, 0, FEATURES), 0, 1);
    drop(front);
    new.stop();
    assert!(Upgrade::begin(&shape(&dir), SUBJECT).unwrap().is_none(), "nobody is there");
}

/// Requests in flight that do not end are run by the new daemon, and only its answer counts.
#[test]
fn requests_in_flight_are_run_by_the_new_daemon() {
    let (dir, guest) = (tempfile::tempdir().unwrap(), Guest::new());
    let memory = MemoryDevice::new(MIB);
    let (stuck, healthy) = (FaultDevice::new(memory.clone()), FaultDevice::new(memory));
    let mut old = Daemon::first(&dir, &stuck, true);
    let mut front = connect_with(&socket(&dir), &guest, FEATURES, SHMFD);
    let _inflight = Inflight::get(&mut front, 2);
    let mut ring = Ring::start(&mut front, &guest, 0, FEATURES);
    stuck.hold(true);
    let data = ring.data();
    let mut open = Vec::new();
    for slot in 0..4_u8 {
        let at = data + u64::from(slot) * 4096;
        guest.put_bytes(at, &[slot + 1; 512]);
        open.push(ring.submit(OUT, u64::from(slot) * 8, &[(at, 512, 0)], slot % 2 == 1));
    }
    ring.kick_if_wanted();
    wait_until("all at the device", || stuck.started() == 4);
    let new = Daemon::take_over(&dir, &healthy).unwrap();
    assert_eq!(old.end(), ServeEnd::HandedOver);
    for _ in 0..4 {
        let (head, _) = ring.wait_used();
        let (status, _) = open.iter().find(|(_, of)| u32::from(*of) == head).unwrap();
        assert_eq!(guest.get::<u8>(*status), 0);
    }
    assert_eq!(ring.used_idx(), 4, "each once");
    assert_eq!(new.stats.resubmitted(), 4);
    assert_eq!(healthy.started(), 4);
    for slot in 0..4_u8 {
        assert_eq!(read(&guest, &mut ring, u64::from(slot) * 8), slot + 1);
    }
}

#[test]
fn without_in_flight_memory_requests_are_answered_first_or_the_old_daemon_goes_on() {
    let (dir, device, guest) = (tempfile::tempdir().unwrap(), device(), Guest::new());
    let mut old = Daemon::first(&dir, &device, true);
    let mut front = connect(&socket(&dir), &guest, FEATURES);
    let mut ring = Ring::start(&mut front, &guest, 0, FEATURES);
    device.hold(true);
    let data = ring.data();
    guest.put_bytes(data, &[9; 512]);
    let (status, _) = ring.submit(OUT, 8, &[(data, 512, 0)], false);
    ring.kick_if_wanted();
    wait_until("at the device", || device.started() == 1);
    let refused = Daemon::take_over(&dir, &device).map(drop).unwrap_err();
    assert!(matches!(refused, HandOverError::Refused(HandOverRefusal::InFlight)), "{refused:?}");
    device.hold(false);
    ring.wait_used();
    assert_eq!(guest.get::<u8>(status), 0);
    let _new = Daemon::take_over(&dir, &device).unwrap();
    assert_eq!(old.end(), ServeEnd::HandedOver);
    assert_eq!(read(&guest, &mut ring, 8), 9);
}

/// A frame of the protocol, by hand: see `handover/wire.rs`.
fn frame(version: u16, kind: u16, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(body.len()).unwrap();
    [b"OGUP", &version.to_le_bytes()[..], &kind.to_le_bytes(), &len.to_le_bytes(), &[0; 4], body].concat()
}

fn hello() -> Vec<u8> {
    let queues: [u8; 4] = [2, 0, 128, 0];
    [&queues, SUBJECT.as_bytes()].concat()
}

/// Kind and body of the next frame; its descriptors are dropped.
fn answer(stream: &mut UnixStream) -> (u16, Vec<u8>) {
    stream.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let mut header = [0; 16];
    stream.read_exact(&mut header).unwrap();
    let mut body = vec![0; usize::from(header[8]) + 256 * usize::from(header[9])];
    stream.read_exact(&mut body).unwrap();
    (u16::from_le_bytes([header[6], header[7]]), body)
}

fn visitor(path: &Path, bytes: &[u8]) -> UnixStream {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.write_all(bytes).unwrap();
    stream
}

const REFUSED: u16 = 2;
const WELCOME: u16 = 3;
const ESTATE: u16 = 5;

/// A new daemon that dies at each of its steps, with requests in flight: the old one goes on with them, and answers each once.
#[test]
fn when_the_new_daemon_dies_before_it_has_accepted_the_old_one_goes_on() {
    let (dir, device, guest) = (tempfile::tempdir().unwrap(), device(), Guest::new());
    let old = Daemon::first(&dir, &device, true);
    let mut front = connect_with(&socket(&dir), &guest, FEATURES, SHMFD);
    let _inflight = Inflight::get(&mut front, 2);
    let mut ring = Ring::start(&mut front, &guest, 0, FEATURES);
    for step in 0..4_u8 {
        device.hold(true);
        let (data, started) = (ring.data(), device.started());
        guest.put_bytes(data, &[step + 1; 512]);
        let (status, _) = ring.submit(OUT, 8, &[(data, 512, 0)], false);
        ring.kick_if_wanted();
        wait_until("at the device", || device.started() == started + 1);
        let mut dying = visitor(&upgrades(&dir), &frame(1, 1, &hello()));
        if step > 0 {
            loop {
                match answer(&mut dying) {
                    (WELCOME, _) => break,
                    // The one before is not forgotten yet.
                    refused => assert_eq!(refused, (REFUSED, vec![2, 0])),
                }
                dying = visitor(&upgrades(&dir), &frame(1, 1, &hello()));
            }
        }
        if step > 1 {
            dying.write_all(&frame(1, 4, &[])).unwrap();
        }
        if step > 2 {
            assert_eq!(answer(&mut dying).0, ESTATE);
            // What ends while the rings stand still is not answered until they go on.
            device.hold(false);
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(guest.get::<u8>(status), support::driver::UNANSWERED);
        }
        drop(dying);
        device.hold(false);
        ring.wait_used();
        assert_eq!(guest.get::<u8>(status), 0, "step {step}");
        assert_eq!(read(&guest, &mut ring, 8), step + 1);
        assert_eq!(config(&mut front, 34, 2).unwrap(), [2, 0], "messages are answered again");
    }
    assert_eq!(old.stats.resubmitted(), 0);
    assert_eq!(old.stats.connections(), 1);
    let next = Daemon::take_over(&dir, &device).unwrap();
    assert_eq!(read(&guest, &mut ring, 8), 4);
    drop((ring, front));
    next.stop();
}

#[test]
fn what_is_not_understood_or_not_the_same_is_refused_with_a_reason() {
    let (dir, device, guest) = (tempfile::tempdir().unwrap(), device(), Guest::new());
    let _old = Daemon::first(&dir, &device, true);
    let mut front = connect(&socket(&dir), &guest, FEATURES);
    let mut ring = Ring::start(&mut front, &guest, 0, FEATURES);
    let other = [&[3, 0, 128, 0][..], SUBJECT.as_bytes()].concat();
    let cases = [
        (frame(2, 1, &hello()), 1_u8),
        (frame(1, 99, &hello()), 1),
        (frame(1, 1, &[]), 1),
        (frame(1, 1, &[hello(), vec![b'x']].concat()), 3),
        (frame(1, 1, &other), 4),
    ];
    for (bytes, reason) in cases {
        assert_eq!(answer(&mut visitor(&upgrades(&dir), &bytes)), (REFUSED, vec![reason, 0]), "{bytes:?}");
    }
    // Noise, half a frame, and silence end themselves.
    drop(visitor(&upgrades(&dir), b"GET / HTTP/1.1\r\n\r\n"));
    drop(visitor(&upgrades(&dir), &frame(1, 1, &hello())[..10]));
    drop(visitor(&upgrades(&dir), &[]));
    write(&guest, &mut ring, 0, 1);

    let config = VhostBlkConfig { num_queues: 3, ..shape(&dir) };
    let refused = Upgrade::begin(&config, SUBJECT).unwrap_err();
    assert!(matches!(refused, HandOverError::Refused(HandOverRefusal::OtherShape)), "{refused:?}");
    let refused = Upgrade::begin(&shape(&dir), "another").unwrap_err();
    assert!(matches!(refused, HandOverError::Refused(HandOverRefusal::OtherSubject)), "{refused:?}");
    let _new = Daemon::take_over(&dir, &device).unwrap();
    assert_eq!(read(&guest, &mut ring, 0), 1);
}

/// The new daemon meets an old one of another version.
#[test]
fn an_old_daemon_of_another_version_is_told_from_a_refusal() {
    let dir = tempfile::tempdir().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(upgrades(&dir)).unwrap();
    let old = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let said = answer(&mut stream);
        stream.write_all(&frame(7, REFUSED, &[1, 0])).unwrap();
        let _ = stream.read(&mut [0]);
        drop(stream);
        drop(listener.accept().unwrap());
        said
    });
    let refused = Upgrade::begin(&shape(&dir), SUBJECT).unwrap_err();
    assert!(matches!(refused, HandOverError::Version { theirs: 7 }), "{refused:?}");
    let ended = Upgrade::begin(&shape(&dir), SUBJECT).unwrap_err();
    assert!(matches!(ended, HandOverError::Wire(WireError::Ended)), "{ended:?}");
    assert_eq!(old.join().unwrap(), (1, hello()));
}

#[test]
fn of_two_that_want_to_take_over_the_second_is_refused() {
    let (dir, device, guest) = (tempfile::tempdir().unwrap(), device(), Guest::new());
    let mut old = Daemon::first(&dir, &device, true);
    let mut front = connect_with(&socket(&dir), &guest, FEATURES, SHMFD);
    let mut ring = Ring::start(&mut front, &guest, 0, FEATURES);
    let first = Upgrade::begin(&shape(&dir), SUBJECT).unwrap().unwrap();
    let busy = Upgrade::begin(&shape(&dir), SUBJECT).unwrap_err();
    assert!(matches!(busy, HandOverError::Refused(HandOverRefusal::Busy)), "{busy:?}");
    write(&guest, &mut ring, 0, 3);
    let stop = StopHandle::new().unwrap();
    let taken = first.prepare(device.clone(), shape(&dir), stop.clone()).unwrap().take().unwrap();
    assert_eq!(old.end(), ServeEnd::HandedOver);
    let _new = Daemon::run(taken.server, stop);
    assert_eq!(read(&guest, &mut ring, 0), 3);
}

/// The old daemon is stopped while the new one gets ready.
#[test]
fn an_old_daemon_that_is_stopped_takes_nobody_along() {
    let (dir, device) = (tempfile::tempdir().unwrap(), device());
    let old = Daemon::first(&dir, &device, true);
    let upgrade = Upgrade::begin(&shape(&dir), SUBJECT).unwrap().unwrap();
    let prepared = upgrade.prepare(device.clone(), shape(&dir), StopHandle::new().unwrap()).unwrap();
    old.stop();
    let ended = prepared.take().map(drop).unwrap_err();
    assert!(matches!(ended, HandOverError::Wire(WireError::Ended)), "{ended:?}");
    assert!(!socket(&dir).exists() && !upgrades(&dir).exists());
}

/// The channel for changes of the configuration goes along, and a size that changed meanwhile is told.
#[test]
fn a_resize_between_the_two_is_told_by_the_new_one() {
    let (dir, guest) = (tempfile::tempdir().unwrap(), Guest::new());
    let memory = MemoryDevice::new(MIB);
    let device = FaultDevice::new(memory.clone());
    let _old = Daemon::first(&dir, &device, true);
    let mut front = connect_with(&socket(&dir), &guest, FEATURES, SHMFD | VhostUserProtocolFeatures::BACKEND_REQ);
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    front.set_backend_request_fd(&theirs).unwrap();
    drop(theirs);
    let _ring = Ring::start(&mut front, &guest, 0, FEATURES);
    let stop = StopHandle::new().unwrap();
    let upgrade = Upgrade::begin(&shape(&dir), SUBJECT).unwrap().unwrap();
    let taken = upgrade.prepare(device.clone(), shape(&dir), stop.clone()).unwrap().take().unwrap();
    // Between the old one's last look and the new one's first.
    memory.resize(2 * MIB);
    let _new = Daemon::run(taken.server, stop);
    ours.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let mut message = [0; 12];
    ours.read_exact(&mut message).unwrap();
    assert_eq!(message[..4], 2_u32.to_ne_bytes(), "CONFIG_CHANGE_MSG");
    assert_eq!(config(&mut front, 0, 8).unwrap(), (2 * MIB as u64 / 512).to_le_bytes());
}

#[test]
fn rings_are_of_the_size_that_the_test_believes() {
    assert_eq!(QUEUE_SIZE, 128, "the shape in `hello` is that of the configuration, not of the ring");
}
