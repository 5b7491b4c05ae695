//! The life of one virtqueue's loop, shared between its thread and the thread of the vhost-user protocol.
//!
//! ```text
//!            enter                    drain (GET_VRING_BASE, stop)
//!   Idle ────────────► Running ───────────────────────────────► Draining
//!    ▲ ▲                  │ │                                    │ │ │
//!    │ └──────leave───────┘ │ discard (front end gone)           │ │ │
//!    │                      ├──────────────► Discarding ◄────────┘ │ │
//!    │                      │ give_up              │ │             │ │
//!    │                      └─► Abandoning ◄───────┘ │  ◄──────────┘ │
//!    └──────leave──────────────────┴─────────────────┴───────leave───┘
//! ```
//!
//! | phase | takes requests | runs those taken | writes guest memory |
//! | --- | --- | --- | --- |
//! | Idle | no | none there | no |
//! | Running | yes | yes | yes |
//! | Draining | no | yes, to the end | yes |
//! | Discarding | no | waits for those started | no |
//! | Abandoning | no | no, they are dropped | no |
//!
//! Invariants: after [`QueuePhase::wait_idle`] returned true the loop touches guest memory no more until the next
//! `enter`; once closed (by a stop or because the front end left) `enter` is refused for good. Transitions that make no
//! sense in a phase leave it as it is.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// See the table of the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Idle,
    Running,
    Draining,
    Discarding,
    Abandoning,
}

/// What moves a queue from phase to phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The thread starts the loop.
    Enter,
    /// The ring stops; requests taken are completed.
    Drain,
    /// The front end is gone; requests started are waited for, but not answered.
    Discard,
    /// Time is over; requests are dropped, their outcome is unknown.
    GiveUp,
    /// The thread left the loop.
    Leave,
}

impl Phase {
    /// The one transition function.
    fn after(self, event: Event) -> Self {
        match (self, event) {
            (_, Event::Leave) => Self::Idle,
            (Self::Idle, Event::Enter) => Self::Running,
            (Self::Running, Event::Drain) => Self::Draining,
            (Self::Running | Self::Draining, Event::Discard) => Self::Discarding,
            (Self::Running | Self::Draining | Self::Discarding, Event::GiveUp) => Self::Abandoning,
            (phase, _) => phase,
        }
    }
}

#[derive(Debug)]
struct State {
    phase: Phase,
    closed: bool,
    gave_up: bool,
}

/// The phase of one queue and the means to wait for its changes.
#[derive(Debug)]
pub(crate) struct QueuePhase {
    state: Mutex<State>,
    idle: Condvar,
    changed: Notify,
}

/// Ends the loop when dropped, also if the loop panicked, so that nobody waits for it forever.
#[derive(Debug)]
pub(crate) struct Running<'a>(&'a QueuePhase);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.phase = state.phase.after(Event::Leave);
        drop(state);
        self.0.idle.notify_all();
    }
}

impl QueuePhase {
    pub(crate) fn new() -> Self {
        let state = State { phase: Phase::Idle, closed: false, gave_up: false };
        Self { state: Mutex::new(state), idle: Condvar::new(), changed: Notify::new() }
    }

    /// The phase as of now.
    pub(crate) fn get(&self) -> Phase {
        self.lock().phase
    }

    /// Starts the loop unless the queue is closed or runs already.
    pub(crate) fn enter(&self) -> Option<Running<'_>> {
        let mut state = self.lock();
        if state.closed || state.phase != Phase::Idle {
            return None;
        }
        state.phase = state.phase.after(Event::Enter);
        Some(Running(self))
    }

    /// The ring stops for now.
    pub(crate) fn drain(&self) {
        self.apply(Event::Drain, false);
    }

    /// The ring stops for good; requests taken are completed.
    pub(crate) fn close_and_drain(&self) {
        self.apply(Event::Drain, true);
    }

    /// The front end is gone.
    pub(crate) fn close_and_discard(&self) {
        self.apply(Event::Discard, true);
    }

    /// Requests in flight are dropped.
    pub(crate) fn close_and_give_up(&self) {
        self.apply(Event::GiveUp, true);
    }

    /// Waits until the loop is not running; false after `timeout`.
    pub(crate) fn wait_idle(&self, timeout: Duration) -> bool {
        let state = self.lock();
        let waited = self.idle.wait_timeout_while(state, timeout, |state| state.phase != Phase::Idle);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.phase == Phase::Idle
    }

    /// Waits until the loop is not running; false if it gave requests up instead of completing them.
    pub(crate) fn wait_drained(&self) -> bool {
        let waited = self.idle.wait_while(self.lock(), |state| state.phase != Phase::Idle);
        !waited.unwrap_or_else(PoisonError::into_inner).gave_up
    }

    /// Completes when the phase was changed from outside; for the loop alone.
    pub(crate) fn changed(&self) -> tokio::sync::futures::Notified<'_> {
        self.changed.notified()
    }

    fn apply(&self, event: Event, close: bool) {
        let mut state = self.lock();
        let next = state.phase.after(event);
        state.gave_up |= next == Phase::Abandoning || next == Phase::Discarding;
        state.phase = next;
        state.closed |= close;
        drop(state);
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_transition_is_as_drawn() {
        use Event::{Discard, Drain, Enter, GiveUp};
        use Phase::{Abandoning, Discarding, Draining, Idle, Running};
        let table = [
            (Idle, [Running, Idle, Idle, Idle]),
            (Running, [Running, Draining, Discarding, Abandoning]),
            (Draining, [Draining, Draining, Discarding, Abandoning]),
            (Discarding, [Discarding, Discarding, Discarding, Abandoning]),
            (Abandoning, [Abandoning, Abandoning, Abandoning, Abandoning]),
        ];
        for (from, to) in table {
            for (event, expected) in [Enter, Drain, Discard, GiveUp].into_iter().zip(to) {
                assert_eq!(from.after(event), expected, "{from:?} after {event:?}");
            }
            assert_eq!(from.after(Event::Leave), Idle);
        }
    }

    #[test]
    fn a_drained_queue_runs_again_and_a_closed_one_never() {
        let queue = QueuePhase::new();
        let running = queue.enter().expect("idle queue starts");
        assert!(queue.enter().is_none(), "no second loop");
        queue.drain();
        assert_eq!(queue.get(), Phase::Draining);
        assert!(!queue.wait_idle(Duration::ZERO));
        drop(running);
        assert!(queue.wait_drained());
        drop(queue.enter().expect("drained queue starts again"));
        queue.close_and_drain();
        assert!(queue.enter().is_none());
        assert!(queue.wait_idle(Duration::ZERO));
    }

    #[test]
    fn giving_up_is_told_to_who_waits_for_the_drain() {
        let queue = QueuePhase::new();
        let running = queue.enter().expect("idle queue starts");
        queue.drain();
        queue.close_and_give_up();
        drop(running);
        assert!(!queue.wait_drained());
    }
}
