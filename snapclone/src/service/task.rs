//! What a task says, in the MDS's rows: the kind's word, its arguments and its note, the last two as JSON. Pure.
//!
//! Invariant: unknown fields are errors, so that a task of a newer build is not half understood. The note lets the next owner find what was begun.

use super::retention::Keep;
use crate::succession::RunName;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The words of all kinds.
pub const KINDS: [&str; 6] = ["backup", "restore", "hydrate", "remove", "verify", "gc"];

/// Back a snapshot up, or a volume as it is when the task is first taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackupTask {
    /// The volume's path.
    pub volume: String,
    /// The snapshot; none: one is taken for the backup, and deleted with its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Bytes a second sent to the repository, at most; 0: no limit.
    #[serde(default)]
    pub throttle: u64,
    /// Read everything that holds data, also what did not change since the last backup.
    #[serde(default)]
    pub full: bool,
    /// Of a schedule: which of the volume's scheduled backups stay. The others are removed when this one is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<Keep>,
}

/// Make a new volume from a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreTask {
    /// The backup: digits of its identity, or a name for the newest.
    pub backup: String,
    /// The new volume's path.
    pub volume: String,
    /// Who may delete it; empty: anyone.
    #[serde(default)]
    pub owner: String,
    /// The pool of chunkservers that holds it.
    pub pool: String,
    /// Bytes of a logical sector, 512 or 4096; 0: 512.
    #[serde(default)]
    pub sector_bytes: u32,
    /// Bytes a second read from the repository, at most; 0: no limit.
    #[serde(default)]
    pub throttle: u64,
}

/// Fill a layer that stands on a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HydrateTask {
    /// The path of the volume that it was made for, then: for people.
    pub volume: String,
    /// The layer.
    pub layer: u64,
    /// Bytes a second read from the repository, at most; 0: no limit.
    #[serde(default)]
    pub throttle: u64,
}

/// Something about one backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OneTask {
    /// The backup: digits of its identity, or a name for the newest.
    pub backup: String,
}

/// Check a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyTask {
    /// The backup: digits of its identity, or a name for the newest.
    pub backup: String,
    /// Every so many blocks one is read.
    pub sample: u64,
}

/// Collect garbage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GcTask {
    /// Runs that said nothing for so long are given up.
    pub abandon_after_seconds: u64,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// Make a backup.
    Backup(BackupTask),
    /// Make a volume.
    Restore(RestoreTask),
    /// Fill a layer.
    Hydrate(HydrateTask),
    /// Remove a backup.
    Remove(OneTask),
    /// Check a backup.
    Verify(VerifyTask),
    /// Collect garbage.
    Gc(GcTask),
}

/// A task that this build does not understand.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// Its kind.
    #[error("there is no kind of task {0:?}")]
    Kind(Box<str>),
    /// Its arguments or its note.
    #[error("its {what} make no sense; a newer snapclone may understand them")]
    Text {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

fn parse<T: DeserializeOwned>(what: &'static str, text: &str) -> Result<T, TaskError> {
    serde_json::from_str(text).map_err(|source| TaskError::Text { what, source })
}

impl Work {
    /// Reads a task's kind and arguments.
    ///
    /// # Errors
    /// [`TaskError`].
    pub fn parse(kind: &str, arguments: &str) -> Result<Self, TaskError> {
        let what = "arguments";
        match kind {
            "backup" => parse(what, arguments).map(Self::Backup),
            "restore" => parse(what, arguments).map(Self::Restore),
            "hydrate" => parse(what, arguments).map(Self::Hydrate),
            "remove" => parse(what, arguments).map(Self::Remove),
            "verify" => parse(what, arguments).map(Self::Verify),
            "gc" => parse(what, arguments).map(Self::Gc),
            _ => Err(TaskError::Kind(kind.into())),
        }
    }

    /// The word of its kind.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Backup(_) => "backup",
            Self::Restore(_) => "restore",
            Self::Hydrate(_) => "hydrate",
            Self::Remove(_) => "remove",
            Self::Verify(_) => "verify",
            Self::Gc(_) => "gc",
        }
    }

    /// Its arguments as they are kept.
    #[must_use]
    pub fn arguments(&self) -> String {
        let text = match self {
            Self::Backup(task) => serde_json::to_string(task),
            Self::Restore(task) => serde_json::to_string(task),
            Self::Hydrate(task) => serde_json::to_string(task),
            Self::Remove(task) => serde_json::to_string(task),
            Self::Verify(task) => serde_json::to_string(task),
            Self::Gc(task) => serde_json::to_string(task),
        };
        text.expect("arguments are text and numbers")
    }
}

/// What an owner leaves to the next one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Note {
    /// The backup that is meant, once it is known: its whole identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) backup: Option<String>,
    /// Runs that were opened for the backup, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) runs: Vec<RunName>,
    /// The volume that was made: its number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) volume: Option<u64>,
}

impl Note {
    pub(super) fn parse(text: &str) -> Result<Self, TaskError> {
        if text.is_empty() { Ok(Self::default()) } else { parse("notes", text) }
    }

    pub(super) fn text(&self) -> String {
        serde_json::to_string(self).expect("a note is text and numbers")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_common::limits::{SERVICE_TASK_ATTEMPTS, SERVICE_TASK_TAKES_MAX, SERVICE_TASK_TEXT_BYTES_MAX};

    #[test]
    fn work_comes_back_and_what_is_not_understood_does_not() {
        let backup = "vm1@nightly".to_owned();
        let all = [
            Work::Backup(BackupTask { volume: "f/a".into(), snapshot: None, throttle: 0, full: true, keep: Some(Keep { last: 2, ..Keep::default() }) }),
            Work::Restore(RestoreTask { backup: backup.clone(), volume: "b".into(), owner: String::new(), pool: "default".into(), sector_bytes: 4096, throttle: 5 }),
            Work::Hydrate(HydrateTask { volume: "b".into(), layer: 7, throttle: 5 }),
            Work::Remove(OneTask { backup: backup.clone() }),
            Work::Verify(VerifyTask { backup, sample: 2 }),
            Work::Gc(GcTask { abandon_after_seconds: 3600 }),
        ];
        assert_eq!(all.each_ref().map(Work::kind), KINDS);
        for work in all {
            assert_eq!(Work::parse(work.kind(), &work.arguments()).expect("work"), work);
            let more = work.arguments().replacen('{', "{\"new\":1,", 1);
            assert!(matches!(Work::parse(work.kind(), &more), Err(TaskError::Text { .. })), "{more}");
        }
        assert!(matches!(Work::parse("paint", "{}"), Err(TaskError::Kind(_))));
    }

    #[test]
    fn a_note_fits_whoever_took_the_task_how_often() {
        let name = format!("{}-{:016x}/{:016x}-{:016x}", "ab".repeat(16), 1, u64::MAX, u64::MAX);
        let run = RunName::try_from(name).expect("a name");
        // One run for each owner; one that goes on after a failure for a while opens more.
        let runs = vec![run; usize::try_from(SERVICE_TASK_TAKES_MAX).expect("few") + SERVICE_TASK_ATTEMPTS as usize];
        let note = Note { backup: Some("f".repeat(16)), runs, volume: Some(u64::MAX) };
        assert!(note.text().len() <= SERVICE_TASK_TEXT_BYTES_MAX, "{}", note.text().len());
        assert_eq!(Note::parse(&note.text()).expect("a note"), note);
        assert_eq!(Note::parse("").expect("none yet"), Note::default());
    }
}
