//! `ogee vhost-blk` is killed with requests in flight, again and again, and a new one goes on with them: the same is asked of a
//! front end without a guest, which records every ring entry, and of a guest that verifies what it writes.
//!
//! `OGEE_VHOST_KILLS` is the number of kills; by default few for the guest and 50 for the rings.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "test code")]

use anyhow::{Context, Result, ensure};
use ogee_common::clock;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::hammer::Hammer;
use ogee_vm_tests::image::Image;
use ogee_vm_tests::vm::Vm;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::path::Path;
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
const FEATURES: u64 = VERSION_1 | EVENT_IDX;
const IN: u32 = 0;
const OUT: u32 = 1;
const PAGE: u64 = 4096;
/// Requests in flight of a queue: as many as the driver has slots.
const DEPTH: u16 = 16;
/// Pages of a queue's part of the volume; few, so that they are written again soon.
const PAGES: u64 = 48;
const QUEUES: u16 = 2;

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
