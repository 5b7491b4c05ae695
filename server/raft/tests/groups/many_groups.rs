//! Many groups in each process: one connection per pair, shared flushes, little work when idle.

use crate::cluster::{Cluster, Setup, now, numbered, wait};
use futures_util::future::join_all;
use std::sync::atomic::Ordering;
use std::time::Duration;

const GROUPS: u64 = 32;

#[test]
fn groups_share_connections_and_flushes() {
    crate::cluster::logs();
    let cluster = Cluster::start(Setup { groups: (1..=GROUPS).collect(), ..Setup::default() });
    let mut led = [0; 3];
    for group in 1..=GROUPS {
        led[cluster.leader(group) as usize - 1] += 1;
    }
    println!("groups led by each process: {led:?}");
    let connections = cluster.net.connections.load(Ordering::Relaxed);
    assert!(connections <= 6, "at most one connection per ordered pair of processes, not {connections}");
    let before: u64 = cluster.nodes.values().map(|n| n.wal.stats().flushes).sum();
    let expected = numbered(0..50);
    let mut under_way = Vec::new();
    for node in cluster.nodes.values() {
        let (done_tx, done) = std::sync::mpsc::sync_channel(1);
        let groups: Vec<_> = node.groups.values().filter(|g| g.is_leader()).cloned().collect();
        let commands = expected.clone();
        under_way.push(done);
        // All groups at once, each with all its commands at once.
        node.spawn(async move {
            let all = groups.iter().flat_map(|g| commands.iter().map(|c| g.propose(c.clone(), None)));
            let results = join_all(all.collect::<Vec<_>>()).await;
            done_tx.send(results.iter().all(Result::is_ok)).expect("the test waits");
        });
    }
    for done in under_way {
        assert!(done.recv_timeout(crate::cluster::DEADLINE).expect("in time"), "every proposal is acknowledged");
    }
    for group in 1..=GROUPS {
        cluster.converged(group, &expected);
    }
    let flushes: u64 = cluster.nodes.values().map(|n| n.wal.stats().flushes).sum::<u64>() - before;
    let entries = GROUPS * 50 * 3;
    println!("{flushes} flushes for {entries} entries on three disks");
    assert!(flushes * 5 < entries, "flushes are shared: {flushes} for {entries}");
}

#[test]
fn idle_groups_cost_little() {
    let cluster = Cluster::start(Setup { groups: (1..=GROUPS).collect(), ..Setup::default() });
    for group in 1..=GROUPS {
        cluster.leader(group);
    }
    let spent = || cluster.nodes.values().map(crate::cluster::Node::cpu).sum::<Duration>();
    let (frames, start, before) = (cluster.net.frames.load(Ordering::Relaxed), now(), spent());
    let span = Duration::from_secs(5);
    wait("the time to pass", || start.elapsed() > span);
    let share = (spent() - before).as_secs_f64() / start.elapsed().as_secs_f64();
    let rate = (cluster.net.frames.load(Ordering::Relaxed) - frames) as f64 / start.elapsed().as_secs_f64();
    println!("idle: {:.1} % of a core for 3 processes with {GROUPS} groups, {rate:.0} frames/s", share * 100.0);
    assert!(share < 0.15, "{share}");
    // Five frames a second for each of six ordered pairs, and what stalls of the machine may add; one for each group and
    // follower would be ten times that.
    assert!(rate < 100.0, "heartbeats share frames: {rate:.0} frames/s");
}
