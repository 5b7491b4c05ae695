//! Which of a schedule's backups stay: a pure function of their times.
//!
//! Invariants: what stays now stays when it is asked again without what went (so a retention that was interrupted comes to the same end); the
//! newest backup stays if anything does; more to keep never keeps less.

use serde::{Deserialize, Serialize};

const HOUR_MS: u64 = 3_600_000;
const DAY_MS: u64 = 24 * HOUR_MS;

/// How many backups stay, of each kind; one may count for several kinds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Keep {
    /// The newest.
    #[serde(skip_serializing_if = "is_none")]
    pub last: u32,
    /// The newest of each of the latest hours that have any (UTC).
    #[serde(skip_serializing_if = "is_none")]
    pub hourly: u32,
    /// The same of days.
    #[serde(skip_serializing_if = "is_none")]
    pub daily: u32,
    /// The same of weeks, from Monday on.
    #[serde(skip_serializing_if = "is_none")]
    pub weekly: u32,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde wants it so
fn is_none(n: &u32) -> bool {
    *n == 0
}

impl Keep {
    /// Whether anything stays at all.
    #[must_use]
    pub fn keeps_any(&self) -> bool {
        [self.last, self.hourly, self.daily, self.weekly].iter().any(|n| *n > 0)
    }

    /// Which of these backups go: positions in the list of (generation, time in milliseconds since 1970). The newest is the one with the highest
    /// generation, whatever the clock said: one that was ahead for a while must not make all later backups look old.
    #[must_use]
    pub fn goes(&self, backups: &[(u64, u64)]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..backups.len()).collect();
        order.sort_by_key(|i| std::cmp::Reverse(backups[*i]));
        let times: Vec<u64> = order.iter().map(|i| backups[*i].1).collect();
        order.into_iter().zip(self.stays(&times)).filter(|(_, stays)| !stays).map(|(i, _)| i).collect()
    }

    /// For each of these times (milliseconds since 1970, of the newest backup first) whether its backup stays.
    #[must_use]
    pub fn stays(&self, times_unix_ms: &[u64]) -> Vec<bool> {
        let mut stays: Vec<bool> = (0..times_unix_ms.len()).map(|i| i < self.last as usize).collect();
        keep_newest(&mut stays, times_unix_ms, (self.hourly, |t| t / HOUR_MS));
        keep_newest(&mut stays, times_unix_ms, (self.daily, |t| t / DAY_MS));
        // 1970-01-01 was a Thursday: three days later than a Monday.
        keep_newest(&mut stays, times_unix_ms, (self.weekly, |t| (t / DAY_MS + 3) / 7));
        stays
    }
}

/// Marks the newest of each of the first `count` periods.
fn keep_newest(stays: &mut [bool], times_unix_ms: &[u64], (count, period): (u32, fn(u64) -> u64)) {
    let (mut left, mut current) = (count, None);
    for (stays, time) in stays.iter_mut().zip(times_unix_ms) {
        let of = Some(period(*time));
        if of != current && left > 0 {
            (*stays, current, left) = (true, of, left - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keep(last: u32, hourly: u32, daily: u32, weekly: u32) -> Keep {
        Keep { last, hourly, daily, weekly }
    }

    #[test]
    fn a_clock_that_was_ahead_does_not_make_later_backups_old() {
        // Generations 1 and 2 were made a year ahead, 3 to 5 after the clock came back, hour by hour.
        let backups = [(1, 365 * DAY_MS), (2, 365 * DAY_MS + HOUR_MS), (3, 0), (4, HOUR_MS), (5, 2 * HOUR_MS)];
        assert_eq!(keep(2, 0, 0, 0).goes(&backups), [2, 1, 0], "the two made last stay");
        for kinds in [keep(1, 0, 0, 0), keep(0, 1, 0, 0), keep(0, 0, 1, 0), keep(0, 0, 0, 1)] {
            assert!(!kinds.goes(&backups).contains(&4), "the newest stays: {kinds:?}");
        }
    }

    #[test]
    fn days_and_weeks_keep_their_newest() {
        // Every 6 hours for ten days from Monday 2026-03-02, newest first.
        let first = 1_772_409_600_000;
        let times: Vec<u64> = (0..40).rev().map(|n| first + n * 6 * HOUR_MS).collect();
        let kept = |keep: Keep| {
            let stays = keep.stays(&times);
            times.iter().zip(stays).filter(|(_, s)| *s).map(|(t, _)| (t - first) / HOUR_MS).collect::<Vec<u64>>()
        };
        assert_eq!(kept(keep(2, 0, 0, 0)), [234, 228]);
        assert_eq!(kept(keep(0, 0, 3, 0)), [234, 210, 186]);
        assert_eq!(kept(keep(1, 0, 0, 2)), [234, 162], "Sunday's last is the week's");
        assert_eq!(kept(keep(3, 1, 2, 5)), [234, 228, 222, 210, 162]);
        assert!(kept(Keep::default()).is_empty() && !Keep::default().keeps_any());
    }

    fn times() -> impl Strategy<Value = Vec<u64>> {
        prop::collection::vec(0u64..40 * DAY_MS, 0..60).prop_map(|mut times| {
            times.sort_unstable_by(|a, b| b.cmp(a));
            times
        })
    }

    proptest! {
        #[test]
        fn what_stays_stays(times in times(), k in (0u32..4, 0u32..4, 0u32..4, 0u32..4), more in 0usize..4) {
            let keep = keep(k.0, k.1, k.2, k.3);
            let stays = keep.stays(&times);
            let kept: Vec<u64> = times.iter().zip(&stays).filter(|(_, s)| **s).map(|(t, _)| *t).collect();
            prop_assert!(keep.stays(&kept).into_iter().all(|s| s), "a second time changes nothing");
            prop_assert!(kept.len() <= (k.0 + k.1 + k.2 + k.3) as usize);
            prop_assert_eq!(stays.first().copied().unwrap_or(false), keep.keeps_any() && !times.is_empty());
            // Whatever goes in any order before the retention ends, what stays is the same.
            let dropped = times.iter().zip(&stays).enumerate().filter(|(i, (_, s))| **s || i % 2 == 0).map(|(_, (t, _))| *t);
            let half: Vec<u64> = dropped.collect();
            let again: Vec<u64> = half.iter().zip(keep.stays(&half)).filter(|(_, s)| *s).map(|(t, _)| *t).collect();
            prop_assert_eq!(&again, &kept);
            let mut larger = keep;
            match more {
                0 => larger.last += 1,
                1 => larger.hourly += 1,
                2 => larger.daily += 1,
                _ => larger.weekly += 1,
            }
            prop_assert!(larger.stays(&times).iter().zip(&stays).all(|(l, s)| *l || !*s), "more never keeps less");
        }
    }
}
