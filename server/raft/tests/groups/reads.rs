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
