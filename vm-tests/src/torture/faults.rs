//! What goes wrong, when and for how long: a schedule by seed, carried out on the fleet.
//!
//! Used by the director. Invariants: every fault that is injected is undone, at its time or by [`Faults::heal`]; no process suffers
//! two faults at once, so that each can be undone by itself. A frozen disk thaws by a process of its own, should this one die. A daemon
//! whose disk failed may end by itself, at once or a little later; it is then started again, as an operator would.

use super::fleet::Fleet;
use anyhow::{Context, Result};
use ogee_common::clock::{self, Instant};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Faults at once.
const ACTIVE_MAX: usize = 3;
/// What is left on a disk that was filled up.
const FULL_LEFT: u64 = 1 << 20;

/// How to undo a fault.
#[derive(Debug)]
enum Undo {
    Start(String),
    StartClient(String, String),
    Continue(String),
    Open(Vec<(String, String)>),
    Empty(PathBuf),
    Thaw(Child),
    MendDisk(String),
    SetClock(String),
}

/// What a disk does wrong: operations are those of `server/disk/src/fault_file.rs`. Paths: log, data files, metadata store.
const DISK_FAULTS: [(&str, &str); 12] = [
    ("disk: flush of the log fails", "sync segment- {skip} 1 errno:5"),
    ("disk: short write of the log", "write segment- {skip} 1 torn:{bytes}"),
    ("disk: write of the log fails", "write segment- {skip} 1 errno:5"),
    ("disk: flush of a data file fails", "sync chunks/ {few} 1 errno:5"),
    ("disk: short write of a data file", "write chunks/ {skip} 1 torn:{bytes}"),
    ("disk: write of a data file fails", "write chunks/ {skip} 1 errno:5"),
    ("disk: reads of data files fail", "read chunks/ {skip} {times} errno:5"),
    ("disk: flush of metadata fails", "sync meta {few} 1 errno:5"),
    ("disk: write of metadata fails", "write meta {few} 1 errno:5"),
    ("disk: no space for new files", "create - 0 {times} errno:28"),
    ("disk: no space for data", "write chunks/ {skip} {times} errno:28"),
    ("disk: slow", "sync - 0 always delay:{delay}"),
];
/// How long after a disk fault a daemon may end by itself because of it.
const GRACE: Duration = Duration::from_secs(20);

/// The faults of a run.
#[derive(Debug)]
pub(super) struct Faults {
    rng: StdRng,
    seed: u64,
    began: Instant,
    active: Vec<(Instant, HashSet<String>, Undo)>,
    /// Daemons whose disk has failed, and until when they may end because of it.
    shaken: HashMap<String, Instant>,
    /// How many of each kind.
    pub counts: BTreeMap<&'static str, u32>,
    /// One line for each.
    pub log: Vec<String>,
}

impl Faults {
    /// A schedule that follows from `rng`.
    #[must_use]
    pub(super) fn new(mut rng: StdRng) -> Self {
        let seed = rng.random();
        Self { rng, seed, began: clock::now(), active: vec![], shaken: HashMap::new(), counts: BTreeMap::new(), log: vec![] }
    }

    fn note(&mut self, kind: &'static str, what: &str) {
        *self.counts.entry(kind).or_default() += 1;
        self.log.push(format!("{:8.3} s: {kind} {what}", self.began.elapsed().as_secs_f64()));
    }

    /// The pause before the next step.
    pub(super) fn pause(&mut self) -> Duration {
        Duration::from_millis(self.rng.random_range(100..2_500))
    }

    fn millis(&mut self, from: u64, to: u64) -> Duration {
        // Short ones are as interesting as long ones: the same number in each octave.
        let (from, to) = (from as f64, to as f64);
        Duration::from_secs_f64(from * (to / from).powf(self.rng.random()) / 1e3)
    }

    /// Undoes what is over, and does one more thing.
    ///
    /// # Errors
    /// When a fault cannot be made or undone.
    pub(super) fn step(&mut self, fleet: &mut Fleet) -> Result<()> {
        self.undo(fleet, clock::now())?;
        self.raise_shaken(fleet)?;
        if self.active.len() >= ACTIVE_MAX {
            return Ok(());
        }
        let free: Vec<String> = fleet.processes.iter().map(|p| p.name.clone()).filter(|n| n != "admin" && !self.suffers(n)).collect();
        let of = |prefix: &str| free.iter().filter(|n| n.starts_with(prefix)).cloned().collect::<Vec<_>>();
        let (mds, chunkservers, clients) = (of("mds-"), of("cs-"), of("client-"));
        let daemons: Vec<String> = mds.iter().chain(&chunkservers).cloned().collect();
        let kind = self.rng.random_range(0..28);
        let rng = &mut self.rng;
        let victims = match kind {
            0..=2 | 13..=15 => &chunkservers,
            3..=4 => &mds,
            5..=6 => &clients,
            20..=23 => &chunkservers,
            24 => &mds,
            25..=26 => &daemons,
            _ => &free,
        };
        let Some(victim) = victims.choose(rng).cloned() else { return Ok(()) };
        match kind {
            0..=4 => self.kill(fleet, victim),
            5 => self.kill_client(fleet, victim),
            6..=8 => self.stop(fleet, victim),
            9..=10 => self.part(fleet, &victim, &free),
            11..=12 => self.cut_off(fleet, victim),
            13 => self.fill(fleet, victim),
            14 => self.freeze(fleet, victim),
            15 | 26 => self.end(fleet, victim),
            16 if free.len() == fleet.processes.len() - 1 => self.roll(fleet, [("rolling restart", &chunkservers[..]), ("rolling restart of the MDS", &mds[..])]),
            17 if self.active.is_empty() => self.kill_all(fleet, &chunkservers),
            18 => self.kill_leader(fleet, &mds),
            19 => self.lose_mds(fleet, &clients),
            20..=24 => self.break_disk(fleet, victim),
            25 => self.set_clock(fleet, victim),
            27 => self.reset(fleet, &victim),
            _ => Ok(()),
        }
    }

    fn suffers(&self, name: &str) -> bool {
        self.active.iter().any(|(_, names, _)| names.contains(name))
    }

    fn add(&mut self, length: Duration, names: impl IntoIterator<Item = String>, undo: Undo) {
        self.active.push((clock::now() + length, names.into_iter().collect(), undo));
    }

    fn kill(&mut self, fleet: &mut Fleet, victim: String) -> Result<()> {
        fleet.process(&victim)?.kill()?;
        self.note(if victim.starts_with("mds") { "kill MDS" } else { "kill chunkserver" }, &victim);
        let length = self.millis(20, 8_000);
        self.add(length, [victim.clone()], Undo::Start(victim));
        Ok(())
    }

    fn kill_leader(&mut self, fleet: &mut Fleet, free: &[String]) -> Result<()> {
        let (hub, mds) = (super::network::HUB, fleet.mds.clone());
        let mut command = fleet.network.command(hub, &crate::cluster::binary()?)?;
        let output = command.args(["status", "--json"]).env("OGEE_MDS", mds).output().context("ask for the leader")?;
        let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let leader = status["mds"].as_array().and_then(|list| list.iter().find(|m| m["leader"] == true)).and_then(|m| m["id"].as_u64());
        let victim = format!("mds-{}", leader.unwrap_or(0));
        if !free.contains(&victim) {
            return Ok(());
        }
        fleet.process(&victim)?.kill()?;
        self.note("kill MDS leader", &victim);
        let length = self.millis(20, 8_000);
        self.add(length, [victim.clone()], Undo::Start(victim));
        Ok(())
    }

    fn kill_client(&mut self, fleet: &mut Fleet, victim: String) -> Result<()> {
        fleet.process(&victim)?.kill()?;
        self.note("kill client", &victim);
        let (length, volume) = (self.millis(20, 8_000), super::volume_of(&victim));
        self.add(length, [victim.clone()], Undo::StartClient(victim, volume.to_owned()));
        Ok(())
    }

    fn kill_all(&mut self, fleet: &mut Fleet, chunkservers: &[String]) -> Result<()> {
        self.note("kill all chunkservers", "");
        for victim in chunkservers {
            fleet.process(victim)?.kill()?;
            let length = self.millis(20, 3_000);
            self.add(length, [victim.clone()], Undo::Start(victim.clone()));
        }
        Ok(())
    }

    fn end(&mut self, fleet: &mut Fleet, victim: String) -> Result<()> {
        fleet.process(&victim)?.end()?;
        fleet.process(&victim)?.wait()?;
        self.note(if victim.starts_with("mds") { "end MDS" } else { "end chunkserver" }, &victim);
        self.add(Duration::ZERO, [victim.clone()], Undo::Start(victim));
        Ok(())
    }

    /// Ends and starts one after the other, as an upgrade does.
    fn roll(&mut self, fleet: &mut Fleet, choices: [(&'static str, &[String]); 2]) -> Result<()> {
        let (whom, victims) = choices[self.rng.random_range(0..2)];
        self.note(whom, "");
        for victim in victims {
            fleet.process(victim)?.end()?;
            fleet.process(victim)?.wait()?;
            fleet.start_daemon(victim)?;
            std::thread::sleep(self.millis(300, 3_000));
        }
        Ok(())
    }

    /// Every connection of a process breaks, in the middle of whatever is on it.
    fn reset(&mut self, fleet: &mut Fleet, victim: &str) -> Result<()> {
        fleet.network.reset(victim)?;
        self.note("cut connections", victim);
        Ok(())
    }

    fn stop(&mut self, fleet: &mut Fleet, victim: String) -> Result<()> {
        fleet.process(&victim)?.stop(true)?;
        let length = self.millis(100, 20_000);
        self.note(if victim.starts_with("client") { "stop client" } else { "stop daemon" }, &format!("{victim} for {length:.1?}"));
        self.add(length, [victim.clone()], Undo::Continue(victim));
        Ok(())
    }

    /// Packets from one process to another get lost, in one direction or both.
    fn part(&mut self, fleet: &mut Fleet, victim: &str, free: &[String]) -> Result<()> {
        let others: Vec<&String> = free.iter().filter(|n| *n != victim).collect();
        let Some(other) = others.choose(&mut self.rng).map(|n| (*n).clone()) else { return Ok(()) };
        let mut ways = vec![(victim.to_owned(), other.clone())];
        let kind = if self.rng.random_bool(0.3) {
            ways.push((other.clone(), victim.to_owned()));
            "part a pair"
        } else {
            "part a pair one way"
        };
        self.block(fleet, &ways)?;
        let length = self.millis(300, 20_000);
        self.note(kind, &format!("{victim} to {other} for {length:.1?}"));
        self.add(length, [victim.to_owned(), other], Undo::Open(ways));
        Ok(())
    }

    /// Packets from or to everybody get lost, or all that the process sends, or all that it is sent.
    fn cut_off(&mut self, fleet: &mut Fleet, victim: String) -> Result<()> {
        let others: Vec<String> = fleet.network.names().filter(|n| *n != victim).map(str::to_owned).collect();
        let way = self.rng.random_range(0..4);
        let mut ways = vec![];
        for other in others.into_iter().chain([super::network::HUB.to_owned()]) {
            if way != 1 {
                ways.push((victim.clone(), other.clone()));
            }
            if way != 0 {
                ways.push((other, victim.clone()));
            }
        }
        self.block(fleet, &ways)?;
        let length = self.millis(300, 15_000);
        let kind = ["cut off, sends nothing", "cut off, hears nothing", "cut off", "cut off"][way];
        self.note(kind, &format!("{victim} for {length:.1?}"));
        self.add(length, [victim], Undo::Open(ways));
        Ok(())
    }

    /// A client reaches the chunkservers and no MDS: it hears of no hold, no takeover and no rollback.
    fn lose_mds(&mut self, fleet: &mut Fleet, clients: &[String]) -> Result<()> {
        let Some(victim) = clients.choose(&mut self.rng).cloned() else { return Ok(()) };
        let ways: Vec<_> = fleet.names("mds-").into_iter().map(|mds| (victim.clone(), mds)).collect();
        self.block(fleet, &ways)?;
        let length = self.millis(1_000, 20_000);
        self.note("client loses the MDS", &format!("{victim} for {length:.1?}"));
        self.add(length, [victim], Undo::Open(ways));
        Ok(())
    }

    fn block(&mut self, fleet: &Fleet, ways: &[(String, String)]) -> Result<()> {
        ways.iter().try_for_each(|(from, to)| fleet.network.block(from, to))
    }

    fn fill(&mut self, fleet: &mut Fleet, victim: String) -> Result<()> {
        let path = fleet.disk(&victim)?.join("filler");
        let space = rustix::fs::statvfs(&fleet.disk(&victim)?).context("look at the disk's space")?;
        let bytes = (space.f_bavail * space.f_frsize).saturating_sub(FULL_LEFT);
        let file = std::fs::File::create(&path).context("fill the disk")?;
        // The chunkserver may take some at the same time; then it is full all the same.
        let _ = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes.max(1));
        let length = self.millis(500, 12_000);
        self.note("fill disk", &format!("{victim} for {length:.1?}"));
        self.add(length, [victim], Undo::Empty(path));
        Ok(())
    }

    fn freeze(&mut self, fleet: &mut Fleet, victim: String) -> Result<()> {
        let (path, length) = (fleet.disk(&victim)?, self.millis(50, 6_000));
        // It stands in the folder: should the director die meanwhile, and the namespace's holder with it, the path would be gone.
        let script = r#"cd "$1" && fsfreeze -f . || exit 1; sleep "$2"; fsfreeze -u ."#;
        let mut command = Command::new("sh");
        command.args(["-c", script, "sh"]).arg(path).arg(format!("{:.3}", length.as_secs_f64()));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("freeze a disk")?;
        self.note("freeze disk", &format!("{victim} for {length:.1?}"));
        self.add(length, [victim], Undo::Thaw(child));
        Ok(())
    }

    /// The disk of a daemon fails some operation, or takes long, until it is mended.
    fn break_disk(&mut self, fleet: &mut Fleet, victim: String) -> Result<()> {
        let Some((kind, rule)) = DISK_FAULTS.choose(&mut self.rng).copied() else { return Ok(()) };
        let mut number = |below: u64| self.rng.random_range(0..below).to_string();
        let (skip, few, bytes) = (number(400), number(6), number(8_192));
        let (times, delay) = ((1 + self.rng.random_range(0..20)).to_string(), self.millis(10, 400).as_millis().to_string());
        let words = [("{skip}", skip), ("{few}", few), ("{bytes}", bytes), ("{times}", times), ("{delay}", delay)];
        let rule = words.iter().fold(rule.to_owned(), |rule, (word, value)| rule.replace(word, value));
        fleet.plant(&victim, &rule)?;
        let length = self.millis(500, 15_000);
        self.note(kind, &format!("{victim} ({rule}) for {length:.1?}"));
        self.shaken.insert(victim.clone(), clock::now() + length + GRACE);
        self.add(length, [victim.clone()], Undo::MendDisk(victim));
        Ok(())
    }

    /// The wall clock of a daemon jumps, and back again later.
    fn set_clock(&mut self, fleet: &mut Fleet, victim: String) -> Result<()> {
        let seconds = self.millis(1_000, 400_000_000_000).as_secs();
        let sign = if self.rng.random_bool(0.5) { '+' } else { '-' };
        fleet.set_clock(&victim, &format!("{sign}{seconds}"))?;
        let length = self.millis(500, 15_000);
        self.note("clock jumps", &format!("{victim} by {sign}{seconds} s for {length:.1?}"));
        self.add(length, [victim.clone()], Undo::SetClock(victim));
        Ok(())
    }

    /// Starts daemons that ended because of their disk.
    fn raise_shaken(&mut self, fleet: &mut Fleet) -> Result<()> {
        for name in self.shaken.keys().cloned().collect::<Vec<_>>() {
            if self.suffers(&name) {
                continue;
            }
            if fleet.process(&name)?.has_ended()? {
                self.note("ended by its disk", &name);
                fleet.start_daemon(&name)?;
            } else if self.shaken.get(&name).is_some_and(|until| *until > clock::now()) {
                continue;
            }
            self.shaken.remove(&name);
        }
        Ok(())
    }

    fn undo(&mut self, fleet: &mut Fleet, now: Instant) -> Result<()> {
        let (over, active) = std::mem::take(&mut self.active).into_iter().partition(|(until, _, _)| *until <= now);
        self.active = active;
        let over: Vec<_> = over;
        for (_, _, undo) in over {
            match undo {
                Undo::Start(name) => fleet.start_daemon(&name)?,
                Undo::StartClient(name, volume) => fleet.start_client(&name, &volume, self.seed)?,
                Undo::Continue(name) => fleet.process(&name)?.stop(false)?,
                Undo::Open(ways) => ways.iter().try_for_each(|(from, to)| fleet.network.open(from, to))?,
                Undo::Empty(path) => std::fs::remove_file(&path).context("empty the disk")?,
                Undo::Thaw(mut child) => drop(child.wait().context("thaw a disk")?),
                Undo::MendDisk(name) => fleet.plant(&name, "")?,
                Undo::SetClock(name) => fleet.set_clock(&name, "+0")?,
            }
        }
        Ok(())
    }

    /// Undoes everything.
    ///
    /// # Errors
    /// When something cannot be undone.
    pub(super) fn heal(&mut self, fleet: &mut Fleet) -> Result<()> {
        self.undo(fleet, clock::now() + Duration::from_secs(86_400))?;
        while !self.shaken.is_empty() {
            self.raise_shaken(fleet)?;
            fleet.check_alive(|name| self.is_dead(name))?;
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Whether a process is dead on purpose.
    #[must_use]
    pub(super) fn is_dead(&self, name: &str) -> bool {
        let dead = |undo: &Undo| matches!(undo, Undo::Start(n) | Undo::StartClient(n, _) if n == name);
        self.shaken.contains_key(name) || self.active.iter().any(|(_, _, undo)| dead(undo))
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        for (_, _, undo) in &mut self.active {
            if let Undo::Thaw(child) = undo {
                // Whatever becomes of it: a disk must not stay frozen.
                drop(child.wait());
            }
        }
    }
}
