//! When a majority last heard of this replica as leader: what lease reads rest on.
//!
//! Filled by [`crate::append_stream`] and [`crate::beat`] with the time at which each answered frame was **sent**; asked
//! by [`crate::replica`]. openraft keeps such a clock too, but counts an answer for every request with the same last entry
//! that was made before it came, also for those that never arrived; under a one-way partition beside a slow flush that
//! is too late by the time of the flush. Invariants: only the answer to a frame moves the clock, to the sending of that
//! very frame; the clock of one term says nothing of another. A follower's own lease starts at the receipt, which is
//! later, and is at least as long; an answer to a beat starts one as well ([`crate::promise`]).

use ogee_common::clock::Instant;
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

#[derive(Debug, Default)]
struct Inner {
    term: u64,
    /// Replica, and the latest sending it answered.
    answered: Vec<(u64, Instant)>,
    /// Replica, the latest sending of a beat it answered, and the committed index that the beat named.
    beaten: Vec<(u64, Instant, u64)>,
}

/// The clock of one replica.
#[derive(Debug, Default)]
pub(crate) struct LeaseClock(Mutex<Inner>);

impl LeaseClock {
    /// `replica` has accepted, in `term`, a frame that was sent at `sent`.
    pub(crate) fn answered(&self, term: u64, replica: u64, sent: Instant) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if term > inner.term {
            *inner = Inner { term, ..Inner::default() };
        }
        if term == inner.term {
            match inner.answered.iter_mut().find(|(id, _)| *id == replica) {
                Some((_, at)) => *at = sent.max(*at),
                None => inner.answered.push((replica, sent)),
            }
        }
    }

    /// `replica` has answered, in `term`, a beat that was sent at `sent` and said that all up to `committed` is committed.
    pub(crate) fn beaten(&self, term: u64, replica: u64, sent: Instant, committed: u64) {
        self.answered(term, replica, sent);
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if term == inner.term {
            match inner.beaten.iter_mut().find(|(id, ..)| *id == replica) {
                Some(known) if known.1 > sent => {}
                Some(known) => *known = (replica, sent, committed),
                None => inner.beaten.push((replica, sent, committed)),
            }
        }
    }

    /// `replica` has refused a beat: openraft's own heartbeat is to reach it.
    pub(crate) fn refused(&self, replica: u64) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.beaten.retain(|(id, ..)| *id != replica);
    }

    /// Whether `replica` has answered in `term` a beat sent at `since` or later, and knows of `committed`.
    pub(crate) fn knows(&self, term: u64, replica: u64, since: Instant, committed: u64) -> bool {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |(id, sent, upto): &(u64, Instant, u64)| *id == replica && *sent >= since && *upto >= committed;
        inner.term == term && inner.beaten.iter().any(known)
    }

    /// Since when a majority of each of `configs` follows `me` in `term`, at `now`; `None` if one does not.
    pub(crate) fn held(&self, term: u64, me: u64, configs: &[BTreeSet<u64>], now: Instant) -> Option<Instant> {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let answered: &[(u64, Instant)] = if inner.term == term { &inner.answered } else { &[] };
        let of = |id: u64| {
            if id == me { Some(now) } else { answered.iter().find(|(known, _)| *known == id).map(|(_, at)| *at) }
        };
        let mut oldest = Some(now).filter(|_| !configs.is_empty());
        for config in configs {
            let mut times: smallvec::SmallVec<[Instant; 8]> = config.iter().filter_map(|id| of(*id)).collect();
            times.sort_unstable_by(|a, b| b.cmp(a));
            oldest = oldest.min(times.get(config.len() / 2).copied());
        }
        oldest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_common::clock;
    use std::time::Duration;

    fn three() -> Vec<BTreeSet<u64>> {
        vec![BTreeSet::from([1, 2, 3])]
    }

    #[test]
    fn the_second_best_of_three_counts() {
        let (lease, t) = (LeaseClock::default(), clock::now());
        let at = |ms| t + Duration::from_millis(ms);
        assert_eq!(lease.held(5, 1, &three(), at(100)), None, "nobody answered");
        lease.answered(5, 2, at(10));
        assert_eq!(lease.held(5, 1, &three(), at(100)), Some(at(10)));
        lease.answered(5, 3, at(30));
        lease.answered(5, 2, at(5));
        assert_eq!(lease.held(5, 1, &three(), at(100)), Some(at(30)), "an older answer moves nothing back");
        assert_eq!(lease.held(5, 9, &three(), at(100)), Some(at(10)), "a leader that is no voter counts for nothing");
    }

    #[test]
    fn terms_do_not_mix() {
        let (lease, t) = (LeaseClock::default(), clock::now());
        lease.answered(5, 2, t);
        assert_eq!(lease.held(6, 1, &three(), t), None);
        assert_eq!(lease.held(4, 1, &three(), t), None);
        lease.answered(6, 3, t);
        lease.answered(5, 2, t);
        assert_eq!(lease.held(6, 1, &[BTreeSet::from([1, 2])], t), None, "a late answer to an old term");
    }

    #[test]
    fn a_beat_counts_as_an_answer_and_says_what_the_follower_knows() {
        let (lease, t) = (LeaseClock::default(), clock::now());
        let at = |ms| t + Duration::from_millis(ms);
        lease.beaten(5, 2, at(10), 100);
        assert_eq!(lease.held(5, 1, &three(), at(20)), Some(at(10)));
        assert!(lease.knows(5, 2, at(10), 100) && lease.knows(5, 2, at(5), 7));
        assert!(!lease.knows(5, 2, at(11), 100), "too long ago");
        assert!(!lease.knows(5, 2, at(10), 101), "something newer");
        assert!(!lease.knows(5, 3, at(10), 100) && !lease.knows(4, 2, at(10), 100));
        lease.refused(2);
        assert!(!lease.knows(5, 2, at(10), 100));
        lease.beaten(5, 2, at(30), 100);
        lease.answered(6, 3, at(30));
        assert!(!lease.knows(6, 2, at(10), 100) && !lease.knows(5, 2, at(10), 100), "terms do not mix");
    }

    #[test]
    fn every_config_of_a_joint_membership_counts() {
        let (lease, t) = (LeaseClock::default(), clock::now());
        let joint = [BTreeSet::from([1, 2, 3]), BTreeSet::from([1, 4, 5])];
        lease.answered(1, 2, t);
        assert_eq!(lease.held(1, 1, &joint, t), None);
        lease.answered(1, 4, t);
        assert_eq!(lease.held(1, 1, &joint, t), Some(t));
        assert_eq!(lease.held(1, 1, &[BTreeSet::from([1])], t), Some(t), "alone is a majority");
        assert_eq!(lease.held(1, 1, &[], t), None, "no membership, no lead");
    }
}
