//! Limits of a volume: how many IOs and bytes a second it may do, and how much more after a rest.
//!
//! Chosen on the command line, kept by the MDS in a row of the volume, applied by the client SDK to itself
//! (`client-sdk/src/token_bucket.rs`). Invariants: the order of [`LimitKind`] is part of the MDS's row format, new kinds
//! come at the end with a new version of that row; limits that passed [`RateLimit::check`] let every IO pass in the end.
//! Absent: time, and what an IO costs.

use crate::limits::{
    QOS_BURST_SECONDS_MAX, QOS_BYTES_PER_SECOND_MAX, QOS_BYTES_PER_SECOND_MIN, QOS_IOPS_MAX,
};
use serde::{Deserialize, Serialize};

/// What is limited. A volume has one limit of each kind; an IO obeys all that concern it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LimitKind {
    /// IOs of all verbs.
    Iops,
    /// Reads.
    ReadIops,
    /// Writes, discards and write-zeroes.
    WriteIops,
    /// Bytes read and written.
    Bytes,
    /// Bytes read.
    ReadBytes,
    /// Bytes written; discards and write-zeroes have none.
    WriteBytes,
}

impl LimitKind {
    /// Every kind, in the order of [`VolumeLimits`].
    pub const ALL: [Self; 6] =
        [Self::Iops, Self::ReadIops, Self::WriteIops, Self::Bytes, Self::ReadBytes, Self::WriteBytes];

    /// As in JSON and messages.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Iops => "iops",
            Self::ReadIops => "read_iops",
            Self::WriteIops => "write_iops",
            Self::Bytes => "bytes",
            Self::ReadBytes => "read_bytes",
            Self::WriteBytes => "write_bytes",
        }
    }

    /// Whether bytes are counted, not IOs.
    #[must_use]
    pub const fn counts_bytes(self) -> bool {
        matches!(self, Self::Bytes | Self::ReadBytes | Self::WriteBytes)
    }
}

/// The most of one kind in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RateLimit {
    /// IOs or bytes a second; 0: no limit.
    pub rate: u64,
    /// IOs or bytes a second of a volume that has rested; 0: no burst.
    pub burst: u64,
    /// For so many seconds a rested volume keeps `burst` up; 0 without one.
    pub burst_seconds: u32,
}

/// Why a limit is refused; the text says what is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitProblem {
    /// IOs a second out of range.
    Iops,
    /// Bytes a second out of range.
    Bytes,
    /// A burst that is not above the rate, or one of no limit.
    Burst,
    /// Seconds of a burst out of range, or seconds without a burst.
    BurstSeconds,
}

impl LimitProblem {
    /// A sentence for people.
    #[must_use]
    pub const fn wanted(self) -> &'static str {
        match self {
            Self::Iops => "1 to 100,000,000 IOs a second",
            Self::Bytes => "64 KiB to 1 TiB a second",
            Self::Burst => "a burst is above the rate, and within what a rate may be",
            Self::BurstSeconds => "a burst lasts 1 to 3,600 seconds",
        }
    }
}

impl RateLimit {
    /// No limit.
    pub const NONE: Self = Self { rate: 0, burst: 0, burst_seconds: 0 };

    /// Whether everything may pass.
    #[must_use]
    pub const fn is_none(&self) -> bool {
        self.rate == 0
    }

    /// Whether a volume may have this limit of a kind.
    ///
    /// # Errors
    /// [`LimitProblem`]: the first thing wrong.
    pub fn check(&self, kind: LimitKind) -> Result<(), LimitProblem> {
        let (allowed, problem) = if kind.counts_bytes() {
            (QOS_BYTES_PER_SECOND_MIN..=QOS_BYTES_PER_SECOND_MAX, LimitProblem::Bytes)
        } else {
            (1..=QOS_IOPS_MAX, LimitProblem::Iops)
        };
        if !self.is_none() && !allowed.contains(&self.rate) {
            return Err(problem);
        }
        if self.burst == 0 {
            return if self.burst_seconds == 0 { Ok(()) } else { Err(LimitProblem::BurstSeconds) };
        }
        if self.is_none() || self.burst <= self.rate || !allowed.contains(&self.burst) {
            return Err(LimitProblem::Burst);
        }
        let is_length = (1..=QOS_BURST_SECONDS_MAX).contains(&self.burst_seconds);
        if is_length { Ok(()) } else { Err(LimitProblem::BurstSeconds) }
    }
}

/// All limits of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VolumeLimits([RateLimit; 6]);

impl VolumeLimits {
    /// No limits.
    pub const NONE: Self = Self([RateLimit::NONE; 6]);

    /// The limit of a kind.
    #[must_use]
    pub const fn get(&self, kind: LimitKind) -> RateLimit {
        self.0[kind as usize]
    }

    /// These limits with another one of a kind.
    #[must_use]
    pub const fn with(mut self, kind: LimitKind, limit: RateLimit) -> Self {
        self.0[kind as usize] = limit;
        self
    }

    /// Whether everything may pass.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.0.iter().all(RateLimit::is_none)
    }

    /// The kinds that are limited.
    pub fn set(&self) -> impl Iterator<Item = (LimitKind, RateLimit)> {
        let limits = *self;
        LimitKind::ALL.into_iter().map(move |kind| (kind, limits.get(kind))).filter(|(_, limit)| !limit.is_none())
    }
}

/// New limits for some kinds; the others stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LimitChanges([Option<RateLimit>; 6]);

impl LimitChanges {
    /// These changes and one more.
    #[must_use]
    pub const fn with(mut self, kind: LimitKind, limit: RateLimit) -> Self {
        self.0[kind as usize] = Some(limit);
        self
    }

    /// The new limit of a kind.
    #[must_use]
    pub const fn get(&self, kind: LimitKind) -> Option<RateLimit> {
        self.0[kind as usize]
    }

    /// Whether nothing changes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Option::is_none)
    }

    /// The limits after the changes.
    #[must_use]
    pub fn apply(&self, to: VolumeLimits) -> VolumeLimits {
        let changed = |limits: VolumeLimits, kind| self.get(kind).map_or(limits, |limit| limits.with(kind, limit));
        LimitKind::ALL.into_iter().fold(to, changed)
    }

    /// Whether a volume may have the new limits.
    ///
    /// # Errors
    /// The first kind whose limit is wrong, and why.
    pub fn check(&self) -> Result<(), (LimitKind, LimitProblem)> {
        LimitKind::ALL.into_iter().try_for_each(|kind| {
            self.get(kind).map_or(Ok(()), |limit| limit.check(kind)).map_err(|problem| (kind, problem))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn limit(rate: u64, burst: u64, burst_seconds: u32) -> RateLimit {
        RateLimit { rate, burst, burst_seconds }
    }

    #[test]
    fn limits_are_checked() {
        use LimitKind::{Bytes, Iops};
        for (good, kind) in [
            (RateLimit::NONE, Iops),
            (limit(1, 0, 0), Iops),
            (limit(500, 2000, 30), Iops),
            (limit(64 << 10, 0, 0), Bytes),
            (limit(1 << 20, 1 << 40, 3600), Bytes),
        ] {
            assert_eq!(good.check(kind), Ok(()), "{good:?}");
        }
        for (bad, kind, problem) in [
            (limit(QOS_IOPS_MAX + 1, 0, 0), Iops, LimitProblem::Iops),
            (limit(1000, 0, 0), Bytes, LimitProblem::Bytes),
            (limit((1 << 40) + 1, 0, 0), Bytes, LimitProblem::Bytes),
            (limit(0, 5, 5), Iops, LimitProblem::Burst),
            (limit(500, 500, 5), Iops, LimitProblem::Burst),
            (limit(500, QOS_IOPS_MAX + 1, 5), Iops, LimitProblem::Burst),
            (limit(500, 600, 0), Iops, LimitProblem::BurstSeconds),
            (limit(500, 600, 3601), Iops, LimitProblem::BurstSeconds),
            (limit(500, 0, 1), Iops, LimitProblem::BurstSeconds),
        ] {
            assert_eq!(bad.check(kind), Err(problem), "{bad:?}");
        }
    }

    #[test]
    fn changes_leave_other_kinds_alone() {
        let before = VolumeLimits::NONE.with(LimitKind::Iops, limit(5, 0, 0)).with(LimitKind::Bytes, limit(1 << 20, 0, 0));
        let changes = LimitChanges::default().with(LimitKind::Iops, RateLimit::NONE).with(LimitKind::WriteIops, limit(7, 0, 0));
        let after = changes.apply(before);
        assert_eq!(after.set().collect::<Vec<_>>(), [
            (LimitKind::WriteIops, limit(7, 0, 0)),
            (LimitKind::Bytes, limit(1 << 20, 0, 0)),
        ]);
        assert!(LimitChanges::default().is_empty() && !changes.is_empty());
        assert_eq!(LimitChanges::default().apply(before), before);
        let wrong = changes.with(LimitKind::ReadBytes, limit(1, 0, 0));
        assert_eq!(wrong.check(), Err((LimitKind::ReadBytes, LimitProblem::Bytes)));
    }
}
