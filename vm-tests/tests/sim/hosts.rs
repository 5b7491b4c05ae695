//! Hosts: each a process on a tokio runtime of its own with a paused clock, all on one thread, one after the other, a millisecond at a time.
//!
//! Invariants: a host runs only in [`Hosts::step`], with its own network and disk; ending its runtime drops every task at once, which is
//! a SIGKILL; loss of power is that and the loss of what was not flushed. Clocks of hosts run at slightly different paces.

use crate::net::{self, Host, Net};
use anyhow::{Context, Result};
use ogee_common::sim;
use ogee_disk::{FaultPlan, MemStore, SimulatedDisk};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// One step of time.
pub(crate) const STEP_NS: u64 = 1_000_000;

/// The life of a process.
pub(crate) type Life = Pin<Box<dyn Future<Output = Result<()>> + Send>>;

/// What it needs to know to begin one: how often it has begun before.
pub(crate) type Begin = Box<dyn Fn(u32) -> Life>;

struct Running {
    runtime: Runtime,
    life: JoinHandle<Result<()>>,
    start: Instant,
    steps: u64,
}

/// A host.
pub(crate) struct Machine {
    begin: Begin,
    begun: u32,
    running: Option<Running>,
    disk: SimulatedDisk,
    /// Steps per step of the world.
    pace: f64,
    behind: f64,
    /// It is stopped and does not run.
    pub(crate) frozen: bool,
    /// An injected failure may end its process.
    pub(crate) may_end: bool,
}

/// All hosts.
pub(crate) struct Hosts {
    /// The network.
    pub(crate) net: Net,
    /// The world's time, nanoseconds.
    pub(crate) now: u64,
    machines: BTreeMap<Host, Machine>,
}

fn new_plan() -> Arc<FaultPlan> {
    let plan = FaultPlan::new();
    plan.watch_power();
    plan
}

impl Hosts {
    /// None yet.
    pub(crate) fn new(net: Net) -> Self {
        // Some time after the epoch: the first lease lies in the past of a fresh replica.
        Self { net, now: 1_000_000_000_000, machines: BTreeMap::new() }
    }

    /// Adds a host and starts it.
    pub(crate) fn add(&mut self, host: Host, pace: f64, begin: Begin) -> Result<()> {
        let disk = SimulatedDisk { faults: new_plan(), meta: Arc::new(MemStore::new()) };
        let machine = Machine { begin, begun: 0, running: None, disk, pace, behind: 0.0, frozen: false, may_end: false };
        self.machines.insert(host, machine);
        self.start(host)
    }

    /// The host.
    pub(crate) fn machine(&mut self, host: Host) -> Result<&mut Machine> {
        self.machines.get_mut(&host).context("no such host")
    }

    /// Whether its process runs.
    pub(crate) fn is_up(&self, host: Host) -> bool {
        self.machines.get(&host).is_some_and(|m| m.running.is_some())
    }

    /// Starts its process.
    pub(crate) fn start(&mut self, host: Host) -> Result<()> {
        self.net.power(host, true);
        let wire = self.net.wire(host);
        let machine = self.machine(host)?;
        if machine.running.is_some() {
            return Ok(());
        }
        let runtime = Builder::new_current_thread().enable_time().start_paused(true).build()?;
        let begun = machine.begun;
        machine.begun += 1;
        (machine.frozen, machine.may_end) = (false, false);
        let life = inside(wire, &machine.disk.clone(), || {
            let life = (machine.begin)(begun);
            runtime.block_on(async { (tokio::spawn(life), Instant::now()) })
        });
        machine.running = Some(Running { runtime, life: life.0, start: life.1, steps: 0 });
        Ok(())
    }

    /// Kills its process.
    pub(crate) fn kill(&mut self, host: Host) -> Result<()> {
        let wire = self.net.wire(host);
        let machine = self.machine(host)?;
        let disk = machine.disk.clone();
        let running = machine.running.take();
        inside(wire, &disk, || drop(running));
        // Failures were of that run.
        machine.disk.faults.clear();
        Ok(())
    }

    /// Takes its power away: of what was not flushed, `survive(n)` of `n` changes remain.
    pub(crate) fn power_off(&mut self, host: Host, survive: &mut dyn FnMut(usize) -> usize) -> Result<()> {
        self.net.power(host, false);
        self.kill(host)?;
        let machine = self.machine(host)?;
        machine.disk.faults.power_cut(survive).context("cut the power")?;
        machine.disk.faults = new_plan();
        machine.disk.meta.power_cut(survive(machine.disk.meta.deferred()));
        Ok(())
    }

    /// A millisecond passes.
    ///
    /// # Errors
    /// A process ended that had no reason.
    pub(crate) fn step(&mut self) -> Result<()> {
        self.now += STEP_NS;
        sim::set_ns(self.now);
        self.net.step(self.now);
        let mut ended = vec![];
        for (host, machine) in &mut self.machines {
            machine.behind += machine.pace;
            let Some(running) = machine.running.as_mut().filter(|_| !machine.frozen) else { continue };
            let (wire, disk) = (self.net.wire(*host), machine.disk.clone());
            let turns = machine.behind.floor();
            machine.behind -= turns;
            inside(wire, &disk, || {
                if turns > 20.0 {
                    // It was stopped: its clock jumps.
                    running.start += Duration::from_millis(turns_of(turns) - 1);
                    let gap = Duration::from_millis(turns_of(turns) - 1);
                    running.runtime.block_on(async { tokio::time::advance(gap).await });
                }
                for _ in 0..if turns > 20.0 { 1 } else { turns_of(turns) } {
                    running.steps += 1;
                    let until = running.start + Duration::from_millis(running.steps);
                    running.runtime.block_on(async { tokio::time::sleep_until(until).await });
                }
            });
            if running.life.is_finished() {
                ended.push(*host);
            }
        }
        ended.into_iter().try_for_each(|host| self.ended(host))
    }

    fn ended(&mut self, host: Host) -> Result<()> {
        let machine = self.machine(host)?;
        let Some(running) = machine.running.as_mut() else { return Ok(()) };
        let result = running.runtime.block_on(&mut running.life);
        let allowed = machine.may_end;
        self.kill(host)?;
        match result.context("a process panicked")? {
            Err(error) if !allowed => Err(error.context(format!("the process of host {host} ended"))),
            _ => Ok(()),
        }
    }

    /// A plan of failures for its disk.
    pub(crate) fn faults(&mut self, host: Host) -> Result<Arc<FaultPlan>> {
        Ok(self.machine(host)?.disk.faults.clone())
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a small whole number
fn turns_of(turns: f64) -> u64 {
    turns as u64
}

fn inside<T>(wire: Arc<dyn ogee_proto::net::Wire>, disk: &SimulatedDisk, work: impl FnOnce() -> T) -> T {
    ogee_proto::net::use_wire(Some(wire));
    ogee_disk::simulate(Some(disk.clone()));
    let out = work();
    ogee_proto::net::use_wire(None);
    ogee_disk::simulate(None);
    out
}

/// The folder of a host's files.
pub(crate) fn folder(root: &std::path::Path, host: Host) -> PathBuf {
    root.join(format!("host-{host}"))
}

/// Its address, as text.
pub(crate) fn address(host: Host) -> String {
    net::addr(host).to_string()
}
