//! Limits of volumes between the words of `ogee_common::qos` and the messages of the MDS.
//!
//! Used by the MDS, the client SDK and the command line. Invariant: a limit that is absent in a message and one whose
//! rate is 0 mean the same in what the MDS says; in what it is asked, an absent one changes nothing. Absent: checks of
//! ranges, which are the MDS's.

use crate::mds;
use ogee_common::qos::{LimitChanges, LimitKind, RateLimit, VolumeLimits};

const fn slot(message: &mds::VolumeLimits, kind: LimitKind) -> Option<&mds::RateLimit> {
    match kind {
        LimitKind::Iops => message.iops.as_ref(),
        LimitKind::ReadIops => message.read_iops.as_ref(),
        LimitKind::WriteIops => message.write_iops.as_ref(),
        LimitKind::Bytes => message.bytes.as_ref(),
        LimitKind::ReadBytes => message.read_bytes.as_ref(),
        LimitKind::WriteBytes => message.write_bytes.as_ref(),
    }
}

fn message_of(limit: impl Fn(LimitKind) -> Option<RateLimit>) -> mds::VolumeLimits {
    let of = |kind| {
        limit(kind).map(|l| mds::RateLimit { rate: l.rate, burst: l.burst, burst_seconds: l.burst_seconds })
    };
    mds::VolumeLimits {
        iops: of(LimitKind::Iops),
        read_iops: of(LimitKind::ReadIops),
        write_iops: of(LimitKind::WriteIops),
        bytes: of(LimitKind::Bytes),
        read_bytes: of(LimitKind::ReadBytes),
        write_bytes: of(LimitKind::WriteBytes),
    }
}

impl From<VolumeLimits> for mds::VolumeLimits {
    fn from(limits: VolumeLimits) -> Self {
        message_of(|kind| Some(limits.get(kind)).filter(|limit| !limit.is_none()))
    }
}

impl From<LimitChanges> for mds::VolumeLimits {
    fn from(changes: LimitChanges) -> Self {
        message_of(|kind| changes.get(kind))
    }
}

/// What a message changes.
#[must_use]
pub fn limit_changes(message: Option<&mds::VolumeLimits>) -> LimitChanges {
    let Some(message) = message else { return LimitChanges::default() };
    LimitKind::ALL.into_iter().fold(LimitChanges::default(), |changes, kind| match slot(message, kind) {
        Some(l) => changes.with(kind, RateLimit { rate: l.rate, burst: l.burst, burst_seconds: l.burst_seconds }),
        None => changes,
    })
}

/// The limits that a message of the MDS says; none if it says nothing, as an older MDS does.
#[must_use]
pub fn volume_limits(message: Option<&mds::VolumeLimits>) -> VolumeLimits {
    limit_changes(message).apply(VolumeLimits::NONE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_and_changes_survive_their_messages() {
        let limit = |n: u64| RateLimit { rate: 1000 + n, burst: 5000 + n, burst_seconds: 7 };
        for (n, kind) in (0..).zip(LimitKind::ALL) {
            let limits = VolumeLimits::NONE.with(kind, limit(n));
            assert_eq!(volume_limits(Some(&limits.into())), limits);
            for changed in [limit(n), RateLimit::NONE] {
                let changes = LimitChanges::default().with(kind, changed);
                assert_eq!(limit_changes(Some(&changes.into())), changes);
            }
        }
        assert_eq!(volume_limits(None), VolumeLimits::NONE);
        assert!(limit_changes(None).is_empty());
        assert_eq!(mds::VolumeLimits::from(VolumeLimits::NONE), mds::VolumeLimits::default());
    }
}
