//! Election, replication, order, expected terms and reads of a healthy group.

use crate::cluster::{Cluster, Setup, numbered, wait};
use bytes::Bytes;
use futures_util::future::join_all;
use ogee_common::id::Term;
use ogee_common::limits::RAFT_COMMAND_BYTES_MAX;
use ogee_raft::RaftError;

#[test]
fn a_group_elects_and_replicates() {
    crate::cluster::logs();
    let cluster = Cluster::start(Setup::default());
    let leader = cluster.leader(1);
    let expected = numbered(0..20);
    for (i, command) in expected.iter().enumerate() {
        let done = cluster.node(leader).propose(1, command, None).expect("the leader takes it");
        assert_eq!(done.reply[..], (i as u64 + 1).to_le_bytes(), "the reply is the state machine's");
    }
    cluster.converged(1, &expected);
    for node in cluster.nodes.values() {
        wait("everyone to know the leader", || node.group(1).leader().process == leader);
        assert_eq!(node.group(1).members(), cluster.members(1));
    }
}

#[test]
fn proposals_keep_the_order_of_calls_even_when_futures_are_polled_backwards() {
    let cluster = Cluster::start(Setup::default());
    let leader = cluster.node(cluster.leader(1));
    let expected = numbered(0..500);
    let (group, commands) = (leader.group(1), expected.clone());
    let positions = leader.run(async move {
        let mut calls: Vec<_> = commands.into_iter().map(|c| group.propose(c, None)).collect();
        calls.reverse();
        join_all(calls).await
    });
    let mut indexes: Vec<u64> = positions.into_iter().map(|p| p.expect("applied").pos.index).collect();
    indexes.reverse();
    assert!(indexes.windows(2).all(|w| w[0] < w[1]), "log positions follow the calls");
    cluster.converged(1, &expected);
    let batches = leader.watched[&1].batches.load(std::sync::atomic::Ordering::Relaxed);
    assert!(batches < 250, "entries that are ready are applied together, not in {batches} calls");
}

#[test]
fn a_dropped_future_abandons_the_answer_only() {
    let cluster = Cluster::start(Setup::default());
    let leader = cluster.node(cluster.leader(1));
    let group = leader.group(1);
    leader.run(async move { drop(group.propose(Bytes::from_static(b"abandoned"), None)) });
    cluster.converged(1, &[Bytes::from_static(b"abandoned")]);
}

#[test]
fn another_term_than_the_expected_is_refused() {
    let cluster = Cluster::start(Setup::default());
    let leader = cluster.node(cluster.leader(1));
    let term = leader.read(1).expect("leads");
    leader.propose(1, b"right", Some(term)).expect("the term is right");
    for wrong in [Term(term.0 - 1), Term(term.0 + 1)] {
        match leader.propose(1, b"wrong", Some(wrong)) {
            Err(RaftError::NotLeader(hint)) => assert_eq!(hint.process, leader.process, "it names itself"),
            other => panic!("expected a refusal, got {other:?}"),
        }
    }
    leader.propose(1, b"last", None).expect("any term");
    cluster.converged(1, &[Bytes::from_static(b"right"), Bytes::from_static(b"last")]);
}

#[test]
fn followers_refuse_and_name_the_leader() {
    let cluster = Cluster::start(Setup::default());
    let leader = cluster.leader(1);
    for node in cluster.nodes.values().filter(|n| n.process != leader) {
        wait("the follower to know the leader", || node.group(1).leader().process == leader);
        let named = |e| matches!(e, RaftError::NotLeader(hint) if hint.process == leader);
        assert!(named(node.propose(1, b"x", None).expect_err("a follower takes nothing")));
        assert!(named(node.read(1).expect_err("a follower serves no reads")));
    }
}

#[test]
fn large_commands_pass_and_larger_ones_are_refused() {
    let cluster = Cluster::start(Setup::default());
    let leader = cluster.node(cluster.leader(1));
    // Together far beyond one frame.
    let expected: Vec<Bytes> =
        (0..12u8).map(|i| Bytes::from(vec![i; if i % 2 == 0 { RAFT_COMMAND_BYTES_MAX } else { 1 << 20 }])).collect();
    let (group, commands) = (leader.group(1), expected.clone());
    let done = leader.run(async move { join_all(commands.into_iter().map(|c| group.propose(c, None))).await });
    assert!(done.iter().all(Result::is_ok), "{:?}", done.iter().find(|d| d.is_err()));
    cluster.converged(1, &expected);
    let too_long = vec![0; RAFT_COMMAND_BYTES_MAX + 1];
    assert_eq!(leader.propose(1, &too_long, None), Err(RaftError::TooLong));
}

#[test]
fn too_much_at_once_is_refused_as_overload_and_never_reordered() {
    let cluster = Cluster::start(Setup::default());
    let leader = cluster.node(cluster.leader(1));
    let group = leader.group(1);
    let results = leader.run(async move {
        let calls: Vec<_> = numbered(0..6000).into_iter().map(|c| group.propose(c, None)).collect();
        join_all(calls).await
    });
    let taken = results.iter().filter(|r| r.is_ok()).count();
    let refused = results.iter().filter(|r| **r == Err(RaftError::Overloaded)).count();
    assert_eq!((taken, refused), (4096, 6000 - 4096));
    let expected = numbered(0..4096);
    cluster.converged(1, &expected);
    leader.propose(1, b"again", None).expect("the budget was given back");
}

#[test]
fn one_process_alone_is_a_group() {
    let cluster = Cluster::start(Setup { processes: 1, ..Setup::default() });
    let node = cluster.node(cluster.leader(1));
    node.propose(1, b"alone", None).expect("a majority of one");
    node.read(1).expect("reads");
    cluster.converged(1, &[Bytes::from_static(b"alone")]);
}
