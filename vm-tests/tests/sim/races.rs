//! Scripted races: links that are held at the one moment that matters, which chance alone hardly ever meets. Half of the worlds have one of two
//! kinds; faults by chance go on between the races.
//!
//! | race | what the director does | what it is for |
//! | --- | --- | --- |
//! | old leader | the chunkserver that serves a reader is cut off from everybody else, and the reader from all other servers; meanwhile another client attaches and writes through a new leader | leases, fences of readers that hear of no takeover |
//! | slow writes | all that a writer sends to chunkservers is under way for long, then a snapshot is taken and read, then the writes arrive, then it is read again | holds, seals |
//!
//! Those who read, write and take snapshots are the two actors (`actors.rs`), with a volume of their own. They and the director agree on the scene:
//!
//! ```text
//!   Begin ─witness─> Made ─writer─> Rest ─witness─> Ready ─director─> Run ──────────────────director─> Rest   (old leader)
//!                                                   Ready ─director─> Warm ─director─> Run ─witness─> Shown ─director─> Again ─witness─> Rest   (slow writes)
//!   any but Begin and Made ─whoever gives up─> Rest;   any ─the world heals─> Over
//! ```
//! Invariants: a race begins only when no fault is open and none has been for [`CALM_MS`]; no fault is injected while one runs; everything it holds
//! is let go at its end. So what makes a race come out is the protocol, not luck.

use crate::faults::Faults;
use crate::hosts::Hosts;
use crate::net::Host;
use crate::world::Plan;
use anyhow::{Context, Result};
use rand::Rng;
use rand::rngs::StdRng;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::watch;

/// Nothing has gone wrong for so long when a race begins: leaders are elected, replicas have caught up.
const CALM_MS: u64 = 500;
/// A race that cannot begin by then is put off.
const PATIENCE_MS: u64 = 7_000;

/// What a world has more of than others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// Nothing.
    Plain,
    /// Leaders that are cut off from all but a client that hears of no takeover.
    OldLeaders,
    /// Requests of a client that are long on their way, while it hears and answers the MDS.
    SlowClients,
}

impl Flavour {
    /// That of a seed.
    pub(crate) fn draw(rng: &mut StdRng) -> Self {
        match rng.random_range(0..4) {
            0 => Self::OldLeaders,
            1 => Self::SlowClients,
            _ => Self::Plain,
        }
    }
}

/// See the module's drawing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scene {
    /// The witness makes the volume.
    Begin,
    /// The writer may attach it.
    Made,
    /// Nothing goes on.
    Rest,
    /// The witness is ready.
    Ready,
    /// The writer writes, nothing is held yet.
    Warm,
    /// The race.
    Run,
    /// The witness has read the snapshot.
    Shown,
    /// The writes have arrived: the witness reads the snapshot again.
    Again,
    /// The world ends.
    Over,
}

/// What director and actors agree on.
#[derive(Debug)]
pub(crate) struct Script {
    /// Which race.
    pub(crate) flavour: Flavour,
    scene: watch::Sender<Scene>,
}

impl Script {
    /// The script of a world.
    pub(crate) fn new(flavour: Flavour) -> Self {
        Self { flavour, scene: watch::Sender::new(Scene::Begin) }
    }

    /// The scene now.
    pub(crate) fn scene(&self) -> Scene {
        *self.scene.borrow()
    }

    /// Changes the scene; the last one stays.
    pub(crate) fn set(&self, to: Scene) {
        self.scene.send_if_modified(|scene| {
            let changes = *scene != Scene::Over && *scene != to;
            if changes {
                *scene = to;
            }
            changes
        });
    }

    /// Changes the scene, if it is `from`.
    pub(crate) fn advance(&self, from: Scene, to: Scene) -> bool {
        self.scene.send_if_modified(|scene| {
            let changes = *scene == from;
            if changes {
                *scene = to;
            }
            changes
        })
    }

    /// Waits for a scene, and for the end in any case.
    pub(crate) async fn until(&self, wanted: impl Fn(Scene) -> bool) -> Result<Scene> {
        let mut scenes = self.scene.subscribe();
        let scene = scenes.wait_for(|scene| *scene == Scene::Over || wanted(*scene)).await;
        scene.map(|scene| *scene).context("the script is gone")
    }
}

/// Where the director is; times are milliseconds of the world.
#[derive(Debug, Clone, Copy)]
enum Phase {
    /// Faults by chance.
    Chance { until: u64 },
    /// No new ones; the last was over at `since`.
    Calm { since: u64, patience: u64 },
    /// The old leader is cut off.
    Apart { until: u64 },
    /// The writer gets going.
    Warms { until: u64 },
    /// Its writes hang, more and more of them.
    Piles { until: u64 },
    /// The snapshot is taken while they hang.
    Taken { until: u64 },
    /// They arrive.
    Lands { until: u64 },
    /// The witness finishes.
    Ends { patience: u64 },
}

/// The director of the races of one world.
#[derive(Debug)]
pub(crate) struct Races {
    script: Arc<Script>,
    phase: Phase,
    /// Held by the present race.
    links: Vec<(Host, Host)>,
    /// What the witness had received from each chunkserver when it became calm.
    heard: BTreeMap<Host, u64>,
}

impl Races {
    /// The director; the first race comes soon.
    pub(crate) fn new(script: Arc<Script>, now: u64, rng: &mut StdRng) -> Self {
        Self { script, phase: Phase::Chance { until: now + rng.random_range(100..1_000) }, links: vec![], heard: BTreeMap::new() }
    }

    /// Does what is due.
    pub(crate) fn step(&mut self, hosts: &mut Hosts, plan: &Plan, faults: &mut Faults, rng: &mut StdRng) -> Result<()> {
        let Some([witness, writer]) = plan.actors else { return Ok(()) };
        let now = hosts.now / 1_000_000;
        match self.phase {
            Phase::Chance { until } if now >= until => {
                faults.rest();
                self.calm(hosts, plan, witness, now + PATIENCE_MS);
            }
            Phase::Calm { patience, .. } if now >= patience => self.give_way(faults, now, rng),
            Phase::Calm { patience, .. } if faults.is_open() || self.script.scene() != Scene::Ready => self.calm(hosts, plan, witness, patience),
            Phase::Calm { since, .. } if now >= since + CALM_MS => match self.script.flavour {
                Flavour::OldLeaders => self.part(hosts, plan, faults, rng)?,
                _ => {
                    self.script.advance(Scene::Ready, Scene::Warm);
                    self.phase = Phase::Warms { until: now + rng.random_range(30..120) };
                }
            },
            Phase::Warms { until } if now >= until => {
                faults.note(now, "race: slow writes", &writer);
                self.hold(hosts, plan.chunkservers.iter().map(|c| (writer, *c)));
                self.phase = Phase::Piles { until: now + rng.random_range(40..90) };
            }
            _ => self.go_on(hosts, faults, now, rng),
        }
        Ok(())
    }

    /// The later phases of a race.
    fn go_on(&mut self, hosts: &Hosts, faults: &mut Faults, now: u64, rng: &mut StdRng) {
        let scene = self.script.scene();
        match self.phase {
            Phase::Apart { until } if now >= until => {
                self.let_go(hosts);
                self.script.advance(Scene::Run, Scene::Rest);
                self.give_way(faults, now, rng);
            }
            Phase::Piles { until } if now >= until => {
                self.script.advance(Scene::Warm, Scene::Run);
                // A hold that waits for these writes ends well when they come within its 2 s; sometimes it is to end otherwise.
                let longest = if rng.random_bool(0.7) { rng.random_range(900..1_400) } else { rng.random_range(1_400..3_000) };
                self.phase = Phase::Taken { until: now + longest };
            }
            Phase::Taken { until } if now >= until || scene != Scene::Run => {
                self.let_go(hosts);
                self.phase = Phase::Lands { until: now + rng.random_range(60..300) };
            }
            Phase::Lands { until } if now >= until => {
                self.script.advance(Scene::Shown, Scene::Again);
                self.phase = Phase::Ends { patience: now + PATIENCE_MS };
            }
            Phase::Ends { patience } => match scene {
                // It gives up; the witness finds that out by itself.
                Scene::Run | Scene::Shown | Scene::Again if now >= patience => self.script.set(Scene::Rest),
                // The snapshot came after the writes, as it should.
                Scene::Shown => self.script.set(Scene::Again),
                Scene::Run | Scene::Again => {}
                _ => self.give_way(faults, now, rng),
            },
            _ => {}
        }
    }

    /// Cuts off the chunkserver that serves the witness, together with the witness.
    fn part(&mut self, hosts: &Hosts, plan: &Plan, faults: &mut Faults, rng: &mut StdRng) -> Result<()> {
        let Some([witness, writer]) = plan.actors else { return Ok(()) };
        let now = hosts.now / 1_000_000;
        let news = |c: &Host| hosts.net.carried(*c, witness).saturating_sub(self.heard.get(c).copied().unwrap_or(0));
        let leader = *plan.chunkservers.iter().max_by_key(|c| news(c)).context("a world without chunkservers")?;
        let servers: Vec<Host> = plan.mds.iter().chain(&plan.chunkservers).copied().filter(|s| *s != leader).collect();
        let others = servers.iter().chain(&plan.clients).copied().chain([plan.admin, writer]);
        let apart = others.map(|o| (leader, o)).chain(servers.iter().map(|s| (witness, *s)));
        let both: Vec<(Host, Host)> = apart.flat_map(|(a, b)| [(a, b), (b, a)]).collect();
        faults.note(now, "race: old leader", &leader);
        self.hold(hosts, both.into_iter());
        self.script.advance(Scene::Ready, Scene::Run);
        self.phase = Phase::Apart { until: now + rng.random_range(4_500..6_500) };
        Ok(())
    }

    fn calm(&mut self, hosts: &Hosts, plan: &Plan, witness: Host, patience: u64) {
        self.heard = plan.chunkservers.iter().map(|c| (*c, hosts.net.carried(*c, witness))).collect();
        self.phase = Phase::Calm { since: hosts.now / 1_000_000, patience };
    }

    /// Leaves the field to chance for a while.
    fn give_way(&mut self, faults: &mut Faults, now: u64, rng: &mut StdRng) {
        faults.resume(now + rng.random_range(50..1_000));
        self.phase = Phase::Chance { until: now + rng.random_range(1_000..3_000) };
    }

    fn hold(&mut self, hosts: &Hosts, links: impl Iterator<Item = (Host, Host)>) {
        for (from, to) in links {
            hosts.net.hold(from, to);
            self.links.push((from, to));
        }
    }

    fn let_go(&mut self, hosts: &Hosts) {
        for (from, to) in self.links.drain(..) {
            hosts.net.let_go(from, to);
        }
    }

    /// Ends what goes on; the actors finish.
    pub(crate) fn end(&mut self, hosts: &Hosts) {
        self.let_go(hosts);
        self.script.set(Scene::Over);
    }
}
