//! One simulated world: the hosts that a seed asks for, its time, its faults, and the judgement at the end.
//!
//! Clients and the administrator are those of the torture (`vm-tests/src/torture`), with the same checker. Invariant: everything that
//! happens follows from the seed.

use crate::actors::{self, ActorArgs};
use crate::entropy;
use crate::faults::Faults;
use crate::hosts::{Hosts, address, folder};
use crate::invariants::Invariants;
use crate::net::{Host, Net, addr};
use crate::races::{Flavour, Races, Scene, Script};
use anyhow::{Context, Result, bail, ensure};
use ogee_chunkserver::ChunkserverConfig;
use ogee_common::sim::{self, Canary};
use ogee_mds::{MdsConfig, PeerConfig};
use ogee_vm_tests::torture::admin::{self, AdminArgs};
use ogee_vm_tests::torture::check_files;
use ogee_vm_tests::torture::client::{self, ClientArgs};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Volumes: a chunk and a bit.
const VOLUME_BYTES: u64 = (16 << 20) + (256 << 10);
/// Steps that a cluster may take to come up, and to become whole and be read at the end.
const STEPS_MAX: u64 = 240_000;

/// What a world showed.
#[derive(Debug, Default)]
pub(crate) struct Shown {
    /// Hash of everything that was delivered, applied and recorded.
    pub(crate) trace: u64,
    /// Operations checked.
    pub(crate) operations: usize,
    /// Snapshots checked.
    pub(crate) cuts: usize,
    /// Faults by kind.
    pub(crate) faults: BTreeMap<&'static str, u32>,
    /// Simulated milliseconds.
    pub(crate) steps: u64,
}

/// Which hosts there are.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// MDS nodes.
    pub(crate) mds: Vec<Host>,
    /// Chunkservers.
    pub(crate) chunkservers: Vec<Host>,
    /// Clients.
    pub(crate) clients: Vec<Host>,
    /// The administrator.
    pub(crate) admin: Host,
    /// What this world has more of than others.
    pub(crate) flavour: Flavour,
    /// Witness and writer of its scripted races, if it has any.
    pub(crate) actors: Option<[Host; 2]>,
}

/// What the hosts share with the director.
#[derive(Debug)]
struct Stage {
    root: PathBuf,
    plan: Plan,
    seed: u64,
    histories: Mutex<Vec<PathBuf>>,
    numbers: AtomicU32,
    clients_stop: Arc<AtomicBool>,
    admin_stop: Arc<AtomicBool>,
    admin_done: AtomicBool,
    script: Arc<Script>,
}

impl Stage {
    fn history(&self) -> (u32, String) {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let path = self.root.join(format!("history-{number}"));
        self.histories.lock().unwrap_or_else(PoisonError::into_inner).push(path.clone());
        (number, path.display().to_string())
    }

    fn mds(&self) -> Vec<String> {
        self.plan.mds.iter().map(|h| address(*h)).collect()
    }
}

fn plan(rng: &mut StdRng) -> Plan {
    let mds = if rng.random_bool(0.4) { 1 } else { 3 };
    let chunkservers = if rng.random_bool(0.7) { 3 } else { 4 };
    let flavour = Flavour::draw(rng);
    Plan {
        mds: (1..=mds).collect(),
        chunkservers: (11..11 + chunkservers).collect(),
        clients: (21..=23).collect(),
        admin: 31,
        flavour,
        actors: (flavour != Flavour::Plain).then_some([41, 42]),
    }
}

async fn run_mds(stage: Arc<Stage>, host: Host, begun: u32) -> Result<()> {
    let peers = stage.plan.mds.iter().map(|h| PeerConfig { id: u32::from(*h), addr: addr(*h) }).collect();
    let config = MdsConfig {
        node: u32::from(host),
        cluster: "sim".to_owned(),
        data_dir: folder(&stage.root, host),
        listen: addr(host),
        bootstrap: begun == 0,
        metrics: None,
        rebuild_after_seconds: 600,
        tls: None,
        peers,
    };
    Ok(ogee_mds::run(config, std::future::pending()).await?)
}

async fn run_chunkserver(stage: Arc<Stage>, host: Host) -> Result<()> {
    let config = ChunkserverConfig {
        data_dir: folder(&stage.root, host),
        listen: addr(host),
        mds: stage.plan.mds.iter().map(|h| addr(*h)).collect(),
        pool: "default".to_owned(),
        zone: format!("zone-{host}"),
        host: format!("host-{host}"),
        capacity_bytes: Some(1 << 40),
        reserve_bytes: Some(0),
        metadata_cache_mib: 8,
        metrics: None,
        rebuild_mib_per_second: 0,
        scrub_interval_hours: 0,
        compare_interval_hours: 0,
        scrub_mib_per_second: 0,
        flatten_mib_per_second: 0,
        tls: None,
    };
    Ok(ogee_chunkserver::run(config, std::future::pending()).await?)
}

async fn run_client(stage: Arc<Stage>, host: Host, begun: u32) -> Result<()> {
    let (number, file) = stage.history();
    let volume = admin::VOLUMES[usize::from(host == stage.plan.clients[2])].to_owned();
    let seed = stage.seed ^ (u64::from(host) << 32) ^ u64::from(begun);
    client::run(ClientArgs { number, mds: stage.mds(), volume, seed, file }, stage.clients_stop.clone()).await
}

async fn run_actor(stage: Arc<Stage>, host: Host) -> Result<()> {
    let (number, file) = stage.history();
    let args = ActorArgs { number, mds: stage.mds(), seed: stage.seed ^ (u64::from(host) << 32), file: file.into(), script: stage.script.clone() };
    let is_witness = stage.plan.actors.is_some_and(|[witness, _]| witness == host);
    if is_witness { actors::witness(args).await } else { actors::writer(args).await }
}

async fn run_admin(stage: Arc<Stage>) -> Result<()> {
    let (number, file) = stage.history();
    let args = AdminArgs {
        number,
        mds: stage.mds(),
        seed: stage.seed,
        file,
        chunkservers: u32::try_from(stage.plan.chunkservers.len())?,
        size_bytes: VOLUME_BYTES,
        copysets: 3,
        speaks: false,
    };
    admin::run(args, stage.admin_stop.clone()).await?;
    stage.admin_done.store(true, Ordering::Relaxed);
    Ok(())
}

/// The director of one world.
struct World {
    hosts: Hosts,
    stage: Arc<Stage>,
    invariants: Invariants,
    began: u64,
}

impl World {
    fn step(&mut self) -> Result<()> {
        self.hosts.step()?;
        for seen in sim::take_seen() {
            self.hosts.net.note(crate::invariants::parts(&seen));
            self.invariants.saw(seen)?;
        }
        Ok(())
    }

    fn steps(&self) -> u64 {
        (self.hosts.now - self.began) / crate::hosts::STEP_NS
    }

    fn start(&mut self, rng: &mut StdRng) -> Result<()> {
        let plan = self.stage.plan.clone();
        let pace = |rng: &mut StdRng| if rng.random_bool(0.5) { 1.0 } else { rng.random_range(0.98..1.02) };
        for host in plan.mds {
            let stage = self.stage.clone();
            self.hosts.add(host, pace(rng), Box::new(move |begun| Box::pin(run_mds(stage.clone(), host, begun))))?;
        }
        for host in plan.chunkservers {
            let stage = self.stage.clone();
            self.hosts.add(host, pace(rng), Box::new(move |_| Box::pin(run_chunkserver(stage.clone(), host))))?;
        }
        let stage = self.stage.clone();
        self.hosts.add(plan.admin, 1.0, Box::new(move |_| Box::pin(run_admin(stage.clone()))))
    }

    fn start_clients(&mut self) -> Result<()> {
        for host in self.stage.plan.clients.clone() {
            let stage = self.stage.clone();
            self.hosts.add(host, 1.0, Box::new(move |begun| Box::pin(run_client(stage.clone(), host, begun))))?;
        }
        Ok(())
    }

    /// Starts the actors, if there are any, and waits until they are ready.
    fn start_actors(&mut self) -> Result<()> {
        let Some(actors) = self.stage.plan.actors else { return Ok(()) };
        for host in actors {
            let stage = self.stage.clone();
            self.hosts.add(host, 1.0, Box::new(move |_| Box::pin(run_actor(stage.clone(), host))))?;
        }
        self.until("set the stage", |w| !matches!(w.stage.script.scene(), Scene::Begin | Scene::Made))
    }

    /// Lets time pass until something is true.
    fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) -> Result<()> {
        let limit = self.steps() + STEPS_MAX;
        while !done(self) {
            ensure!(self.steps() < limit, "{what}: not within {} simulated seconds", STEPS_MAX / 1000);
            self.step()?;
        }
        Ok(())
    }
}

fn volumes_exist(root: &Path) -> bool {
    let text = std::fs::read_to_string(root.join("history-1")).unwrap_or_default();
    text.lines().count() >= admin::VOLUMES.len()
}

/// Runs the world of a seed to its end, on this thread, which must be a fresh one.
///
/// # Errors
/// A violation.
pub(crate) fn run(seed: u64, canary: Option<Canary>, root: &Path, faults: &mut Faults) -> Result<Shown> {
    entropy::seed(seed);
    let mut rng = StdRng::seed_from_u64(seed);
    let plan = plan(&mut rng);
    let stage = Arc::new(Stage {
        root: root.to_owned(),
        plan: plan.clone(),
        seed,
        histories: Mutex::default(),
        numbers: AtomicU32::new(1),
        clients_stop: Arc::default(),
        admin_stop: Arc::default(),
        admin_done: AtomicBool::new(false),
        script: Arc::new(Script::new(plan.flavour)),
    });
    let hosts = Hosts::new(Net::new(rng.random()));
    sim::set_ns(hosts.now);
    if let Some(canary) = canary {
        sim::plant(canary);
    }
    let began = hosts.now;
    let mut world = World { hosts, stage, invariants: Invariants::default(), began };
    world.start(&mut rng)?;
    let root = root.to_owned();
    world.until("make the cluster", |w| w.steps() % 50 == 0 && volumes_exist(&root))?;
    world.start_actors()?;
    world.start_clients()?;
    let end = world.steps() + rng.random_range(8_000..16_000);
    let mut races = Races::new(world.stage.script.clone(), world.hosts.now / crate::hosts::STEP_NS, &mut rng);
    while world.steps() < end {
        races.step(&mut world.hosts, &plan, faults, &mut rng)?;
        faults.step(&mut world.hosts, &plan, &mut rng)?;
        world.step()?;
    }
    races.end(&world.hosts);
    faults.heal(&mut world.hosts, &plan)?;
    world.stage.clients_stop.store(true, Ordering::Relaxed);
    let clients: Vec<Host> = plan.clients.iter().copied().chain(plan.actors.into_iter().flatten()).collect();
    world.until("end the clients", |w| clients.iter().all(|c| !w.hosts.is_up(*c)))?;
    world.stage.admin_stop.store(true, Ordering::Relaxed);
    world.until("read everything", |w| w.stage.admin_done.load(Ordering::Relaxed))?;
    let steps = world.steps();
    let histories = world.stage.histories.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for host in plan.mds.iter().chain(&plan.chunkservers) {
        world.hosts.kill(*host)?;
    }
    let checked = crate::invariants::history::explained(|| check_files(&histories))?;
    for path in &histories {
        let text = std::fs::read(path).context("read a history")?;
        world.hosts.net.note([u64::from(ogee_common::checksum::crc32c(&text)), text.len() as u64, 0, 0]);
    }
    if checked.operations < 20 {
        bail!("only {} operations: the load did not get going", checked.operations);
    }
    let faults = std::mem::take(&mut faults.counts);
    Ok(Shown { trace: world.hosts.net.trace(), operations: checked.operations, cuts: checked.cuts, faults, steps })
}
