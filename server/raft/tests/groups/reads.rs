//! Who may serve reads: never two at once with different data.

use crate::cluster::{Cluster, DEADLINE, Setup, now, wait};
use bytes::Bytes;
use ogee_raft::RaftError;
use std::time::Duration;

#[test]
fn a_deposed_leader_refuses_reads_before_another_can_write() {
    crate::cluster::logs();
    let cluster = Cluster::start(Setup::default());
    for round in 0..3u32 {
        let old = cluster.leader(1);
        let others: Vec<u32> = cluster.all().into_iter().filter(|p| *p != old).collect();
        let start = now();
        cluster.node(old).propose(1, format!("old {round}").as_bytes(), None).expect("acknowledged");
        cluster.net.isolate(old, others.clone());
        // The old leader is asked all the time. Whenever it still answers, nobody else may have written.
        let fresh = format!("new {round}");
        let mut written = false;
        while !written {
            assert!(start.elapsed() < DEADLINE, "nobody takes over");
            let before = others.iter().any(|p| cluster.node(*p).group(1).is_leader());
            let read = cluster.node(old).read(1);
            assert!(!(before && read.is_ok()), "a stale read: another leads already");
            for p in &others {
                let node = cluster.node(*p);
                if node.group(1).is_leader() && node.propose(1, fresh.as_bytes(), None).is_ok() {
                    written = true;
                }
            }
        }
        println!("took over after {:?}", start.elapsed());
        // One of the two has just promised its vote to the old leader.
        assert!(start.elapsed() >= cluster.setup.tuning.election_max, "a lease was cut short");
        assert!(matches!(cluster.node(old).read(1), Err(RaftError::NoQuorum | RaftError::NotLeader(_))));
        let group = cluster.node(old).group(1);
        let late = cluster.node(old).run(async move {
            tokio::time::timeout(Duration::from_millis(50), group.propose(Bytes::from_static(b"late"), None)).await
        });
        assert!(!matches!(late, Ok(Ok(_))), "and takes nothing");
        cluster.net.heal();
        wait("the old leader to follow", || {
            let hint = cluster.node(old).group(1).leader().process;
            hint != old && hint != 0
        });
        let expected = cluster.node(cluster.leader(1)).commands(1);
        assert!(expected.contains(&Bytes::from(fresh)) && !expected.contains(&Bytes::from_static(b"late")));
        cluster.converged(1, &expected);
    }
}

#[test]
fn a_read_after_the_election_sees_what_the_last_leader_acknowledged() {
    let mut cluster = Cluster::start(Setup::default());
    for round in 0..3u32 {
        let leader = cluster.leader(1);
        let command = Bytes::from(format!("acknowledged {round}"));
        cluster.node(leader).propose(1, &command, None).expect("acknowledged");
        cluster.kill(leader);
        // `leader` is whoever grants the first read: at that moment its state must be complete.
        let start = now();
        let next = loop {
            assert!(start.elapsed() < DEADLINE);
            let granted = cluster.nodes.values().find(|n| n.read(1).is_ok());
            if let Some(node) = granted {
                break node;
            }
        };
        assert!(next.commands(1).contains(&command), "round {round}");
        cluster.boot(leader);
    }
}

#[test]
fn an_isolated_follower_does_not_disturb_when_it_returns() {
    let cluster = Cluster::start(Setup::default());
    let leader = cluster.leader(1);
    let term = cluster.node(leader).read(1).expect("leads");
    let away = cluster.all().into_iter().find(|p| *p != leader).expect("three");
    cluster.net.isolate(away, cluster.all());
    // Long enough for several elections of its own.
    let start = now();
    while start.elapsed() < Duration::from_secs(4) {
        cluster.node(leader).propose(1, b"without it", Some(term)).expect("two of three");
        std::thread::sleep(Duration::from_millis(20));
    }
    cluster.net.heal();
    let expected = cluster.node(leader).commands(1);
    cluster.converged(1, &expected);
    assert_eq!(cluster.node(leader).read(1), Ok(term), "pre-vote keeps the term");
}

#[test]
fn a_restart_forgets_no_promise() {
    let mut cluster = Cluster::start(Setup::default());
    let lease = cluster.setup.tuning.election_max;
    let leader = cluster.leader(1);
    let others: Vec<u32> = cluster.all().into_iter().filter(|p| *p != leader).collect();
    let (loyal, rival) = (others[0], others[1]);
    // The rival has the whole log and hears nothing of the leader: only the promise of the third keeps it from the lead.
    cluster.node(leader).propose(1, b"everybody has this", None).expect("acknowledged");
    cluster.converged(1, &[Bytes::from_static(b"everybody has this")]);
    cluster.net.isolate(leader, [rival]);
    let start = now();
    wait("the rival's lease to end", || start.elapsed() > lease * 2);
    cluster.node(leader).read(1).expect("by the promise of the loyal one");
    // The loyal one restarts, and hears nothing of the leader afterwards.
    cluster.kill(loyal);
    cluster.net.isolate(leader, others.clone());
    let booted = now();
    cluster.boot(loyal);
    let mut asked = None::<std::time::Instant>;
    loop {
        assert!(booted.elapsed() < DEADLINE, "nobody takes over");
        // Often, but not so often that one attempt ends the one before.
        if asked.is_none_or(|at| at.elapsed() > Duration::from_millis(100)) {
            asked = Some(now());
            let group = cluster.node(rival).group(1);
            cluster.node(rival).run(async move { group.elect().await });
        }
        let deposed = others.iter().any(|p| cluster.node(*p).group(1).is_leader());
        let read = cluster.node(leader).read(1);
        assert!(!(deposed && read.is_ok()), "a stale read: another leads already");
        if deposed {
            break;
        }
    }
    println!("took over {:?} after the restart began", booted.elapsed());
    assert!(booted.elapsed() >= lease, "a promise was forgotten");
}

#[test]
fn a_new_leader_serves_no_read_before_it_has_applied() {
    let cluster = Cluster::start(Setup::default());
    let old = cluster.leader(1);
    let next = cluster.all().into_iter().find(|p| *p != old).expect("three");
    cluster.node(next).watched[&1].held.send_replace(true);
    cluster.node(old).propose(1, b"acknowledged", None).expect("acknowledged");
    let group = cluster.node(old).group(1);
    cluster.node(old).run(async move { group.transfer_leader(crate::cluster::replica(1, next)).await });
    wait("the other to lead", || cluster.node(next).group(1).is_leader());
    // The first waits for what is committed to be applied; by the second the lease is certainly held.
    for _ in 0..2 {
        let read = cluster.node(next).read(1);
        assert!(read.is_err(), "it has not applied what its predecessor acknowledged: {read:?}");
    }
    cluster.node(next).watched[&1].held.send_replace(false);
    wait("reads to be served", || cluster.nodes.values().any(|n| n.read(1).is_ok()));
    let leader = cluster.leader(1);
    assert_eq!(cluster.node(leader).commands(1), [Bytes::from_static(b"acknowledged")]);
}

#[test]
fn a_promise_that_openraft_does_not_know_of_keeps_a_rival_out() {
    let cluster = Cluster::start(Setup::default());
    let leader = cluster.leader(1);
    cluster.node(leader).propose(1, b"everybody has this", None).expect("acknowledged");
    cluster.converged(1, &[Bytes::from_static(b"everybody has this")]);
    let term = cluster.node(leader).read(1).expect("leads");
    let rival = cluster.all().into_iter().find(|p| *p != leader).expect("three");
    // Nothing is written, so the third hears only the common heartbeat, and the rival hears nothing. The rival has the
    // whole log and asks all the time: it is the third that must refuse, long after its core last heard of a leader.
    cluster.net.isolate(leader, [rival]);
    let lease = cluster.setup.tuning.election_max;
    let (start, mut asked) = (now(), None::<std::time::Instant>);
    while start.elapsed() < lease * 5 {
        if asked.is_none_or(|at| at.elapsed() > Duration::from_millis(100)) {
            asked = Some(now());
            let group = cluster.node(rival).group(1);
            cluster.node(rival).run(async move { group.elect().await });
        }
        assert_eq!(cluster.node(leader).read(1), Ok(term), "after {:?}", start.elapsed());
        std::thread::sleep(Duration::from_millis(5));
    }
    // The leader is not heard of any more: then the promise ends, and with it the leader's lease.
    let silent = now();
    cluster.net.isolate(leader, cluster.all());
    let others: Vec<u32> = cluster.all().into_iter().filter(|p| *p != leader).collect();
    wait("another leader", || {
        let deposed = others.iter().any(|p| cluster.node(*p).group(1).is_leader());
        let read = cluster.node(leader).read(1);
        assert!(!(deposed && read.is_ok()), "a stale read: another leads already");
        deposed
    });
    println!("took over after {:?}", silent.elapsed());
}

#[test]
fn a_leader_whose_state_machine_fails_is_replaced() {
    let cluster = Cluster::start(Setup::default());
    let old = cluster.leader(1);
    cluster.node(old).watched[&1].broken.store(true, std::sync::atomic::Ordering::Relaxed);
    let outcome = cluster.node(old).propose(1, b"fate unknown", None);
    assert!(outcome.is_err(), "{outcome:?}");
    // Its process lives and talks to the others: what it says of this group must not keep them quiet.
    let others: Vec<u32> = cluster.all().into_iter().filter(|p| *p != old).collect();
    let next = cluster.leader_among(1, &others);
    cluster.node(next).propose(1, b"after", None).expect("two of three");
}
