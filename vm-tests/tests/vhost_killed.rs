//! `ogee vhost-blk` is killed with requests in flight, again and again, and a new one goes on with them: the same is asked of a
//! front end without a guest, which records every ring entry, and of a guest that verifies what it writes. The same front end keeps its connection
//! while one daemon takes over from another (`--upgrade`), and while daemons that want to die as they do so.
//!
//! `OGEE_VHOST_KILLS` is the number of kills; by default few for the guest and 50 for the rings. `OGEE_VHOST_UPGRADES` is that of upgrades, by default 20.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "test code")]

use anyhow::{Context, Result, ensure};
use ogee_common::clock;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::hammer::Hammer;
use ogee_vm_tests::image::Image;
use ogee_vm_tests::vm::Vm;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use vhost::vhost_user::Frontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

#[allow(dead_code, reason = "a part of it is used here")]
#[path = "../../vhost-blk/tests/support/driver.rs"]
mod driver;

use driver::{EVENT_IDX, Guest, Inflight, Ring, VERSION_1, WRITE};

/// A test waits at most this long for something that must happen.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// From a kill to the last answer of what was in flight, in the median: the start of a daemon on a busy machine, and less than the
/// 5 s after which the MDS gives up a client that nobody follows.
const PAUSE_MAX: Duration = Duration::from_secs(4);
/// Without an answer at an upgrade at most, so that a hang is found: what is aimed at is 50 ms at the 99th percentile, which a busy machine does not hold.
const UPGRADE_PAUSE_MAX: Duration = Duration::from_secs(10);
const FEATURES: u64 = VERSION_1 | EVENT_IDX;
const IN: u32 = 0;
const OUT: u32 = 1;
const PAGE: u64 = 4096;
/// Requests in flight of a queue: as many as the driver has slots.
const DEPTH: u16 = 16;
/// Pages of a queue's part of the volume; few, so that they are written again soon.
const PAGES: u64 = 48;
const QUEUES: u16 = 2;

fn upgrades() -> u32 {
    std::env::var("OGEE_VHOST_UPGRADES").ok().and_then(|n| n.parse().ok()).unwrap_or(20).max(1)
}

fn kills(default: u32) -> u32 {
    std::env::var("OGEE_VHOST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(default).max(1)
}

/// What is in flight in a slot.
#[derive(Debug, Clone, Copy)]
struct Open {
    page: u64,
    /// The version that is written; `None`: a read.
    writes: Option<u64>,
    status: u64,
}

/// One queue and what the volume must hold in its part.
struct Recorder<'a> {
    guest: &'a Guest,
    ring: Ring<'a>,
    open: [Option<Open>; DEPTH as usize],
    versions: Vec<u64>,
    next_version: u64,
    answered: u64,
    submitted: u64,
}

impl<'a> Recorder<'a> {
    fn new(guest: &'a Guest, ring: Ring<'a>) -> Self {
        let versions = vec![0; usize::try_from(PAGES).unwrap()];
        Self { guest, ring, open: [None; DEPTH as usize], versions, next_version: 1, answered: 0, submitted: 0 }
    }

    fn sector(&self, page: u64) -> u64 {
        (self.ring.index as u64 * PAGES + page) * PAGE / 512
    }

    fn contents(&self, page: u64, version: u64) -> Vec<u8> {
        let stamp = [version, page, self.ring.index as u64, !version].map(u64::to_le_bytes).concat();
        if version == 0 { vec![0; usize::try_from(PAGE).unwrap()] } else { stamp.repeat(usize::try_from(PAGE).unwrap() / 32) }
    }

    /// Fills the free slots. A page is in flight once at a time, as a guest's file system has it.
    fn fill(&mut self, rng: &mut SmallRng) {
        for slot in 0..DEPTH {
            if self.open[usize::from(slot)].is_none() {
                let page = rng.random_range(0..PAGES);
                let write = rng.random_bool(0.7);
                if self.open.iter().flatten().all(|open| open.page != page) {
                    self.submit(slot, page, write);
                }
            }
        }
        self.ring.kick_if_wanted();
    }

    fn submit(&mut self, slot: u16, page: u64, write: bool) {
        let at = self.ring.data() + u64::from(slot) * PAGE;
        let version = write.then_some(self.next_version);
        let filled = version.map_or_else(|| vec![0xdd; usize::try_from(PAGE).unwrap()], |v| self.contents(page, v));
        self.guest.put_bytes(at, &filled);
        self.ring.choose_slot(slot);
        let (kind, flags) = if write { (OUT, 0) } else { (IN, WRITE) };
        let (status, head) = self.ring.submit(kind, self.sector(page), &[(at, 4096, flags)], slot % 2 == 1);
        assert_eq!(head, slot * 8);
        self.next_version += u64::from(write);
        self.open[usize::from(slot)] = Some(Open { page, writes: version, status });
        self.submitted += 1;
    }

    /// Takes what was answered: each a request in flight, without an error, a read with what was written last.
    fn reap(&mut self) -> Result<u64> {
        let mut count = 0;
        while let Some((head, len)) = self.ring.poll_used() {
            let slot = usize::try_from(head / 8)?;
            let open = self.open.get_mut(slot).and_then(Option::take);
            let open = open.with_context(|| format!("queue {}: head {head} answered twice", self.ring.index))?;
            ensure!(self.guest.get::<u8>(open.status) == 0, "queue {}: status of {open:?}", self.ring.index);
            match open.writes {
                Some(version) => self.versions[usize::try_from(open.page)?] = version,
                None => {
                    ensure!(len == 4097, "read of {len} bytes");
                    let got = self.guest.bytes(self.ring.data() + slot as u64 * PAGE, 4096);
                    let version = self.versions[usize::try_from(open.page)?];
                    let seen = u64::from_le_bytes(got[..8].try_into()?);
                    ensure!(got == self.contents(open.page, version),
                        "queue {} page {}: version {seen} read, {version} was written last", self.ring.index, open.page);
                }
            }
            count += 1;
        }
        self.answered += count;
        Ok(count)
    }

    fn in_flight(&self) -> usize {
        self.open.iter().flatten().count()
    }

    /// Waits for everything in flight, then reads every page.
    fn finish(&mut self) -> Result<()> {
        self.drain()?;
        for first in (0..PAGES).step_by(usize::from(DEPTH)) {
            for slot in 0..DEPTH {
                self.submit(slot, first + u64::from(slot), false);
            }
            self.ring.kick_if_wanted();
            self.drain()?;
        }
        ensure!(self.answered == self.submitted && u64::from(self.ring.used_idx()) == self.answered % 65_536, "each once");
        Ok(())
    }

    fn drain(&mut self) -> Result<()> {
        let deadline = clock::now() + PATIENCE;
        while self.in_flight() > 0 {
            ensure!(clock::now() < deadline, "{} requests of queue {} are never answered", self.in_flight(), self.ring.index);
            if self.reap()? == 0 {
                std::thread::yield_now();
            }
        }
        Ok(())
    }
}

fn connect(socket: &Path, guest: &Guest) -> Frontend {
    driver::connect_with(socket, guest, FEATURES, VhostUserProtocolFeatures::INFLIGHT_SHMFD)
}

#[test]
fn every_request_is_answered_once_and_in_effect_once_over_kills_of_the_daemon() -> Result<()> {
    let kills = kills(50);
    let seed = 0x0_6ee_u64;
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut cluster = Cluster::start("vhost-killed-rings", 3, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "1G"])?;
    let socket = cluster.folder().join("disk.sock");
    let guest = Guest::new();
    let mut backend = cluster.serve_on("disk", &socket)?;
    let mut front = connect(&socket, &guest);
    let inflight = Inflight::get(&mut front, QUEUES);
    let mut queues: Vec<Recorder<'_>> = Vec::new();
    for index in 0..usize::from(QUEUES) {
        let ring = Ring::start(&mut front, &guest, index, FEATURES);
        queues.push(Recorder::new(&guest, ring));
    }
    let (mut left, mut pauses) = (0, Vec::new());
    for kill in 0..kills {
        let end = clock::now() + Duration::from_millis(rng.random_range(5..150));
        while clock::now() < end {
            for queue in &mut queues {
                queue.fill(&mut rng);
                queue.reap()?;
            }
        }
        queues.iter_mut().for_each(|queue| queue.fill(&mut rng));
        backend.kill();
        let killed = clock::now();
        for queue in &mut queues {
            queue.reap()?;
            left += queue.in_flight();
        }
        drop(front);
        backend = cluster.serve_on("disk", &socket).with_context(|| format!("after kill {kill}"))?;
        front = connect(&socket, &guest);
        inflight.set(&mut front)?;
        for queue in &mut queues {
            let base = queue.ring.used_idx();
            queue.ring.restart(&mut front, base);
        }
        // Whatever was in flight is answered now, without anything new.
        queues.iter_mut().try_for_each(Recorder::drain).with_context(|| format!("after kill {kill}"))?;
        pauses.push(clock::now() - killed);
    }
    queues.iter_mut().try_for_each(Recorder::finish)?;
    pauses.sort_unstable();
    let (median, longest) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
    let answered: u64 = queues.iter().map(|queue| queue.answered).sum();
    eprintln!("{kills} kills (seed {seed:#x}): {answered} requests answered, {left} were in flight at a kill, pause {median:?} in the median, {longest:?} at most");
    // The new daemon takes the volume from the dead one at once, so what that had sent may still be on its way.
    ensure!(median < PAUSE_MAX, "a restart took {median:?}, {PAUSE_MAX:?} are allowed");
    ensure!(left > usize::try_from(kills)?, "too few requests in flight at the kills: nothing was tested");
    drop(front);
    backend.stop()?;
    cluster.shut_down()
}

/// Load from a thread of its own, while the test starts and ends daemons. The longest time without an answer of a queue is kept until it is asked for.
#[derive(Default)]
struct Load {
    end: AtomicBool,
    answered: AtomicU64,
    longest_ns: AtomicU64,
}

impl Load {
    fn run(&self, queues: &mut [Recorder<'_>], rng: &mut SmallRng) -> Result<()> {
        let mut last = vec![clock::now(); queues.len()];
        while !self.end.load(Ordering::SeqCst) {
            let mut idle = true;
            for (queue, last) in queues.iter_mut().zip(&mut last) {
                queue.fill(rng);
                let answered = queue.reap()?;
                let now = clock::now();
                let waited = now - *last;
                self.longest_ns.fetch_max(u64::try_from(waited.as_nanos())?, Ordering::SeqCst);
                ensure!(waited < UPGRADE_PAUSE_MAX, "queue {} has no answer for {waited:?}", queue.ring.index);
                if answered > 0 {
                    (*last, idle) = (now, false);
                    self.answered.fetch_add(answered, Ordering::SeqCst);
                }
            }
            if idle {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        Ok(())
    }

    /// The longest time without an answer since the last question.
    fn longest(&self) -> Duration {
        Duration::from_nanos(self.longest_ns.swap(0, Ordering::SeqCst))
    }

    /// Waits for some more answers.
    fn goes_on(&self) -> Result<()> {
        let (from, deadline) = (self.answered.load(Ordering::SeqCst), clock::now() + PATIENCE);
        while self.answered.load(Ordering::SeqCst) < from + 200 {
            ensure!(clock::now() < deadline && !self.end.load(Ordering::SeqCst), "the load stands still");
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// Sets the end of a load also when the test fails, else its thread would never be joined.
struct EndOnDrop<'a>(&'a Load);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.end.store(true, Ordering::SeqCst);
    }
}

/// Recorders under load on two rings, while `meanwhile` does something to the daemons; then everything is answered and read.
fn under_load<T>(
    front: &mut Frontend,
    guest: &Guest,
    rng: &mut SmallRng,
    meanwhile: impl FnOnce(&Load) -> Result<T>,
) -> Result<(T, u64)> {
    let mut queues: Vec<Recorder<'_>> =
        (0..usize::from(QUEUES)).map(|index| Recorder::new(guest, Ring::start(front, guest, index, FEATURES))).collect();
    let load = Load::default();
    let done = std::thread::scope(|scope| {
        let end = EndOnDrop(&load);
        let thread = scope.spawn(|| {
            let _end = EndOnDrop(&load);
            load.run(&mut queues, rng)
        });
        let done = load.goes_on().and_then(|()| meanwhile(&load));
        drop(end);
        // The load's own error is the cause of the other one.
        thread.join().expect("the load does not panic").and(done)
    })?;
    queues.iter_mut().try_for_each(Recorder::finish)?;
    Ok((done, queues.iter().map(|queue| queue.answered).sum()))
}

/// `sorted` at a percentile.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
}

#[test]
fn every_request_is_answered_once_and_in_effect_once_over_upgrades_without_a_reconnection() -> Result<()> {
    let upgrades = upgrades();
    let mut rng = SmallRng::seed_from_u64(0x0_6ef);
    let mut cluster = Cluster::start("vhost-upgraded-rings", 3, 1)?;
    cluster.ok(&["volume", "create", "disk", "--size", "1G"])?;
    let socket = cluster.folder().join("disk.sock");
    let guest = Guest::new();
    let mut backend = cluster.serve_on("disk", &socket)?;
    let mut front = connect(&socket, &guest);
    let _inflight = Inflight::get(&mut front, QUEUES);
    let ((mut pauses, resubmitted), answered) = under_load(&mut front, &guest, &mut rng, |load| {
        let (mut pauses, mut resubmitted, mut usual) = (Vec::new(), 0, Vec::new());
        for upgrade in 0..upgrades {
            load.longest();
            let begun = clock::now();
            let next = cluster.serve_with("disk", &socket, &["--upgrade"]).with_context(|| format!("upgrade {upgrade}"))?;
            std::mem::replace(&mut backend, next).handed_over()?;
            load.goes_on()?;
            pauses.push(load.longest());
            resubmitted += u32::from(backend.output().has_heard("requests in flight submitted again"));
            load.goes_on()?;
            // As much time without an upgrade, to tell what the cluster and the disk below it do by themselves.
            let as_long = begun.elapsed();
            load.longest();
            std::thread::sleep(as_long);
            usual.push(load.longest());
        }
        usual.sort_unstable();
        eprintln!("without an upgrade the longest time without an answer of a queue, in windows as long: p50 {:?}, p99 {:?}, at most {:?}",
            percentile(&usual, 50), percentile(&usual, 99), percentile(&usual, 100));
        Ok((pauses, resubmitted))
    })?;
    pauses.sort_unstable();
    eprintln!("{upgrades} upgrades: {answered} requests answered, {resubmitted} upgrades with requests run again; longest time without an answer of a \
        queue: p50 {:?}, p99 {:?}, at most {:?}", percentile(&pauses, 50), percentile(&pauses, 99), percentile(&pauses, 100));
    // The connection of before is still the one; and with it ends the last daemon's part.
    driver::config(&mut front, 0, 8).context("the front end's connection is the first one")?;
    drop(front);
    backend.stop()?;
    cluster.shut_down()
}

/// A frame of the hand-over protocol: `vhost-blk/src/handover/wire.rs`.
fn frame(version: u16, kind: u16, body: &[u8]) -> Result<Vec<u8>> {
    let len = u32::try_from(body.len())?;
    Ok([b"OGUP", &version.to_le_bytes()[..], &kind.to_le_bytes(), &len.to_le_bytes(), &[0; 4], body].concat())
}

/// What the daemon answers to a visitor: kind and first byte of the body.
fn answer(stream: &mut UnixStream) -> Result<(u16, u8)> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut header = [0; 16];
    stream.read_exact(&mut header)?;
    let mut body = vec![0; usize::from(u16::from_le_bytes([header[8], header[9]]))];
    stream.read_exact(&mut body)?;
    Ok((u16::from_le_bytes([header[6], header[7]]), body.first().copied().unwrap_or_default()))
}

#[test]
fn an_upgrade_that_fails_leaves_the_running_daemon_going_on() -> Result<()> {
    let mut rng = SmallRng::seed_from_u64(0x0_6f0);
    let mut cluster = Cluster::start("vhost-upgrade-fails", 3, 1)?;
    for name in ["disk", "other"] {
        cluster.ok(&["volume", "create", name, "--size", "1G"])?;
    }
    let socket = cluster.folder().join("disk.sock");
    let door = PathBuf::from(format!("{}.upgrade", socket.display()));
    let guest = Guest::new();
    let mut backend = cluster.serve_on("disk", &socket)?;
    let mut front = connect(&socket, &guest);
    let _inflight = Inflight::get(&mut front, QUEUES);
    let ((), answered) = under_load(&mut front, &guest, &mut rng, |load| {
        let hello = [&8_u16.to_le_bytes()[..], &128_u16.to_le_bytes(), b"disk read-write"].concat();
        let visit = |bytes: &[u8]| -> Result<UnixStream> {
            let mut stream = UnixStream::connect(&door)?;
            stream.write_all(bytes)?;
            Ok(stream)
        };
        // Another version, another volume, another shape: refused, in one line and with an exit code.
        ensure!(answer(&mut visit(&frame(2, 1, &hello)?)?)? == (2, 1), "version 2 is refused");
        let path = socket.to_string_lossy();
        let refused = [
            (vec!["vhost-blk", "other", "--socket", &path, "--upgrade"], "serves something else"),
            (vec!["vhost-blk", "disk", "--socket", &path, "--upgrade", "--queues", "3"], "number of queues"),
            (vec!["vhost-blk", "disk", "--socket", &path], "another process serves this socket"),
        ];
        for (args, words) in refused {
            let said = cluster.refused(&args)?;
            ensure!(said.contains(words), "{args:?}: {said}");
        }
        // One that gets ready keeps the second out; it dies when the rings stand still, the estate in its hands.
        for _ in 0..5 {
            let mut dying = visit(&frame(1, 1, &hello)?)?;
            ensure!(answer(&mut dying)?.0 == 3, "welcome");
            let said = cluster.refused(&["vhost-blk", "disk", "--socket", &path, "--upgrade"])?;
            ensure!(said.contains("another daemon is taking over"), "{said}");
            dying.write_all(&frame(1, 4, &[])?)?;
            ensure!(answer(&mut dying)?.0 == 5, "estate");
            drop(dying);
            load.goes_on()?;
        }
        // And one that does not fail.
        let next = cluster.serve_with("disk", &socket, &["--upgrade"])?;
        std::mem::replace(&mut backend, next).handed_over()?;
        load.goes_on()
    })?;
    eprintln!("{answered} requests answered over upgrades that failed");
    drop(front);
    backend.stop()?;
    cluster.shut_down()
}

#[test]
fn a_verifying_guest_sees_no_error_over_kills_of_the_daemon() -> Result<()> {
    let kills = kills(6);
    let image = Image::golden()?;
    let mut cluster = Cluster::start("vhost-killed-guest", 3, 1)?;
    cluster.ok(&["image", "import", &image.raw.to_string_lossy(), "golden"])?;
    cluster.ok(&["clone", "golden", "vm1"])?;
    let socket = cluster.folder().join("vm1.sock");
    let mut backend = cluster.serve_on("vm1", &socket)?;
    let mut vm = Vm::boot("vhost-killed", &backend.disk())?;
    let hammer = Hammer::start(&mut vm, "vhost-killed")?;
    vm.put_file("/tmp/flood.sh", include_str!("../scripts/guest-flood.sh"))?;
    vm.spawn("sh /tmp/flood.sh 3")?;
    vm.wait_until("test -f /tmp/flood.0 -a -f /tmp/flood.1 -a -f /tmp/flood.2", PATIENCE)?;
    let mut resubmitted = 0;
    // The guest computes most of the time: more kills until one has met a request.
    for kill in 0..kills * 6 {
        if kill >= kills && resubmitted > 0 {
            break;
        }
        backend.kill();
        backend = cluster.serve_on("vm1", &socket).with_context(|| format!("after kill {kill}"))?;
        hammer.goes_on(&mut vm)?;
        resubmitted += u32::from(backend.output().has_heard("requests in flight submitted again"));
    }
    ensure!(resubmitted > 0, "no kill met a request in flight: nothing was tested");
    vm.run_ok("touch /tmp/flood.stop")?;
    vm.wait_until("test -f /tmp/flood.over.0 -a -f /tmp/flood.over.1 -a -f /tmp/flood.over.2", PATIENCE)?;
    let rounds = vm.run_ok("cat /tmp/flood.0 /tmp/flood.1 /tmp/flood.2")?;
    ensure!(vm.run("cat /tmp/flood.bad")?.code != 0, "{}", vm.run("cat /tmp/flood.bad")?.output);
    let longest = hammer.finish(&mut vm)?;
    eprintln!("{kills} kills or more under a guest, {resubmitted} of them with requests in flight: longest round {longest:?}, rounds of its other writers {rounds:?}");
    vm.power_off()?;
    backend.stop()?;
    cluster.shut_down()
}

#[test]
fn a_verifying_guest_sees_no_error_over_upgrades() -> Result<()> {
    let upgrades = upgrades().min(5);
    let image = Image::golden()?;
    let mut cluster = Cluster::start("vhost-upgraded-guest", 3, 1)?;
    cluster.ok(&["image", "import", &image.raw.to_string_lossy(), "golden"])?;
    cluster.ok(&["clone", "golden", "vm1"])?;
    let socket = cluster.folder().join("vm1.sock");
    let mut backend = cluster.serve_on("vm1", &socket)?;
    let mut vm = Vm::boot("vhost-upgraded", &backend.disk())?;
    let hammer = Hammer::start(&mut vm, "vhost-upgraded")?;
    for upgrade in 0..upgrades {
        let next = cluster.serve_with("vm1", &socket, &["--upgrade"]).with_context(|| format!("upgrade {upgrade}"))?;
        std::mem::replace(&mut backend, next).handed_over()?;
        hammer.goes_on(&mut vm)?;
        ensure!(!backend.output().has_heard("front end left"), "QEMU has connected anew");
    }
    let longest = hammer.finish(&mut vm)?;
    eprintln!("{upgrades} upgrades under a guest: longest round {longest:?}");
    // QEMU stops the rings on the connection that was handed over.
    vm.power_off()?;
    backend.stop()?;
    cluster.shut_down()
}
