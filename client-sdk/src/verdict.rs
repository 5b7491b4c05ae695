//! What an answer of a chunkserver means: the table of statuses, and which attempts of a write can still land after it.
//!
//! Used by `attempt.rs`. Pure. Invariant: an attempt counts as refused only when its answer says that it was never
//! proposed, or that the state machine refused it; `NotLeader` and `NotReady` do not say so, because a leader may lose
//! its office, or its quorum, after it proposed. Absent: what is done about it.

use crate::block_device::IoErrorKind;
use crate::gate::Unsettled;
use ogee_common::id::VolumeSeq;
use ogee_proto::data::{Redirect, Status};

/// What an answer asks the loop to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// It succeeded.
    Done,
    /// Somebody else leads, or in another term. It may have been proposed.
    Moved(Option<Redirect>),
    /// This chunkserver is of no use now: find another. It may have been proposed.
    Lost,
    /// This chunkserver is of no use, and never took it.
    Misplaced,
    /// Send it again; it was not taken.
    Again,
    /// Send it again with a seq of at least this.
    Stale(Option<VolumeSeq>),
    /// Raise the fence first.
    Reopen,
    /// There is no space.
    NoSpace,
    /// Data and checksums differ.
    Mismatch,
    /// It will never succeed.
    Never(IoErrorKind),
}

/// The table of answers. Pure.
pub(crate) fn judge(status: Status, head: &[u8]) -> Next {
    match status {
        Status::Ok => Next::Done,
        Status::NotLeader => Next::Moved(Redirect::decode(head).ok().filter(|r| r.leader != 0)),
        Status::NotReady | Status::DiskFailed | Status::Unknown => Next::Lost,
        Status::UnknownCopyset | Status::WrongTarget | Status::Version => Next::Misplaced,
        Status::Overloaded | Status::OldGeneration => Next::Again,
        Status::StaleSeq => Next::Stale(head.try_into().ok().map(|b| VolumeSeq(u64::from_le_bytes(b)))),
        Status::LayerNotOpen => Next::Reopen,
        Status::NoSpace => Next::NoSpace,
        Status::PayloadChecksum | Status::Corrupt => Next::Mismatch,
        Status::Fenced => Next::Never(IoErrorKind::Fenced),
        Status::LayerGone => Next::Never(IoErrorKind::Closed),
        Status::BadRequest | Status::Forbidden => Next::Never(IoErrorKind::InvalidInput),
    }
}

/// Which attempts can still land after this answer.
pub(crate) fn settle(account: &mut Unsettled<'_>, before: VolumeSeq, next: Next) {
    match next {
        Next::Done | Next::Never(IoErrorKind::Fenced | IoErrorKind::Closed) => account.settled(),
        Next::Stale(Some(minimum)) => account.settled_below(minimum, before),
        Next::Moved(_) | Next::Lost => {}
        Next::Misplaced | Next::Again | Next::Stale(None) | Next::Reopen | Next::NoSpace | Next::Mismatch => {
            account.refused(before);
        }
        Next::Never(_) => account.refused(before),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_a_verdict_and_hints_are_read() {
        for status in Status::ALL {
            assert_eq!(judge(*status, &[]) == Next::Done, *status == Status::Ok);
        }
        let hint = Redirect { leader: 3, term: ogee_common::id::Term(9) };
        assert_eq!(judge(Status::NotLeader, &hint.encode()), Next::Moved(Some(hint)));
        assert_eq!(judge(Status::NotLeader, &[1]), Next::Moved(None));
        assert_eq!(judge(Status::StaleSeq, &7u64.to_le_bytes()), Next::Stale(Some(VolumeSeq(7))));
        assert_eq!(judge(Status::StaleSeq, &[7]), Next::Stale(None));
    }

    #[test]
    fn only_a_sure_refusal_takes_an_attempt_back() {
        use futures_util::FutureExt;
        let seq = VolumeSeq(3);
        // Whether a write whose only attempt got this answer may still land.
        let may_land = |next: Next| {
            let gate = crate::gate::Gate::new(seq);
            let ticket = gate.enter_write().now_or_never().expect("open").expect("running");
            let mut part = ticket.part();
            let before = part.sending(seq);
            settle(&mut part, before, next);
            drop(part);
            drop(ticket);
            gate.hold(1);
            gate.drained(1).now_or_never() == Some(crate::gate::Drained::Never)
        };
        for status in Status::ALL {
            let unsure = matches!(status, Status::NotLeader | Status::NotReady | Status::DiskFailed | Status::Unknown);
            assert_eq!(may_land(judge(*status, &4u64.to_le_bytes())), unsure, "{status:?}");
        }
        assert!(may_land(Next::Lost), "no answer at all");
    }
}
