//! Loss of processes: what was acknowledged survives, and how long nobody leads.

use crate::cluster::{Cluster, DEADLINE, Setup, now, numbered, wait};
use bytes::Bytes;
use ogee_raft::{MembershipError, RaftError, RaftTuning};
use std::time::Duration;

/// Proposes to whoever leads until it is acknowledged, and says how long that took.
fn insist(cluster: &Cluster, group: u64, command: &[u8]) -> Duration {
    let start = now();
    loop {
        assert!(start.elapsed() < DEADLINE, "nobody takes the command");
        for node in cluster.nodes.values() {
            if node.group(group).is_leader() && node.propose(group, command, None).is_ok() {
                return start.elapsed();
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn assert_holds(cluster: &Cluster, acknowledged: &[Bytes]) {
    wait("all to hold what was acknowledged", || {
        cluster.nodes.values().all(|n| {
            let held = n.commands(1);
            acknowledged.iter().all(|c| held.contains(c))
        })
    });
    let first = cluster.nodes.values().next().expect("a node").commands(1);
    cluster.converged(1, &first);
}

#[test]
fn a_killed_leader_is_replaced_soon_and_nothing_acknowledged_is_lost() {
    crate::cluster::logs();
    let mut cluster = Cluster::start(Setup::default());
    let mut acknowledged = Vec::new();
    let mut stalls = Vec::new();
    for round in 0..5 {
        let leader = cluster.leader(1);
        for command in numbered(round * 10..round * 10 + 10) {
            cluster.node(leader).propose(1, &command, None).expect("acknowledged");
            acknowledged.push(command);
        }
        // Some are under way when it dies: their fate is open, but it must be the same everywhere.
        let group = cluster.node(leader).group(1);
        let open: Vec<_> = numbered(1000 + round * 10..1000 + round * 10 + 10);
        let calls: Vec<_> = open.into_iter().map(|c| group.propose(c, None)).collect();
        drop((calls, group));
        cluster.kill(leader);
        let marker = Bytes::from(format!("after {round}"));
        stalls.push(insist(&cluster, 1, &marker));
        acknowledged.push(marker);
        cluster.boot(leader);
        wait("the restarted one to follow", || cluster.node(leader).group(1).leader().process != 0);
    }
    assert_holds(&cluster, &acknowledged);
    stalls.sort();
    println!("stalls after kill: {stalls:?}");
    assert!(stalls[2] < Duration::from_millis(1500), "typically below 1.5 s: {stalls:?}");
}

#[test]
fn a_hung_leader_is_replaced_and_finds_its_way_back() {
    let cluster = Cluster::start(Setup::default());
    let mut stalls = Vec::new();
    let mut acknowledged = Vec::new();
    for round in 0..3 {
        let leader = cluster.leader(1);
        let others: Vec<u32> = cluster.all().into_iter().filter(|p| *p != leader).collect();
        let resume = cluster.node(leader).hang();
        let start = now();
        let marker = Bytes::from(format!("hung {round}"));
        wait("another leader to take a command", || {
            let mut leaders = others.iter().map(|p| cluster.node(*p)).filter(|n| n.group(1).is_leader());
            leaders.any(|n| n.propose(1, &marker, None).is_ok())
        });
        stalls.push(start.elapsed());
        acknowledged.push(marker);
        drop(resume);
        wait("the old leader to step down", || !cluster.node(leader).group(1).is_leader());
    }
    println!("stalls after hang: {stalls:?}");
    cluster.converged(1, &acknowledged);
    assert!(stalls.iter().all(|s| *s < Duration::from_secs(3)), "{stalls:?}");
}

#[test]
fn the_death_of_a_follower_is_not_felt() {
    let mut cluster = Cluster::start(Setup::default());
    let leader = cluster.leader(1);
    let term = cluster.node(leader).read(1).expect("leads");
    let follower = cluster.all().into_iter().find(|p| *p != leader).expect("three");
    cluster.node(leader).propose(1, b"before", None).expect("three of three");
    cluster.kill(follower);
    let start = now();
    let mut longest = Duration::ZERO;
    while start.elapsed() < Duration::from_secs(3) {
        let one = now();
        cluster.node(leader).propose(1, b"during", Some(term)).expect("two of three, in the same term");
        longest = longest.max(one.elapsed());
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("longest proposal beside a dead follower: {longest:?}");
    assert!(longest < Duration::from_millis(500), "{longest:?}");
    // With nothing to do but to try, it tries at a measured pace.
    let (busy, start) = (cluster.node(leader).cpu(), now());
    wait("a second to pass", || start.elapsed() > Duration::from_secs(1));
    let busy = cluster.node(leader).cpu() - busy;
    assert!(busy < Duration::from_millis(200), "a dead peer costs {busy:?} of CPU in a second");
    cluster.boot(follower);
    let expected = cluster.node(leader).commands(1);
    cluster.converged(1, &expected);
    assert_eq!(cluster.node(leader).read(1), Ok(term), "the return of a follower ends no term");
}

#[test]
fn without_a_majority_nothing_is_taken_and_it_resumes_by_itself() {
    let mut cluster = Cluster::start(Setup::default());
    let leader = cluster.leader(1);
    cluster.node(leader).propose(1, b"before", None).expect("acknowledged");
    let others: Vec<u32> = cluster.all().into_iter().filter(|p| *p != leader).collect();
    others.iter().for_each(|p| cluster.kill(*p));
    wait("the lease to end", || matches!(cluster.node(leader).read(1), Err(RaftError::NoQuorum)));
    wait("proposals to be refused", || {
        let group = cluster.node(leader).group(1);
        // What is taken while the lease still runs stays open; only a refusal ends at once.
        let call = cluster.node(leader).run(async move {
            tokio::time::timeout(Duration::from_millis(20), group.propose(Bytes::from_static(b"open"), None)).await
        });
        matches!(call, Ok(Err(RaftError::NoQuorum | RaftError::NotLeader(_))))
    });
    others.iter().for_each(|p| cluster.boot(*p));
    insist(&cluster, 1, b"after");
    let first = cluster.node(leader).commands(1);
    assert!(first.contains(&Bytes::from_static(b"before")));
    wait("the same everywhere", || {
        let held = cluster.node(1).commands(1);
        held.contains(&Bytes::from_static(b"after")) && cluster.nodes.values().all(|n| n.commands(1) == held)
    });
}

#[test]
fn a_healthy_group_keeps_its_leader() {
    let cluster = Cluster::start(Setup::default());
    let leader = cluster.leader(1);
    let term = cluster.node(leader).read(1).expect("leads");
    let start = now();
    while start.elapsed() < Duration::from_secs(5) {
        assert_eq!(cluster.node(leader).read(1), Ok(term), "a lease is renewed in time, always");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_lead_is_handed_over_quickly() {
    let cluster = Cluster::start(Setup::default());
    let mut fastest = Duration::MAX;
    for _ in 0..4 {
        let leader = cluster.leader(1);
        cluster.node(leader).propose(1, b"x", None).expect("acknowledged");
        let next = cluster.all().into_iter().find(|p| *p != leader).expect("three");
        let group = cluster.node(leader).group(1);
        let start = now();
        cluster.node(leader).run(async move { group.transfer_leader(crate::cluster::replica(1, next)).await });
        assert!(cluster.node(leader).read(1).is_err(), "it refuses reads from then on");
        wait("the other to lead", || cluster.node(next).read(1).is_ok());
        println!("handed over in {:?}", start.elapsed());
        fastest = fastest.min(start.elapsed());
    }
    assert!(fastest < Duration::from_millis(700), "without waiting for a lease: {fastest:?}");
}

#[test]
fn a_closed_connection_is_noticed_without_the_timer() {
    // A patience so long that only a closed connection can cut it: then the lease alone is waited for.
    let tuning = RaftTuning {
        election_min: Duration::from_secs(4),
        election_max: Duration::from_millis(4100),
        ..RaftTuning::default()
    };
    let mut cluster = Cluster::start(Setup { tuning: tuning.clone(), ..Setup::default() });
    let leader = cluster.leader(1);
    cluster.node(leader).propose(1, b"before", None).expect("acknowledged");
    cluster.kill(leader);
    let took = insist(&cluster, 1, b"after");
    println!("replaced after {took:?}");
    // By the timer at the earliest: the lease, counted from a heartbeat before the end, and half of a patience.
    let timer = tuning.election_max + tuning.election_min / 2 - tuning.heartbeat;
    assert!(took < timer, "not before the timer: {took:?} of {timer:?}");
}

#[test]
fn a_leader_hands_over_before_it_is_removed() {
    let cluster = Cluster::start(Setup::default());
    let old = cluster.leader(1);
    cluster.node(old).propose(1, b"before", None).expect("acknowledged");
    let others: Vec<u32> = cluster.all().into_iter().filter(|p| *p != old).collect();
    let voters: std::collections::BTreeSet<_> = others.iter().map(|p| crate::cluster::replica(1, *p)).collect();
    let remove = |process: u32| {
        let (group, voters) = (cluster.node(process).group(1), voters.clone());
        cluster.node(process).run(async move { group.change_voters(voters).await })
    };
    let refused = remove(old);
    assert!(matches!(refused, Err(MembershipError::NotLeader(_))), "it does not remove itself: {refused:?}");
    let next = cluster.leader_among(1, &others);
    assert_eq!(cluster.node(next).group(1).members().len(), 3, "nothing has changed but the lead");
    wait("the new leader to remove the old one", || others.iter().any(|p| remove(*p).is_ok()));
    let next = cluster.leader_among(1, &others);
    let members: std::collections::BTreeSet<_> = cluster.node(next).group(1).members().into_keys().collect();
    assert_eq!(members, voters);
    cluster.node(next).propose(1, b"after", None).expect("two of two");
    assert!(!cluster.node(old).group(1).is_leader() && cluster.node(old).read(1).is_err());
}
