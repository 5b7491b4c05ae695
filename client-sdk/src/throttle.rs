//! The limits of an open volume: where IOs wait until they may begin.
//!
//! `volume.rs` sends every read, write, discard and write-zeroes through [`Throttle::enter`] before anything else: before
//! the gate, so that a hold for a volume snapshot and a flush wait for no IO that has not begun, and before the order of
//! writes, so that one that waits here keeps nobody's place. Two writes to one place that are in flight together have no
//! order then, as without limits; one that began after another was answered still comes after it.
//!
//! Invariants: without limits it costs one load and one branch; nothing is allocated for an IO but its entry in the line,
//! whose memory is kept; who waits is woken by a task of the control thread, which sleeps until something is due and
//! is started with the first limit; after [`Throttle::close`] everybody passes, to be refused by the gate. The IO
//! timeout does not count the time spent here. Absent: what the limits are, which the MDS says (`watch.rs`); all clients of
//! a volume together: each obeys by itself.

use crate::attachment::Attachment;
use crate::token_bucket::{Lane, Lines};
use ogee_common::clock::{self, Instant};
use ogee_common::qos::VolumeLimits;
use smallvec::SmallVec;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::sync::Notify;

/// Woken after the lock is let go; more spill to the heap.
type Wakers = SmallVec<[Waker; 16]>;

#[derive(Debug)]
struct State {
    lines: Lines<Option<Waker>>,
    closed: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// Whether there are limits; a hint that may be a moment old.
    active: AtomicBool,
    /// Whether [`run`] was started.
    timed: AtomicBool,
    start: Instant,
    state: Mutex<State>,
    /// Wakes [`run`] when something may be due earlier than it knows.
    timer: Arc<Notify>,
}

impl Default for Throttle {
    fn default() -> Self {
        Self {
            active: AtomicBool::new(false),
            timed: AtomicBool::new(false),
            start: clock::now(),
            state: Mutex::new(State { lines: Lines::new(), closed: false }),
            timer: Arc::default(),
        }
    }
}

impl Throttle {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        clock::now().saturating_duration_since(self.start)
    }

    /// The limits as they are.
    pub(crate) fn limits(&self) -> VolumeLimits {
        self.state().lines.limits()
    }

    /// Sets the limits; who waits and may pass now is woken. Returns whether [`run`] is to be started.
    #[must_use]
    pub(crate) fn set(&self, limits: VolumeLimits) -> bool {
        let mut state = self.state();
        if state.closed || state.lines.limits() == limits {
            return false;
        }
        state.lines.set(self.now(), limits);
        self.active.store(!limits.is_none(), Ordering::Relaxed);
        self.advance(state);
        self.timer.notify_one();
        !limits.is_none() && !self.timed.swap(true, Ordering::Relaxed)
    }

    /// Lifts the limits for good.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.lines.set(self.now(), VolumeLimits::NONE);
        self.active.store(false, Ordering::Relaxed);
        self.advance(state);
    }

    /// Waits until an IO may begin, and says whether it had to wait. Cancellation-safe: one that is given up takes no
    /// tokens.
    pub(crate) async fn enter(&self, lane: Lane, bytes: u64) -> bool {
        if !self.active.load(Ordering::Relaxed) {
            return false;
        }
        let Some(number) = self.ask(lane, bytes) else { return false };
        Waiting { throttle: self, lane, number, passed: false }.await;
        true
    }

    /// The number of an IO that must wait; `None`: it has passed.
    fn ask(&self, lane: Lane, bytes: u64) -> Option<u64> {
        let mut wakers = Wakers::new();
        let mut state = self.state();
        let number = state.lines.join(lane, bytes);
        // Others too: the timer may be late.
        state.lines.advance(self.now(), |waker| wakers.extend(waker));
        let waits = state.lines.waker(lane, number).is_some();
        let is_head = state.lines.is_head(lane, number);
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
        if waits && is_head {
            self.timer.notify_one();
        }
        waits.then_some(number)
    }

    /// Lets pass who may, and says when somebody else may.
    fn advance(&self, mut state: MutexGuard<'_, State>) -> Option<Duration> {
        let mut wakers = Wakers::new();
        let due = state.lines.advance(self.now(), |waker| wakers.extend(waker));
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
        due
    }
}

/// Wakes whoever may pass when the time has come; the task of one attach, ended by its owner.
pub(crate) async fn run(at: Weak<Attachment>) {
    loop {
        let Some(strong) = at.upgrade() else { return };
        let (due, timer) = (strong.throttle.advance(strong.throttle.state()), strong.throttle.timer.clone());
        drop(strong);
        match due {
            // Either way somebody may be due.
            Some(due) => _ = tokio::time::timeout(due, timer.notified()).await,
            None => timer.notified().await,
        }
    }
}

/// An IO in its line.
struct Waiting<'a> {
    throttle: &'a Throttle,
    lane: Lane,
    number: u64,
    passed: bool,
}

impl Future for Waiting<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let throttle = self.throttle;
        let mut state = throttle.state();
        match state.lines.waker(self.lane, self.number) {
            Some(slot) => {
                if slot.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
                    *slot = Some(cx.waker().clone());
                }
                Poll::Pending
            }
            None => {
                drop(state);
                self.passed = true;
                Poll::Ready(())
            }
        }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if !self.passed {
            let mut state = self.throttle.state();
            state.lines.leave(self.lane, self.number);
            self.throttle.advance(state);
            self.throttle.timer.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use ogee_common::qos::{LimitKind, RateLimit};

    fn limited(kind: LimitKind, rate: u64) -> Throttle {
        let throttle = Throttle::default();
        assert!(throttle.set(VolumeLimits::NONE.with(kind, RateLimit { rate, ..RateLimit::NONE })), "the timer is wanted");
        throttle
    }

    #[tokio::test(start_paused = true)]
    async fn without_limits_nobody_waits() {
        let throttle = Throttle::default();
        assert_eq!(throttle.enter(Lane::Write, u64::MAX).now_or_never(), Some(false));
        assert!(!throttle.set(VolumeLimits::NONE));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_passes_when_the_limit_is_lifted_or_the_throttle_closed() {
        let lifts: [fn(&Throttle); 2] = [|t| assert!(!t.set(VolumeLimits::NONE)), Throttle::close];
        for lift in lifts {
            let throttle = limited(LimitKind::Iops, 1);
            assert_eq!(throttle.enter(Lane::Read, 512).now_or_never(), Some(false));
            let mut first = Box::pin(throttle.enter(Lane::Read, 512));
            let mut second = Box::pin(throttle.enter(Lane::Write, 512));
            assert!((&mut first).now_or_never().is_none() && (&mut second).now_or_never().is_none());
            lift(&throttle);
            assert_eq!((first.now_or_never(), second.now_or_never()), (Some(true), Some(true)));
            assert_eq!(throttle.enter(Lane::Read, 512).now_or_never(), Some(false));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_closed_throttle_takes_no_limits() {
        let throttle = limited(LimitKind::Iops, 1);
        throttle.close();
        assert!(!throttle.set(VolumeLimits::NONE.with(LimitKind::Iops, RateLimit { rate: 1, ..RateLimit::NONE })));
        for _ in 0..9 {
            assert_eq!(throttle.enter(Lane::Write, 512).now_or_never(), Some(false));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_given_up_makes_room() {
        let throttle = limited(LimitKind::WriteIops, 1);
        assert_eq!(throttle.enter(Lane::Write, 512).now_or_never(), Some(false));
        let mut first = Box::pin(throttle.enter(Lane::Write, 512));
        let mut second = Box::pin(throttle.enter(Lane::Write, 512));
        assert!((&mut first).now_or_never().is_none() && (&mut second).now_or_never().is_none());
        tokio::time::advance(Duration::from_millis(1001)).await;
        drop(first);
        assert_eq!(second.now_or_never(), Some(true), "it has the token of the one that left");
    }
}
