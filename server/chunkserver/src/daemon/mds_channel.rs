//! Calls to the MDS leader: tries the known addresses in turn and follows the leader named by a refusal.

use ogee_common::rng;
use ogee_proto::LEADER_METADATA;
use ogee_proto::mds::mds_client::MdsClient;
use ogee_proto::net::{Network, channel};
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

/// One call may take this long.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause before the next address.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// The MDS group as seen from a chunkserver.
#[derive(Debug)]
pub(super) struct MdsChannel {
    addresses: Vec<SocketAddr>,
    network: Network,
    /// The client that worked last, with its address.
    current: Mutex<Option<(SocketAddr, MdsClient<Channel>)>>,
}

impl MdsChannel {
    pub(super) fn new(addresses: Vec<SocketAddr>, network: Network) -> Self {
        Self { addresses, network, current: Mutex::new(None) }
    }

    fn client(&self, addr: SocketAddr) -> Result<MdsClient<Channel>, Status> {
        let channel = channel(&self.network, &addr.to_string(), CALL_TIMEOUT);
        channel.map(MdsClient::new).ok_or_else(|| Status::invalid_argument(format!("{addr} makes no URI")))
    }

    fn cached(&self) -> Option<(SocketAddr, MdsClient<Channel>)> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn remember(&self, current: Option<(SocketAddr, MdsClient<Channel>)>) {
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = current;
    }

    /// Calls the leader; goes once through every address and every leader named on the way.
    ///
    /// # Errors
    /// The last status, when no node could answer as the leader; any other status of the leader at once.
    pub(super) async fn call<T, F>(&self, op: impl Fn(MdsClient<Channel>) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut last = Status::unavailable("no MDS address");
        let mut next = self.cached();
        let mut others = self.addresses.clone();
        rng::shuffle(&mut others);
        for _ in 0..self.addresses.len() * 2 + 1 {
            let (addr, client) = match next.take() {
                Some(known) => known,
                None => match others.pop() {
                    Some(addr) => (addr, self.client(addr)?),
                    None => break,
                },
            };
            let attempt = tokio::time::timeout(CALL_TIMEOUT, op(client.clone())).await;
            match attempt.unwrap_or_else(|_| Err(Status::deadline_exceeded("the MDS does not answer"))) {
                Ok(reply) => {
                    self.remember(Some((addr, client)));
                    return Ok(reply.into_inner());
                }
                Err(status) if is_redirect(&status) => {
                    self.remember(None);
                    next = match leader_of(&status) {
                        Some(leader) if leader != addr => Some((leader, self.client(leader)?)),
                        _ => None,
                    };
                    last = status;
                }
                Err(status) if matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Cancelled) => {
                    self.remember(None);
                    last = status;
                    tokio::time::sleep(rng::jitter(RETRY_PAUSE)).await;
                }
                Err(status) => return Err(status),
            }
        }
        Err(last)
    }
}

fn is_redirect(status: &Status) -> bool {
    status.code() == Code::FailedPrecondition && status.metadata().contains_key(LEADER_METADATA)
}

fn leader_of(status: &Status) -> Option<SocketAddr> {
    status.metadata().get(LEADER_METADATA)?.to_str().ok()?.parse().ok()
}
