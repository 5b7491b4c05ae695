//! `ogee vhost-blk serve`: one daemon with many volumes, asked by its control socket. Front ends without guests, which verify every
//! byte, work on all volumes while volumes come and go, the daemon is killed, and others send it what they should not.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "test code")]

use anyhow::{Context, Result, ensure};
use ogee_common::clock;
use ogee_vm_tests::cluster::{Cluster, binary};
use ogee_vm_tests::deadline::wait_for;
use ogee_vm_tests::vhost::{Readiness, VhostBackend};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Duration;
use vhost::vhost_user::Frontend;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;

#[allow(dead_code, reason = "a part of it is used here")]
#[path = "../../vhost-blk/tests/support/driver.rs"]
mod driver;

use driver::{EVENT_IDX, Guest, Inflight, NEXT, Ring, VERSION_1, WRITE, config};

/// For anything that must happen.
pub const PATIENCE: Duration = Duration::from_secs(60);
const FEATURES: u64 = VERSION_1 | EVENT_IDX;
const IN: u32 = 0;
const OUT: u32 = 1;
const PAGE: u64 = 4096;
const PAGE_LEN: usize = 4096;
/// Requests in flight of a front end: as many as the driver has slots. Each has a page of the volume of its own.
const DEPTH: usize = 16;
const VOLUMES: usize = 8;
const SIZE_SECTORS: u64 = (64 << 20) / 512;
/// Answers after which a front end counts as going on.
const GOES_ON: u64 = 40;

/// A daemon with a state file.
struct Many<'a> {
    cluster: &'a Cluster,
    name: &'static str,
    control: PathBuf,
    state: PathBuf,
    starts: u32,
}

impl<'a> Many<'a> {
    fn new(cluster: &'a Cluster, name: &'static str) -> Self {
        let (control, state) = (cluster.folder().join("many.control"), cluster.folder().join("many.state"));
        Self { cluster, name, control, state, starts: 0 }
    }

    fn start(&mut self) -> Result<VhostBackend> {
        self.starts += 1;
        let name = format!("{}-{}", self.name, self.starts);
        VhostBackend::start(&name, &binary()?, &self.control, Readiness::Says, |command| {
            command.env("OGEE_MDS", self.cluster.mds().join(",")).args(["vhost-blk", "serve", "--metrics", "127.0.0.1:0"]);
            command.args(["--socket-mode", "600", "--control"]).arg(&self.control).arg("--state").arg(&self.state);
        })
    }

    fn socket(&self, volume: &str) -> PathBuf {
        self.control.with_file_name(format!("{volume}.sock"))
    }

    /// The arguments of a command of the daemon.
    fn arguments<'b>(&'b self, arguments: &[&'b str]) -> Vec<&'b str> {
        let control = self.control.to_str().expect("a plain path");
        [&["vhost-blk"][..], arguments, &["--control", control]].concat()
    }

    fn json(&self, arguments: &[&str]) -> Result<Value> {
        self.cluster.json(&[&self.arguments(arguments)[..], &["--json"]].concat())
    }

    /// Exit code and explanation of a command that must fail.
    fn refused(&self, arguments: &[&str]) -> Result<(i32, String)> {
        let arguments = self.arguments(arguments);
        let said = self.cluster.refused(&arguments)?;
        Ok((self.cluster.ogee(&arguments)?.code, said))
    }

    /// The entry of a volume in the listing.
    fn listed(&self, volume: &str) -> Result<Value> {
        let list = self.json(&["ls"])?;
        let found = list.as_array().context("a list")?.iter().find(|entry| entry["volume"] == volume);
        Ok(found.cloned().unwrap_or(Value::Null))
    }

    fn wait_listed(&self, volume: &str, field: &str, value: &Value) -> Result<()> {
        wait_for(&format!("{volume}: {field} {value}"), PATIENCE, || Ok((self.listed(volume)?[field] == *value).then_some(())))
    }

    /// One line on the control socket, as somebody without our command would send it.
    fn say(&self, line: &[u8]) -> Result<Value> {
        let mut stream = UnixStream::connect(&self.control)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        // Of a line that is too long the rest may be refused.
        let _ = stream.write_all(line);
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        serde_json::from_str(&answer).with_context(|| format!("answered {answer:?}"))
    }
}

/// What main tells a front end.
const GO: u8 = 0;
const RECONNECT: u8 = 1;
const FINISH: u8 = 2;

/// Between main and a front end's thread.
#[derive(Default)]
struct Post {
    order: AtomicU8,
    answered: AtomicU64,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    writes: Option<u64>,
    status: u64,
}

/// The front end of one volume, and what the volume must hold.
struct Disk<'a> {
    guest: &'a Guest,
    ring: Ring<'a>,
    number: u64,
    open: [Option<Open>; DEPTH],
    versions: [u64; DEPTH],
    next_version: u64,
    rng: SmallRng,
}

impl<'a> Disk<'a> {
    fn new(guest: &'a Guest, ring: Ring<'a>, number: u64) -> Self {
        let rng = SmallRng::seed_from_u64(number);
        Self { guest, ring, number, open: [None; DEPTH], versions: [0; DEPTH], next_version: 1, rng }
    }

    /// A page of another volume, another place or another time is none of these.
    fn contents(&self, slot: usize, version: u64) -> Vec<u8> {
        let stamp = [version, slot as u64, self.number, !version].map(u64::to_le_bytes).concat();
        if version == 0 { vec![0; PAGE_LEN] } else { stamp.repeat(PAGE_LEN / 32) }
    }

    fn submit(&mut self, slot: usize, write: bool) {
        let at = self.ring.data() + slot as u64 * PAGE;
        let version = write.then_some(self.next_version);
        self.next_version += u64::from(write);
        let filled = version.map_or_else(|| vec![0xdd; PAGE_LEN], |version| self.contents(slot, version));
        self.guest.put_bytes(at, &filled);
        self.ring.choose_slot(u16::try_from(slot).unwrap());
        let (kind, flags) = if write { (OUT, 0) } else { (IN, WRITE) };
        let (status, _) = self.ring.submit(kind, slot as u64 * PAGE / 512, &[(at, 4096, flags)], slot % 2 == 1);
        self.open[slot] = Some(Open { writes: version, status });
    }

    fn fill(&mut self) {
        for slot in 0..DEPTH {
            if self.open[slot].is_none() {
                let write = self.rng.random_bool(0.7);
                self.submit(slot, write);
            }
        }
        self.ring.kick_if_wanted();
    }

    /// Takes what was answered: each a request in flight, without an error, a read with what was written last.
    fn reap(&mut self) -> Result<u64> {
        let mut count = 0;
        while let Some((head, _)) = self.ring.poll_used() {
            let slot = usize::try_from(head / 8)?;
            let open = self.open.get_mut(slot).and_then(Option::take).with_context(|| format!("head {head} answered twice"))?;
            ensure!(self.guest.get::<u8>(open.status) == 0, "volume {}: status of {open:?}", self.number);
            match open.writes {
                Some(version) => self.versions[slot] = version,
                None => {
                    let got = self.guest.bytes(self.ring.data() + slot as u64 * PAGE, PAGE_LEN);
                    ensure!(got == self.contents(slot, self.versions[slot]), "volume {} page {slot}: wrong data", self.number);
                }
            }
            count += 1;
        }
        Ok(count)
    }

    fn drain(&mut self) -> Result<()> {
        wait_for(&format!("answers of volume {}", self.number), PATIENCE, || {
            self.reap()?;
            Ok(self.open.iter().all(Option::is_none).then_some(()))
        })
    }

    /// Waits for what is in flight, then reads every page.
    fn finish(&mut self) -> Result<()> {
        self.drain()?;
        (0..DEPTH).for_each(|slot| self.submit(slot, false));
        self.ring.kick_if_wanted();
        self.drain()
    }
}

fn connect(socket: &Path, guest: &Guest) -> Frontend {
    driver::connect_with(socket, guest, FEATURES, VhostUserProtocolFeatures::INFLIGHT_SHMFD)
}

/// A front end that works on a volume until it is told to finish.
fn work(number: usize, socket: &Path, post: &Post) -> Result<()> {
    let guest = Guest::new();
    let mut front = connect(socket, &guest);
    let inflight = Inflight::get(&mut front, 1);
    let ring = Ring::start(&mut front, &guest, 0, FEATURES);
    let mut disk = Disk::new(&guest, ring, number as u64);
    loop {
        match post.order.load(Ordering::SeqCst) {
            GO => {
                disk.fill();
                let answered = disk.reap()?;
                post.answered.fetch_add(answered, Ordering::SeqCst);
                if answered == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            RECONNECT => {
                disk.reap()?;
                drop(front);
                front = connect(socket, &guest);
                inflight.set(&mut front)?;
                let base = disk.ring.used_idx();
                disk.ring.restart(&mut front, base);
                // Whatever was in flight is answered now, without anything new.
                disk.drain()?;
                // Unless it was told to finish meanwhile.
                let _ = post.order.compare_exchange(RECONNECT, GO, Ordering::SeqCst, Ordering::SeqCst);
            }
            _ => break,
        }
    }
    disk.finish()
}

/// Every one of them has more answers than now before long.
fn all_go_on(posts: &[Post]) -> Result<()> {
    let before: Vec<u64> = posts.iter().map(|post| post.answered.load(Ordering::SeqCst)).collect();
    for (number, (post, before)) in posts.iter().zip(before).enumerate() {
        let goes_on = || Ok((post.answered.load(Ordering::SeqCst) >= before + GOES_ON).then_some(()));
        wait_for(&format!("volume {number} to go on"), PATIENCE, goes_on)?;
    }
    Ok(())
}

fn finish(post: &Post, thread: ScopedJoinHandle<'_, Result<()>>, number: usize) -> Result<()> {
    post.order.store(FINISH, Ordering::SeqCst);
    thread.join().map_err(|_| anyhow::anyhow!("front end {number} panicked"))?.with_context(|| format!("front end {number}"))
}

fn metrics(daemon: &VhostBackend) -> Result<String> {
    let said = daemon.output().text();
    let addr = said.split("metrics: http://").nth(1).and_then(|rest| rest.split('/').next()).context("the address of the metrics")?;
    let mut stream = TcpStream::connect(addr)?;
    write!(stream, "GET /metrics HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n")?;
    let mut page = String::new();
    stream.read_to_string(&mut page)?;
    Ok(page)
}

/// The value of one line of a metrics page.
fn figure(page: &str, name: &str) -> Option<u64> {
    page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// A front end whose ring makes no sense.
fn break_ring(socket: &Path) -> Result<()> {
    let guest = Guest::new();
    let mut front = driver::connect(socket, &guest, VERSION_1);
    let ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    for head in 0..16_u16 {
        // A chain that leads back to itself, far outside of the memory.
        let looped = Descriptor::new(u64::MAX - 4, u32::MAX, NEXT | WRITE, head);
        guest.put(u64::from(head) * 16, RawDescriptor::from(looped));
        ring.publish(head);
    }
    ring.set_avail_idx(30_000);
    ring.kick();
    ensure!(config(&mut front, 0, 8)? == SIZE_SECTORS.to_le_bytes(), "its connection is still answered");
    Ok(())
}

/// What nobody should send is answered by an error, and what comes after it as ever.
fn hostile_lines(many: &Many<'_>) -> Result<()> {
    let relative = r#"{"version":1,"request":{"attach":{"spec":{"volume":"v0","socket":"s"}}}}"#;
    let lines: [Vec<u8>; 9] = [
        b"\n".to_vec(),
        b"attach v0\n".to_vec(),
        b"\0\xff\xfe\n".to_vec(),
        b"{\"version\":2,\"request\":\"list\"}\n".to_vec(),
        b"{\"version\":1,\"request\":\"reboot\"}\n".to_vec(),
        b"{\"version\":1,\"request\":{\"attach\":{\"spec\":{\"volume\":\"../x\",\"socket\":\"/s\"}}}}\n".to_vec(),
        format!("{relative}\n").into_bytes(),
        ["[".repeat(60_000), "\n".to_owned()].concat().into_bytes(),
        vec![b'x'; 1 << 20],
    ];
    for line in lines {
        let shown = String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned();
        let answer = many.say(&line).with_context(|| shown.clone())?;
        ensure!(answer["reply"]["error"]["kind"] == "usage", "{shown}: {answer}");
    }
    // A mistake does not end the connection.
    let mut stream = UnixStream::connect(&many.control)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"nonsense\n{\"version\":1,\"request\":\"list\"}\n{\"half")?;
    let mut answers = BufReader::new(stream.try_clone()?).lines();
    ensure!(answers.next().context("an error")??.contains("\"error\""), "the first line");
    ensure!(answers.next().context("a list")??.contains("\"list\""), "the second line");
    drop((answers, stream));
    // More connections than there may be: some are turned away, and room is found when they are gone.
    let open: Vec<UnixStream> = (0..40).map(|_| UnixStream::connect(&many.control)).collect::<Result<_, _>>()?;
    let (code, said) = many.refused(&["ls"])?;
    ensure!(code == 5 && said.contains("limit"), "{code}: {said}");
    drop(open);
    wait_for("room for a connection", PATIENCE, || Ok((many.cluster.ogee(&many.arguments(&["ls"]))?.code == 0).then_some(())))
}

#[test]
fn many_volumes_in_one_daemon() -> Result<()> {
    let cluster = Cluster::start("vhost-many", 3, 1)?;
    let names: Vec<String> = (0..VOLUMES).map(|number| format!("v{number}")).collect();
    let mut many = Many::new(&cluster, "vhost-many-daemon");
    ensure!(many.refused(&["ls"])?.0 == 3, "nobody is there");
    let daemon = many.start()?;
    ensure!(std::fs::metadata(&many.control)?.permissions().mode() & 0o777 == 0o600, "the control socket is its owner's");
    for name in &names {
        cluster.ok(&["volume", "create", name, "--size", "64M"])?;
        let attached = many.json(&["attach", name, "--queues", "1"])?;
        ensure!(attached["socket"] == json!(many.socket(name)), "{attached}");
        ensure!(std::fs::metadata(many.socket(name))?.permissions().mode() & 0o777 == 0o600, "the daemon's default");
    }
    for (arguments, code) in [(&["attach", "nobody"][..], 3), (&["attach", "v0", "--socket", "/tmp/other"], 4), (&["detach", "nobody"], 3)] {
        let (found, said) = many.refused(arguments)?;
        ensure!(found == code, "{arguments:?}: {found}: {said}");
    }
    let list = many.json(&["ls"])?;
    ensure!(list.as_array().is_some_and(|list| list.len() == VOLUMES), "{list}");
    ensure!(list.as_array().is_some_and(|list| list.iter().all(|it| it["state"] == "serving" && it["connected"] == false)), "{list}");
    let posts: Vec<Post> = names.iter().map(|_| Post::default()).collect();
    let daemon = std::thread::scope(|scope| -> Result<VhostBackend> {
        let mut threads = vec![];
        for (number, (name, post)) in names.iter().zip(&posts).enumerate() {
            let socket = many.socket(name);
            threads.push(scope.spawn(move || work(number, &socket, post)));
        }
        let under_load = daemon_under_load(&mut many, daemon, &posts, &mut threads);
        // Whatever happened, nobody is waited for who was not told.
        posts.iter().for_each(|post| post.order.store(FINISH, Ordering::SeqCst));
        for (number, thread) in threads.into_iter().enumerate() {
            let ended = thread.join().map_err(|_| anyhow::anyhow!("front end {number} panicked"));
            if under_load.is_ok() {
                ended?.with_context(|| format!("front end {number}"))?;
            }
        }
        under_load
    })?;
    daemon.stop()?;
    ensure!(names.iter().all(|name| !many.socket(name).exists()) && !many.control.exists(), "no socket is left");
    for name in &names {
        ensure!(cluster.json(&["volume", "info", name, "--json"])?["attached"] == false, "{name} was given back");
    }
    // The state file outlives the end too; a damaged one is not started on.
    let daemon = many.start()?;
    ensure!(many.listed("v0")?["state"] == "serving" && many.listed("v7")? == Value::Null, "all but the one that was detached");
    daemon.stop()?;
    let state = std::fs::read(&many.state)?;
    std::fs::write(&many.state, &state[..state.len() / 2])?;
    let state_path = many.state.to_str().context("a plain path")?.to_owned();
    let (code, said) = many.refused(&["serve", "--state", &state_path])?;
    ensure!(code == 1 && said.contains(&state_path), "{code}: {said}");
    cluster.shut_down()
}

/// Everything that happens while front ends work.
fn daemon_under_load(
    many: &mut Many<'_>, daemon: VhostBackend, posts: &[Post], threads: &mut Vec<ScopedJoinHandle<'_, Result<()>>>,
) -> Result<VhostBackend> {
    all_go_on(posts)?;
    let page = metrics(&daemon)?;
    for number in 0..VOLUMES {
        let writes = figure(&page, &format!("ogee_volume_ios_total{{volume=\"v{number}\",kind=\"write\"}}"));
        ensure!(writes.is_some_and(|writes| writes > 0), "v{number}: {page}");
        many.wait_listed(&format!("v{number}"), "connected", &json!(true))?;
    }
    ensure!(figure(&page, "ogee_vhost_volumes{state=\"serving\"}") == Some(VOLUMES as u64), "{page}");
    ensure!(figure(&page, "ogee_vhost_connections_total{volume=\"v0\"}") == Some(1), "{page}");
    ensure!(figure(&page, "ogee_vhost_front_ends{volume=\"v0\"}") == Some(1), "{page}");
    let stats = many.json(&["stats"])?;
    let writes = &stats[0]["kinds"][1];
    let timed: u64 = writes["latency_us_log2"].as_array().context("latencies")?.iter().filter_map(Value::as_u64).sum();
    ensure!(writes["kind"] == "write" && timed > 0 && writes["errors"] == 0, "{stats}");

    // One goes, under the eyes of the others.
    let (code, said) = many.refused(&["detach", "v7"])?;
    ensure!(code == 4 && said.contains("--force"), "{code}: {said}");
    let others = &posts[..VOLUMES - 1];
    finish(&posts[7], threads.pop().context("thread 7")?, 7)?;
    many.wait_listed("v7", "connected", &json!(false))?;
    many.json(&["detach", "v7"])?;
    ensure!(!many.socket("v7").exists() && many.listed("v7")? == Value::Null, "it is gone");
    ensure!(many.cluster.json(&["volume", "info", "v7", "--json"])?["attached"] == false, "and given back");
    all_go_on(others)?;

    // One has a guest that breaks its ring; and the control socket is abused.
    let others = &posts[..VOLUMES - 2];
    finish(&posts[6], threads.pop().context("thread 6")?, 6)?;
    break_ring(&many.socket("v6"))?;
    hostile_lines(many)?;
    all_go_on(others)?;
    let guest = Guest::new();
    let mut front = driver::connect(&many.socket("v6"), &guest, VERSION_1);
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    let data = ring.data();
    ensure!(ring.call(IN, 0, &[(data, 4096, WRITE)], false).0 == 0, "the next front end of that volume is served");
    many.wait_listed("v6", "connected", &json!(true))?;
    many.json(&["detach", "v6", "--force"])?;
    drop(front);
    many.json(&["attach", "v6", "--queues", "1"])?;
    all_go_on(others)?;

    // The daemon dies with requests in flight, and the next one finds everything.
    daemon.kill();
    let daemon = many.start()?;
    let died = clock::now();
    for number in 0..VOLUMES - 1 {
        many.wait_listed(&format!("v{number}"), "state", &json!("serving"))?;
    }
    eprintln!("all volumes are served {:?} after the next daemon was ready", died.elapsed());
    others.iter().for_each(|post| post.order.store(RECONNECT, Ordering::SeqCst));
    all_go_on(others)?;
    let stats = many.json(&["stats"])?;
    let again: u64 = stats.as_array().context("stats")?.iter().filter_map(|it| it["resubmitted"].as_u64()).sum();
    ensure!(again > 0, "nothing was in flight at the kill: nothing was tested");
    let page = metrics(&daemon)?;
    let shown = (0..VOLUMES).filter_map(|number| figure(&page, &format!("ogee_vhost_resubmitted_requests_total{{volume=\"v{number}\"}}")));
    ensure!(shown.sum::<u64>() == again, "{page}");
    Ok(daemon)
}

/// The status of a read by a front end of its own.
fn read_status(socket: &Path) -> u8 {
    let guest = Guest::new();
    let mut front = driver::connect(socket, &guest, VERSION_1);
    let mut ring = Ring::start(&mut front, &guest, 0, VERSION_1);
    let data = ring.data();
    ring.call(IN, 0, &[(data, 4096, WRITE)], false).0
}

/// A daemon with one volume, which it takes from whoever has it.
fn thief(cluster: &Cluster, name: &str, volume: &str) -> Result<VhostBackend> {
    let socket = cluster.folder().join("thief.sock");
    VhostBackend::start(name, &binary()?, &socket, Readiness::Says, |command| {
        command.env("OGEE_MDS", cluster.mds().join(",")).args(["vhost-blk", volume, "--steal", "--socket"]).arg(&socket);
    })
}

/// A volume that another client takes, and a socket that somebody removes: the others do not notice, and what can come back does.
#[test]
fn what_goes_wrong_with_one_volume_stays_there() -> Result<()> {
    let cluster = Cluster::start("vhost-many-apart", 3, 1)?;
    let mut many = Many::new(&cluster, "vhost-many-apart-daemon");
    for name in ["stolen", "unlinked", "well"] {
        cluster.ok(&["volume", "create", name, "--size", "64M"])?;
    }
    let daemon = many.start()?;
    for name in ["stolen", "unlinked", "well"] {
        many.json(&["attach", name, "--queues", "1"])?;
    }
    let reads = |many: &Many<'_>, name: &str| read_status(&many.socket(name));
    ensure!(reads(&many, "stolen") == 0 && reads(&many, "well") == 0, "all is well");
    let first = thief(&cluster, "vhost-many-thief", "stolen")?;
    many.wait_listed("stolen", "state", &json!("fenced"))?;
    ensure!(reads(&many, "stolen") == 1 && reads(&many, "well") == 0, "only the one that was taken fails");
    std::fs::remove_file(many.socket("unlinked"))?;
    ensure!(reads(&many, "well") == 0, "a removed socket is that volume's affair");
    many.json(&["detach", "unlinked"])?;
    many.json(&["attach", "unlinked", "--queues", "1"])?;
    ensure!(reads(&many, "unlinked") == 0, "attached again it has a socket");

    daemon.kill();
    let daemon = many.start()?;
    many.wait_listed("well", "state", &json!("serving"))?;
    waits_because(&many, "stolen", "another client")?;
    ensure!(reads(&many, "well") == 0, "the others are served meanwhile");

    // Nobody has it any more; but its guest here must not go on with what another one wrote.
    first.stop()?;
    daemon.kill();
    let daemon = many.start()?;
    waits_because(&many, "stolen", "another client")?;
    ensure!(cluster.json(&["volume", "info", "stolen", "--json"])?["attached"] == false, "it was not touched");
    many.json(&["detach", "stolen"])?;
    many.json(&["attach", "stolen", "--queues", "1"])?;
    ensure!(reads(&many, "stolen") == 0, "it was asked for");

    // Nobody loses a volume to a socket that cannot be made.
    let second = thief(&cluster, "vhost-many-thief-2", "stolen")?;
    many.wait_listed("stolen", "connected", &json!(false))?;
    many.json(&["detach", "stolen"])?;
    let nowhere = cluster.folder().join("nowhere/s");
    let (code, said) = many.refused(&["attach", "stolen", "--steal", "--socket", nowhere.to_str().context("a plain path")?])?;
    ensure!(code == 3 && said.contains("directory"), "{code}: {said}");
    ensure!(read_status(&cluster.folder().join("thief.sock")) == 0, "it has it still");
    second.stop()?;
    daemon.stop()?;
    cluster.shut_down()
}

fn waits_because(many: &Many<'_>, volume: &str, why: &str) -> Result<()> {
    let waiting = many.listed(volume)?;
    let says_why = waiting["reason"].as_str().is_some_and(|reason| reason.contains(why));
    ensure!(waiting["state"] == "waiting" && says_why, "{why}: {waiting}");
    Ok(())
}

/// A volume is renamed under its guest, and another one gets its name.
#[test]
fn a_volume_is_known_by_more_than_its_name() -> Result<()> {
    let cluster = Cluster::start("vhost-many-names", 3, 1)?;
    let mut many = Many::new(&cluster, "vhost-many-names-daemon");
    cluster.ok(&["volume", "create", "vm1", "--size", "64M"])?;
    let daemon = many.start()?;
    many.json(&["attach", "vm1", "--queues", "1"])?;
    cluster.ok(&["volume", "rename", "vm1", "old"])?;
    let (code, said) = many.refused(&["attach", "old"])?;
    ensure!(code == 4 && said.contains("vm1.sock"), "{code}: {said}");
    ensure!(read_status(&many.socket("vm1")) == 0, "its guest goes on");

    daemon.kill();
    cluster.ok(&["volume", "create", "vm1", "--size", "64M"])?;
    let daemon = many.start()?;
    waits_because(&many, "vm1", "another volume now")?;
    many.json(&["detach", "vm1"])?;
    for name in ["old", "vm1"] {
        many.json(&["attach", name, "--queues", "1"])?;
        ensure!(read_status(&many.socket(name)) == 0, "{name} was asked for");
    }
    daemon.stop()?;
    cluster.shut_down()
}
