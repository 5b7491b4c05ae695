//! One operation at a time per volume, for those that take several commands: snapshots, clones of live volumes, rollback.
//!
//! Invariants: while an operation's [`Turn`] exists, no other one of the volume runs and the leader's duties leave its
//! half-made snapshots alone; a volume without an operation takes no memory. The state machine does not rely on this:
//! each command says what it expects.

use ogee_common::id::VolumeId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

type Locks = Arc<Mutex<HashMap<VolumeId, Arc<AsyncMutex<()>>>>>;

/// The volumes with an operation under way.
#[derive(Debug, Default)]
pub(crate) struct VolumeOps(Locks);

/// An operation's turn; it ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Turn {
    locks: Locks,
    volume: VolumeId,
    guard: Option<OwnedMutexGuard<()>>,
}

impl VolumeOps {
    fn of(&self, volume: VolumeId) -> Arc<AsyncMutex<()>> {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        locks.entry(volume).or_default().clone()
    }

    fn turn(&self, volume: VolumeId, guard: OwnedMutexGuard<()>) -> Turn {
        Turn { locks: self.0.clone(), volume, guard: Some(guard) }
    }

    /// Waits for a turn. Bounded by the timeouts of the operations before.
    pub(crate) async fn wait(&self, volume: VolumeId) -> Turn {
        let guard = self.of(volume).lock_owned().await;
        self.turn(volume, guard)
    }

    /// A turn, if no operation is under way.
    pub(crate) fn try_now(&self, volume: VolumeId) -> Option<Turn> {
        let guard = self.of(volume).try_lock_owned().ok()?;
        Some(self.turn(volume, guard))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.guard = None;
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever waits holds a second reference; new ones need the map, which is locked.
        if locks.get(&self.volume).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            locks.remove(&self.volume);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn turns_follow_each_other_and_leave_nothing() {
        let ops = VolumeOps::default();
        let first = ops.wait(VolumeId(1)).await;
        assert!(ops.try_now(VolumeId(1)).is_none());
        assert!(ops.try_now(VolumeId(2)).is_some(), "another volume");
        let waiting = ops.wait(VolumeId(1));
        let (second, ()) = tokio::join!(waiting, async { drop(first) });
        assert!(ops.try_now(VolumeId(1)).is_none());
        drop(second);
        assert!(ops.0.lock().expect("lock").is_empty());
    }
}
