//! An owner's hold of a task: it says every second that it is at it, and knows when it is not the owner any more.
//!
//! ```text
//!   Held ── the MDS says that it is to be cancelled ──> Cancelling
//!     └───────────────┬───────────────────────────────────┘
//!                     v  the MDS says that another has it, or said nothing for SERVICE_TASK_GIVE_UP
//!                    Lost
//! ```
//! Invariants: [`Lease::check`] asks the MDS, which answers under its leader's lease, so a task that was taken by another before the call is
//! found lost; the time without an answer counts from when the last good one was asked for, so an owner stops by itself before
//! the MDS may give its task away (the clocks of both only have to run about equally fast, and a wrong one costs work, never safety).

use super::failure::Failure;
use super::task::Note;
use ogee_client::MdsClient;
use ogee_common::clock::{self, Instant};
use ogee_common::limits::{SERVICE_TASK_GIVE_UP, SERVICE_TASK_RENEW};
use ogee_proto::MdsErrorKind;
use ogee_proto::mds as m;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use tokio::sync::watch;

/// What an owner knows of its hold. Only gets worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// The task is to be done.
    Held,
    /// What was begun is to be undone.
    Cancelling,
    /// It is another's, or may be.
    Lost,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Lease {
    mds: MdsClient,
    holder: m::TaskHolder,
    note: Mutex<Note>,
    done: AtomicU64,
    total: AtomicU64,
    heard: Mutex<Instant>,
    standing: watch::Sender<Standing>,
}

impl Lease {
    /// The hold of a task that was asked for at `asked` and taken.
    pub(super) fn new(mds: MdsClient, task: &m::ServiceTask, note: Note, asked: Instant) -> Self {
        let first = if task.state == "cancelling" { Standing::Cancelling } else { Standing::Held };
        Self {
            mds,
            holder: m::TaskHolder { id: task.id, owner: task.owner, fence: task.fence },
            note: Mutex::new(note),
            done: AtomicU64::new(0),
            total: AtomicU64::new(task.total),
            heard: Mutex::new(asked),
            standing: watch::Sender::new(first),
        }
    }

    /// The task.
    pub(super) fn task(&self) -> u64 {
        self.holder.id
    }

    /// How often it was taken.
    pub(super) fn fence(&self) -> u64 {
        self.holder.fence
    }

    /// What is noted.
    pub(super) fn noted(&self) -> Note {
        self.note.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Work begins, anew if it failed before.
    pub(super) fn begin(&self, total: u64) {
        self.done.store(0, Relaxed);
        self.total.store(total, Relaxed);
    }

    /// So much more is done.
    pub(super) fn advance(&self, more: u64) {
        self.done.fetch_add(more, Relaxed);
    }

    /// Waits until the standing is this or worse.
    pub(super) async fn until(&self, standing: Standing) {
        let mut watch = self.standing.subscribe();
        // The sender lives as long as this.
        let _ = watch.wait_for(|now| *now >= standing).await;
    }

    fn worsen(&self, to: Standing) {
        self.standing.send_if_modified(|now| {
            let worse = to > *now;
            *now = to.max(*now);
            worse
        });
    }

    fn heard_at(&self) -> Instant {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the MDS whether the task is still this owner's.
    ///
    /// # Errors
    /// [`Failure::Lost`].
    pub(super) async fn check(&self) -> Result<(), Failure> {
        if *self.standing.borrow() == Standing::Lost {
            return Err(Failure::Lost);
        }
        let (asked, until) = (clock::now(), self.heard_at() + SERVICE_TASK_GIVE_UP);
        let request = m::RenewServiceTaskRequest { holder: Some(self.holder), done: self.done.load(Relaxed), total: self.total.load(Relaxed) };
        let answer = tokio::time::timeout_at(until, self.mds.renew_service_task(request)).await;
        match answer {
            Ok(Ok(task)) => {
                *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = asked;
                if task.state == "cancelling" {
                    self.worsen(Standing::Cancelling);
                }
                Ok(())
            }
            // Anything else leaves open whose it is.
            Ok(Err(e)) if !is_gone(e.kind) && clock::now() < until => Err(Failure::Passing(format!("renew task {}: {}", self.holder.id, e.message))),
            _ => {
                self.worsen(Standing::Lost);
                Err(Failure::Lost)
            }
        }
    }

    /// Renews until the task is lost.
    pub(super) async fn keep(&self) {
        loop {
            tokio::time::sleep(SERVICE_TASK_RENEW).await;
            if let Err(Failure::Lost) = self.check().await {
                return;
            }
        }
    }

    /// Writes down for the next owner what is begun, before it is.
    ///
    /// # Errors
    /// [`Failure::Lost`], or the MDS does not answer; then it may be written down.
    pub(super) async fn write_down(&self, change: impl FnOnce(&mut Note)) -> Result<(), Failure> {
        let mut note = self.noted();
        change(&mut note);
        let request = m::NoteServiceTaskRequest {
            holder: Some(self.holder),
            note: note.text(),
            done: self.done.load(Relaxed),
            total: self.total.load(Relaxed),
        };
        match self.mds.note_service_task(request).await {
            Ok(_) => {
                *self.note.lock().unwrap_or_else(PoisonError::into_inner) = note;
                Ok(())
            }
            Err(e) if is_gone(e.kind) => {
                self.worsen(Standing::Lost);
                Err(Failure::Lost)
            }
            Err(e) => Err(Failure::call(&format!("note what task {} began", self.holder.id), &e)),
        }
    }

    /// Parts with the task. `end` is the MDS's word.
    ///
    /// # Errors
    /// [`Failure::Lost`], or the MDS does not answer: the next owner finds everything done.
    pub(super) async fn end(&self, end: &str, result: String) -> Result<(), Failure> {
        let request = m::EndServiceTaskRequest { holder: Some(self.holder), end: end.to_owned(), result };
        match self.mds.end_service_task(request).await {
            Ok(_) => Ok(()),
            Err(e) if is_gone(e.kind) => Err(Failure::Lost),
            Err(e) => Err(Failure::call(&format!("end task {}", self.holder.id), &e)),
        }
    }
}

/// Whether a refusal says that the task is not the owner's.
fn is_gone(kind: MdsErrorKind) -> bool {
    matches!(kind, MdsErrorKind::Fenced | MdsErrorKind::NotFound)
}
