//! The leader's memory of owners of service tasks: when each was last heard of, and how far it is.
//!
//! Invariants: nothing here is needed for safety, which is the fence's ([`crate::machine::service_tasks`]), so it is not replicated, rests on no
//! wall clock, and a new leader starts empty; an owner that this leader has not had the time to hear of counts as alive, so a change of the
//! leader takes no task from anybody, and delays a takeover by one lease at most. Bounded by the number of open tasks.

use ogee_common::clock::{self, Instant};
use ogee_common::id::{ServiceTaskId, Term};
use ogee_common::limits::SERVICE_TASK_LEASE;
use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How far an owner says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Far {
    /// In a unit of the task's kind.
    pub(crate) done: u64,
    /// 0: not known.
    pub(crate) total: u64,
}

#[derive(Debug)]
struct Lease {
    fence: u64,
    heard: Instant,
    far: Far,
}

#[derive(Debug, Default)]
struct State {
    term: Term,
    since: Option<Instant>,
    leases: HashMap<ServiceTaskId, Lease>,
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct Leases(Mutex<State>);

impl Leases {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node leads in `term`; what is known from an earlier term is forgotten.
    pub(crate) fn enter(&self, term: Term) {
        let mut state = self.lock();
        if term > state.term {
            *state = State { term, since: Some(clock::now()), ..State::default() };
        }
    }

    /// The owner with this fence was heard of.
    pub(crate) fn heard(&self, task: ServiceTaskId, fence: u64, far: Far) {
        let lease = Lease { fence, heard: clock::now(), far };
        let mut state = self.lock();
        // Of two that call at the same time the older may come second.
        if state.leases.get(&task).is_none_or(|known| known.fence <= fence) {
            state.leases.insert(task, lease);
        }
    }

    /// Whether the owner with this fence was silent for so long that another may take the task.
    pub(crate) fn has_lapsed(&self, task: ServiceTaskId, fence: u64) -> bool {
        let state = self.lock();
        let heard = state.leases.get(&task).filter(|l| l.fence == fence).map(|l| l.heard).or(state.since);
        heard.is_some_and(|at| clock::now().saturating_duration_since(at) >= SERVICE_TASK_LEASE)
    }

    /// How far the owner with this fence is, if it was heard of.
    pub(crate) fn far(&self, task: ServiceTaskId, fence: u64) -> Option<Far> {
        self.lock().leases.get(&task).filter(|l| l.fence == fence).map(|l| l.far)
    }

    /// Forgets all tasks but these.
    pub(crate) fn keep(&self, open: &HashSet<ServiceTaskId>) {
        self.lock().leases.retain(|task, _| open.contains(task));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const TASK: ServiceTaskId = ServiceTaskId(1);

    #[tokio::test(start_paused = true)]
    async fn an_owner_that_is_silent_loses_its_lease() {
        let leases = Leases::default();
        leases.enter(Term(1));
        assert!(!leases.has_lapsed(TASK, 1), "this leader has not had the time to hear of it");
        tokio::time::advance(SERVICE_TASK_LEASE).await;
        assert!(leases.has_lapsed(TASK, 1));
        leases.heard(TASK, 1, Far { done: 3, total: 9 });
        assert!(!leases.has_lapsed(TASK, 1));
        assert_eq!(leases.far(TASK, 1), Some(Far { done: 3, total: 9 }));
        leases.heard(TASK, 2, Far::default());
        leases.heard(TASK, 1, Far::default());
        assert_eq!((leases.far(TASK, 1), leases.far(TASK, 2)), (None, Some(Far::default())), "late news change nothing");
        tokio::time::advance(SERVICE_TASK_LEASE - Duration::from_millis(1)).await;
        assert!(!leases.has_lapsed(TASK, 2));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(leases.has_lapsed(TASK, 2));
        leases.enter(Term(2));
        assert!(!leases.has_lapsed(TASK, 2), "a new leader waits a lease");
        leases.heard(TASK, 2, Far::default());
        leases.keep(&HashSet::new());
        assert_eq!(leases.far(TASK, 2), None);
    }
}
