//! The order of writes to one volume: two that overlap never run at the same time, whatever handles they came by.
//!
//! Why this is needed: an answer may be lost, and then the write A is sent once more. A write B to the same place that runs
//! beside it could land between the two: a reader sees A, B completes, and the repeated A is there again. So B waits until
//! A has its outcome. `volume.rs` enters every write, discard and write-zeroes here. A front end whose client repeats
//! requests by itself keeps an order of its own, from the moment it took a request from the socket: an NBD client that
//! loses a connection sends the write that was not answered on another one, and then something newer to the same place.
//!
//! Invariants: a write waits only for overlapping ones that entered before it, so nobody waits in a circle; whoever
//! leaves (or is dropped) wakes all that wait for it. Bounded by what front ends have in flight. Cost without overlap:
//! a lock and a walk over the writes in flight. A write that was given up (IO timeout, dropped future) leaves, and may
//! still land: its outcome is unknown, as section 7 of ARCHITECTURE.md says. Absent: reads; a client that reads and
//! writes one place at once has no order between them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::oneshot;

#[derive(Debug)]
struct Entry {
    range: Range<u64>,
    /// Dropped when the entry goes, which wakes the receivers.
    waiters: Vec<oneshot::Sender<()>>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    active: BTreeMap<u64, Entry>,
}

/// The writes in flight to one volume.
#[derive(Debug, Default)]
pub struct WriteOrder(Mutex<State>);

/// The place of one write in the order; it leaves when dropped.
#[derive(Debug)]
pub struct WritePlace {
    order: Arc<WriteOrder>,
    number: u64,
}

impl WriteOrder {
    /// Takes the next place for a range of bytes. Never waits.
    #[must_use]
    pub fn enter(self: &Arc<Self>, range: Range<u64>) -> WritePlace {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.active.insert(number, Entry { range, waiters: vec![] });
        WritePlace { order: self.clone(), number }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl WritePlace {
    /// Waits until no earlier write overlaps this one. Cancellation-safe.
    pub async fn turn(&self) {
        while let Some(gone) = self.earlier() {
            // An error: the sender was dropped with the entry, which is what is waited for.
            let _ = gone.await;
        }
    }

    /// The end of an earlier write that overlaps.
    fn earlier(&self) -> Option<oneshot::Receiver<()>> {
        let mut state = self.order.lock();
        let mine = state.active.get(&self.number)?.range.clone();
        let overlaps = |entry: &Entry| entry.range.start < mine.end && mine.start < entry.range.end;
        let (_, entry) = state.active.range_mut(..self.number).find(|(_, entry)| overlaps(entry))?;
        let (sender, receiver) = oneshot::channel();
        entry.waiters.push(sender);
        Some(receiver)
    }
}

impl Drop for WritePlace {
    fn drop(&mut self) {
        let entry = self.order.lock().active.remove(&self.number);
        drop(entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn overlapping_writes_run_in_order_and_others_at_once() {
        let order = Arc::new(WriteOrder::default());
        let first = order.enter(0..4096);
        let second = order.enter(4095..8192);
        let apart = order.enter(8192..8193);
        let third = order.enter(0..1);
        assert!(first.turn().now_or_never().is_some());
        assert!(apart.turn().now_or_never().is_some());
        let (mut waits_second, mut waits_third) = (Box::pin(second.turn()), Box::pin(third.turn()));
        assert!((&mut waits_second).now_or_never().is_none());
        assert!((&mut waits_third).now_or_never().is_none());
        drop(first);
        assert!(waits_second.now_or_never().is_some());
        assert!(waits_third.now_or_never().is_some());
    }

    #[test]
    fn a_later_write_does_not_overtake_one_that_waits() {
        let order = Arc::new(WriteOrder::default());
        let first = order.enter(0..10);
        let second = order.enter(5..15);
        let third = order.enter(12..20);
        assert!(third.turn().now_or_never().is_none(), "it overlaps the second, which waits for the first");
        drop(first);
        assert!(second.turn().now_or_never().is_some());
        assert!(third.turn().now_or_never().is_none());
        drop(second);
        assert!(third.turn().now_or_never().is_some());
    }
}
