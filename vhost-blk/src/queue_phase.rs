//! The life of one virtqueue's loop, shared between its thread and the thread of the vhost-user protocol.
//!
//! ```text
//!            enter                    drain (GET_VRING_BASE, stop, pause)
//!   Idle ────────────► Running ───────────────────────────────► Draining
//!    ▲ ▲                  │ │                                    │ │ │
//!    │ └──────leave───────┘ │ discard (front end gone)           │ │ │
//!    │                      ├──────────────► Discarding ◄────────┘ │ │
//!    │                      │ give_up              │ │             │ │
//!    │                      └─► Abandoning ◄───────┘ │  ◄──────────┘ │
//!    └──────leave──────────────────┴─────────────────┴───────leave───┘
//!
//!               hold                                thaw
//!   Draining ────────► Holding     Holding, Draining ────► Running       Holding: drain, discard, give_up as Running
//! ```
//!
//! | phase | takes requests | runs those taken | writes guest memory |
//! | --- | --- | --- | --- |
//! | Idle | no | none there | no |
//! | Running | yes | yes | yes |
//! | Draining | no | yes, to the end | yes |
//! | Holding | no | those started; their answers are kept back | no |
//! | Discarding | no | waits for those started | no |
//! | Abandoning | no | no, they are dropped | no |
//!
//! Invariants: after [`QueuePhase::wait_idle`] returned true the loop touches guest memory no more until the next
//! `enter`; after [`QueuePhase::hold`] returned true it does so no more until [`QueuePhase::thaw`], and between
//! [`QueuePhase::pause`] and `thaw` no `enter` is granted (a hand-over to another process, `handover.rs`); once closed (by a stop or because the front end left) `enter` is refused for good. Transitions that make no
//! sense in a phase leave it as it is.
//!
//! **Dirty log.** It is handed over here, because the loop asks for its phase in each turn anyway: a turn writes guest memory with one log
//! from its start to its end, and [`QueuePhase::set_log`] returns when no turn with another one is under way. So what is written after
//! the front end has its answer is in the new log, and nothing is written into one that the front end has let go.

use crate::dirty_log::QueueLog;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// See the table of the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Idle,
    Running,
    Draining,
    Holding,
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
    /// What is in flight goes on, but its answers are kept back.
    Hold,
    /// The ring goes on as if nothing had been.
    Thaw,
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
            (Self::Running | Self::Holding, Event::Drain) => Self::Draining,
            (Self::Draining, Event::Hold) => Self::Holding,
            (Self::Draining | Self::Holding, Event::Thaw) => Self::Running,
            (Self::Running | Self::Draining | Self::Holding, Event::Discard) => Self::Discarding,
            (Self::Running | Self::Draining | Self::Holding | Self::Discarding, Event::GiveUp) => Self::Abandoning,
            (phase, _) => phase,
        }
    }
}

#[derive(Debug)]
struct State {
    phase: Phase,
    closed: bool,
    gave_up: bool,
    /// Between `pause` and `thaw`.
    paused: bool,
    /// Whether the loop has begun a turn in phase `Holding`.
    holds: bool,
    log: Option<QueueLog>,
    /// Counts the changes of `log`; 0: there never was one.
    log_number: u64,
    /// The number that the loop's turn has seen; for a loop that has just entered 0.
    log_seen: u64,
}

/// The log of a loop's turn.
#[derive(Debug, Default)]
pub(crate) struct TurnLog {
    pub(crate) log: Option<QueueLog>,
    number: u64,
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
        let state = State {
            phase: Phase::Idle,
            closed: false,
            gave_up: false,
            paused: false,
            holds: false,
            log: None,
            log_number: 0,
            log_seen: 0,
        };
        Self { state: Mutex::new(state), idle: Condvar::new(), changed: Notify::new() }
    }

    /// The phase as of now.
    pub(crate) fn get(&self) -> Phase {
        self.lock().phase
    }

    /// Starts the loop unless the queue is closed or runs already.
    pub(crate) fn enter(&self) -> Option<Running<'_>> {
        let mut state = self.lock();
        if state.closed || state.paused || state.phase != Phase::Idle {
            return None;
        }
        state.phase = state.phase.after(Event::Enter);
        state.log_seen = 0;
        Some(Running(self))
    }

    /// Begins a turn of the loop: gives the phase, and puts the log to be used until the next turn into `turn`.
    pub(crate) fn begin_turn(&self, turn: &mut TurnLog) -> Phase {
        let mut state = self.lock();
        if turn.number != state.log_number {
            turn.log.clone_from(&state.log);
            turn.number = state.log_number;
            state.log_seen = turn.number;
            self.idle.notify_all();
        }
        if state.phase == Phase::Holding && !state.holds {
            state.holds = true;
            self.idle.notify_all();
        }
        state.phase
    }

    /// Changes the log, and waits until the loop, if it runs, uses it and the one before no more.
    pub(crate) fn set_log(&self, log: Option<QueueLog>) {
        let mut state = self.lock();
        if log.is_none() && state.log.is_none() {
            return;
        }
        state.log = log;
        state.log_number += 1;
        self.changed.notify_one();
        let other = |state: &mut State| state.phase != Phase::Idle && state.log_seen != state.log_number;
        drop(self.idle.wait_while(state, other).unwrap_or_else(PoisonError::into_inner));
    }

    /// The ring stops for a hand-over that may not come about; requests taken are completed.
    pub(crate) fn pause(&self) {
        self.lock().paused = true;
        self.apply(Event::Drain, false);
    }

    /// Of a paused ring: answers are kept back from now on. True when that is so, or the loop is not running; false after `timeout`.
    pub(crate) fn hold(&self, timeout: Duration) -> bool {
        self.apply(Event::Hold, false);
        let turning = |state: &mut State| state.phase != Phase::Idle && !state.holds;
        let waited = self.idle.wait_timeout_while(self.lock(), timeout, turning);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !turning(&mut state)
    }

    /// The hand-over did not come about: the ring goes on. Its thread must be called, since the loop may have ended.
    pub(crate) fn thaw(&self) {
        let mut state = self.lock();
        (state.paused, state.holds) = (false, false);
        drop(state);
        self.apply(Event::Thaw, false);
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
        use Event::{Discard, Drain, Enter, GiveUp, Hold, Thaw};
        use Phase::{Abandoning, Discarding, Draining, Holding, Idle, Running};
        let table = [
            (Idle, [Running, Idle, Idle, Idle, Idle, Idle]),
            (Running, [Running, Draining, Running, Running, Discarding, Abandoning]),
            (Draining, [Draining, Draining, Holding, Running, Discarding, Abandoning]),
            (Holding, [Holding, Draining, Holding, Running, Discarding, Abandoning]),
            (Discarding, [Discarding, Discarding, Discarding, Discarding, Discarding, Abandoning]),
            (Abandoning, [Abandoning, Abandoning, Abandoning, Abandoning, Abandoning, Abandoning]),
        ];
        for (from, to) in table {
            for (event, expected) in [Enter, Drain, Hold, Thaw, Discard, GiveUp].into_iter().zip(to) {
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
    fn a_paused_queue_does_not_start_until_it_is_thawed() {
        let queue = QueuePhase::new();
        let running = queue.enter().expect("idle queue starts");
        queue.pause();
        assert!(!queue.hold(Duration::ZERO), "its turn is not over");
        let mut turn = TurnLog::default();
        assert_eq!(queue.begin_turn(&mut turn), Phase::Holding);
        assert!(queue.hold(Duration::ZERO), "it has seen that");
        queue.thaw();
        assert_eq!(queue.begin_turn(&mut turn), Phase::Running);
        queue.pause();
        assert!(!queue.hold(Duration::ZERO), "what was seen at the last time says nothing");
        drop(running);
        assert!(queue.hold(Duration::ZERO) && queue.wait_idle(Duration::ZERO));
        assert!(queue.enter().is_none());
        queue.thaw();
        drop(queue.enter().expect("as if nothing had been"));
        assert!(queue.wait_drained(), "nothing was given up");
    }

    #[test]
    fn when_a_log_is_set_no_turn_without_it_is_under_way() {
        use crate::dirty_log::DirtyLog;
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
        use std::sync::Arc;
        use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
        let file = std::fs::File::from(memfd_create("log", MemfdFlags::ALLOW_SEALING).unwrap());
        file.set_len(8).unwrap();
        fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
        let log = DirtyLog::map(&vhost::vhost_user::message::VhostUserLog::new(8, 0), file).unwrap();
        let log = QueueLog { log: Arc::new(log), used: None };
        // 0: between turns, 1: in a turn without a log, 2: in a turn with one.
        let (queue, turns, end) = (QueuePhase::new(), AtomicU8::new(0), AtomicBool::new(false));
        queue.set_log(Some(log.clone()));
        queue.set_log(None);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !end.load(Ordering::SeqCst) {
                    let _running = queue.enter().expect("nobody closes it");
                    let mut turn = TurnLog::default();
                    for _ in 0..7 {
                        queue.begin_turn(&mut turn);
                        turns.store(1 + u8::from(turn.log.is_some()), Ordering::SeqCst);
                        std::thread::yield_now();
                        turns.store(0, Ordering::SeqCst);
                    }
                }
            });
            for _ in 0..2000 {
                queue.set_log(Some(log.clone()));
                assert_ne!(turns.load(Ordering::SeqCst), 1, "a turn without the log");
                queue.set_log(None);
                assert_ne!(turns.load(Ordering::SeqCst), 2, "a turn with the log that was taken back");
            }
            end.store(true, Ordering::SeqCst);
        });
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
