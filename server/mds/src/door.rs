//! The one listening socket of a node: gRPC and the other nodes' Raft share it.
//!
//! The first byte of a plain connection tells them apart (a frame of the data protocol begins with `O`, the preface of
//! HTTP/2 with `P`), and ALPN one under TLS. Invariants: a connection that says nothing is closed after [`FIRST_BYTE_TIMEOUT`]; at most
//! [`WAITING_MAX`] connections wait for gRPC to take them; every connection's task ends with the door.

use ogee_proto::data::{Role, Status};
use ogee_proto::link;
use ogee_proto::net::{self, Accepted, Listener, Network, Plane, Stream};
use ogee_raft::{PeerConnection, RaftProcess};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// A connection must begin to speak within this time.
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that wait for gRPC to take them.
const WAITING_MAX: usize = 64;
/// Connections whose first byte is waited for, and Raft connections; further ones wait in the socket's backlog.
const CONNECTIONS_MAX: usize = 1024;
/// Pause after a failed accept: out of file descriptors passes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What connections are told apart for.
#[derive(Clone)]
pub(crate) struct Door {
    /// This node.
    pub(crate) node: u32,
    /// The identity under which the nodes know each other.
    pub(crate) cluster: [u8; 16],
    /// Who gets Raft connections.
    pub(crate) raft: Arc<RaftProcess>,
    /// How connections are taken.
    pub(crate) network: Network,
}

impl Door {
    /// Accepts connections until it is dropped. gRPC connections come out of the receiver.
    pub(crate) fn open(self, listener: Listener) -> (mpsc::Receiver<io::Result<Stream>>, impl Future<Output = ()>) {
        let (grpc, waiting) = mpsc::channel(WAITING_MAX);
        (waiting, self.run(listener, grpc))
    }

    async fn run(self, listener: Listener, grpc: mpsc::Sender<io::Result<Stream>>) {
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            if connections.len() >= CONNECTIONS_MAX {
                connections.join_next().await;
            }
            match net::accept(&listener).await {
                Ok(accepted) => {
                    connections.spawn(self.clone().sort(accepted, grpc.clone()));
                }
                Err(error) => {
                    tracing::warn!(target: "controlpath", %error, "accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn sort(self, accepted: Accepted, grpc: mpsc::Sender<io::Result<Stream>>) {
        let from = accepted.addr();
        let mut stream = match self.network.admit(accepted).await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(target: "controlpath", %from, %error, "a connection is refused");
                return;
            }
        };
        match tokio::time::timeout(FIRST_BYTE_TIMEOUT, stream.plane()).await {
            Ok(Ok(Some(Plane::Data))) => self.serve_peer(stream).await,
            Ok(Ok(Some(Plane::Control))) => {
                // An error means that gRPC has stopped, and so will the door.
                let _ = grpc.send(Ok(stream)).await;
            }
            _ => {}
        }
    }

    async fn serve_peer(self, stream: Stream) {
        let Self { node, cluster, raft, .. } = self;
        let accept = |hello: &ogee_proto::data::HelloHead| {
            if hello.role != Role::Mds || hello.cluster != cluster || (hello.target != 0 && hello.target != node) {
                tracing::warn!(target: "controlpath", peer = hello.process, "a connection for another cluster or node");
                return Err(Status::WrongTarget);
            }
            Ok(PeerConnection::new(raft, hello.process))
        };
        if let Err(error) = link::serve(stream, node, accept).await {
            tracing::debug!(target: "controlpath", %error, "a peer's connection ended");
        }
    }
}
