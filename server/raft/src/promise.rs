//! What a replica has promised to a leader outside of openraft, and when it may promise more.
//!
//! A follower whose leader has nothing new answers a line of a common frame ([`crate::beat`]) instead of an
//! AppendEntries of its own: openraft's core hears nothing of it. Such an answer is a promise like any other: for a
//! lease from then on this replica gives no vote and asks for none. It is kept here, because openraft's own lease of the
//! vote was not renewed. Invariants:
//!
//! 1. While a promise runs, no vote but one authorized by the leader itself reaches the core ([`Promise::ballot`]), and
//!    the core is not told to stand for election.
//! 2. A promise to the leader of a term is made only while the core still stands by that term. The core's vote changes
//!    without a word to us in two ways only: by a vote that was let through, or by an election of its own. Both open a
//!    [`Doubt`] before the core can hear of them, which ends when it has. After a doubt, and after a start, nothing is
//!    promised until the core itself has accepted an AppendEntries of the term that was queued after the doubt ended:
//!    its queue is in order, and an AppendEntries that it accepts ends an election that it only probed for.
//! 3. A leader that lets a vote through may have given it away before it says so: its lease counts for nothing from the
//!    moment the doubt opens ([`Promise::may_lead`]).
//!
//! ```text
//!   Doubtful --an AppendEntries of term T, queued with no doubt open, is accepted--> Trusted(T) --beat of T--> promised
//!      ^                                                                                |
//!      +------------ vote let through, election asked for, lead handed here ------------+
//! ```
//! A higher term that reaches this replica by AppendEntries needs no doubt: its leader was elected by others, each of
//! which kept its own promises.

use ogee_common::clock::Instant;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[derive(Debug, Default)]
struct Inner {
    /// When a leader was last promised to.
    made: Option<Instant>,
    /// Doubts that were opened or closed so far.
    count: u64,
    open: u32,
    /// The count and the term of the last AppendEntries that the core has accepted.
    trusted: Option<(u64, u64)>,
    /// The highest term of which a vote may have been given away.
    voted: u64,
}

/// The promises of one replica.
#[derive(Debug, Default)]
pub(crate) struct Promise(Mutex<Inner>);

impl Promise {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn runs(&self, now: Instant, lease: Duration) -> bool {
        self.inner().made.is_some_and(|at| now < at + lease)
    }

    /// Before the core hears of a vote or of an election that no leader has authorized: `None` while a promise runs.
    pub(crate) fn ballot(self: &Arc<Self>, now: Instant, lease: Duration) -> Option<Doubt> {
        let mut inner = self.inner();
        if inner.made.is_some_and(|at| now < at + lease) {
            return None;
        }
        (inner.open, inner.count) = (inner.open + 1, inner.count + 1);
        Some(Doubt { promise: self.clone(), term: 0 })
    }

    /// The same for what the leader itself asks for.
    pub(crate) fn authorized(self: &Arc<Self>) -> Doubt {
        let mut inner = self.inner();
        (inner.open, inner.count) = (inner.open + 1, inner.count + 1);
        Doubt { promise: self.clone(), term: 0 }
    }

    /// To be taken when an AppendEntries arrives, before the core gets it.
    pub(crate) fn arrival(&self) -> Arrival {
        Arrival(self.inner().count)
    }

    /// The core has accepted, in `term`, the AppendEntries of `arrival`.
    pub(crate) fn accepted(&self, term: u64, arrival: Arrival) {
        let mut inner = self.inner();
        if inner.open == 0 && inner.count == arrival.0 && inner.trusted.is_none_or(|(_, known)| known <= term) {
            inner.trusted = Some((arrival.0, term));
        }
    }

    /// Promises the leader of `term` a lease from `now` on, if the core certainly follows it.
    pub(crate) fn renew(&self, term: u64, now: Instant) -> bool {
        let mut inner = self.inner();
        let sure = inner.open == 0 && inner.trusted == Some((inner.count, term));
        if sure {
            inner.made = inner.made.max(Some(now));
        }
        sure
    }

    /// Whether this replica, which leads in `term` as far as it knows, has certainly not voted for a later one.
    pub(crate) fn may_lead(&self, term: u64) -> bool {
        let inner = self.inner();
        inner.open == 0 && inner.voted <= term
    }
}

/// When an AppendEntries arrived.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival(u64);

/// The core is about to hear of something that may change its vote. Ends when dropped: after the core has answered, or
/// after the request is in its queue.
#[derive(Debug)]
pub(crate) struct Doubt {
    promise: Arc<Promise>,
    term: u64,
}

impl Doubt {
    /// A vote in `term` is asked for: given, unless [`Doubt::refused`] follows.
    pub(crate) fn over(mut self, term: u64) -> Self {
        self.term = term;
        self
    }

    /// The core did not give its vote.
    pub(crate) fn refused(&mut self) {
        self.term = 0;
    }
}

impl Drop for Doubt {
    fn drop(&mut self) {
        let mut inner = self.promise.inner();
        (inner.open, inner.count) = (inner.open - 1, inner.count + 1);
        inner.voted = inner.voted.max(self.term);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_common::clock;

    const LEASE: Duration = Duration::from_millis(900);

    fn trusted(term: u64) -> Arc<Promise> {
        let promise = Arc::new(Promise::default());
        promise.accepted(term, promise.arrival());
        promise
    }

    #[test]
    fn nothing_is_promised_before_the_core_has_accepted_the_term() {
        let (promise, now) = (Arc::new(Promise::default()), clock::now());
        assert!(!promise.renew(5, now), "just started");
        promise.accepted(5, promise.arrival());
        assert!(!promise.renew(4, now) && !promise.renew(6, now), "another term");
        assert!(!promise.runs(now, LEASE));
        assert!(promise.renew(5, now) && promise.runs(now, LEASE));
        promise.accepted(4, promise.arrival());
        assert!(promise.renew(5, now), "terms do not go back");
    }

    #[test]
    fn a_promise_keeps_ballots_out_for_a_lease() {
        let (promise, now) = (trusted(5), clock::now());
        assert!(promise.renew(5, now));
        assert!(promise.ballot(now + LEASE - Duration::from_millis(1), LEASE).is_none());
        assert!(promise.ballot(now + LEASE, LEASE).is_some());
        assert!(promise.renew(5, now - LEASE) || promise.runs(now, LEASE), "an older beat takes nothing back");
    }

    #[test]
    fn a_doubt_ends_with_what_was_queued_after_it() {
        let (promise, now) = (trusted(5), clock::now());
        let before = promise.arrival();
        let doubt = promise.ballot(now, LEASE).expect("nothing was promised");
        assert!(!promise.renew(5, now), "while the core has not answered");
        let during = promise.arrival();
        promise.accepted(5, during);
        assert!(!promise.renew(5, now));
        drop(doubt);
        promise.accepted(5, before);
        promise.accepted(5, during);
        assert!(!promise.renew(5, now), "both may have been accepted before the vote was given");
        promise.accepted(5, promise.arrival());
        assert!(promise.renew(5, now));
    }

    #[test]
    fn doubts_overlap() {
        let (promise, now) = (trusted(5), clock::now());
        let (first, second) = (promise.authorized(), promise.ballot(now, LEASE).expect("nothing was promised"));
        drop(first);
        promise.accepted(5, promise.arrival());
        assert!(!promise.renew(5, now), "the second is open");
        drop(second);
        promise.accepted(5, promise.arrival());
        assert!(promise.renew(5, now));
    }

    #[test]
    fn a_leader_that_may_have_voted_leads_no_more() {
        let (promise, now) = (trusted(5), clock::now());
        assert!(promise.may_lead(5));
        let mut doubt = promise.ballot(now, LEASE).expect("nothing was promised").over(6);
        assert!(!promise.may_lead(5), "the core is deciding");
        doubt.refused();
        drop(doubt);
        assert!(promise.may_lead(5));
        drop(promise.ballot(now, LEASE).expect("nothing was promised").over(6));
        assert!(!promise.may_lead(5), "given, or nobody knows");
        assert!(promise.may_lead(6));
    }
}
