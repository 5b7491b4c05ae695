//! Boot profiles: which pages a boot from a backup reads, in order, kept beside the backup for hydrators.
//!
//! A hint and nothing else: a wrong or missing one costs time, never content. Invariants: it is bounded ([`BACKUP_PROFILE_BYTES_MAX`]) and refused if
//! it makes no sense; it goes when its backup is collected. The format is in `docs/backup-format.md`.

use crate::error::{RepoError, RepoErrorKind};
use crate::index::BackupId;
use crate::layout::profile_key;
use crate::repository::Repository;
use ogee_client::PageRun;
use ogee_common::limits::{
    BACKUP_OBJECT_OVERHEAD, BACKUP_PROFILE_BYTES_MAX, BOOT_PROFILE_RECORD_BYTES, PAGE_BYTES, VOLUME_BYTES_MAX,
};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// The format of profiles.
const FORMAT: u32 = 1;

/// Pages in the order in which they are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootProfile {
    format: u32,
    /// First page and number of pages.
    runs: Vec<(u64, u32)>,
}

impl BootProfile {
    /// A profile of what was recorded.
    #[must_use]
    pub fn new(runs: &[PageRun]) -> Self {
        Self { format: FORMAT, runs: runs.iter().map(|run| (run.first, run.pages)).collect() }
    }

    /// Reads what [`BootProfile::json`] wrote.
    ///
    /// # Errors
    /// [`RepoErrorKind::Corrupt`].
    pub fn parse(name: &str, json: &[u8]) -> Result<Self, RepoError> {
        let profile: Self = serde_json::from_slice(json).map_err(|e| RepoError::corrupt(name, "it is no boot profile").because(e))?;
        let pages = VOLUME_BYTES_MAX / u64::from(PAGE_BYTES);
        let fits = |(first, count): &(u64, u32)| *count > 0 && first.checked_add(u64::from(*count)).is_some_and(|end| end <= pages);
        let is_short = json.len() <= BACKUP_PROFILE_BYTES_MAX && profile.bytes() <= BOOT_PROFILE_RECORD_BYTES;
        let is_sound = profile.format == FORMAT && is_short && profile.runs.iter().all(fits);
        if is_sound { Ok(profile) } else { Err(RepoError::corrupt(name, "it makes no sense, or is of a newer version")) }
    }

    /// The profile as text.
    #[must_use]
    pub fn json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a profile is numbers")
    }

    /// Bytes of its pages.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.runs.iter().map(|(_, pages)| u64::from(*pages) * u64::from(PAGE_BYTES)).sum()
    }

    /// Runs of pages in it.
    #[must_use]
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// The blocks of its pages, each once, in order; blocks of `block_bytes`, of which there are `blocks`.
    #[must_use]
    pub fn blocks(&self, block_bytes: u32, blocks: u64) -> Vec<u64> {
        let pages_per_block = u64::from(block_bytes / PAGE_BYTES).max(1);
        let mut seen = HashSet::new();
        let of_run = |(first, pages): &(u64, u32)| {
            let last = first + u64::from(*pages).saturating_sub(1);
            first / pages_per_block..(last / pages_per_block + 1).min(blocks)
        };
        self.runs.iter().flat_map(of_run).filter(|block| seen.insert(*block)).collect()
    }
}

impl Repository {
    /// The profile of a backup, if it has one.
    ///
    /// # Errors
    /// It cannot be read, or makes no sense.
    pub async fn profile(&self, backup: BackupId) -> Result<Option<BootProfile>, RepoError> {
        let name = profile_key(backup.0);
        match self.backend.get(&name, BACKUP_PROFILE_BYTES_MAX + BACKUP_OBJECT_OVERHEAD).await {
            Ok(object) => Ok(Some(BootProfile::parse(&name, &self.sealer.open(&name, &object, BACKUP_PROFILE_BYTES_MAX)?)?)),
            Err(e) if e.kind == RepoErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Keeps a profile beside a backup, in the place of one that it may have.
    ///
    /// # Errors
    /// [`RepoErrorKind::Limit`] for one that is too large; it cannot be written.
    pub async fn set_profile(&self, backup: BackupId, profile: &BootProfile) -> Result<(), RepoError> {
        let (name, json) = (profile_key(backup.0), profile.json());
        if json.len() > BACKUP_PROFILE_BYTES_MAX {
            return Err(RepoError::new(RepoErrorKind::Limit, "write", name, "the profile is too large; record less"));
        }
        self.backend.replace(&name, self.sealer.seal(&name, &json)).await?;
        self.backend.settle().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_comes_back_and_names_each_block_once() {
        let runs = [(70, 3), (0, 1), (63, 2), (1000, 1)].map(|(first, pages)| PageRun { first, pages });
        let profile = BootProfile::new(&runs);
        assert_eq!(BootProfile::parse("p", &profile.json()).expect("it comes back"), profile);
        assert_eq!(profile.blocks(256 << 10, 100), [1, 0, 15]);
        assert_eq!(profile.blocks(256 << 10, 2), [1, 0], "none behind the end");
        assert_eq!((profile.bytes(), profile.runs()), (7 * 4096, 4));
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [r#"{"format":2,"runs":[]}"#, r#"{"format":1,"runs":[[0,0]]}"#, r#"{"format":1,"runs":[[18446744073709551615,2]]}"#, r#"{"format":1,"runs":[[0,65537]]}"#, "[]"] {
            assert!(BootProfile::parse("p", text.as_bytes()).is_err(), "{text}");
        }
    }
}
