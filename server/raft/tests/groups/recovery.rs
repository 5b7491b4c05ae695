//! Restarts from logs and checkpoints, snapshots for those that fell behind, failures of disk and state machine.

use crate::cluster::{Cluster, Setup, numbered, replica, wait};
use bytes::Bytes;
use ogee_disk::{DiskOp, Fault, FaultRule};
use ogee_raft::{GroupStatus, RaftError, RaftTuning};
use std::sync::atomic::Ordering;

fn short_tail() -> Setup {
    Setup { tuning: RaftTuning { tail_entries: 10, ..RaftTuning::default() }, ..Setup::default() }
}

fn propose_all(cluster: &Cluster, leader: u32, commands: &[Bytes]) {
    for command in commands {
        cluster.node(leader).propose(1, command, None).expect("acknowledged");
    }
}

#[test]
fn all_restart_from_log_and_checkpoint() {
    crate::cluster::logs();
    let mut cluster = Cluster::start(short_tail());
    let expected = numbered(0..100);
    let leader = cluster.leader(1);
    propose_all(&cluster, leader, &expected[..60]);
    // Each is at another place: one with a late checkpoint, one with an early one, one with none.
    cluster.node(leader).checkpoint(1).expect("checkpoint");
    let others: Vec<u32> = cluster.all().into_iter().filter(|p| *p != leader).collect();
    wait("the follower to apply", || cluster.node(others[0]).commands(1).len() == 60);
    cluster.node(others[0]).checkpoint(1).expect("checkpoint");
    propose_all(&cluster, leader, &expected[60..90]);
    cluster.node(leader).checkpoint(1).expect("checkpoint");
    propose_all(&cluster, leader, &expected[90..]);
    cluster.converged(1, &expected);
    for round in 0..2 {
        cluster.all().into_iter().for_each(|p| cluster.kill(p));
        cluster.all().into_iter().for_each(|p| cluster.boot(p));
        let leader = cluster.leader(1);
        cluster.converged(1, &expected);
        assert!(cluster.node(leader).read(1).is_ok(), "round {round}");
        cluster.initialize();
    }
    let leader = cluster.leader(1);
    cluster.node(leader).propose(1, b"more", None).expect("and goes on");
}

#[test]
fn a_checkpoint_purges_all_but_the_tail() {
    let cluster = Cluster::start(short_tail());
    let leader = cluster.leader(1);
    propose_all(&cluster, leader, &numbered(0..100));
    let node = cluster.node(leader);
    node.checkpoint(1).expect("checkpoint");
    let applied = node.group(1).applied_index();
    wait("the purge", || node.group(1).purged_index() == applied - 10);
    node.checkpoint(1).expect("nothing new to save is no error");
    propose_all(&cluster, leader, &numbered(100..105));
    node.checkpoint(1).expect("checkpoint");
    wait("the purge", || node.group(1).purged_index() == node.group(1).applied_index() - 10);
}

/// A follower is down while the others purge what it lacks.
fn leave_behind(cluster: &mut Cluster) -> (u32, u32) {
    let leader = cluster.leader(1);
    let behind = cluster.all().into_iter().find(|p| *p != leader).expect("three");
    propose_all(cluster, leader, &numbered(0..10));
    wait("the follower to apply", || cluster.node(behind).commands(1).len() == 10);
    cluster.kill(behind);
    propose_all(cluster, leader, &numbered(10..200));
    for node in cluster.nodes.values() {
        wait("all to apply", || node.commands(1).len() == 200);
        node.checkpoint(1).expect("checkpoint");
        wait("the purge", || node.group(1).purged_index() > 100);
    }
    (leader, behind)
}

#[test]
fn a_follower_behind_the_log_fetches_a_snapshot() {
    let mut cluster = Cluster::start(short_tail());
    let (leader, behind) = leave_behind(&mut cluster);
    cluster.boot(behind);
    cluster.converged(1, &numbered(0..200));
    assert_eq!(cluster.node(behind).watched[&1].installs.load(Ordering::Relaxed), 1);
    assert_eq!(cluster.node(leader).watched[&1].fetches.load(Ordering::Relaxed), 13, "200 commands in parts of 16");
    propose_all(&cluster, leader, &numbered(200..220));
    cluster.converged(1, &numbered(0..220));
    // What was installed is where it starts from.
    cluster.kill(behind);
    cluster.boot(behind);
    cluster.converged(1, &numbered(0..220));
    cluster.node(behind).checkpoint(1).expect("and it makes checkpoints of its own");
}

#[test]
fn a_snapshot_that_cannot_be_fetched_is_tried_again() {
    let mut cluster = Cluster::start(short_tail());
    let (leader, behind) = leave_behind(&mut cluster);
    for node in cluster.nodes.values() {
        node.watched[&1].withhold.store(true, Ordering::Relaxed);
    }
    cluster.boot(behind);
    let frames = cluster.net.frames.load(Ordering::Relaxed);
    wait("some attempts", || cluster.net.frames.load(Ordering::Relaxed) > frames + 60);
    let node = cluster.node(behind);
    assert_eq!(node.watched[&1].installs.load(Ordering::Relaxed), 0);
    assert_eq!(node.group(1).state().borrow().status, GroupStatus::Running, "a failed fetch is no failure");
    cluster.node(leader).propose(1, b"meanwhile", None).expect("the others go on");
    for node in cluster.nodes.values() {
        node.watched[&1].withhold.store(false, Ordering::Relaxed);
    }
    let expected = cluster.node(leader).commands(1);
    cluster.converged(1, &expected);
}

#[test]
fn a_new_replica_joins_by_snapshot_and_takes_over() {
    let mut cluster = Cluster::prepare(Setup { processes: 4, ..short_tail() });
    (1..=3).for_each(|p| cluster.boot(p));
    let members: ogee_raft::Members = (1..=3).map(|p| (replica(1, p), p)).collect();
    for node in cluster.nodes.values() {
        let (group, members) = (node.group(1), members.clone());
        node.run(async move { group.initialize(members).await }).expect("initialize");
    }
    let leader = cluster.leader(1);
    propose_all(&cluster, leader, &numbered(0..100));
    cluster.node(leader).checkpoint(1).expect("checkpoint");
    cluster.boot(4);
    let group = cluster.node(leader).group(1);
    cluster
        .node(leader)
        .run({
            let group = group.clone();
            async move { group.add_learner(replica(1, 4), 4).await }
        })
        .expect("a learner is added");
    wait("the learner to catch up", || cluster.node(4).commands(1).len() == 100);
    assert_eq!(group.learners().len(), 1);
    let gone = (1..=3).find(|p| *p != leader).expect("three");
    let voters: std::collections::BTreeSet<_> = (1..=4).filter(|p| *p != gone).map(|p| replica(1, p)).collect();
    let expected_voters = voters.clone();
    cluster.node(leader).run(async move { group.change_voters(voters).await }).expect("the membership changes");
    let now: std::collections::BTreeSet<_> = cluster.node(leader).group(1).members().into_keys().collect();
    assert_eq!(now, expected_voters);
    // The new one counts: with it and without the third there is a majority.
    cluster.kill(gone);
    let third = (1..=3).find(|p| *p != leader && *p != gone).expect("three");
    cluster.kill(third);
    cluster.node(leader).propose(1, b"with the new one", None).expect("two of three");
}

#[test]
fn a_state_machine_that_fails_stops_its_replica_only() {
    let cluster = Cluster::start(Setup { groups: vec![1, 2], ..Setup::default() });
    let leader = cluster.leader(1);
    let victim = cluster.all().into_iter().find(|p| *p != leader).expect("three");
    cluster.node(victim).watched[&1].broken.store(true, Ordering::Relaxed);
    cluster.node(leader).propose(1, b"x", None).expect("two of three");
    let node = cluster.node(victim);
    wait("the replica to stop", || matches!(node.group(1).state().borrow().status, GroupStatus::Failed(_)));
    let chain = match &node.group(1).state().borrow().status {
        GroupStatus::Failed(failure) => format!("{failure:?}"),
        other => panic!("{other:?}"),
    };
    assert!(chain.contains("told to break"), "the reason is kept: {chain}");
    assert_eq!(node.propose(1, b"y", None), Err(RaftError::Stopped));
    assert_eq!(node.read(1), Err(RaftError::Stopped));
    assert_eq!(node.checkpoint(1), Err(RaftError::Stopped));
    let other = cluster.leader(2);
    cluster.node(other).propose(2, b"z", None).expect("the other group goes on");
    wait("the other group to apply here too", || node.commands(2).len() == 1);
}

#[test]
fn a_poisoned_log_stops_the_replicas_of_its_process() {
    let mut cluster = Cluster::prepare(Setup { groups: vec![1, 2], ..Setup::default() });
    cluster.faulty = 2;
    cluster.all().into_iter().for_each(|p| cluster.boot(p));
    cluster.initialize();
    for group in [1, 2] {
        let leader = cluster.leader(group);
        // The idle group is led where the log will fail, the other one elsewhere.
        let wanted = if group == 1 { 1 } else { 2 };
        if leader != wanted {
            let from = cluster.node(leader).group(group);
            cluster.node(leader).run(async move { from.transfer_leader(replica(group, wanted)).await });
            wait("the lead to move", || cluster.node(wanted).read(group).is_ok());
        }
    }
    let errno = Fault::Errno(5);
    for op in [DiskOp::Write, DiskOp::Sync] {
        let path_contains = "wal".into();
        cluster.faults.add(FaultRule { op, path_contains, skip: 0, times: u64::MAX, fault: errno });
    }
    // Only one group writes; the other one must not go on with a log that is out.
    let leader = cluster.leader_among(1, &[1, 3]);
    cluster.node(leader).propose(1, b"x", None).expect("two of three");
    for group in [1, 2] {
        let stopped = cluster.node(2).group(group);
        wait("the replica to stop", || matches!(stopped.state().borrow().status, GroupStatus::Failed(_)));
        wait("reads to be refused", || cluster.node(2).read(group) == Err(RaftError::Stopped));
    }
}

#[test]
fn a_group_is_open_once_and_can_be_closed() {
    use crate::cluster::machine::{Machine, Parts, Watched};
    let cluster = Cluster::start(Setup::default());
    cluster.leader(1);
    let node = cluster.node(1);
    let watched = std::sync::Arc::new(Watched::default());
    let file = cluster.dirs[0].path().join("again");
    let (raft, parts) = (node.raft.clone(), std::sync::Arc::new(Parts(watched.clone())));
    let opened = node.run(async move { raft.open_group(1, replica(1, 1), Machine { watched, file }, parts).await });
    assert!(matches!(opened, Err(ogee_raft::OpenError::AlreadyOpen(1))));
    let raft = node.raft.clone();
    node.run(async move { raft.close_group(1).await });
    wait("the status", || node.group(1).state().borrow().status == GroupStatus::Shutdown);
    assert!(node.raft.group(1).is_none());
}

/// What a crash leaves behind after a snapshot was installed and before openraft heard of it: a checkpoint ahead of the
/// log.
fn plant_checkpoint(cluster: &Cluster, from: u32, to: u32) {
    let file = |process: u32| cluster.dirs[process as usize - 1].path().join("checkpoint-1");
    std::fs::copy(file(from), file(to)).expect("copy the checkpoint");
}

#[test]
fn a_checkpoint_beyond_the_end_of_the_log_is_where_a_replica_starts() {
    let mut cluster = Cluster::start(short_tail());
    let (leader, behind) = leave_behind(&mut cluster);
    plant_checkpoint(&cluster, leader, behind);
    cluster.boot(behind);
    cluster.converged(1, &numbered(0..200));
    assert_eq!(cluster.node(behind).watched[&1].installs.load(Ordering::Relaxed), 0, "the log of the others suffices");
    propose_all(&cluster, leader, &numbered(200..210));
    cluster.converged(1, &numbered(0..210));
}

#[test]
fn entries_that_a_checkpoint_contradicts_are_dropped() {
    let mut cluster = Cluster::start(Setup::default());
    let old = cluster.leader(1);
    let others: Vec<u32> = cluster.all().into_iter().filter(|p| *p != old).collect();
    propose_all(&cluster, old, &numbered(0..10));
    cluster.converged(1, &numbered(0..10));
    // The old leader writes entries that nobody else gets.
    cluster.net.isolate(old, others.clone());
    let group = cluster.node(old).group(1);
    let written = cluster.node(old).wal.stats().entries;
    let calls: Vec<_> = (0..60).map(|i| group.propose(Bytes::from(format!("lost {i}")), None)).collect();
    wait("them to be on its disk", || cluster.node(old).wal.stats().entries == written + 60);
    drop((calls, group));
    cluster.kill(old);
    cluster.net.heal();
    let new = cluster.leader(1);
    propose_all(&cluster, new, &numbered(10..50));
    cluster.node(new).checkpoint(1).expect("checkpoint");
    plant_checkpoint(&cluster, new, old);
    cluster.boot(old);
    cluster.converged(1, &numbered(0..50));
    propose_all(&cluster, new, &numbered(50..60));
    cluster.converged(1, &numbered(0..60));
    cluster.kill(old);
    cluster.boot(old);
    cluster.converged(1, &numbered(0..60));
}

#[test]
fn a_log_that_begins_after_its_checkpoint_is_refused() {
    use crate::cluster::machine::{Machine, Parts, Watched};
    let mut cluster = Cluster::start(short_tail());
    let leader = cluster.leader(1);
    propose_all(&cluster, leader, &numbered(0..100));
    let node = cluster.node(leader);
    node.checkpoint(1).expect("checkpoint");
    wait("the purge", || node.group(1).purged_index() > 50);
    let raft = node.raft.clone();
    node.run(async move { raft.close_group(1).await });
    // A state machine that has lost its checkpoint must not start from nothing.
    let watched = std::sync::Arc::new(Watched::default());
    let file = cluster.dirs[0].path().join("lost");
    let (raft, parts) = (node.raft.clone(), std::sync::Arc::new(Parts(watched.clone())));
    let id = replica(1, leader);
    let opened = node.run(async move { raft.open_group(1, id, Machine { watched, file }, parts).await });
    let error = opened.expect_err("the log and the checkpoint do not belong together");
    let source = std::error::Error::source(&error).expect("it says why").to_string();
    assert!(source.contains("the log begins after index"), "{source}");
    cluster.kill(leader);
}
