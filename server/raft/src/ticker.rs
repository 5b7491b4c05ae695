//! The clock of all groups of a process: heartbeats and elections, driven by one timer.
//!
//! openraft's own tick costs a timer and a turn of each group's core forty times a second; here an idle follower costs a
//! comparison. All heartbeats of a process start in the same tick and leave as one frame per peer ([`crate::beat`]).
//!
//! Invariants: this only *asks*. openraft refuses to ask for votes while its lease on a leader runs, and peers refuse to
//! answer, and of leases that openraft knows nothing of [`crate::promise`] keeps count; nothing here can shorten one. Life of the timer of a follower:
//!
//! ```text
//!   heard -----------------> lease runs -> patience runs -> ask for votes -> not before: a new patience later -> ...
//!     ^  leader's process     (election_max)  random election_min..max
//!     |  lost: patience = rank * election_step
//!     +---- any AppendEntries of the current term or a later one, or an accepted beat
//! ```
//! An election takes two flushes and must not be disturbed: a request for this replica's vote puts `not before` off, and
//! so does an attempt of its own. Only a refusal of a pre-vote ("my lease runs a little longer") brings it near again.

use crate::beat;
use crate::process::RaftProcess;
use crate::tuning::RaftTuning;
use ogee_common::clock::{self, Instant};
use ogee_common::rng;
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::time::MissedTickBehavior;

struct Inner {
    /// When a leader was last heard of.
    heard: Instant,
    /// How long after the lease votes are asked for.
    patience: Duration,
    not_before: Instant,
    /// The leader's process is gone: votes are asked for as soon as the lease allows, and again soon.
    suspect: bool,
    attempts: u32,
    /// Somebody would vote for this replica: the election proper may be under way.
    favoured: bool,
}

/// The election timer of one replica.
pub(crate) struct ElectionTimer {
    inner: Mutex<Inner>,
    lease: Duration,
    min: Duration,
    spread: Duration,
    step: Duration,
}

impl ElectionTimer {
    /// A timer for a replica that starts now. `fresh`: it never took part, so no lease can run.
    pub(crate) fn new(tuning: &RaftTuning, started: Started) -> Self {
        let (lease, min, step) = (tuning.lease(), tuning.election_min, tuning.election_step);
        let spread = tuning.election_max.saturating_sub(min);
        let now = clock::now();
        let base = match started {
            Started::Fresh => now.checked_sub(lease).unwrap_or(now),
            Started::Again => now,
        };
        // Replicas of one group that start together do so within moments; half a timeout tells them apart.
        let patience = rng::jitter(min);
        let inner = Inner { heard: base, patience, not_before: now, suspect: false, attempts: 0, favoured: false };
        Self { inner: Mutex::new(inner), lease, min, spread, step }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn random(&self) -> Duration {
        // `jitter` spreads over the upper half, so twice the spread less the spread is the whole of it.
        self.min + (rng::jitter(self.spread * 2).saturating_sub(self.spread))
    }

    /// A leader was heard of, or this replica leads.
    pub(crate) fn heard(&self) {
        let mut inner = self.inner();
        inner.heard = clock::now();
        if inner.suspect || inner.attempts > 0 {
            (inner.suspect, inner.attempts) = (false, 0);
            inner.patience = self.random();
        }
    }

    /// Someone asks for this replica's vote: let it win.
    pub(crate) fn asked(&self) {
        let mut inner = self.inner();
        inner.not_before = inner.not_before.max(clock::now() + self.random());
    }

    /// Another replica said whether it would vote for this one.
    pub(crate) fn probed(&self, granted: bool) {
        let mut inner = self.inner();
        if granted {
            inner.favoured = true;
            inner.not_before = inner.not_before.max(clock::now() + self.min);
        } else if inner.suspect && !inner.favoured {
            let soon = rng::jitter(self.step * (1 << inner.attempts.min(5)) / 2);
            inner.not_before = inner.not_before.min(clock::now() + soon);
        }
    }

    /// The leader's process closed its connections. `rank` is this replica's place among those that remain.
    pub(crate) fn suspect(&self, rank: u32) {
        let mut inner = self.inner();
        if !inner.suspect {
            inner.suspect = true;
            inner.patience = self.step * rank + rng::jitter(self.step / 4);
        }
    }

    /// Before this time [`ElectionTimer::due`] says no, unless [`ElectionTimer::suspect`] is called.
    fn quiet_until(&self) -> Instant {
        let inner = self.inner();
        // Answers to an attempt may bring the next one near.
        if inner.attempts > 0 { inner.heard } else { inner.heard + self.lease + inner.patience }
    }

    /// Whether votes are to be asked for at `now`; if so, the timer is set for the next attempt.
    pub(crate) fn due(&self, now: Instant) -> bool {
        let mut inner = self.inner();
        if now < inner.heard + self.lease + inner.patience || now < inner.not_before {
            return false;
        }
        inner.attempts = inner.attempts.saturating_add(1);
        inner.favoured = false;
        inner.not_before = now + self.random();
        true
    }
}

/// Whether a replica that starts has taken part before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Started {
    /// It has neither vote nor log.
    Fresh,
    /// It may have promised something to a leader a moment ago.
    Again,
}

/// Ticks until the process is dropped.
pub(crate) async fn run(process: Weak<RaftProcess>, tuning: RaftTuning) {
    let mut ticks = tokio::time::interval(tuning.tick);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut last, mut beat_at) = (clock::now(), clock::now());
    // Between two beats nobody is looked at who cannot be due: a thousand timers are a thousand cache misses.
    let mut quiet_until = last;
    loop {
        ticks.tick().await;
        let Some(process) = process.upgrade() else { return };
        let now = clock::now();
        // After a standstill of this process the answer to "was the leader silent?" may lie unread in the sockets.
        let stood_still = now.saturating_duration_since(last) > tuning.heartbeat;
        last = now;
        let beat = now >= beat_at;
        if beat {
            // From the planned time, not from now: a late tick shall not slow the beat down.
            beat_at = (beat_at + tuning.heartbeat).max(now);
        }
        if !process.take_hurry() && !beat && now < quiet_until {
            continue;
        }
        let tick = Tick { now, beat, stood_still };
        quiet_until = now + tuning.lease();
        process.for_each(|replica| {
            replica.tick(tick);
            quiet_until = quiet_until.min(replica.timer.quiet_until());
        });
        if beat {
            beat::send(&process);
        }
    }
}

/// One look at the clock.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tick {
    pub(crate) now: Instant,
    /// Leaders show themselves in this tick.
    pub(crate) beat: bool,
    /// The process did not run for a while.
    pub(crate) stood_still: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timer() -> ElectionTimer {
        ElectionTimer::new(&RaftTuning::default(), Started::Again)
    }

    #[test]
    fn a_lease_is_never_cut_short() {
        let timer = timer();
        let now = clock::now();
        timer.heard();
        timer.suspect(0);
        assert!(!timer.due(now + Duration::from_millis(890)));
        assert!(timer.due(now + Duration::from_millis(950)));
    }

    #[test]
    fn nobody_is_due_while_it_is_quiet() {
        let timer = timer();
        timer.heard();
        let quiet = timer.quiet_until();
        assert!(quiet > clock::now() + Duration::from_millis(900 + 200), "lease and patience");
        assert!(!timer.due(quiet - Duration::from_millis(1)) && timer.due(quiet));
        assert!(timer.quiet_until() <= clock::now(), "an attempt is watched closely");
        let timer = ElectionTimer::new(&RaftTuning::default(), Started::Again);
        timer.suspect(0);
        assert!(timer.quiet_until() < clock::now() + Duration::from_millis(950), "the lease alone");
        assert!(timer.due(timer.quiet_until()));
    }

    #[test]
    fn an_unsuspected_silence_waits_for_the_timeout_too() {
        let timer = timer();
        timer.heard();
        let now = clock::now();
        assert!(!timer.due(now + Duration::from_millis(900 + 240)));
        assert!(timer.due(now + Duration::from_millis(1810)));
        assert!(!timer.due(now + Duration::from_millis(1810 + 490)), "one attempt per timeout");
        assert!(timer.due(now + Duration::from_millis(1810 + 910)));
    }

    #[test]
    fn hearing_ends_the_suspicion_and_voting_puts_off() {
        let timer = timer();
        timer.suspect(0);
        timer.heard();
        let now = clock::now();
        assert!(!timer.due(now + Duration::from_millis(1300)), "patience is long again");
        timer.suspect(0);
        timer.asked();
        assert!(!timer.due(now + Duration::from_millis(480)), "the lease alone");
        let timer = ElectionTimer::new(&RaftTuning::default(), Started::Fresh);
        timer.asked();
        assert!(!timer.due(clock::now() + Duration::from_millis(490)), "somebody else stands for election");
        assert!(timer.due(clock::now() + Duration::from_millis(910)));
    }

    #[test]
    fn a_refused_probe_is_repeated_soon_and_a_granted_one_is_left_alone() {
        let timer = timer();
        timer.heard();
        timer.suspect(0);
        let then = clock::now() + Duration::from_millis(950);
        assert!(timer.due(then));
        timer.probed(false);
        assert!(timer.due(then), "`then` is later than soon");
        timer.probed(true);
        timer.probed(false);
        assert!(!timer.due(clock::now() + Duration::from_millis(490)), "the election proper takes its time");
    }

    #[test]
    fn a_fresh_replica_waits_for_no_lease() {
        let timer = ElectionTimer::new(&RaftTuning::default(), Started::Fresh);
        assert!(timer.due(clock::now() + Duration::from_millis(510)));
    }
}
