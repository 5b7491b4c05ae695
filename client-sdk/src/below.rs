//! What a granted attach stands on, if that is a backup: checked, opened, and started with the volume.
//!
//! Used by `volume.rs`. Invariants: a grant whose backup is not that of the last of its ancestry is refused; an attach of a volume whose backup this
//! process cannot read is not asked for, as far as that is known before, or given back before anything was done with it. Absent: the IO, which is `thin.rs`.

use crate::attachment::Attachment;
use crate::backup::{BackupParent, UnknownRepository, can_read};
use crate::cluster::Cluster;
use crate::lazy::Lazy;
use crate::session::Session;
use crate::thin;
use crate::volume::OpenError;
use ogee_proto::mds::{AttachGrant, DetachVolumeRequest, StatVolumeRequest};
use std::sync::{Arc, PoisonError};
use tokio::sync::mpsc;

/// A backup below an attach, and where its offers come out.
pub(crate) struct Below {
    pub(crate) lazy: Arc<Lazy>,
    offers: mpsc::Receiver<u64>,
}

/// Why there is no [`Below`].
#[derive(Debug)]
pub(crate) enum BadBelow {
    /// A field of the grant makes no sense.
    Field(&'static str),
    /// This process has no access to the repository.
    NoAccess(UnknownRepository),
}

/// Refuses to attach a volume for writing whose backup this process cannot read, before its present writer is fenced. The grant is checked again: another
/// volume may have the name by then.
///
/// # Errors
/// [`OpenError::NoRepository`]; what the MDS refused.
pub(crate) async fn look_first(cluster: &Cluster, name: &str, path: &str) -> Result<(), OpenError> {
    let opener = cluster.0.config.backups.as_ref();
    if opener.is_none() {
        // The MDS itself grants such a volume only to who says that it reads backups.
        return Ok(());
    }
    let found = cluster.mds().stat_volume(StatVolumeRequest { path: path.to_owned() }).await;
    let found = found.map_err(|source| OpenError::Attach { volume: name.to_owned(), source })?;
    let readable = found.backup.as_ref().map_or(Ok(()), |message| can_read(opener, message));
    readable.map_err(|source| OpenError::NoRepository { volume: name.to_owned(), source })
}

/// What a granted volume stands on.
///
/// # Errors
/// [`BadBelow`].
pub(crate) fn of(cluster: &Cluster, grant: &AttachGrant) -> Result<Option<Below>, BadBelow> {
    let Some(message) = &grant.backup else { return Ok(None) };
    let parent = BackupParent::of(message).map_err(BadBelow::Field)?;
    let bottom = grant.ancestry.last().map_or(grant.layer, |ancestor| ancestor.layer);
    if parent.layer.0 != bottom {
        return Err(BadBelow::Field("backup layer"));
    }
    // Who has no repositories at all said so, and is granted no such volume.
    let opener = cluster.0.config.backups.as_ref().ok_or(BadBelow::Field("backup"))?;
    let source = opener.open(&parent).map_err(BadBelow::NoAccess)?;
    let (lazy, offers) = Lazy::new(parent, source, cluster.0.control().clone());
    Ok(Some(Below { lazy, offers }))
}

impl Below {
    /// Pastes from now on what is offered, with connections like those of `session`.
    pub(crate) fn start(self, at: &Arc<Attachment>, session: &Session) {
        let task = at.cluster.control().spawn(thin::run_offers(Arc::downgrade(at), session.another(), self.offers));
        at.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }
}

/// Ends an attach that nothing was done with.
pub(crate) async fn give_back(cluster: &Cluster, grant: &AttachGrant) {
    let Some(volume) = grant.volume.as_ref().filter(|_| grant.epoch != 0) else { return };
    let request = DetachVolumeRequest { volume: volume.id, epoch: grant.epoch, unclean: false };
    if let Err(error) = cluster.mds().detach_volume(request).await {
        tracing::warn!(target: "controlpath", volume = volume.id, error = &error as &dyn std::error::Error, "give an attach back");
    }
}
