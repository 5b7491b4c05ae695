//! What the daemon does when it is asked: attach, detach, tell; and its start and end with all volumes.
//!
//! Called by the control socket and by `serve.rs`. Invariants: an attach or detach is answered after the state file has it, so that
//! what a client was told survives a kill; no lock is held while anything is waited for.

use super::attachment::{Attachment, Begin, Ended};
use super::book::Book;
use super::known::Known;
use super::protocol::{Attach, Detach, Figures, Listed, Refusal, Reply, Request};
use super::state::Kept;
use super::table::Table;
use crate::error::{CliError, ErrorKind};
use crate::open::look_up;
use ogee_client::Cluster;
use ogee_common::id::VolumeId;
use std::sync::{Arc, MutexGuard};
use tokio::sync::{Semaphore, oneshot};

/// What all volumes of the daemon have in common.
pub(super) struct Site {
    /// The one connection to the cluster.
    pub(super) cluster: Cluster,
    /// Permission bits of sockets that are attached without their own.
    pub(super) socket_mode: Option<u32>,
    /// Group of sockets that are attached without their own.
    pub(super) socket_group: Option<u32>,
    /// One for each attach that may be under way.
    pub(super) attaches: Semaphore,
    /// What is attached, and where that is kept.
    pub(super) book: Book,
}

/// Where the outcome of a first attempt is told.
pub(super) type FirstAttempt = oneshot::Receiver<Result<(), Refusal>>;

/// The daemon.
pub(super) struct Daemon {
    site: Arc<Site>,
}

impl Daemon {
    /// One without volumes.
    pub(super) fn new(site: Site) -> Self {
        Self { site: Arc::new(site) }
    }

    /// Carries out a request.
    pub(super) async fn answer(&self, request: Request) -> Reply {
        let done = match request {
            Request::Attach(attach) => self.attach(attach).await,
            Request::Detach(detach) => self.detach(detach).await,
            Request::List => return Reply::List(self.list()),
            Request::Stats => return Reply::Stats(self.figures()),
        };
        done.map_or_else(Reply::Error, |()| Reply::Done)
    }

    /// Begins to attach what the state file had; to be called before anybody can ask. What fails is tried again until it is
    /// detached. Gives where each first attempt is told.
    pub(super) fn resume(&self, volumes: Vec<Kept>) -> Vec<FirstAttempt> {
        let mut added = vec![];
        for kept in volumes {
            match self.add(kept) {
                Ok(attachment) => {
                    self.table().keep(&attachment, true);
                    added.push(attachment);
                }
                // Its numbers and conflicts were checked when the file was read.
                Err(refusal) => tracing::error!(target: "controlpath", reason = refusal.message, "volume of the state file left out"),
            }
        }
        // Not before all are in the table: the first that is attached writes the state file.
        added.iter().map(|attachment| self.begin(attachment, Begin::Kept)).collect()
    }

    async fn attach(&self, Attach { spec, steal }: Attach) -> Result<(), Refusal> {
        let name = spec.check()?;
        // It may be attached here under another name: whoever attached it once more would take it from that guest.
        let found = look_up(&self.site.cluster, &name).await.map_err(Refusal::from)?;
        let known = Known::unattached(VolumeId(found.id));
        let attachment = self.add(Kept { spec, attach: Some(known) })?;
        let started = self.begin(&attachment, Begin::Asked { steal }).await;
        let ending = |_| Refusal::new(ErrorKind::Unavailable, "the daemon is ending");
        if let Err(refusal) = started.map_err(ending).and_then(|outcome| outcome) {
            // Not before what was opened on the way is given back.
            attachment.wait_ended().await;
            self.table().remove(&attachment);
            return Err(refusal);
        }
        self.table().keep(&attachment, true);
        let Err(error) = self.save().await else { return Ok(()) };
        // A volume that the next daemon would not serve is not served by this one either.
        self.table().keep(&attachment, false);
        attachment.end();
        attachment.wait_ended().await;
        self.table().remove(&attachment);
        if let Err(error) = self.save().await {
            tracing::warn!(target: "controlpath", error = error.message, "state not written");
        }
        Err(error)
    }

    /// Adds a volume, which has no keeper yet.
    fn add(&self, mut kept: Kept) -> Result<Arc<Attachment>, Refusal> {
        let name = kept.spec.check()?;
        kept.spec.volume = name.to_string();
        let attachment = Arc::new(Attachment::new(kept, name));
        self.table().add(&attachment)?;
        Ok(attachment)
    }

    /// Starts the keeper of a volume that was added; gives where its first attempt is told.
    fn begin(&self, attachment: &Arc<Attachment>, begin: Begin) -> FirstAttempt {
        let (first, told) = oneshot::channel();
        // Joined by wait_ended, which is told of a panic too.
        drop(tokio::spawn(Arc::clone(attachment).keep(Arc::clone(&self.site), begin, first)));
        told
    }

    async fn detach(&self, Detach { of, force }: Detach) -> Result<(), Refusal> {
        let attachment = {
            let mut table = self.table();
            let attachment = table.find(&of)?;
            if attachment.is_connected() && !force {
                let text = "a virtual machine is connected; stop it or unplug its disk first, or give --force";
                return Err(Refusal::new(ErrorKind::Conflict, text));
            }
            table.keep(&attachment, false);
            attachment
        };
        if let Err(error) = self.save().await {
            self.table().keep(&attachment, true);
            return Err(error);
        }
        attachment.end();
        let ended = attachment.wait_ended().await;
        self.table().remove(&attachment);
        match ended {
            Ended::GivenBack | Ended::NotAttached => Ok(()),
            Ended::Failed(refusal) => Err(refusal),
        }
    }

    /// How every volume is, by socket.
    pub(super) fn list(&self) -> Vec<Listed> {
        self.attachments().iter().map(|attachment| attachment.listed()).collect()
    }

    /// Every volume, by socket.
    pub(super) fn attachments(&self) -> Vec<Arc<Attachment>> {
        self.table().all()
    }

    fn figures(&self) -> Vec<Figures> {
        self.attachments().iter().filter_map(|attachment| attachment.figures()).collect()
    }

    /// Gives every volume back, all at once; the state file keeps them. True if the MDS knows that none is attached by us any more.
    ///
    /// # Errors
    /// The first volume that may still be attached; each is logged.
    pub(super) async fn end(&self) -> Result<bool, CliError> {
        let all = self.table().close();
        all.iter().for_each(|attachment| attachment.end());
        let (mut is_given_back, mut result) = (true, Ok(()));
        for attachment in all {
            let ended = attachment.wait_ended().await;
            is_given_back &= ended == Ended::GivenBack;
            if let Ended::Failed(refusal) = ended {
                let volume = &attachment.spec().volume;
                tracing::warn!(target: "controlpath", volume, error = refusal.message, "volume may still be attached");
                let text = refusal.message.clone();
                result = result.and_then(|()| Err(CliError::new(refusal.kind, format!("end {volume}: {text}"))));
            }
        }
        result.map(|()| is_given_back)
    }

    /// Writes the table to the state file, if there is one.
    async fn save(&self) -> Result<(), Refusal> {
        self.site.book.save().await
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.site.book.table()
    }
}
