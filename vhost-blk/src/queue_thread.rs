//! The thread of one virtqueue: sleeps until its ring starts, runs the queue's loop, and sleeps again until it is ended.
//!
//! Used by the back end, one for each queue it offers. Invariants: a call that comes while the loop runs is kept, so the
//! ring is looked at once more after it; an end is seen only between two runs, so whoever ends a thread must have closed
//! its queue first.

use std::sync::{Condvar, Mutex, PoisonError};

#[derive(Debug, Default)]
struct Wanted {
    run: bool,
    end: bool,
}

/// What is asked of the thread.
#[derive(Debug, Default)]
pub(crate) struct Summons {
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

impl Summons {
    /// The ring may have started.
    pub(crate) fn call(&self) {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).run = true;
        self.changed.notify_one();
    }

    /// The thread is to end.
    pub(crate) fn end(&self) {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).end = true;
        self.changed.notify_one();
    }

    /// Waits for a call (true) or the end (false).
    pub(crate) fn wait(&self) -> bool {
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_while(wanted, |wanted| !wanted.run && !wanted.end);
        let mut wanted = waited.unwrap_or_else(PoisonError::into_inner);
        wanted.run = false;
        !wanted.end
    }
}

#[cfg(test)]
mod tests {
    use super::Summons;

    #[test]
    fn calls_are_kept_but_not_counted_and_the_end_stays() {
        let summons = Summons::default();
        summons.call();
        summons.call();
        assert!(summons.wait());
        summons.call();
        assert!(summons.wait());
        summons.end();
        summons.call();
        assert!(!summons.wait());
        assert!(!summons.wait());
    }
}
