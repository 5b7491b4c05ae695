//! The order of writes to one export: two that overlap never run at the same time, whatever connections they came by.
//!
//! Why this is needed: a client that loses a connection sends the write W that was not answered once more, on another
//! connection, and then writes something newer to the same place. If the first W were still under way in the SDK, it
//! could land last. Here the repeated W waits for the first, so what the client writes after its answer is later than
//! both. `connection.rs` therefore finishes what is in flight when a client is gone, and a request that it has taken
//! from the socket is entered here before anything is awaited.
//!
//! Invariants: a write waits only for overlapping ones that entered before it, so nobody waits in a circle; whoever
//! leaves (or is dropped) wakes all that wait for it. Bounded by the requests of all connections. Cost without overlap:
//! one lock and a walk over the writes in flight. Absent: reads; a client that reads and writes one place at once has
//! no order between them.

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

/// See the module's documentation.
#[derive(Debug, Default)]
pub(crate) struct WriteOrder(Mutex<State>);

/// The place of one write in the order; it leaves when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    order: Arc<WriteOrder>,
    number: u64,
}

impl WriteOrder {
    /// Takes the next place for a range of bytes. Never waits.
    pub(crate) fn enter(self: &Arc<Self>, range: Range<u64>) -> Place {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.active.insert(number, Entry { range, waiters: vec![] });
        Place { order: self.clone(), number }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    /// Waits until no earlier write overlaps this one. Cancellation-safe.
    pub(crate) async fn turn(&self) {
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

impl Drop for Place {
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
