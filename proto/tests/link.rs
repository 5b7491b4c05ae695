//! Two ends of a real TCP connection: order, refusals, ends of connections.

use bytes::Bytes;
use ogee_common::id::{ConnectionGeneration, SessionId};
use ogee_proto::data::{Frame, HelloHead, Opcode, PROTOCOL_MAX, Role, Status};
use ogee_proto::link::{Handler, Link, LinkError, Responder, serve};
use ogee_proto::net::{self, Network};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

fn hello(version: u16) -> HelloHead {
    HelloHead {
        version_min: version,
        version_max: version,
        role: Role::Client,
        process: 0,
        target: 0,
        session: SessionId(1),
        generation: ConnectionGeneration(1),
        cluster: [0; 16],
    }
}

/// Echoes payloads; keeps requests with an empty payload unanswered.
#[derive(Default)]
struct Echo {
    seen: Arc<Mutex<Vec<Bytes>>>,
    kept: Mutex<Vec<Responder>>,
}

impl Handler for Echo {
    fn handle(&self, frame: Frame, responder: Responder) {
        let payload = frame.payload();
        self.seen.lock().expect("no panics").push(payload.clone());
        if payload.is_empty() {
            self.kept.lock().expect("no panics").push(responder);
        } else {
            responder.send(Status::Ok, frame.head(), payload);
        }
    }
}

async fn start(refuse: Option<Status>) -> (SocketAddr, Arc<Mutex<Vec<Bytes>>>, tokio::task::JoinHandle<()>) {
    let listener = net::listen("127.0.0.1:0".parse().expect("an address")).await.expect("listen");
    let addr = listener.local_addr().expect("bound");
    let seen = Arc::new(Mutex::new(vec![]));
    let echo = Echo { seen: seen.clone(), kept: Mutex::default() };
    let task = tokio::spawn(async move {
        let accepted = net::accept(&listener).await.expect("accept");
        let stream = Network::default().admit(accepted).await.expect("a plain connection");
        let _ = serve(stream, 9, |_| refuse.map_or(Ok(echo), Err)).await;
    });
    (addr, seen, task)
}

fn payload(i: u32) -> smallvec::SmallVec<[Bytes; 2]> {
    let bytes = Bytes::copy_from_slice(&i.to_le_bytes());
    smallvec::smallvec![bytes.slice(..2), bytes.slice(2..)]
}

#[tokio::test]
async fn calls_arrive_in_order_and_replies_find_their_caller() {
    let (addr, seen, _task) = start(None).await;
    let link = Link::connect(&Network::default(), addr, &hello(1)).await.expect("connect");
    assert_eq!(link.process(), 9);
    let calls: Vec<_> = (0..2000u32).map(|i| link.call(Opcode::Status, &i.to_le_bytes(), payload(i))).collect();
    for (i, call) in (0u32..).zip(calls) {
        let reply = call.await.expect("a reply");
        assert_eq!(reply.head(), i.to_le_bytes());
        assert_eq!(reply.payload()[..], i.to_le_bytes());
    }
    let order: Vec<u32> = seen
        .lock()
        .expect("no panics")
        .iter()
        .map(|b| u32::from_le_bytes(b[..].try_into().expect("four bytes")))
        .collect();
    assert_eq!(order, (0..2000).collect::<Vec<_>>());
}

#[tokio::test]
async fn big_payloads_pass_whole() {
    let (addr, _, _task) = start(None).await;
    let link = Link::connect(&Network::default(), addr, &hello(1)).await.expect("connect");
    let big = Bytes::from((0..4 << 20).map(|i: u32| (i % 253) as u8).collect::<Vec<u8>>());
    let reply = link.call(Opcode::Write, b"h", smallvec::smallvec![big.clone()]).await.expect("a reply");
    assert_eq!(reply.payload(), big);
}

#[tokio::test]
async fn an_ended_connection_ends_its_calls() {
    let (addr, _, task) = start(None).await;
    let link = Link::connect(&Network::default(), addr, &hello(1)).await.expect("connect");
    let unanswered = link.call(Opcode::Status, b"", smallvec::smallvec![]);
    let answered = link.call(Opcode::Status, b"", payload(1));
    answered.await.expect("a reply");
    task.abort();
    assert!(matches!(unanswered.await, Err(LinkError::Closed)));
    link.closed().await;
    assert!(link.is_closed());
    assert!(matches!(link.call(Opcode::Status, b"", payload(2)).await, Err(LinkError::Closed)));
}

#[tokio::test]
async fn a_dropped_connection_ends_its_calls() {
    let (addr, _, _task) = start(None).await;
    let link = Link::connect(&Network::default(), addr, &hello(1)).await.expect("connect");
    let unanswered = link.call(Opcode::Status, b"", smallvec::smallvec![]);
    let answered = link.call(Opcode::Status, b"", payload(1));
    answered.await.expect("a reply");
    let closed = link.closed();
    drop(link);
    let ended = tokio::time::timeout(std::time::Duration::from_secs(5), unanswered).await;
    assert!(matches!(ended.expect("at once"), Err(LinkError::Closed)));
    closed.await;
}

#[tokio::test]
async fn refusals_and_foreign_versions_are_told() {
    let (addr, _, _t) = start(Some(Status::WrongTarget)).await;
    let refused = Link::connect(&Network::default(), addr, &hello(1)).await.expect_err("must be refused");
    assert!(matches!(refused, LinkError::Refused { status: Status::WrongTarget, .. }), "{refused}");
    let (addr, _, _t) = start(None).await;
    let refused = Link::connect(&Network::default(), addr, &hello(PROTOCOL_MAX + 1)).await.expect_err("must be refused");
    assert!(matches!(refused, LinkError::Refused { status: Status::Version, .. }), "{refused}");
}

#[tokio::test]
async fn the_highest_common_version_is_chosen() {
    for (min, max, chosen) in [(1, 1, 1), (1, PROTOCOL_MAX, PROTOCOL_MAX), (1, PROTOCOL_MAX + 7, PROTOCOL_MAX), (PROTOCOL_MAX, u16::MAX, PROTOCOL_MAX)] {
        let (addr, _, _t) = start(None).await;
        let hello = HelloHead { version_min: min, version_max: max, ..hello(1) };
        let link = Link::connect(&Network::default(), addr, &hello).await.expect("connect");
        assert_eq!(link.version(), chosen, "{min} to {max}");
    }
}

#[tokio::test]
async fn nobody_listening_is_a_connect_error() {
    let listener = net::listen("127.0.0.1:0".parse().expect("an address")).await.expect("listen");
    let addr = listener.local_addr().expect("bound");
    drop(listener);
    let error = Link::connect(&Network::default(), addr, &hello(1)).await.expect_err("nobody is there");
    assert!(matches!(error, LinkError::Connect { .. }), "{error}");
}
