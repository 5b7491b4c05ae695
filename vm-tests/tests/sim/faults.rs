//! What goes wrong, when, and how it is healed. Everything follows from the seed.
//!
//! Invariant: at most one fault of a kind that lasts is open per host or link; healing ends all of them and starts every host.

use crate::hosts::Hosts;
use crate::net::Host;
use crate::races::Flavour;
use crate::world::Plan;
use anyhow::Result;
use ogee_disk::{DiskOp, Fault, FaultRule};
use rand::Rng;
use rand::rngs::StdRng;
use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy)]
enum Later {
    Start(Host),
    LetGo(Host, Host),
    Thaw(Host),
    Replace(Host),
}

/// Faults of one world.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// By kind.
    pub(crate) counts: BTreeMap<&'static str, u32>,
    /// What was done and when, for people.
    pub(crate) log: Vec<String>,
    next: u64,
    later: Vec<(u64, Later)>,
}

impl Faults {
    /// Notes that something was done.
    pub(crate) fn note(&mut self, now: u64, kind: &'static str, whom: &dyn std::fmt::Debug) {
        *self.counts.entry(kind).or_default() += 1;
        self.log.push(format!("{now} {kind} {whom:?}"));
    }

    /// Does what is due.
    pub(crate) fn step(&mut self, hosts: &mut Hosts, plan: &Plan, rng: &mut StdRng) -> Result<()> {
        let now = hosts.now / 1_000_000;
        let (due, later) = std::mem::take(&mut self.later).into_iter().partition(|(at, _)| *at <= now);
        self.later = later;
        let due: Vec<(u64, Later)> = due;
        for (_, what) in due {
            undo(hosts, what)?;
        }
        if self.next == 0 {
            self.next = now + rng.random_range(200..2_000);
        }
        if now >= self.next {
            self.next = now + rng.random_range(50..1_800);
            self.one(hosts, plan, rng, now)?;
        }
        Ok(())
    }

    /// No new faults until [`Faults::resume`].
    pub(crate) fn rest(&mut self) {
        self.next = u64::MAX;
    }

    /// The next fault comes at `next`, milliseconds.
    pub(crate) fn resume(&mut self, next: u64) {
        self.next = next;
    }

    /// Whether something is broken now.
    pub(crate) fn is_open(&self) -> bool {
        !self.later.is_empty()
    }

    fn one(&mut self, hosts: &mut Hosts, plan: &Plan, rng: &mut StdRng, now: u64) -> Result<()> {
        let servers: Vec<Host> = plan.mds.iter().chain(&plan.chunkservers).copied().collect();
        let everybody: Vec<Host> = servers.iter().chain(&plan.clients).copied().chain([plan.admin]).collect();
        let server = servers[rng.random_range(0..servers.len())];
        let other = everybody[rng.random_range(0..everybody.len())];
        let storage = plan.chunkservers[rng.random_range(0..plan.chunkservers.len())];
        let back = now + rng.random_range(20..2_500);
        if plan.flavour != Flavour::Plain && rng.random_bool(0.6) {
            let client = plan.clients[rng.random_range(0..plan.clients.len())];
            return match plan.flavour {
                Flavour::OldLeaders => self.old_leader(hosts, plan, (storage, client), now, now + rng.random_range(2_500..6_000)),
                _ => self.slow_client(hosts, plan, client, now, now + rng.random_range(100..1_800)),
            };
        }
        match rng.random_range(0..20) {
            0..=3 => self.kill(hosts, server, now, back),
            4 => self.kill(hosts, plan.clients[rng.random_range(0..plan.clients.len())], now, back),
            5 => self.power(hosts, &[server], rng, now),
            6..=8 => self.power(hosts, &servers, rng, now),
            9..=10 => self.hold(hosts, &[(server, other)], now, back),
            11 => {
                let links: Vec<(Host, Host)> = everybody.iter().flat_map(|o| [(server, *o), (*o, server)]).collect();
                self.hold(hosts, &links, now, back)
            }
            12..=13 => {
                hosts.net.cut(server, other);
                self.note(now, "cut", &(server, other));
                Ok(())
            }
            14..=16 => {
                if hosts.is_up(server) {
                    hosts.machine(server)?.frozen = true;
                    self.later.push((back, Later::Thaw(server)));
                    self.note(now, "freeze", &server);
                }
                Ok(())
            }
            17 => self.disk(hosts, storage, (DiskOp::Sync, libc::EIO), ("EIO", now), rng.random_range(0..4)),
            18 => self.disk(hosts, storage, (DiskOp::Write, libc::EIO), ("EIO", now), rng.random_range(0..4)),
            _ => self.disk(hosts, storage, (DiskOp::Create, libc::ENOSPC), ("ENOSPC", now), 0),
        }
    }

    /// Servers hear nothing of a chunkserver, nor it of them; a client hears nothing of the MDS.
    fn old_leader(&mut self, hosts: &mut Hosts, plan: &Plan, (storage, client): (Host, Host), now: u64, back: u64) -> Result<()> {
        let others = plan.chunkservers.iter().chain(&plan.mds).filter(|o| **o != storage);
        let mut links: Vec<(Host, Host)> = others.flat_map(|o| [(storage, *o), (*o, storage)]).collect();
        links.extend(plan.mds.iter().flat_map(|m| [(client, *m), (*m, client)]));
        self.hold_named(hosts, "old leader", &links, now, back)
    }

    /// Nothing of what a client sends gets to a chunkserver for a while; then all of it does.
    fn slow_client(&mut self, hosts: &mut Hosts, plan: &Plan, client: Host, now: u64, back: u64) -> Result<()> {
        let links: Vec<(Host, Host)> = plan.chunkservers.iter().map(|c| (client, *c)).collect();
        self.hold_named(hosts, "slow client", &links, now, back)
    }

    fn kill(&mut self, hosts: &mut Hosts, host: Host, now: u64, back: u64) -> Result<()> {
        if hosts.is_up(host) {
            self.note(now, "kill", &host);
            hosts.kill(host)?;
            self.later.push((back, Later::Start(host)));
        }
        Ok(())
    }

    fn power(&mut self, hosts: &mut Hosts, whom: &[Host], rng: &mut StdRng, now: u64) -> Result<()> {
        self.note(now, if whom.len() > 1 { "power-all" } else { "power" }, &whom);
        for host in whom.iter().filter(|h| hosts.is_up(**h)).copied().collect::<Vec<_>>() {
            hosts.power_off(host, &mut |n| rng.random_range(0..=n))?;
            self.later.push((now + rng.random_range(10..1_500), Later::Start(host)));
        }
        Ok(())
    }

    fn hold(&mut self, hosts: &mut Hosts, links: &[(Host, Host)], now: u64, back: u64) -> Result<()> {
        self.hold_named(hosts, if links.len() > 1 { "isolate" } else { "hold" }, links, now, back)
    }

    fn hold_named(&mut self, hosts: &mut Hosts, kind: &'static str, links: &[(Host, Host)], now: u64, back: u64) -> Result<()> {
        self.note(now, kind, &links[0]);
        for (from, to) in links {
            hosts.net.hold(*from, *to);
            self.later.push((back, Later::LetGo(*from, *to)));
        }
        Ok(())
    }

    fn disk(&mut self, hosts: &mut Hosts, host: Host, what: (DiskOp, i32), (kind, now): (&'static str, u64), skip: u64) -> Result<()> {
        if !hosts.is_up(host) {
            return Ok(());
        }
        let (op, errno) = what;
        let times = if errno == libc::ENOSPC { u64::MAX } else { 1 };
        hosts.faults(host)?.add(FaultRule { op, path_contains: String::new(), skip, times, fault: Fault::Errno(errno) });
        hosts.machine(host)?.may_end = true;
        self.note(now, kind, &(host, op));
        self.later.push((now + 1_500, Later::Replace(host)));
        Ok(())
    }

    /// Ends every fault.
    pub(crate) fn heal(&mut self, hosts: &mut Hosts, plan: &Plan) -> Result<()> {
        for (_, what) in std::mem::take(&mut self.later) {
            undo(hosts, what)?;
        }
        plan.mds.iter().chain(&plan.chunkservers).try_for_each(|host| hosts.start(*host))
    }
}

fn undo(hosts: &mut Hosts, what: Later) -> Result<()> {
    match what {
        Later::Start(host) => hosts.start(host)?,
        Later::LetGo(from, to) => hosts.net.let_go(from, to),
        Later::Thaw(host) => hosts.machine(host)?.frozen = false,
        Later::Replace(host) => {
            // A disk that failed ended replicas or the process: an operator starts it again.
            hosts.kill(host)?;
            hosts.start(host)?;
        }
    }
    Ok(())
}
