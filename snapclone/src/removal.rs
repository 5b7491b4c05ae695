//! Removing a backup that volumes may stand on, beside lazy restores of it.
//!
//! ```text
//!   begun (a record) ──> asked: nothing stands on it ──> decided: "go" ──> marked as removed ──> over (no record)
//!     │                    └── something does: taken back (no record)
//!     └── the remover died: a collection decides "given up" ──> no record
//! ```
//! Who removes and who restores lazily each write first and look afterwards: the remover writes its record and then asks the cluster what stands on the
//! backup; the restorer makes its volume and then looks for records, marks and the index ([`Repository::refuse_removed`]). So one of them sees
//! the other. Invariants:
//! - A record goes only after the backup was marked as removed, or when its remover can never mark it any more. Each removal has a record of its own, so that
//!   one that is taken back hides no other.
//! - Whether a removal goes on or was given up is decided by one create-if-absent of one key: a remover that slept for a week marks nothing.
//! - The record goes after the mark was made, the mark after the index was deleted: who looks for record, mark and index in this order misses none.
//!
//! A repository does not know the clusters that use it: whoever removes asks those that it knows ([`standing_on`]).

use crate::error::{RepoError, RepoErrorKind};
use crate::index::{BackupId, IndexKey};
use crate::layout::{INDEXES, REMOVALS, RemovalKey};
use crate::repository::Repository;
use ogee_client::{MdsCallError, MdsClient};
use ogee_common::clock;
use ogee_common::limits::{BACKUP_RECORD_BYTES_MAX, REMOVAL_ASK_EVERY, REMOVAL_WAIT};
use ogee_common::rng;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds::ListBackupParentsRequest;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::time::Duration;

/// The decision of a remover.
const GO: &[u8] = b"go";
/// The decision of a collection.
const GIVEN_UP: &[u8] = b"given up";

/// The record of a removal, as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    /// When it began, milliseconds since 1970.
    began_unix_ms: u64,
}

/// A removal that has begun. Dropped, it is as if its remover had died: nobody restores the backup lazily until a collection gives it up.
#[derive(Debug)]
#[must_use = "carry it out or take it back"]
pub struct Removal {
    repo: Repository,
    index: IndexKey,
    key: RemovalKey,
}

impl Removal {
    /// Marks the backup as removed: it shows no more. Its space comes back with the next collection.
    ///
    /// # Errors
    /// [`RepoErrorKind::Abandoned`] if a collection has given the removal up; the mark cannot be written: then the next collection may still do it.
    pub async fn carry_out(self) -> Result<(), RepoError> {
        let backend = &self.repo.backend;
        let decision = self.key.decision();
        // The answer to a first attempt may have been lost: only a remover decides so.
        if !backend.create(&decision, GO.to_vec()).await? && decided(&self.repo, &self.key).await?.as_deref() != Some(GO) {
            backend.delete(&self.key.record()).await?;
            let why = "the removal took so long that a collection gave it up; remove the backup again";
            return Err(RepoError::new(RepoErrorKind::Abandoned, "remove", BackupId(self.index.run).to_string(), why));
        }
        finish(&self.repo, &self.index, &self.key).await
    }

    /// The backup stays.
    ///
    /// # Errors
    /// The storage fails: then nobody restores the backup lazily until a collection gives the removal up.
    pub async fn take_back(self) -> Result<(), RepoError> {
        self.repo.backend.delete(&self.key.record()).await
    }
}

/// Marks, then forgets: the record first, because a decision without a record is harmless.
async fn finish(repo: &Repository, index: &IndexKey, key: &RemovalKey) -> Result<(), RepoError> {
    // A mark that is there already is as good.
    repo.backend.create(&index.removed_key(), b"removed".to_vec()).await?;
    repo.backend.settle().await?;
    repo.backend.delete(&key.record()).await?;
    repo.backend.delete(&key.decision()).await
}

impl Repository {
    /// Begins the removal of a backup, whole or damaged: from now on nobody restores it lazily. Ask then what stands on it.
    ///
    /// # Errors
    /// [`RepoErrorKind::NotFound`], or the record cannot be written.
    pub async fn begin_removal(&self, id: BackupId) -> Result<Removal, RepoError> {
        let keys = self.index_keys().await?;
        let missing = || RepoError::new(RepoErrorKind::NotFound, "remove", id.to_string(), "there is no such backup");
        let index = keys.into_iter().find(|key| key.run == id.0).ok_or_else(missing)?;
        // The note that a run was given up stays for ever: without it that run could publish.
        if let Ok(None) = self.index(&index).await {
            return Err(missing());
        }
        let key = RemovalKey { run: id.0, number: rng::nonzero_u64() };
        let record = serde_json::to_vec(&Record { began_unix_ms: clock::unix_ms() }).expect("a record is a number");
        self.backend.create(&key.record(), record).await?;
        self.backend.settle().await?;
        Ok(Removal { repo: self.clone(), index, key })
    }

    /// Whether there is no backup of this identity any more.
    ///
    /// # Errors
    /// The repository cannot be listed.
    pub(crate) async fn is_removed(&self, id: BackupId) -> Result<bool, RepoError> {
        Ok(!self.index_keys().await?.iter().any(|key| key.run == id.0))
    }

    /// Removes a backup of which the caller knows that nothing stands on it.
    ///
    /// # Errors
    /// As [`Repository::begin_removal`] and [`Removal::carry_out`].
    pub async fn remove(&self, id: BackupId) -> Result<(), RepoError> {
        self.begin_removal(id).await?.carry_out().await
    }

    /// Refuses a backup that is removed or about to be. Asked after a volume was made that stands on it; then every later removal finds the volume.
    /// Waits a little for removals that are under way.
    ///
    /// # Errors
    /// [`RepoErrorKind::NotFound`] when it is removed, [`RepoErrorKind::Abandoned`] while it is being removed.
    pub async fn refuse_removed(&self, id: BackupId) -> Result<(), RepoError> {
        let refused = |kind, why| RepoError::new(kind, "stand on", id.to_string(), why);
        let until = clock::now() + REMOVAL_WAIT;
        loop {
            let begun = self.backend.list(&RemovalKey::of(id.0), RemovalKey::parse_record).await?;
            if self.removed_keys().await?.iter().any(|key| key.run == id.0) {
                return Err(refused(RepoErrorKind::NotFound, "the backup was removed meanwhile"));
            }
            let run = id.0;
            let indexes = self.backend.list(INDEXES, move |key| IndexKey::parse(INDEXES, key).filter(|key| key.run == run)).await?;
            if indexes.is_empty() {
                return Err(refused(RepoErrorKind::NotFound, "the backup was removed and collected meanwhile"));
            }
            if begun.is_empty() {
                return Ok(());
            }
            if clock::now() >= until {
                let why = "the backup is being removed; if whoever did that was interrupted, ogee backup gc gives it up after an hour (--abandon-after)";
                return Err(refused(RepoErrorKind::Abandoned, why));
            }
            tokio::time::sleep(REMOVAL_ASK_EVERY).await;
        }
    }
}

/// The first volume, or layer without one, of a cluster that stands on a backup, in words.
///
/// # Errors
/// The MDS does not answer.
pub async fn standing_on(mds: &MdsClient, backup: BackupId) -> Result<Option<String>, MdsCallError> {
    let mut after = 0;
    loop {
        let list = match mds.list_backup_parents(ListBackupParentsRequest { after }).await {
            // An MDS of an older build does not know the call, and has no such layers.
            Err(e) if e.kind == MdsErrorKind::InvalidArgument => return Ok(None),
            list => list?,
        };
        if let Some(parent) = list.parents.iter().find(|parent| parent.backup == backup.0) {
            let path = &parent.volume;
            return Ok(Some(if path.is_empty() { format!("layer {}", parent.layer) } else { format!("volume {path}") }));
        }
        match list.parents.last() {
            Some(last) if list.more => after = last.layer,
            _ => return Ok(None),
        }
    }
}

/// Brings removals to an end that began longer than `abandon_after` ago: those that were decided are carried out, others given up. How many were
/// given up.
pub(crate) async fn give_up(repo: &Repository, abandon_after: Duration) -> Result<u64, RepoError> {
    let backend = &repo.backend;
    let keys = backend.list(REMOVALS, RemovalKey::parse).await?;
    if keys.is_empty() {
        return Ok(0);
    }
    let indexes = indexes(repo).await?;
    let limit = u64::try_from(abandon_after.as_millis()).unwrap_or(u64::MAX);
    let mut given_up = 0;
    for (key, is_record) in keys {
        let Some(index) = indexes.get(&key.run).filter(|_| is_record) else { continue };
        if !began_before(repo, &key, limit).await? {
            continue;
        }
        if backend.create(&key.decision(), GIVEN_UP.to_vec()).await? {
            backend.settle().await?;
            given_up += 1;
            backend.delete(&key.record()).await?;
            continue;
        }
        match decided(repo, &key).await?.as_deref() {
            Some(GO) => finish(repo, index, &key).await?,
            Some(GIVEN_UP) => backend.delete(&key.record()).await?,
            // Its remover came to the end just now, or it is no decision of ours.
            _ => {}
        }
    }
    Ok(given_up)
}

/// Forgets what is left of removals of backups that are gone.
pub(crate) async fn forget(repo: &Repository) -> Result<(), RepoError> {
    let keys = repo.backend.list(REMOVALS, RemovalKey::parse).await?;
    if keys.is_empty() {
        return Ok(());
    }
    let indexes = indexes(repo).await?;
    for (key, is_record) in keys.into_iter().filter(|(key, _)| !indexes.contains_key(&key.run)) {
        repo.backend.delete(&if is_record { key.record() } else { key.decision() }).await?;
    }
    Ok(())
}

/// The indexes that are there, by their runs. One that is not there after a removal of it was begun will never be there again.
async fn indexes(repo: &Repository) -> Result<HashMap<u64, IndexKey>, RepoError> {
    let indexes = repo.backend.list(INDEXES, |key| IndexKey::parse(INDEXES, key)).await?;
    Ok(indexes.into_iter().map(|key| (key.run, key)).collect())
}

/// What was decided about a removal, if anything is.
async fn decided(repo: &Repository, key: &RemovalKey) -> Result<Option<Vec<u8>>, RepoError> {
    match repo.backend.get(&key.decision(), BACKUP_RECORD_BYTES_MAX).await {
        Ok(decision) => Ok(Some(decision)),
        Err(e) if e.kind == RepoErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Whether a removal began longer ago than `limit` ms; no if it is over.
async fn began_before(repo: &Repository, key: &RemovalKey, limit: u64) -> Result<bool, RepoError> {
    let name = key.record();
    match repo.backend.get(&name, BACKUP_RECORD_BYTES_MAX).await {
        Err(e) if e.kind == RepoErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
        Ok(json) => {
            let why = "it is no record of a removal; if no backup is being removed, delete it";
            let record: Record = serde_json::from_slice(&json).map_err(|e| RepoError::corrupt(&name, why).because(e))?;
            Ok(record.began_unix_ms.saturating_add(limit) <= clock::unix_ms())
        }
    }
}
