//! Takes tasks from the MDS, has them done, and ends them.
//!
//! ```text
//!   take ──> work ──┬─ done ────────────────────────────> end "done"
//!                   ├─ failed ────────> undo ───────────> end "failed"
//!                   ├─ cancelled ─────> undo ──┬────────> end "cancelled"
//!                   │                          └ too late > end "done"
//!                   ├─ shutdown ────────────────────────> end "released": another instance takes it at once
//!                   └─ lost ──> nothing: it is another's now
//! ```
//! Invariants: whatever is under way for a task is dropped at the moment its lease is lost; at most as many tasks as configured are done at once; an
//! instance holds nothing that a new one would need. Work runs on one thread; renewals on others, so that work never holds them up.

use super::config::SnapcloneConfig;
use super::doors::{DoorError, Doors};
use super::failure::{Failure, chain};
use super::lease::{Lease, Standing};
use super::metrics::ServiceFigures;
use super::task::{KINDS, Note, Work};
use super::{backup, hydrate, restore, upkeep};
use crate::lazy::Repositories;
use crate::place::Place;
use crate::repository::Repository;
use ogee_client::{Cluster, ClusterConfig, MdsCallError};
use ogee_common::clock::{self, Instant};
use ogee_common::limits::{
    SERVICE_TASK_ATTEMPTS, SERVICE_TASK_RENEW, SERVICE_TASK_RETRY_PAUSE, SERVICE_TASK_TAKES_MAX, SERVICE_TASK_TEXT_BYTES_MAX,
};
use ogee_common::rng;
use ogee_proto::mds as m;
use ogee_proto::net::{Network, TlsError};
use serde_json::Value;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{JoinSet, LocalSet};

/// An IO that takes longer fails for a while: the task goes on with it later.
const IO_TIMEOUT: Duration = Duration::from_secs(60);

/// An instance that cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// Its certificates are of no use.
    #[error("set TLS up")]
    Tls(#[from] TlsError),
    /// It cannot be a client of the cluster.
    #[error("connect to the cluster")]
    Connect(#[from] MdsCallError),
    /// What it is to listen on cannot be had.
    #[error("listen")]
    Listen(#[from] DoorError),
}

/// Does tasks and serves the APIs until `shutdown`; then gives back what is under way, and ends the requests that are.
///
/// # Errors
/// [`ServiceError`]. An MDS or a repository that does not answer is none: it is waited for.
pub async fn run(config: SnapcloneConfig, shutdown: impl Future<Output = ()>) -> Result<(), ServiceError> {
    let doors = Doors::open(&config)?;
    let (limit, metrics) = (config.tasks, config.metrics);
    let daemon = Rc::new(Daemon::new(config)?);
    let _metrics = metrics.and_then(|addr| daemon.figures.serve(addr));
    let stop = watch::Sender::new(false);
    let mut serving = doors.serve((daemon.cluster.mds(), &daemon.places), &daemon.figures, &stop);
    tracing::info!(target: "controlpath", owner = daemon.owner, repositories = daemon.places.len(), "snapclone serves");
    let shutdown = async {
        shutdown.await;
        stop.send_replace(true);
    };
    LocalSet::new().run_until(daemon.serve(limit, shutdown)).await;
    while let Some(ended) = serving.join_next().await {
        if let Err(error) = ended {
            tracing::error!(target: "controlpath", %error, "an API ended by a bug");
        }
    }
    Ok(())
}

/// An instance.
#[derive(Debug)]
pub(super) struct Daemon {
    cluster: Cluster,
    places: BTreeMap<String, Place>,
    owner: u64,
    figures: Arc<ServiceFigures>,
}

impl Daemon {
    fn new(config: SnapcloneConfig) -> Result<Self, ServiceError> {
        let places: BTreeMap<String, Place> = config.repositories.into_iter().map(|r| (r.name, r.place)).collect();
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let cluster = Cluster::connect_lazy(ClusterConfig {
            mds: config.mds,
            network: Network::new(config.tls.as_ref())?,
            description: format!("{} snapclone {}", host.trim(), std::process::id()),
            io_timeout: Some(IO_TIMEOUT),
            // A volume that stands on a backup is backed up, too.
            backups: Some(Arc::new(Repositories::new(places.clone()))),
            ..ClusterConfig::default()
        })?;
        Ok(Self { cluster, places, owner: rng::nonzero_u64(), figures: Arc::default() })
    }

    async fn serve(self: Rc<Self>, limit: usize, shutdown: impl Future<Output = ()>) {
        let stop = watch::Sender::new(false);
        let mut tasks = JoinSet::new();
        let mut shutdown = std::pin::pin!(shutdown);
        loop {
            while let Some(ended) = tasks.try_join_next() {
                report(ended);
            }
            let find = async { if tasks.len() < limit { self.take().await } else { None } };
            let found = tokio::select! {
                // A task that is being taken is free again after its lease.
                () = &mut shutdown => break,
                found = find => found,
            };
            match found {
                Some((task, asked)) => {
                    tasks.spawn_local(self.clone().attend(task, asked, stop.subscribe()));
                }
                None => tokio::select! {
                    () = &mut shutdown => break,
                    () = tokio::time::sleep(rng::jitter(SERVICE_TASK_RENEW)) => {}
                },
            }
        }
        stop.send_replace(true);
        while let Some(ended) = tasks.join_next().await {
            report(ended);
        }
        tracing::info!(target: "controlpath", "snapclone ends");
    }

    /// A task that nobody is at.
    async fn take(&self) -> Option<(m::ServiceTask, Instant)> {
        let asked = clock::now();
        let kinds = KINDS.iter().map(ToString::to_string).collect();
        let repositories = self.places.keys().cloned().collect();
        let request = m::TakeServiceTaskRequest { owner: self.owner, kinds, repositories };
        match self.cluster.mds().take_service_task(request).await {
            Ok(reply) => reply.task.map(|task| (task, asked)),
            Err(error) => {
                tracing::warn!(target: "controlpath", error = &error as &dyn std::error::Error, "take a task");
                None
            }
        }
    }

    async fn attend(self: Rc<Self>, task: m::ServiceTask, asked: Instant, stop: watch::Receiver<bool>) {
        tracing::info!(target: "controlpath", task = task.id, kind = task.kind, fence = task.fence, "task taken");
        let mds = self.cluster.mds().clone();
        let read = Work::parse(&task.kind, &task.arguments).and_then(|work| Ok((work, Note::parse(&task.note)?)));
        let (work, note) = match read {
            Ok(read) => read,
            Err(error) => {
                let lease = Lease::new(mds, &task, Note::default(), asked);
                said(&lease, "failed", lease.end("failed", bounded(chain(&error))).await);
                self.figures.ended("other", "failed");
                return;
            }
        };
        let lease = Arc::new(Lease::new(mds, &task, note, asked));
        let kept = lease.clone();
        let keeper = AbortOnDrop(tokio::spawn(async move { kept.keep().await }));
        let _running = self.figures.begin(work.kind());
        let job = Job {
            cluster: &self.cluster,
            repository: &task.repository,
            places: &self.places,
            lease: &lease,
            work: &work,
            figures: &self.figures,
        };
        let outcome = Box::pin(job.outcome(stop)).await;
        tokio::select! {
            () = lease.until(Standing::Lost) => tracing::warn!(target: "controlpath", task = task.id, "task lost"),
            () = job.part(outcome) => {}
        }
        drop(keeper);
    }
}

/// A task's keeper ends with the task.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(target: "controlpath", %error, "a task's work ended by a bug; it will be taken again");
    }
}

/// Tells how parting with a task went.
fn said(lease: &Lease, end: &str, result: Result<(), Failure>) {
    let task = lease.task();
    match result {
        Ok(()) => tracing::info!(target: "controlpath", task, end, "task ended"),
        Err(Failure::Lost) => tracing::warn!(target: "controlpath", task, end, "task lost"),
        Err(Failure::Passing(why) | Failure::Final(why)) => {
            tracing::warn!(target: "controlpath", task, end, why, "the end of a task is not noted; the next owner will");
        }
    }
}

/// A text that the MDS takes.
fn bounded(mut text: String) -> String {
    if text.len() > SERVICE_TASK_TEXT_BYTES_MAX {
        text.truncate(text.floor_char_boundary(SERVICE_TASK_TEXT_BYTES_MAX));
    }
    text
}

/// How the work on a task ended.
enum Outcome {
    Done(Value),
    Failed(String),
    Cancelled,
    Released,
    Lost,
}

/// A task under way.
pub(super) struct Job<'a> {
    pub(super) cluster: &'a Cluster,
    repository: &'a str,
    places: &'a BTreeMap<String, Place>,
    pub(super) lease: &'a Lease,
    work: &'a Work,
    figures: &'a ServiceFigures,
}

impl Job<'_> {
    /// The task's repository; with `make` it is made if there is none.
    pub(super) async fn open(&self, make: bool) -> Result<Repository, Failure> {
        Ok(self.place_of(self.repository)?.open(make).await?)
    }

    /// Where a repository is.
    ///
    /// # Errors
    /// This instance does not know it.
    pub(super) fn place_of(&self, repository: &str) -> Result<&Place, Failure> {
        self.places.get(repository).ok_or_else(|| Failure::Final(format!("this snapclone does not know repository {repository:?}")))
    }

    async fn outcome(&self, mut stop: watch::Receiver<bool>) -> Outcome {
        if self.lease.fence() > SERVICE_TASK_TAKES_MAX {
            return Outcome::Failed(format!("it was taken {SERVICE_TASK_TAKES_MAX} times and nobody came to its end"));
        }
        tokio::select! {
            biased;
            () = self.lease.until(Standing::Lost) => Outcome::Lost,
            () = self.lease.until(Standing::Cancelling) => Outcome::Cancelled,
            _ = stop.wait_for(|stop| *stop) => Outcome::Released,
            outcome = self.tries() => outcome,
        }
    }

    async fn tries(&self) -> Outcome {
        let mut attempt = 1;
        loop {
            match self.once().await {
                Ok(result) => return Outcome::Done(result),
                Err(Failure::Lost) => return Outcome::Lost,
                Err(Failure::Final(why)) => return Outcome::Failed(why),
                Err(Failure::Passing(why)) if attempt == SERVICE_TASK_ATTEMPTS => return Outcome::Failed(why),
                Err(Failure::Passing(why)) => {
                    tracing::warn!(target: "controlpath", task = self.lease.task(), why, attempt, "the task is tried again");
                }
            }
            attempt += 1;
            tokio::time::sleep(rng::jitter(SERVICE_TASK_RETRY_PAUSE)).await;
        }
    }

    async fn once(&self) -> Result<Value, Failure> {
        match self.work {
            Work::Backup(task) => Box::pin(backup::make(self, task)).await,
            Work::Restore(task) => Box::pin(restore::make(self, task)).await,
            Work::Hydrate(task) => Box::pin(hydrate::make(self, task)).await,
            Work::Remove(task) => upkeep::remove(self, task).await,
            Work::Verify(task) => upkeep::check(self, task).await,
            Work::Gc(task) => upkeep::gc(self, task).await,
        }
    }

    /// Undoes what was begun. `Some`: it had come to its end already.
    async fn undo(&self, is_cancelled: bool) -> Result<Option<Value>, Failure> {
        match self.work {
            Work::Backup(task) => backup::undo(self, task, is_cancelled).await,
            Work::Restore(task) => restore::undo(self, task).await,
            // A removal is one step, what was pasted is good, the others leave nothing.
            Work::Hydrate(_) | Work::Remove(_) | Work::Verify(_) | Work::Gc(_) => Ok(None),
        }
    }

    async fn undo_at_last(&self, is_cancelled: bool) -> Result<Option<Value>, Failure> {
        let mut attempt = 1;
        loop {
            match self.undo(is_cancelled).await {
                Err(Failure::Passing(_) | Failure::Final(_)) if attempt < SERVICE_TASK_ATTEMPTS => attempt += 1,
                undone => return undone,
            }
            tokio::time::sleep(rng::jitter(SERVICE_TASK_RENEW)).await;
        }
    }

    async fn part(&self, outcome: Outcome) {
        let (is_cancelled, why) = match outcome {
            Outcome::Lost => return tracing::warn!(target: "controlpath", task = self.lease.task(), "task lost"),
            Outcome::Released => return self.end("released", String::new()).await,
            Outcome::Done(result) => return self.end("done", result.to_string()).await,
            Outcome::Cancelled => (true, String::new()),
            Outcome::Failed(why) => (false, why),
        };
        match self.undo_at_last(is_cancelled).await {
            Ok(Some(result)) => self.end("done", result.to_string()).await,
            Ok(None) if is_cancelled => self.end("cancelled", String::new()).await,
            Ok(None) => self.end("failed", why).await,
            Err(Failure::Lost) => tracing::warn!(target: "controlpath", task = self.lease.task(), "task lost"),
            Err(Failure::Passing(left) | Failure::Final(left)) => {
                let why = if is_cancelled { "cancelled".to_owned() } else { why };
                self.end("failed", format!("{why}; what was begun is not undone: {left}")).await;
            }
        }
    }

    async fn end(&self, end: &'static str, result: String) {
        let ended = self.lease.end(end, bounded(result)).await;
        self.figures.ended(self.work.kind(), if ended.is_ok() { end } else { "lost" });
        said(self.lease, end, ended);
    }
}
