//! Rows of service tasks. See [`crate::machine::service_tasks`]; invariants and format as in [`super`].

use ogee_common::id::ServiceTaskId;
use serde::{Deserialize, Serialize};

/// How far a service task is.
///
/// ```text
///                  Take
///   Queued ────────────────────> Running ── End ──> Done, Failed
///     │ ^                          │ │
///     │ └──── End(Released) ───────┘ │ Cancel
///     │                              v
///     ├─ Cancel, taken before ──> Cancelling ── End ──> Cancelled; Done or Failed, if it was too late
///     │                              │ ^
///     │                              └─┘ Take by another, End(Released)
///     └─ Cancel, never taken ──> Cancelled
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ServiceTaskState {
    /// Nobody is at it.
    Queued,
    /// An owner is at it, or was.
    Running,
    /// An owner undoes what was begun, or is to.
    Cancelling,
    /// It came to its end.
    Done,
    /// It cannot come to its end.
    Failed,
    /// It was given up because somebody wished so.
    Cancelled,
}

impl ServiceTaskState {
    /// The word in listings.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Cancelling => "cancelling",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether there is something left to do.
    pub(crate) const fn is_open(self) -> bool {
        matches!(self, Self::Queued | Self::Running | Self::Cancelling)
    }
}

/// A service task. Its texts are opaque here: they are the daemons'.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ServiceTaskRow {
    /// What is to be done: a word that daemons know.
    pub(crate) kind: String,
    /// The name under which daemons know the backup repository; one that does not know it leaves the task alone.
    pub(crate) repository: String,
    /// What exactly.
    pub(crate) arguments: String,
    /// How far it is.
    pub(crate) state: ServiceTaskState,
    /// The instance that took it last; 0: none, or it gave it back.
    pub(crate) owner: u64,
    /// Raised whenever it is taken, never lowered; 0: never taken.
    pub(crate) fence: u64,
    /// What an owner must know of what was begun.
    pub(crate) note: String,
    /// What came of it, or why nothing came of it.
    pub(crate) result: String,
    /// How much is done, in a unit of the kind, when it was noted last.
    pub(crate) done: u64,
    /// Of how much; 0: not known.
    pub(crate) total: u64,
    /// For people.
    pub(crate) created_unix_ms: u64,
    /// When it was taken first, for people; 0: not yet.
    pub(crate) started_unix_ms: u64,
    /// For people; 0: not yet.
    pub(crate) ended_unix_ms: u64,
    /// By what its creator knows it.
    pub(crate) key: Option<[u8; 16]>,
}

/// The service task of the key has not ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct OpenServiceTaskRow;

/// The service task at a position of the order in which they ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EndedServiceTaskRow(pub(crate) ServiceTaskId);

/// The service task of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ServiceTaskKeyRow(pub(crate) ServiceTaskId);

/// Service tasks that are made again and again. See [`crate::machine::schedules`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ScheduleRow {
    /// Of its tasks.
    pub(crate) kind: String,
    /// Of its tasks.
    pub(crate) repository: String,
    /// Of its tasks.
    pub(crate) arguments: String,
    /// Milliseconds between due times, which are the multiples of it since 1970.
    pub(crate) every_ms: u64,
    /// The last due time that is over: its task was made, or it was before the schedule.
    pub(crate) last_due_unix_ms: u64,
    /// The last task that was made; 0: none yet.
    pub(crate) last_task: ServiceTaskId,
    /// For people.
    pub(crate) created_unix_ms: u64,
}
