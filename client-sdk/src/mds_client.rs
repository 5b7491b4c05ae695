//! Calls to the MDS group: finds the leader, follows redirects, tries the other nodes, retries with a deadline.
//!
//! Used by the volume's control task, by the IO path for layouts, and by the command line. Invariants: every call ends
//! within [`MDS_CALL_TIMEOUT`]; a refusal by the leader is returned at once and never retried; a call whose outcome is
//! unknown is repeated (the MDS's operations are idempotent or tell by their refusal that they were carried out, see
//! `mds_calls.rs`). All calls run on the control thread, so they may be awaited from any runtime. Absent: what calls
//! mean.

use ogee_common::clock;
use ogee_common::limits::{
    MDS_ATTEMPT_TIMEOUT, MDS_CALL_TIMEOUT, MDS_NODES_MAX, RETRY_BACKOFF_MAX, RETRY_BACKOFF_MIN,
};
use ogee_common::rng;
use ogee_proto::mds::mds_client::MdsClient as Grpc;
use ogee_proto::net::{Network, channel};
use ogee_proto::{ERROR_METADATA, LEADER_METADATA, MdsErrorKind};
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

/// Redirects followed without a pause; more means that the group is electing.
const REDIRECTS_MAX: u32 = 3;

/// A call to the MDS that failed.
#[derive(Debug, thiserror::Error)]
#[error("{rpc}: {} ({message})", kind.as_str())]
pub struct MdsCallError {
    /// What a program can act on.
    pub kind: MdsErrorKind,
    /// The rpc, in snake case.
    pub rpc: &'static str,
    /// A sentence for people, from the MDS.
    pub message: String,
    /// Whether an attempt may have been carried out although the call failed.
    pub outcome_unknown: bool,
}

type Client = Grpc<Channel>;

#[derive(Debug)]
struct Node {
    addr: String,
    client: Option<Client>,
}

#[derive(Debug)]
struct Nodes {
    list: Vec<Node>,
    /// Position of the node to ask first.
    current: usize,
}

#[derive(Debug)]
struct Inner {
    control: Handle,
    network: Network,
    nodes: Mutex<Nodes>,
}

/// The asking side of the control plane. Clones share connections and the leader's address.
#[derive(Debug, Clone)]
pub struct MdsClient(Arc<Inner>);

/// A call that nobody waits for any more ends: an acknowledgement that is retried after its hold is over would be a
/// lie.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What to do after one attempt.
enum Verdict {
    /// Return the error.
    Refused(MdsErrorKind),
    /// Ask the named node, or the next one if there is no name.
    Redirect(Option<String>),
    /// Ask the next node; the attempt may have been carried out.
    Unknown,
}

impl MdsClient {
    /// A client of the nodes at `addrs` (`host:port`); connects when first used.
    pub(crate) fn new(control: Handle, addrs: &[String], network: Network) -> Self {
        let list = addrs.iter().map(|a| Node { addr: a.clone(), client: None }).collect();
        Self(Arc::new(Inner { control, network, nodes: Mutex::new(Nodes { list, current: 0 }) }))
    }

    /// The addresses known now, the presumed leader first.
    #[must_use]
    pub fn addrs(&self) -> Vec<String> {
        let nodes = self.nodes();
        let (tail, head) = nodes.list.split_at(nodes.current.min(nodes.list.len()));
        head.iter().chain(tail).map(|n| n.addr.clone()).collect()
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.0.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the call on the control thread, again and again until it has an answer or the deadline passed.
    pub(crate) async fn call<T, F, Fut>(&self, rpc: &'static str, ask: F) -> Result<T, MdsCallError>
    where
        F: Fn(Client) -> Fut + Send + 'static,
        Fut: Future<Output = Result<Response<T>, Status>> + Send,
        T: Send + 'static,
    {
        self.call_within(rpc, MDS_ATTEMPT_TIMEOUT, ask).await
    }

    /// As `call`, for an rpc that may take up to `attempt` at the MDS.
    pub(crate) async fn call_within<T, F, Fut>(
        &self,
        rpc: &'static str,
        attempt: Duration,
        ask: F,
    ) -> Result<T, MdsCallError>
    where
        F: Fn(Client) -> Fut + Send + 'static,
        Fut: Future<Output = Result<Response<T>, Status>> + Send,
        T: Send + 'static,
    {
        let this = self.clone();
        let mut task = AbortOnDrop(self.0.control.spawn(async move { this.run(rpc, attempt, ask).await }));
        (&mut task.0).await.unwrap_or_else(|_| {
            let message = "the control thread has ended".to_owned();
            Err(MdsCallError { kind: MdsErrorKind::Unavailable, rpc, message, outcome_unknown: true })
        })
    }

    async fn run<T, F, Fut>(&self, rpc: &'static str, attempt: Duration, ask: F) -> Result<T, MdsCallError>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = clock::now() + MDS_CALL_TIMEOUT;
        let (mut unknown, mut redirects, mut backoff) = (false, 0, RETRY_BACKOFF_MIN);
        let mut message = "no MDS node answered".to_owned();
        while clock::now() < deadline {
            let verdict = match self.current() {
                None => Verdict::Redirect(None),
                Some(client) => match tokio::time::timeout(attempt, ask(client)).await {
                    Ok(Ok(reply)) => return Ok(reply.into_inner()),
                    Ok(Err(status)) => {
                        status.message().clone_into(&mut message);
                        judge(&status)
                    }
                    Err(_) => Verdict::Unknown,
                },
            };
            match verdict {
                Verdict::Refused(kind) => return Err(MdsCallError { kind, rpc, message, outcome_unknown: unknown }),
                Verdict::Redirect(Some(leader)) if redirects < REDIRECTS_MAX => {
                    redirects += 1;
                    self.point_to(&leader);
                    continue;
                }
                Verdict::Redirect(_) => self.advance(),
                Verdict::Unknown => {
                    unknown = true;
                    self.advance();
                }
            }
            redirects = 0;
            tokio::time::sleep(rng::jitter(backoff)).await;
            backoff = (backoff * 2).min(RETRY_BACKOFF_MAX);
        }
        Err(MdsCallError { kind: MdsErrorKind::Unavailable, rpc, message, outcome_unknown: unknown })
    }

    /// The client of the node to ask; `None` if its address makes no URI.
    fn current(&self) -> Option<Client> {
        let mut nodes = self.nodes();
        let at = nodes.current;
        let node = nodes.list.get_mut(at)?;
        if node.client.is_none() {
            node.client = Some(Grpc::new(channel(&self.0.network, &node.addr, MDS_ATTEMPT_TIMEOUT)?));
        }
        node.client.clone()
    }

    fn advance(&self) {
        let mut nodes = self.nodes();
        nodes.current = (nodes.current + 1) % nodes.list.len().max(1);
    }

    fn point_to(&self, addr: &str) {
        let mut nodes = self.nodes();
        if let Some(at) = nodes.list.iter().position(|n| n.addr == addr) {
            nodes.current = at;
        } else if nodes.list.len() < MDS_NODES_MAX {
            nodes.current = nodes.list.len();
            nodes.list.push(Node { addr: addr.to_owned(), client: None });
        } else {
            nodes.current = (nodes.current + 1) % nodes.list.len();
        }
    }
}

/// The kind of a refusal, `None` if asking again may help.
pub(crate) fn refusal(status: &Status) -> Option<MdsErrorKind> {
    match judge(status) {
        Verdict::Refused(kind) => Some(kind),
        _ => None,
    }
}

/// What a status means for the call. Pure.
fn judge(status: &Status) -> Verdict {
    let text = |key| status.metadata().get(key).and_then(|v| v.to_str().ok());
    let kind = text(ERROR_METADATA).and_then(MdsErrorKind::parse);
    let leader = text(LEADER_METADATA);
    match (kind, leader) {
        (Some(MdsErrorKind::NotLeader), leader) => Verdict::Redirect(leader.filter(|l| !l.is_empty()).map(Into::into)),
        (None, Some(leader)) if status.code() == Code::FailedPrecondition => {
            Verdict::Redirect((!leader.is_empty()).then(|| leader.to_owned()))
        }
        (Some(MdsErrorKind::Unavailable), _) => Verdict::Unknown,
        (Some(kind), _) => Verdict::Refused(kind),
        (None, _) => match status.code() {
            Code::NotFound => Verdict::Refused(MdsErrorKind::NotFound),
            Code::AlreadyExists => Verdict::Refused(MdsErrorKind::AlreadyExists),
            Code::InvalidArgument | Code::Unimplemented | Code::OutOfRange => {
                Verdict::Refused(MdsErrorKind::InvalidArgument)
            }
            _ => Verdict::Unknown,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(code: Code, error: Option<&'static str>, leader: Option<&'static str>) -> Status {
        let mut s = Status::new(code, "x");
        for (key, value) in [(ERROR_METADATA, error), (LEADER_METADATA, leader)] {
            if let Some(value) = value {
                s.metadata_mut().insert(key, tonic::metadata::MetadataValue::from_static(value));
            }
        }
        s
    }

    #[test]
    fn every_verdict_follows_from_the_status() {
        let redirect = |s: &Status| match judge(s) {
            Verdict::Redirect(to) => to,
            _ => panic!("not a redirect: {s:?}"),
        };
        let named = status(Code::FailedPrecondition, Some("not-leader"), Some("a:1"));
        assert_eq!(redirect(&named).as_deref(), Some("a:1"));
        assert_eq!(redirect(&status(Code::FailedPrecondition, None, Some("a:1"))).as_deref(), Some("a:1"));
        assert_eq!(redirect(&status(Code::FailedPrecondition, None, Some(""))), None);
        let refused = status(Code::FailedPrecondition, Some("attached"), None);
        assert!(matches!(judge(&refused), Verdict::Refused(MdsErrorKind::Attached)));
        assert!(matches!(judge(&status(Code::Unavailable, None, None)), Verdict::Unknown));
        assert!(matches!(judge(&status(Code::Internal, Some("unavailable"), None)), Verdict::Unknown));
    }
}
