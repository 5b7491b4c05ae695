//! The hold gate: lets IO in, counts it, and stops writes for an exact volume snapshot.
//!
//! ```text
//!            Hold(token)                    drained, ack about to be sent
//!   open ─────────────────> held ───────────────────────────────────────> acknowledged
//!    ^                       │ State, or HOLD_RELEASE_AFTER                    │ State only
//!    └───────────────────────┴────────────────────────────────────────────────┘
//! ```
//!
//! Why a snapshot is exact (section 6 of ARCHITECTURE.md). A write is counted from before its first attempt until its
//! final outcome, and it reads the seq to write with only while it is counted. An acknowledgement is sent only when no
//! write is counted, so afterwards no write with the old seq is under way and none starts. An **acknowledged** hold is
//! let go only by the MDS, which has then either raised the seq or given the snapshot up: were it let go by time, a
//! write with the old seq could follow the commit of the snapshot, and no copyset would refuse it. A hold that was
//! **not** acknowledged is let go after `HOLD_RELEASE_AFTER`, because the MDS does not count on it: it raises the
//! minimum seq in every copyset instead, writes with the old seq are refused, and the client learns the new one from
//! the refusal.
//!
//! So bypassed, writes with the old seq may still be on their way to copysets that are not sealed yet, and they belong to the snapshot, while
//! those that begin now do not. What this client sees or writes anywhere with the new seq must come after them: a copyset is therefore opened
//! anew, with the new seq, before the first request that follows (`fence.rs`, [`Gate::floor`]). Whatever the old attempt did there, it did
//! before, and nobody saw the copyset without it in between; it counts as done when the seq was raised. An acknowledged hold needs none of that.
//! (A *read-only* client of the live volume opens nothing: it may see new content in one copyset and then old content, which belongs to
//! the snapshot, arrive in another.)
//!
//! A write that was given up with an unknown outcome (IO timeout, dropped future) may still land. It is remembered as
//! *abandoned* with its seq, and as long as that is the current seq no hold is acknowledged: the MDS then bypasses this
//! client, and its seal bounds the stray attempt. A detach tells the MDS of it, with the same effect on later snapshots.
//!
//! Used by `io.rs` (entering), `attempt.rs` (seq) and `watch.rs` (holding). Absent: time, the MDS.

use crate::block_device::IoErrorKind;
use ogee_common::id::VolumeSeq;
use ogee_common::sim::{self, Canary};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Life of the attach, in `Gate::life`.
const RUNNING: u8 = 0;
/// No new IO; what is in flight may finish.
const CLOSING: u8 = 1;
/// All IO fails with `Closed`.
const CLOSED: u8 = 2;
/// All IO fails with `Fenced`.
const FENCED: u8 = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hold {
    token: u64,
    acknowledged: bool,
}

#[derive(Debug, Default)]
struct State {
    hold: Option<Hold>,
    /// Number of the next write.
    next: u64,
    /// Numbers of the writes that have no final outcome; bounded by what front ends have in flight.
    inflight: BTreeSet<u64>,
    /// Highest seq of an abandoned attempt.
    abandoned: VolumeSeq,
    /// How many tasks wait for writes to end; nobody is woken when it is 0.
    watchers: usize,
}

/// Whether a hold may be acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drained {
    /// Yes; from now on only the MDS lets it go.
    Yes,
    /// Never: an abandoned write may still land.
    Never,
    /// The hold is over, or another one took its place.
    Over,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Gate {
    seq: AtomicU64,
    /// See [`Gate::floor`].
    floor: AtomicU64,
    life: AtomicU8,
    reads: AtomicUsize,
    state: Mutex<State>,
    changed: Notify,
}

impl Gate {
    /// An open gate; writes carry `seq`.
    pub(crate) fn new(seq: VolumeSeq) -> Self {
        Self {
            seq: AtomicU64::new(seq.0),
            floor: AtomicU64::new(0),
            life: AtomicU8::new(RUNNING),
            reads: AtomicUsize::new(0),
            state: Mutex::new(State { next: 1, ..State::default() }),
            changed: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The seq that a write sent now carries.
    pub(crate) fn seq(&self) -> VolumeSeq {
        VolumeSeq(self.seq.load(Ordering::SeqCst))
    }

    /// With what seq, at least, a copyset must have been opened before it is asked anything. Never above [`Gate::seq`] for longer than a moment.
    pub(crate) fn floor(&self) -> VolumeSeq {
        VolumeSeq(self.floor.load(Ordering::SeqCst))
    }

    /// Raises the seq while writes with a lower one may be under way; a lower one changes nothing. Copysets only ever name a seq that
    /// the MDS has committed, so a seq learned from a refusal is as good as one from the MDS.
    pub(crate) fn raise_seq(&self, seq: VolumeSeq) {
        if seq > self.seq() {
            // First, so that whoever reads the new seq finds the floor raised.
            self.floor.fetch_max(seq.0, Ordering::SeqCst);
            self.seq.fetch_max(seq.0, Ordering::SeqCst);
        }
    }

    /// Whether a write that was given up may still land with the current seq.
    pub(crate) fn has_strays(&self) -> bool {
        self.state().abandoned >= self.seq()
    }

    /// Whether IO that has started may go on.
    pub(crate) fn check(&self) -> Result<(), IoErrorKind> {
        match self.life.load(Ordering::SeqCst) {
            RUNNING | CLOSING => Ok(()),
            FENCED => Err(IoErrorKind::Fenced),
            _ => Err(IoErrorKind::Closed),
        }
    }

    /// Whether IO may start.
    pub(crate) fn check_new(&self) -> Result<(), IoErrorKind> {
        match self.life.load(Ordering::SeqCst) {
            RUNNING => Ok(()),
            FENCED => Err(IoErrorKind::Fenced),
            _ => Err(IoErrorKind::Closed),
        }
    }

    /// Ends the attach for good; the first reason stays, but a fence is never hidden by a close.
    pub(crate) fn end(&self, fenced: bool) {
        self.life.fetch_max(if fenced { FENCED } else { CLOSED }, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    /// Lets a write in, after a hold is over.
    pub(crate) async fn enter_write(&self) -> Result<WriteTicket<'_>, IoErrorKind> {
        loop {
            if let Some(ticket) = self.try_enter_write()? {
                return Ok(ticket);
            }
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if let Some(ticket) = self.try_enter_write()? {
                return Ok(ticket);
            }
            changed.await;
        }
    }

    fn try_enter_write(&self) -> Result<Option<WriteTicket<'_>>, IoErrorKind> {
        let mut state = self.state();
        // Under the lock, so that a drain that began after `close` misses no write.
        self.check_new()?;
        if state.hold.is_some() {
            return Ok(None);
        }
        let number = state.next;
        state.next += 1;
        state.inflight.insert(number);
        Ok(Some(WriteTicket { gate: self, number }))
    }

    /// Lets a read in; holds do not concern it.
    pub(crate) fn enter_read(&self) -> Result<ReadTicket<'_>, IoErrorKind> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let ticket = ReadTicket { gate: self };
        self.check_new().map(|()| ticket)
    }

    /// Waits until every write that entered before the call has ended.
    pub(crate) async fn settle(&self) -> Result<(), IoErrorKind> {
        self.check_new()?;
        let before = self.state().next;
        self.wait(|state| state.inflight.first().is_none_or(|first| *first >= before).then_some(())).await;
        self.check()
    }

    /// Refuses new IO; what is in flight may finish.
    pub(crate) fn refuse_new(&self) {
        self.life.fetch_max(CLOSING, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    /// Refuses new IO and waits until none is in flight.
    pub(crate) async fn close(&self) {
        self.refuse_new();
        self.wait(|state| {
            (state.inflight.is_empty() && self.reads.load(Ordering::SeqCst) == 0).then_some(())
        })
        .await;
    }

    /// Stops new writes. A hold that is under way is replaced.
    pub(crate) fn hold(&self, token: u64) {
        self.state().hold = Some(Hold { token, acknowledged: false });
        self.changed.notify_waiters();
    }

    /// Waits until the hold `token` may be acknowledged, and if so marks it as acknowledged in the same step.
    pub(crate) async fn drained(&self, token: u64) -> Drained {
        self.wait(|state| {
            let seq = self.seq();
            match &mut state.hold {
                Some(hold) if hold.token == token => {
                    if !state.inflight.is_empty() && !sim::planted(Canary::EarlyHold) {
                        return None;
                    }
                    if state.abandoned >= seq {
                        return Some(Drained::Never);
                    }
                    hold.acknowledged = true;
                    Some(Drained::Yes)
                }
                _ => Some(Drained::Over),
            }
        })
        .await
    }

    /// The MDS refused the acknowledgement of `token`: it does not count on it.
    pub(crate) fn ack_refused(&self, token: u64) {
        let mut state = self.state();
        if let Some(hold) = state.hold.as_mut().filter(|h| h.token == token) {
            hold.acknowledged = false;
        }
    }

    /// Lets go the hold `token` unless it was acknowledged. Returns whether it is still there.
    pub(crate) fn release_unacknowledged(&self, token: u64) -> bool {
        let mut state = self.state();
        match state.hold {
            Some(hold) if hold.token == token && hold.acknowledged => true,
            Some(hold) if hold.token == token => {
                state.hold = None;
                drop(state);
                self.changed.notify_waiters();
                false
            }
            _ => false,
        }
    }

    /// The MDS's word: writes carry `seq` from now on, and whatever hold there was is over.
    pub(crate) fn release(&self, seq: VolumeSeq) {
        let mut state = self.state();
        // Before the hold ends, so that no write enters with the old seq.
        if state.hold.is_some_and(|hold| hold.acknowledged) {
            // No write is under way.
            self.seq.fetch_max(seq.0, Ordering::SeqCst);
        } else {
            self.raise_seq(seq);
        }
        state.hold = None;
        drop(state);
        self.changed.notify_waiters();
    }

    async fn wait<T>(&self, mut ready: impl FnMut(&mut State) -> Option<T>) -> T {
        let mut watcher = Watcher { gate: self, counted: false };
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            {
                let mut state = self.state();
                if let Some(result) = ready(&mut state) {
                    drop(state);
                    return result;
                }
                if !watcher.counted {
                    state.watchers += 1;
                    watcher.counted = true;
                }
            }
            changed.await;
        }
    }
}

/// Counts a waiting task, also when it is dropped.
struct Watcher<'a> {
    gate: &'a Gate,
    counted: bool,
}

impl Drop for Watcher<'_> {
    fn drop(&mut self) {
        if self.counted {
            self.gate.state().watchers -= 1;
        }
    }
}

/// A write between its start and its final outcome.
#[derive(Debug)]
pub(crate) struct WriteTicket<'a> {
    gate: &'a Gate,
    number: u64,
}

impl WriteTicket<'_> {
    /// Starts the account of one part of the write.
    pub(crate) fn part(&self) -> Unsettled<'_> {
        Unsettled { gate: self.gate, seq: VolumeSeq(0) }
    }
}

impl Drop for WriteTicket<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.inflight.remove(&self.number);
        let wake = state.watchers > 0;
        drop(state);
        if wake {
            self.gate.changed.notify_waiters();
        }
    }
}

/// A read in flight.
#[derive(Debug)]
pub(crate) struct ReadTicket<'a> {
    gate: &'a Gate,
}

impl Drop for ReadTicket<'_> {
    fn drop(&mut self) {
        let left = self.gate.reads.fetch_sub(1, Ordering::SeqCst) - 1;
        if left == 0 && self.gate.life.load(Ordering::SeqCst) != RUNNING {
            self.gate.changed.notify_waiters();
        }
    }
}

/// Attempts of one part of a write whose outcome is not known. Dropped while there are any, the write is abandoned.
#[derive(Debug)]
pub(crate) struct Unsettled<'a> {
    gate: &'a Gate,
    /// Highest seq of such attempts; 0 if none.
    seq: VolumeSeq,
}

impl Unsettled<'_> {
    /// An attempt with `seq` is about to be sent. Returns what [`Unsettled::refused`] wants back.
    pub(crate) fn sending(&mut self, seq: VolumeSeq) -> VolumeSeq {
        let before = self.seq;
        self.seq = before.max(seq);
        before
    }

    /// The attempt that [`Unsettled::sending`] announced was refused: it will never be applied.
    pub(crate) fn refused(&mut self, before: VolumeSeq) {
        self.seq = before;
    }

    /// The attempt was refused because the copyset accepts only a seq of at least `minimum` now. Nothing lower can
    /// land any more, on this copyset, where all attempts of the part went.
    pub(crate) fn settled_below(&mut self, minimum: VolumeSeq, before: VolumeSeq) {
        self.seq = if self.seq < minimum { VolumeSeq(0) } else { before };
    }

    /// No earlier attempt can be applied any more: the newest one succeeded (see `session.rs`), or the copyset refuses
    /// the seq or the epoch of all of them.
    pub(crate) fn settled(&mut self) {
        self.seq = VolumeSeq(0);
    }
}

impl Drop for Unsettled<'_> {
    fn drop(&mut self) {
        if self.seq.0 != 0 {
            let mut state = self.gate.state();
            state.abandoned = state.abandoned.max(self.seq);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    const SEQ: VolumeSeq = VolumeSeq(3);

    fn enter(gate: &Gate) -> WriteTicket<'_> {
        gate.enter_write().now_or_never().expect("the gate is open").expect("the attach runs")
    }

    #[test]
    fn a_held_gate_drains_acknowledges_and_lets_go_with_the_new_seq() {
        let gate = Gate::new(SEQ);
        let inflight = enter(&gate);
        gate.hold(7);
        let mut waiting = Box::pin(gate.enter_write());
        assert!(waiting.as_mut().now_or_never().is_none());
        let mut drained = Box::pin(gate.drained(7));
        assert!(drained.as_mut().now_or_never().is_none());
        drop(inflight);
        assert_eq!(drained.as_mut().now_or_never(), Some(Drained::Yes));
        assert!(gate.release_unacknowledged(7), "an acknowledged hold is not let go by time");
        assert!(waiting.as_mut().now_or_never().is_none());
        gate.release(VolumeSeq(4));
        let ticket = waiting.now_or_never().expect("the gate is open again").expect("the attach runs");
        assert_eq!((gate.seq(), gate.floor()), (VolumeSeq(4), VolumeSeq(0)), "nothing was under way");
        drop(ticket);
        gate.release(VolumeSeq(4));
        assert_eq!(gate.floor(), VolumeSeq(0), "the same again");
        gate.release(VolumeSeq(5));
        assert_eq!((gate.seq(), gate.floor()), (VolumeSeq(5), VolumeSeq(5)), "something may have been");
    }

    #[test]
    fn an_unacknowledged_hold_is_let_go_by_time() {
        let gate = Gate::new(SEQ);
        let inflight = enter(&gate);
        gate.hold(7);
        assert!(!gate.release_unacknowledged(7));
        drop(enter(&gate));
        assert_eq!(gate.drained(7).now_or_never(), Some(Drained::Over));
        drop(inflight);
        gate.hold(8);
        assert_eq!(gate.drained(7).now_or_never(), Some(Drained::Over));
        assert_eq!(gate.drained(8).now_or_never(), Some(Drained::Yes));
        gate.ack_refused(8);
        assert!(!gate.release_unacknowledged(8));
    }

    #[test]
    fn an_abandoned_write_forbids_acknowledging_until_the_seq_moved_on() {
        let gate = Gate::new(SEQ);
        let ticket = enter(&gate);
        let mut part = ticket.part();
        let before = part.sending(SEQ);
        part.refused(before);
        drop(part);
        let mut part = ticket.part();
        part.sending(SEQ);
        part.settled();
        drop(part);
        gate.hold(1);
        drop(ticket);
        assert_eq!(gate.drained(1).now_or_never(), Some(Drained::Yes));
        gate.release(SEQ);

        let ticket = enter(&gate);
        let mut part = ticket.part();
        part.sending(SEQ);
        let before = part.sending(SEQ);
        part.refused(before);
        drop(part);
        drop(ticket);
        gate.hold(2);
        assert_eq!(gate.drained(2).now_or_never(), Some(Drained::Never));
        gate.release(VolumeSeq(4));
        gate.hold(3);
        assert_eq!(gate.drained(3).now_or_never(), Some(Drained::Yes));
    }

    #[test]
    fn settle_waits_for_earlier_writes_only() {
        let gate = Gate::new(SEQ);
        let earlier = enter(&gate);
        let mut settle = Box::pin(gate.settle());
        assert!(settle.as_mut().now_or_never().is_none());
        let later = enter(&gate);
        drop(earlier);
        assert_eq!(settle.now_or_never(), Some(Ok(())));
        drop(later);
    }

    #[test]
    fn close_waits_for_reads_and_writes_and_refuses_new_ones() {
        let gate = Gate::new(SEQ);
        let (write, read) = (enter(&gate), gate.enter_read().expect("the attach runs"));
        let mut close = Box::pin(gate.close());
        assert!(close.as_mut().now_or_never().is_none());
        assert_eq!(gate.enter_write().now_or_never().map(|r| r.map(drop)), Some(Err(IoErrorKind::Closed)));
        assert_eq!(gate.enter_read().map(drop), Err(IoErrorKind::Closed));
        assert_eq!(gate.check(), Ok(()));
        drop(write);
        assert!(close.as_mut().now_or_never().is_none());
        drop(read);
        assert!(close.now_or_never().is_some());
        gate.end(true);
        gate.end(false);
        assert_eq!(gate.check(), Err(IoErrorKind::Fenced));
    }
}
