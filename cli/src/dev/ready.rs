//! Waiting until a dev cluster serves: a leader at the MDS, every chunkserver reporting, a pool, and a leader in every
//! copyset.
//!
//! Every condition is a level that is read again and again until a deadline. A daemon that ends meanwhile ends the
//! waiting with the last line of its log.

use super::layout::{DaemonPlace, Role};
use super::process::last_log_line;
use crate::error::{CliError, ErrorKind};
use crate::output::Output;
use crate::sdk_error::call_failed;
use ogee_client::MdsClient;
use ogee_common::clock::{Instant, now};
use ogee_common::limits::REPLICAS_DEFAULT;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds as m;
use std::process::Child;
use std::time::Duration;

/// The pool that is made.
const POOL: &str = "default";
/// A pause between two looks.
const POLL: Duration = Duration::from_millis(50);

/// A daemon of the cluster and, if this command started it, its process.
#[derive(Debug)]
pub(crate) struct Member {
    /// Where it is.
    pub place: DaemonPlace,
    /// Its process id.
    pub pid: u32,
    /// Started by this command, and when.
    pub started: Option<(Child, Instant)>,
}

/// Waits until the cluster serves.
///
/// # Errors
/// A daemon ended, or the deadline passed ([`ErrorKind::Unavailable`]); the message says what was waited for.
pub(crate) async fn wait(
    mds: &MdsClient, members: &mut [Member], out: Output, limit: Duration,
) -> Result<(), CliError> {
    let deadline = now() + limit;
    let mut missing = "an answer of the MDS".to_owned();
    loop {
        let look = tokio::time::timeout_at(deadline, look_while_alive(mds, members, out)).await;
        match look {
            Ok(Ok(None)) => return Ok(()),
            Ok(Ok(Some(still))) => missing = still,
            Ok(Err(e)) => return Err(e),
            Err(_) => {
                let logs = members.first().and_then(|m| m.place.dir.parent()).map(|d| d.display().to_string());
                let text = format!(
                    "the cluster does not serve after {} s: still waiting for {missing}; see the logs {}/*/log",
                    limit.as_secs(),
                    logs.unwrap_or_default()
                );
                return Err(CliError::new(ErrorKind::Unavailable, text));
            }
        }
        tokio::time::sleep(POLL).await;
    }
}

/// One look, given up when a daemon ends: a call to a dead MDS would take long to fail.
async fn look_while_alive(mds: &MdsClient, members: &mut [Member], out: Output) -> Result<Option<String>, CliError> {
    // Only what the look needs is copied, because the members' processes are watched at the same time.
    let chunkservers: Vec<Expected> = members.iter().filter_map(Expected::of).collect();
    let look = look(mds, &chunkservers, out);
    tokio::pin!(look);
    loop {
        tokio::select! {
            found = &mut look => return found,
            () = tokio::time::sleep(POLL) => check_alive(members)?,
        }
    }
}

fn check_alive(members: &mut [Member]) -> Result<(), CliError> {
    for member in members {
        if let Some((child, _)) = &mut member.started
            && let Ok(Some(status)) = child.try_wait()
        {
            let (name, line, log) = (&member.place.name, last_log_line(&member.place), member.place.log());
            let text = format!("{name} ended with {status}: {line} (see {})", log.display());
            return Err(CliError::new(ErrorKind::Failure, text));
        }
    }
    Ok(())
}

/// A chunkserver that must report.
#[derive(Debug, Clone)]
struct Expected {
    name: String,
    addr: String,
    started: Option<Instant>,
}

impl Expected {
    fn of(member: &Member) -> Option<Self> {
        let started = member.started.as_ref().map(|(_, at)| *at);
        let place = &member.place;
        (place.role == Role::Chunkserver).then(|| Self { name: place.name.clone(), addr: place.addr.to_string(), started })
    }

    /// Whether the MDS heard of this process, not only of the one before it.
    fn is_up(&self, known: &[m::Chunkserver]) -> bool {
        let heard = |c: &m::Chunkserver| {
            let silent = Duration::from_millis(c.silent_ms);
            c.state == "up" && self.started.is_none_or(|at| silent < now().duration_since(at))
        };
        known.iter().any(|c| c.addr == self.addr && heard(c))
    }
}

/// What is still missing; `None` when the cluster serves.
async fn look(mds: &MdsClient, chunkservers: &[Expected], out: Output) -> Result<Option<String>, CliError> {
    let known = match mds.list_chunkservers().await {
        Ok(list) => list.chunkservers,
        Err(e) if e.kind == MdsErrorKind::Unavailable => return Ok(Some("a leader of the MDS".to_owned())),
        Err(e) => return Err(call_failed("list chunkservers", &e)),
    };
    if let Some(silent) = chunkservers.iter().find(|c| !c.is_up(&known)) {
        return Ok(Some(format!("a report of {}", silent.name)));
    }
    if let Some(missing) = ensure_pool(mds, chunkservers.len(), out).await? {
        return Ok(Some(missing));
    }
    let status = match mds.cluster_status().await {
        Ok(status) => status,
        Err(e) if e.kind == MdsErrorKind::Unavailable => return Ok(Some("a leader of the MDS".to_owned())),
        Err(e) => return Err(call_failed("cluster status", &e)),
    };
    let (led, all) = (status.copysets_with_leader, status.copysets);
    Ok((led < all || all == 0).then(|| format!("leaders of copysets ({led} of {all})")))
}

/// Makes the pool when there is none.
async fn ensure_pool(mds: &MdsClient, chunkservers: usize, out: Output) -> Result<Option<String>, CliError> {
    let pools = match mds.list_pools().await {
        Ok(list) => list.pools,
        Err(e) if e.kind == MdsErrorKind::Unavailable => return Ok(Some("a leader of the MDS".to_owned())),
        Err(e) => return Err(call_failed("list pools", &e)),
    };
    if pools.iter().any(|p| p.name == POOL && p.copysets > 0) {
        return Ok(None);
    }
    let replicas = u32::try_from(chunkservers).unwrap_or(u32::MAX).min(REPLICAS_DEFAULT);
    if replicas < REPLICAS_DEFAULT {
        out.warn(&format!("{chunkservers} chunkservers keep {replicas} copies of the data; three survive the loss of one"));
    }
    let request = m::CreatePoolRequest { name: POOL.to_owned(), replicas, copysets: 0 };
    match mds.create_pool(request).await {
        Ok(_) => Ok(None),
        Err(e) if e.kind == MdsErrorKind::AlreadyExists => Ok(None),
        Err(e) if e.kind == MdsErrorKind::Unavailable => Ok(Some("the pool".to_owned())),
        Err(e) => Err(call_failed(&format!("create pool {POOL}"), &e)),
    }
}
