//! The life of one attached volume, in a task of its own.
//!
//! ```text
//!               attached, bound                 told to end
//!   Starting ────────────────────► Serving ────────────────────► Leaving ──► Ended
//!      │                            │   ▲                                      ▲
//!      │ refused                    │   │ attached, bound                      │
//!      ├───────────► Waiting ◄──────┘   │                                      │
//!      │              │   └── a pause ──┘                                      │
//!      │              └──────────────── told to end ───────────────────────────┤
//!      └── refused, and asked for by a client: its error ──────────────────────┘
//! ```
//!
//! Serving turns to Waiting when the server ends by itself (a system call failed, it panicked). Invariants: nothing that happens here
//! touches another volume: the task shares with others the connection to the cluster and the state file, and nothing else; the volume is never
//! stolen but at the first attempt of a client that asked for it, and attached again only as `known.rs` has it; whoever waits for the end is told, also if
//! the task panics.

use super::daemon::Site;
use super::known::{Found, Known, mode, taken};
use super::protocol::{Figures, KindFigures, Listed, Phase, Refusal};
use super::running::{Running, check_place};
use super::spec::Spec;
use super::state::Kept;
use crate::error::{CliError, ErrorKind};
use crate::open::{look_up, open_same};
use ogee_client::{BlockDevice, OpStats, OpenMode, Volume, VolumeStats};
use ogee_common::clock;
use ogee_common::id::VolumeId;
use ogee_common::limits::VHOST_REATTACH_PAUSE;
use ogee_common::name::VolumeRef;
use ogee_vhost_blk::VhostBlkStats;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{oneshot, watch};

/// What an attempt is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Begin {
    /// A client waits for it, the first time; if it fails, that is the end.
    Asked {
        /// Whether to take the volume from who has it.
        steal: bool,
    },
    /// The state file has it, or it was served before; if it fails, it is tried again and again.
    Kept,
}

/// How it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    /// The volume was given back.
    GivenBack,
    /// It was not attached by this daemon when it was told to end; a predecessor of the daemon may still have it.
    NotAttached,
    /// It may still be attached.
    Failed(Refusal),
}

/// What somebody who looks on sees.
enum View {
    Starting,
    Serving { volume: Volume, stats: Arc<VhostBlkStats>, since_unix_ms: u64 },
    Waiting { reason: String },
    Leaving,
}

/// One attached volume.
pub(super) struct Attachment {
    spec: Spec,
    name: VolumeRef,
    known: Mutex<Option<Known>>,
    view: Mutex<View>,
    end: watch::Sender<bool>,
    ended: watch::Sender<Option<Ended>>,
}

/// Tells of the end, whatever it is.
struct TellEnd<'a>(&'a Attachment);

impl Drop for TellEnd<'_> {
    fn drop(&mut self) {
        let panicked = || Ended::Failed(Refusal::new(ErrorKind::Failure, "its keeper panicked; see the daemon's log"));
        self.0.ended.send_if_modified(|ended| {
            let was_told = ended.is_some();
            ended.get_or_insert_with(panicked);
            !was_told
        });
    }
}

impl Attachment {
    /// One that nobody keeps yet. `name` is the parsed name of its spec.
    pub(super) fn new(Kept { spec, attach }: Kept, name: VolumeRef) -> Self {
        let (known, view) = (Mutex::new(attach), Mutex::new(View::Starting));
        Self { spec, name, known, view, end: watch::Sender::new(false), ended: watch::Sender::new(None) }
    }

    /// As what it is attached.
    pub(super) fn spec(&self) -> &Spec {
        &self.spec
    }

    /// What the state file has to have of it.
    pub(super) fn kept(&self) -> Kept {
        Kept { spec: self.spec.clone(), attach: self.known() }
    }

    /// What is known of it beyond its name.
    pub(super) fn known(&self) -> Option<Known> {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on so much is known of it.
    pub(super) fn learn(&self, known: Known) {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = Some(known);
    }

    /// Whether it writes this volume, as far as is known.
    pub(super) fn writes(&self, volume_id: VolumeId) -> bool {
        !self.spec.read_only && self.known().is_some_and(|known| known.volume_id == volume_id)
    }

    /// Asks it to end; returns at once.
    pub(super) fn end(&self) {
        self.end.send_replace(true);
    }

    /// Waits for its end.
    pub(super) async fn wait_ended(&self) -> Ended {
        let mut ended = self.ended.subscribe();
        let found = ended.wait_for(Option::is_some).await.ok().and_then(|found| found.clone());
        found.expect("the sender is ours, and it was waited for")
    }

    /// Whether a front end is connected.
    pub(super) fn is_connected(&self) -> bool {
        matches!(&*self.view(), View::Serving { stats, .. } if stats.is_connected())
    }

    /// Attaches and serves until told to end. The outcome of the first attempt goes to `first`.
    pub(super) async fn keep(self: Arc<Self>, site: Arc<Site>, begin: Begin, first: oneshot::Sender<Result<(), Refusal>>) {
        let tell = TellEnd(&self);
        let ended = self.live(&site, begin, first).await;
        self.ended.send_replace(Some(ended));
        drop(tell);
    }

    async fn live(&self, site: &Site, begin: Begin, first: oneshot::Sender<Result<(), Refusal>>) -> Ended {
        let (mut end, mut first, mut attempt) = (self.end.subscribe(), Some(first), begin);
        loop {
            let permit = tokio::select! {
                biased;
                _ = end.wait_for(|end| *end) => return Ended::NotAttached,
                permit = site.attaches.acquire() => permit,
            };
            // Not given up half-way: what the MDS grants has to be given back.
            let started = self.start(site, std::mem::replace(&mut attempt, Begin::Kept)).await;
            drop(permit);
            let refusal = match started {
                Ok(running) => {
                    if let Some(first) = first.take() {
                        // Nobody waits for it: then it is served all the same.
                        let _ = first.send(Ok(()));
                    }
                    match self.serve(running, &mut end).await {
                        Ok(ended) => return ended,
                        Err(refusal) => refusal,
                    }
                }
                Err(error) => Refusal::from(error),
            };
            self.wait_because(&refusal);
            if let Some(first) = first.take() {
                let _ = first.send(Err(refusal.clone()));
                if begin != Begin::Kept {
                    return Ended::Failed(refusal);
                }
            }
            tokio::select! {
                biased;
                _ = end.wait_for(|end| *end) => return Ended::NotAttached,
                () = tokio::time::sleep(VHOST_REATTACH_PAUSE) => {}
            }
        }
    }

    /// Attaches the volume and begins to serve it.
    async fn start(&self, site: &Site, begin: Begin) -> Result<Running, CliError> {
        check_place(&self.spec.socket).await?;
        let volume = self.open(site, begin).await?;
        self.learn(Known::from(volume.attach_info()));
        // Of one that was asked for it is written before that is answered.
        if begin == Begin::Kept
            && let Err(error) = site.book.save().await
        {
            // It is served all the same; the next daemon has it if it is the same client to the MDS.
            tracing::warn!(target: "controlpath", volume = %self.name, error = error.message, "the attach is not in the state file");
        }
        Running::start(site, &self.spec, &self.name, volume).await
    }

    /// Opens the volume, if it may be opened.
    async fn open(&self, site: &Site, begin: Begin) -> Result<Volume, CliError> {
        let found = Found::from(&look_up(&site.cluster, &self.name).await?);
        if self.known().is_none() {
            site.book.table().identify(self, found.volume_id)?;
        }
        let mode = match (mode(&self.spec, self.known(), found)?, begin) {
            (OpenMode::ReadWrite { .. }, Begin::Asked { steal }) => OpenMode::ReadWrite { steal },
            (mode, _) => mode,
        };
        match open_same(&site.cluster, &self.name, mode, found.volume_id).await {
            Err(error) if mode == OpenMode::Resume && error.kind() == ErrorKind::Conflict => Err(taken(&self.spec).into()),
            opened => opened,
        }
    }

    /// Serves until told to end, or until the server ends by itself, which is the error.
    async fn serve(&self, mut running: Running, end: &mut watch::Receiver<bool>) -> Result<Ended, Refusal> {
        let (volume, stats) = (running.volume().clone(), running.stats());
        self.show(View::Serving { volume, stats, since_unix_ms: clock::unix_ms() });
        tracing::info!(target: "controlpath", volume = %self.name, socket = %self.spec.socket.display(), "volume is served");
        let by_itself = tokio::select! {
            biased;
            _ = end.wait_for(|end| *end) => None,
            outcome = running.ended() => Some(outcome),
        };
        self.show(View::Leaving);
        let ended = running.end().await.map_err(Refusal::from);
        match by_itself {
            None => {
                tracing::info!(target: "controlpath", volume = %self.name, "volume is not served any more");
                Ok(ended.map_or_else(Ended::Failed, |()| Ended::GivenBack))
            }
            Some(outcome) => {
                if let Err(refusal) = ended {
                    tracing::warn!(target: "controlpath", volume = %self.name, error = refusal.message, "volume not given back");
                }
                let unasked = || Refusal::new(ErrorKind::Failure, "its server ended without being told to");
                Err(outcome.map_err(Refusal::from).err().unwrap_or_else(unasked))
            }
        }
    }

    /// Shows why it is not served; told in the log once for each reason.
    fn wait_because(&self, refusal: &Refusal) {
        let reason = refusal.message.clone();
        let is_told = matches!(&*self.view(), View::Waiting { reason: told } if *told == reason);
        if !is_told {
            tracing::warn!(target: "controlpath", volume = %self.name, reason, "volume is not served");
        }
        self.show(View::Waiting { reason });
    }

    fn show(&self, view: View) {
        *self.view() = view;
    }

    fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it is.
    pub(super) fn listed(&self) -> Listed {
        let Spec { volume, socket, read_only, queues, .. } = self.spec.clone();
        let mut listed = Listed {
            volume,
            socket,
            read_only,
            state: Phase::Starting,
            connected: false,
            queues,
            size_bytes: 0,
            since_unix_ms: 0,
            reason: None,
        };
        match &*self.view() {
            View::Starting => {}
            View::Leaving => listed.state = Phase::Leaving,
            View::Waiting { reason } => (listed.state, listed.reason) = (Phase::Waiting, Some(reason.clone())),
            View::Serving { volume, stats, since_unix_ms } => {
                listed.state = if volume.is_fenced() { Phase::Fenced } else { Phase::Serving };
                (listed.connected, listed.since_unix_ms) = (stats.is_connected(), *since_unix_ms);
                listed.size_bytes = volume.info().size_bytes;
            }
        }
        listed
    }

    /// What it did since it was attached; nothing while it is not.
    pub(super) fn volume_stats(&self) -> Option<(VolumeStats, Arc<VhostBlkStats>)> {
        match &*self.view() {
            View::Serving { volume, stats, .. } => Some((volume.stats(), Arc::clone(stats))),
            _ => None,
        }
    }

    /// The same for a reply.
    pub(super) fn figures(&self) -> Option<Figures> {
        let (io, front_ends) = self.volume_stats()?;
        let kind = |kind: &str, of: &OpStats| KindFigures {
            kind: kind.to_owned(),
            ios: of.ops,
            errors: of.errors,
            bytes: of.bytes,
            latency_us_log2: of.latency_us_log2.to_vec(),
        };
        Some(Figures {
            volume: self.spec.volume.clone(),
            socket: self.spec.socket.clone(),
            connections: front_ends.connections(),
            resubmitted: front_ends.resubmitted(),
            in_flight: io.inflight,
            throttled: io.throttled,
            kinds: vec![
                kind("read", &io.read),
                kind("write", &io.write),
                kind("flush", &io.flush),
                kind("discard", &io.discard),
                kind("write_zeroes", &io.write_zeroes),
            ],
        })
    }
}
