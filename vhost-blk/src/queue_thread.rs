//! The thread of one virtqueue: sleeps until its ring starts, runs the queue's loop, and sleeps again until it is ended.
//!
//! Used by the back end, one for each queue it offers. Invariants: a call that comes while the loop runs is kept, so the
//! ring is looked at once more after it; an end is seen only between two runs, so whoever ends a thread must have closed
//! its queue first.

use std::sync::mpsc::SyncSender;
use std::sync::{Condvar, Mutex, PoisonError};

#[derive(Debug, Default)]
struct Wanted {
    run: bool,
    end: bool,
    warm_up: Option<SyncSender<()>>,
}

/// What the thread has to do next.
#[derive(Debug)]
pub(crate) enum Call {
    /// Look at the ring.
    Run,
    /// Make the device's handle ready, then say so.
    WarmUp(SyncSender<()>),
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

    /// The ring is going to start.
    pub(crate) fn warm_up(&self, ready: SyncSender<()>) {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).warm_up = Some(ready);
        self.changed.notify_one();
    }

    /// The thread is to end.
    pub(crate) fn end(&self) {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).end = true;
        self.changed.notify_one();
    }

    /// Waits for a call; `None`: the end.
    pub(crate) fn wait(&self) -> Option<Call> {
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        let nothing = |wanted: &mut Wanted| !wanted.run && !wanted.end && wanted.warm_up.is_none();
        let waited = self.changed.wait_while(wanted, nothing);
        let mut wanted = waited.unwrap_or_else(PoisonError::into_inner);
        if wanted.end {
            return None;
        }
        if let Some(ready) = wanted.warm_up.take() {
            return Some(Call::WarmUp(ready));
        }
        wanted.run = false;
        Some(Call::Run)
    }
}

#[cfg(test)]
mod tests {
    use super::{Call, Summons};

    #[test]
    fn calls_are_kept_but_not_counted_and_the_end_stays() {
        let summons = Summons::default();
        summons.call();
        summons.call();
        assert!(matches!(summons.wait(), Some(Call::Run)));
        summons.call();
        summons.warm_up(std::sync::mpsc::sync_channel(1).0);
        assert!(matches!(summons.wait(), Some(Call::WarmUp(_))));
        assert!(matches!(summons.wait(), Some(Call::Run)));
        summons.end();
        summons.call();
        assert!(summons.wait().is_none());
        assert!(summons.wait().is_none());
    }
}
