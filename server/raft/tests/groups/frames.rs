//! Frames as a stranger might send them: to a replica that is not here any more, or was never.

use crate::cluster::{CLUSTER, Cluster, Setup, replica};
use bytes::{BufMut, Bytes, BytesMut};
use ogee_common::id::{ConnectionGeneration, SessionId};
use ogee_proto::data::{HelloHead, Opcode, RaftHead, Role, Status};
use ogee_proto::link::Link;
use ogee_proto::net::Network;
use ogee_raft::AddressBook as _;
use smallvec::SmallVec;

/// A vote that the leader itself would have authorized, so that no lease stands in its way, from an address that has
/// everything (`docs/formats/raft.md`).
fn vote(term: u64, candidate: u64) -> Bytes {
    let mut message = BytesMut::new();
    message.put_u64_le(term);
    message.put_u64_le(candidate);
    message.put_u8(0);
    message.put_u8(1);
    message.put_u64_le(term - 1);
    message.put_u64_le(1_000_000);
    message.put_u8(1);
    message.freeze()
}

fn ask(cluster: &Cluster, process: u32, opcode: Opcode, target: u64, message: Bytes) -> Status {
    let addr = cluster.net.addr(process).expect("it runs");
    let hello = HelloHead {
        version_min: 1,
        version_max: 1,
        role: Role::Chunkserver,
        process: 9,
        target: process,
        session: SessionId(0),
        generation: ConnectionGeneration(0),
        cluster: CLUSTER,
    };
    let head = RaftHead { group: 1, target, message }.encode();
    cluster.node(process).run(async move {
        let link = Link::connect(&Network::default(), addr, &hello).await.expect("connect");
        let frame = link.call(opcode, &head, SmallVec::new()).await.expect("an answer");
        Status::parse(frame.header.status)
    })
}

#[test]
fn a_frame_for_another_replica_of_the_group_is_refused() {
    let cluster = Cluster::start(Setup::default());
    let leader = cluster.leader(1);
    let term = cluster.node(leader).read(1).expect("leads");
    let foreign = replica(1, leader).0 + 50;
    let opcodes = [
        Opcode::RaftVote,
        Opcode::RaftPreVote,
        Opcode::RaftAppend,
        Opcode::RaftTransfer,
        Opcode::RaftSnapshot,
        Opcode::FetchPages,
    ];
    for opcode in opcodes {
        let status = ask(&cluster, leader, opcode, foreign, vote(term.0 + 1000, foreign));
        assert_eq!(status, Status::UnknownCopyset, "{opcode:?}");
    }
    assert_eq!(cluster.node(leader).read(1), Ok(term), "nothing of it was heeded");
    // The same vote to the replica that is here deposes it: it was refused for its target alone.
    let status = ask(&cluster, leader, Opcode::RaftVote, replica(1, leader).0, vote(term.0 + 1000, foreign));
    assert_eq!(status, Status::Ok);
    assert!(cluster.node(leader).group(1).leader().term > term);
}
