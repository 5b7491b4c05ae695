//! Waiting until a dev cluster serves: a leader at the MDS, every chunkserver reporting, a pool, and a leader in every
//! copyset.
//!
//! Every condition is a level that is read again and again until a deadline. A daemon that ends meanwhile ends the
//! waiting with the last line of its log.

use super::layout::{DaemonPlace, Role};
use super::process::{self, Running, last_log_line};
use super::ports;
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
/// A port that is still taken after this time belongs to somebody else.
const PORT_LIMIT: Duration = Duration::from_secs(5);
/// A pause between two looks.
const POLL: Duration = Duration::from_millis(50);

/// A daemon of the cluster.
#[derive(Debug)]
pub(crate) struct Member {
    /// Where it is.
    pub place: DaemonPlace,
    /// Its process.
    pub process: Process,
}

/// How a daemon came to run.
#[derive(Debug)]
pub(crate) enum Process {
    /// It ran before. It may have been killed a moment ago and be about to end.
    Found(Running),
    /// This command started it, and when.
    Started(Child, Instant),
}

impl Member {
    /// Finds the daemon, or starts it.
    ///
    /// # Errors
    /// Its port belongs to somebody else, or it cannot be started.
    pub(crate) async fn ensure(place: DaemonPlace) -> Result<Self, CliError> {
        if let Some(running) = process::find(&place) {
            return Ok(Self { place, process: Process::Found(running) });
        }
        ports::wait_free(&place.name, place.addr, PORT_LIMIT).await?;
        let at = now();
        let child = process::start(&place)?;
        Ok(Self { place, process: Process::Started(child, at) })
    }

    /// Its process id.
    #[must_use]
    pub(crate) fn pid(&self) -> u32 {
        match &self.process {
            Process::Found(running) => running.pid,
            Process::Started(child, _) => child.id(),
        }
    }

    /// When this command started it, if it did.
    #[must_use]
    pub(crate) const fn started(&self) -> Option<Instant> {
        match &self.process {
            Process::Found(_) => None,
            Process::Started(_, at) => Some(*at),
        }
    }
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
    // A look may take less than a poll, time and again: so once in any case.
    if let Some(again) = revive(members).await? {
        return Ok(Some(again));
    }
    // Only what the look needs is copied, because the members' processes are watched at the same time.
    let chunkservers: Vec<Expected> = members.iter().filter_map(Expected::of).collect();
    let look = look(mds, &chunkservers, out);
    tokio::pin!(look);
    loop {
        tokio::select! {
            found = &mut look => return found,
            () = tokio::time::sleep(POLL) => {
                if let Some(again) = revive(members).await? {
                    return Ok(Some(again));
                }
            }
        }
    }
}

/// Starts a daemon that ran when it was looked for and has ended since; its name, if there was one.
///
/// # Errors
/// A daemon that this command started has ended.
async fn revive(members: &mut [Member]) -> Result<Option<String>, CliError> {
    for member in members {
        match &mut member.process {
            Process::Found(running) if running.has_ended() => {
                *member = Member::ensure(member.place.clone()).await?;
                return Ok(Some(format!("the start of {}", member.place.name)));
            }
            Process::Found(_) => {}
            Process::Started(child, _) => {
                if let Ok(Some(status)) = child.try_wait() {
                    let (name, line, log) = (&member.place.name, last_log_line(&member.place), member.place.log());
                    let text = format!("{name} ended with {status}: {line} (see {})", log.display());
                    return Err(CliError::new(ErrorKind::Failure, text));
                }
            }
        }
    }
    Ok(None)
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
        let (place, started) = (&member.place, member.started());
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
