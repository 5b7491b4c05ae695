//! Changes of members that the MDS orders, for copysets that are led here.
//!
//! One step at a time: an order is repeated with every heartbeat until the MDS has seen its effect, so each step looks at
//! what is and does what comes next. Invariants: a replica gets a vote only when it has caught up; at most one step per
//! copyset is under way; a change that has begun is finished before the opposite is tried (a group between two
//! configurations needs a majority of both).

use super::copysets::Hosted;
use ogee_common::id::{CopysetId, ReplicaId};
use ogee_proto::mds;
use ogee_raft::MembershipError;
use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

/// A replica that lacks no more entries than this is let vote: the rest takes a moment.
const CAUGHT_UP_ENTRIES: u64 = 256;

/// Which copysets have a step under way.
#[derive(Debug, Default)]
pub(super) struct Moves(Mutex<HashSet<CopysetId>>);

/// What an order asks for next. Pure.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// Take the replica in, without a vote.
    Add,
    /// Make these the voters.
    Vote(BTreeSet<ReplicaId>),
    /// Take the replica out again.
    Remove,
    /// Wait: nothing to do, or not yet.
    Wait,
}

/// What is known of a group that is led here.
struct Group {
    voters: BTreeSet<ReplicaId>,
    learners: BTreeSet<ReplicaId>,
    /// No change of members is under way.
    settled: bool,
    /// Entries that the new replica lacks.
    behind: Option<u64>,
}

fn next(group: &Group, added: ReplicaId, removed: ReplicaId, cancel: bool) -> Step {
    let mut after: BTreeSet<ReplicaId> = group.voters.iter().copied().filter(|r| *r != removed).collect();
    after.insert(added);
    if group.voters.contains(&added) {
        // Through, or begun and to be finished: that goes for a cancelled one as well.
        return if group.settled && !group.voters.contains(&removed) { Step::Wait } else { Step::Vote(after) };
    }
    match (cancel, group.learners.contains(&added)) {
        (true, true) => Step::Remove,
        (true, false) => Step::Wait,
        (false, false) => Step::Add,
        (false, true) if group.behind.is_some_and(|n| n <= CAUGHT_UP_ENTRIES) => Step::Vote(after),
        (false, true) => Step::Wait,
    }
}

impl Moves {
    /// Takes the next step of an order, in a task of its own.
    pub(super) fn follow(self: &Arc<Self>, hosted: Hosted, order: &mds::MoveOrder) {
        let Some(added) = &order.added else { return };
        if !hosted.group.is_leader() || !self.busy().insert(hosted.copyset) {
            return;
        }
        let (process, this) = (added.chunkserver, self.clone());
        let (added, removed, cancel) = (ReplicaId(added.replica), ReplicaId(order.removed), order.cancel);
        tokio::spawn(async move {
            let step = next(&state(&hosted, added), added, removed, cancel);
            if step != Step::Wait {
                tracing::info!(copyset = %hosted.copyset, ?step, %added, %removed, "change of members");
            }
            if let Err(error) = take(&hosted, step, added, process).await {
                tracing::info!(copyset = %hosted.copyset, %error, "change of members is tried again");
            }
            this.busy().remove(&hosted.copyset);
        });
    }

    fn busy(&self) -> std::sync::MutexGuard<'_, HashSet<CopysetId>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn state(hosted: &Hosted, added: ReplicaId) -> Group {
    Group {
        voters: hosted.group.members().into_keys().collect(),
        learners: hosted.group.learners().into_keys().collect(),
        settled: hosted.group.settled_members().is_some(),
        behind: hosted.group.behind(added),
    }
}

async fn take(hosted: &Hosted, step: Step, added: ReplicaId, process: u32) -> Result<(), MembershipError> {
    match step {
        Step::Add => hosted.group.add_learner(added, process).await,
        Step::Vote(voters) => hosted.group.change_voters(voters).await,
        Step::Remove => hosted.group.remove_learner(added).await,
        Step::Wait => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(ids: &[u64]) -> BTreeSet<ReplicaId> {
        ids.iter().map(|id| ReplicaId(*id)).collect()
    }

    fn group(voters: &[u64], learners: &[u64], settled: bool, behind: Option<u64>) -> Group {
        Group { voters: set(voters), learners: set(learners), settled, behind }
    }

    #[test]
    fn each_step_follows_from_what_is() {
        let step = |group, cancel| next(&group, ReplicaId(9), ReplicaId(2), cancel);
        let vote = Step::Vote(set(&[1, 3, 9]));
        assert_eq!(step(group(&[1, 2, 3], &[], true, None), false), Step::Add);
        assert_eq!(step(group(&[1, 2, 3], &[9], true, None), false), Step::Wait);
        assert_eq!(step(group(&[1, 2, 3], &[9], true, Some(CAUGHT_UP_ENTRIES + 1)), false), Step::Wait);
        assert_eq!(step(group(&[1, 2, 3], &[9], true, Some(3)), false), vote);
        for cancel in [false, true] {
            assert_eq!(step(group(&[1, 2, 3, 9], &[], false, Some(0)), cancel), vote, "between two configurations");
            assert_eq!(step(group(&[1, 3, 9], &[], false, Some(0)), cancel), vote, "not committed yet");
            assert_eq!(step(group(&[1, 3, 9], &[], true, Some(0)), cancel), Step::Wait, "through");
        }
        assert_eq!(step(group(&[1, 2, 3], &[9], true, Some(0)), true), Step::Remove);
        assert_eq!(step(group(&[1, 2, 3], &[], true, None), true), Step::Wait);
    }
}
