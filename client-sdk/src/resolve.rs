//! Finds the leader of a copyset: asks its replicas, and the MDS where the replicas are.
//!
//! Used by `attempt.rs` when `routing.rs` knows no leader. Invariants: at most one round per copyset and session at a
//! time, and rounds are at least [`ROUND_INTERVAL`] apart however many IOs wait; a round in which most replicas answered
//! does not wait for one that hangs; an MDS that does not answer holds up nobody who has replicas to ask. Absent:
//! retries, which belong to the caller.

use crate::cluster::ClusterInner;
use crate::routing::{ReplicaAddr, Target, Witness};
use crate::session::Session;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use ogee_common::clock;
use ogee_common::id::{ChunkserverId, CopysetId};
use ogee_proto::data::{Opcode, Status, StatusHead, StatusReply};
use ogee_proto::mds::GetCopysetsRequest;
use smallvec::SmallVec;
use std::sync::Arc;
use std::time::Duration;

/// Rounds of one copyset and session are at least this far apart.
const ROUND_INTERVAL: Duration = Duration::from_millis(10);
/// When most replicas have answered without naming a leader, the others get this much longer.
const STRAGGLER_GRACE: Duration = Duration::from_millis(50);
/// The MDS is asked again for the replicas of a copyset without leader after this time.
const REFRESH_INTERVAL: Duration = Duration::from_millis(500);
/// The MDS is waited for this long.
const REFRESH_TIMEOUT: Duration = Duration::from_millis(1000);

/// The leader of `copyset`, or `None` if nobody names one now.
pub(crate) async fn resolve(cluster: &Arc<ClusterInner>, session: &Session, copyset: CopysetId) -> Option<Target> {
    let round = session.round(copyset);
    let mut last = round.lock().await;
    let routes = &cluster.routes;
    if let Some(target) = routes.target(copyset) {
        return Some(target);
    }
    if last.ended.is_some_and(|at| at.elapsed() < ROUND_INTERVAL) {
        return None;
    }
    if routes.replicas(copyset).is_empty() {
        refresh(cluster, copyset).await;
    } else if last.refreshed.is_none_or(|at| at.elapsed() >= REFRESH_INTERVAL) {
        // Beside the round, and ended by its own timeout: the replicas may have moved.
        last.refreshed = Some(clock::now());
        let cluster = cluster.clone();
        cluster.clone().control().spawn(async move { refresh(&cluster, copyset).await });
    }
    ask_replicas(cluster, session, copyset).await;
    last.ended = Some(clock::now());
    routes.target(copyset)
}

/// Asks the MDS for the replicas of a copyset.
async fn refresh(cluster: &ClusterInner, copyset: CopysetId) {
    let request = GetCopysetsRequest { ids: vec![copyset.0] };
    match tokio::time::timeout(REFRESH_TIMEOUT, cluster.mds.get_copysets(request)).await {
        Ok(Ok(list)) => cluster.routes.install(&list.copysets),
        Ok(Err(error)) => tracing::debug!(target: "controlpath", %copyset, %error, "refresh replicas"),
        Err(_) => tracing::debug!(target: "controlpath", %copyset, "refresh replicas: no answer"),
    }
}

/// Asks all replicas at once; ends when one names a leader that may be believed.
async fn ask_replicas(cluster: &ClusterInner, session: &Session, copyset: CopysetId) {
    let replicas = cluster.routes.replicas(copyset);
    let mut answers: FuturesUnordered<_> =
        replicas.iter().map(|replica| ask(cluster, session, copyset, *replica)).collect();
    let mut answered = 0;
    loop {
        let limit = if 2 * answered > replicas.len() { STRAGGLER_GRACE } else { Duration::MAX };
        let Ok(Some(answer)) = tokio::time::timeout(limit, answers.next()).await else { return };
        let Some((from, reply)) = answer else { continue };
        answered += 1;
        let leader = ChunkserverId(reply.at.leader);
        let witness = if leader == from { Witness::Leader } else { Witness::Other };
        cluster.routes.learn(copyset, leader, reply.at.term, witness);
        if cluster.routes.target(copyset).is_some() {
            return;
        }
    }
}

async fn ask(
    cluster: &ClusterInner,
    session: &Session,
    copyset: CopysetId,
    replica: ReplicaAddr,
) -> Option<(ChunkserverId, StatusReply)> {
    let limit = cluster.config.timing.status_timeout;
    let connection = match tokio::time::timeout(limit, session.connect(replica)).await.ok()? {
        Ok(connection) => connection,
        Err(error) => {
            tracing::debug!(target: "datapath", chunkserver = %replica.chunkserver, %error, "connect");
            return None;
        }
    };
    let head = StatusHead { copyset }.encode();
    match tokio::time::timeout(limit, connection.link.call(Opcode::Status, &head, SmallVec::new())).await {
        Ok(Ok(frame)) if Status::parse(frame.header.status) == Status::Ok => {
            StatusReply::decode(frame.head()).ok().map(|reply| (replica.chunkserver, reply))
        }
        Ok(_) => None,
        Err(_) => {
            // Status is answered from memory, so the process or the network hangs.
            session.retire(replica.chunkserver, &connection);
            None
        }
    }
}
