//! One heartbeat frame per peer process and interval, for all groups that this process leads.
//!
//! openraft's own heartbeat costs a turn of two cores, a task's wake-up and a frame per group and follower. A group that
//! has nothing new says so here in a line of 32 bytes; the follower compares it with what its core published, starts its
//! election timer anew and promises a lease ([`crate::promise`]), and the core sleeps on. What the two disagree about is
//! left to openraft: a refused line makes its heartbeat go out at once, over the network. Invariants: a line is answered
//! as accepted only if the follower's core follows that very leader's term and knows all of what the line says is
//! committed; the leader's clock moves to the **sending** of the answered frame, before which no follower can have
//! promised anything; a leader whose core has stopped, has lost its majority or hands over says nothing.
//!
//! The leader's core still wants to hear that it leads. Its heartbeats come less often and are answered on the spot by
//! [`crate::network`] for followers whose answer to a beat is fresh. openraft's clock may then be ahead of ours by the
//! age of that answer; it decides only whether proposals are taken and whether the leader falls silent, never reads.

use crate::codec::{self, BEATS_MAX, Beat};
use crate::links::Links;
use crate::poll_once;
use crate::process::RaftProcess;
use crate::replica::Replica;
use ogee_common::clock;
use ogee_proto::data::{Opcode, Status};
use ogee_proto::link::Responder;
use smallvec::SmallVec;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// An answer that takes longer makes the connection suspect. Bounds the frames under way with it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

type Line = (Arc<Replica>, Beat);

/// Sends what the leaders of this process have to say.
pub(crate) fn send(process: &RaftProcess) {
    let mut lines: HashMap<u32, Vec<Line>> = HashMap::new();
    process.for_each(|replica| {
        replica.beats(|peer, beat| lines.entry(peer).or_default().push((replica.clone(), beat)));
    });
    for (peer, mut rest) in lines {
        while !rest.is_empty() {
            let more = rest.split_off(rest.len().min(BEATS_MAX));
            tokio::spawn(exchange(process.links().clone(), peer, rest));
            rest = more;
        }
    }
}

async fn exchange(links: Arc<Links>, peer: u32, lines: Vec<Line>) {
    // A peer that is down is openraft's business: without answers its own heartbeats go out again.
    let Ok(live) = links.acquire(peer).await else { return };
    let beats: Vec<Beat> = lines.iter().map(|(_, beat)| *beat).collect();
    let message = codec::encode_beats(&beats);
    let sent = clock::now();
    let call = live.call(Opcode::RaftBeat, &message, SmallVec::new());
    let frame = match tokio::time::timeout(ANSWER_TIMEOUT, call).await {
        Ok(Ok(frame)) if Status::parse(frame.header.status) == Status::Ok => frame,
        Ok(_) => return,
        Err(_) => return links.suspect(&live),
    };
    let refused = match codec::decode_beats_reply(frame.head(), lines.len()) {
        Ok(refused) => refused,
        Err(error) => {
            tracing::warn!(target: "datapath", peer, %error, "malformed answer to a heartbeat");
            return;
        }
    };
    if !refused.is_empty() {
        tracing::debug!(target: "controlpath", peer, lines = lines.len(), refused = refused.len(), "heartbeat refused");
    }
    let mut refused = refused.into_iter().peekable();
    for (place, (replica, beat)) in lines.iter().enumerate() {
        if refused.next_if(|at| *at as usize == place).is_none() {
            replica.lease.beaten(beat.term, beat.target, sent, beat.committed);
            continue;
        }
        replica.lease.refused(beat.target);
        // Not ready: the core is busy; the next beat comes soon.
        let _ = poll_once::ready(replica.raft.trigger().heartbeat());
    }
}

/// Answers a frame of another process.
pub(crate) fn receive(process: &RaftProcess, message: &[u8], responder: Responder) {
    let beats = match codec::decode_beats(message) {
        Ok(beats) => beats,
        Err(error) => {
            tracing::warn!(target: "datapath", %error, "malformed heartbeat");
            return responder.bad_request(&error);
        }
    };
    let now = clock::now();
    let mut refused: Vec<u32> = Vec::new();
    for (place, beat) in (0..).zip(&beats) {
        if !process.replica(beat.group).is_some_and(|replica| replica.beaten(beat, now)) {
            refused.push(place);
        }
    }
    responder.send(Status::Ok, &codec::encode_beats_reply(&refused), bytes::Bytes::new());
}
