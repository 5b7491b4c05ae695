//! What a deterministic simulation tells the code that runs inside it. Used by the few seams that a thread-local can serve: the wall
//! clock, blocking work, observation of Raft, and planted bugs.
//!
//! A simulation runs all processes of a cluster on one thread, one after the other, each on a runtime of its own with a paused clock,
//! and says so to this module on that thread. Invariants: on a thread that was never told, every question is answered with "no" (one
//! look at a thread-local), so production behaves as if this module did not exist; only the simulation calls the functions that
//! tell (`ogee-sim`; checked by `common/tests/tidy.rs`). Absent: network (`ogee_proto::net`) and disk (`ogee_disk`), which have
//! their own seams of the same kind.

use std::cell::{Cell, RefCell};
use std::time::Duration;
use tokio::task::JoinHandle;

/// A bug that can be planted, to see that it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Canary {
    /// The log says that a batch is durable before it is written.
    AckBeforeFlush,
    /// A copyset takes writes of attach epochs below its fence.
    SkipFence,
    /// A checkpoint leaves out a row of the page map.
    ForgetRow,
    /// A leader serves reads without looking at its lease.
    IgnoreLease,
    /// A hold is acknowledged before the writes in flight are done.
    EarlyHold,
}

/// What a replica did, for invariants over all replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// It leads the group in a term.
    Leads {
        /// The group.
        group: u64,
        /// The term.
        term: u64,
        /// Its replica id.
        replica: u64,
    },
    /// It applied an entry.
    Applied {
        /// The group.
        group: u64,
        /// The entry's index.
        index: u64,
        /// The entry's term.
        term: u64,
        /// CRC32C of the command.
        crc: u32,
        /// Its replica id.
        replica: u64,
    },
}

thread_local! {
    static NOW: Cell<Option<u64>> = const { Cell::new(None) };
    static CANARY: Cell<Option<Canary>> = const { Cell::new(None) };
    static SEEN: RefCell<Vec<Seen>> = const { RefCell::new(vec![]) };
}

/// Whether this thread runs a simulation.
#[must_use]
pub fn running() -> bool {
    NOW.get().is_some()
}

/// The time of the simulated world, nanoseconds; each call gives a later one, so that events can be ordered. `None` outside.
#[must_use]
pub fn tick_ns() -> Option<u64> {
    let now = NOW.get()?;
    NOW.set(Some(now + 1));
    Some(now)
}

/// Sets the time of the simulated world; it never goes back. From the first call on this thread runs a simulation.
pub fn set_ns(now: u64) {
    NOW.set(Some(NOW.get().unwrap_or(0).max(now)));
}

/// Plants a bug on this thread, in a simulation only.
pub fn plant(canary: Canary) {
    CANARY.set(Some(canary));
}

/// Whether this bug is planted: never outside a simulation.
#[must_use]
pub fn planted(canary: Canary) -> bool {
    CANARY.get() == Some(canary) && running()
}

/// Notes what a replica did; nothing outside a simulation.
pub fn saw(seen: impl FnOnce() -> Seen) {
    if running() {
        SEEN.with_borrow_mut(|all| all.push(seen()));
    }
}

/// Takes what was noted since the last call.
#[must_use]
pub fn take_seen() -> Vec<Seen> {
    SEEN.take()
}

/// Runs work that may wait for a device: on tokio's blocking pool, or in a simulation on a task of the same thread, so that the order of
/// events does not depend on the machine.
pub fn spawn_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    if running() { tokio::spawn(async move { work() }) } else { tokio::task::spawn_blocking(work) }
}

/// How long a log write takes in a simulation, and how much of it would have reached the disk when it is cut off: both drawn anew.
#[must_use]
pub fn log_write() -> (Duration, f64) {
    (crate::rng::jitter(Duration::from_micros(1500)), crate::rng::share())
}
