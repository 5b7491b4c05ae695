//! The load loop: one job is a target, a plan and as many slots as it has IOs in flight.
//!
//! A slot is one future that does one IO after the other; all slots of a thread run side by side on its runtime.
//! Invariants: nothing is allocated per IO here; the clock is read twice per IO, around the target's call and nothing
//! else; once the window is over no IO begins, and those in flight are waited for; with verification no two IOs of a
//! volume are on the same block at once.

use super::ledger::Entry;
use super::live::Live;
use super::plan::{Blocks, Op, Plan, SplitMix64, Verb};
use super::tally::{Tally, Window};
use super::target::{IoBuffer, Target, TargetError};
use super::verifier::Verifier;
use ogee_common::clock::now;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::time::Duration;

/// A slot whose IO failed waits this long, so that a dead device is not asked in a tight loop.
const ERROR_PAUSE: Duration = Duration::from_millis(10);

/// IOs of a slot after which the others of its thread get a turn, if it was never waited for any.
const TURNS: u64 = 64;

/// Where the working set lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    /// Its first byte.
    pub(crate) offset: u64,
    /// Bytes of a block.
    pub(crate) block_bytes: usize,
    /// Blocks.
    pub(crate) blocks: u64,
}

impl Region {
    fn offset_of(&self, block: u64) -> u64 {
        self.offset + block * self.block_bytes as u64
    }

    fn len_of(&self, op: &Op) -> usize {
        usize::try_from(op.count).expect("an IO is bounded by IO_BYTES_MAX") * self.block_bytes
    }

    /// All of it.
    #[must_use]
    pub(crate) const fn all(&self) -> Blocks {
        Blocks { first: 0, count: self.blocks }
    }
}

/// A job before its target is open.
#[derive(Debug)]
pub(crate) struct JobSpec<S> {
    /// What is opened.
    pub(crate) source: S,
    /// What is done.
    pub(crate) plan: Plan,
    /// Where.
    pub(crate) region: Region,
    /// IOs in flight.
    pub(crate) depth: usize,
    /// Most blocks of one IO.
    pub(crate) stride: u64,
    /// Contents of unverified writes.
    pub(crate) seed: u64,
    /// With verification.
    pub(crate) verifier: Option<Arc<Verifier>>,
}

/// A job at work.
pub(crate) struct Job<T> {
    /// What is loaded.
    pub(crate) target: T,
    /// What it came to.
    pub(crate) tally: RefCell<Tally>,
    plan: RefCell<Plan>,
    region: Region,
    verifier: Option<Arc<Verifier>>,
    live: Arc<Live>,
    window: Window,
    over: Cell<bool>,
}

impl<T: Target> Job<T> {
    /// Puts together what was opened.
    #[must_use]
    pub(crate) fn new<S>(spec: JobSpec<S>, target: T, live: Arc<Live>, window: Window) -> Self {
        Self {
            target,
            tally: RefCell::new(Tally::new()),
            plan: RefCell::new(spec.plan),
            region: spec.region,
            verifier: spec.verifier,
            live,
            window,
            over: Cell::new(false),
        }
    }

    /// Does one IO after the other until the window or the plan ends.
    pub(crate) async fn slot(&self, mut buffer: T::Buffer) {
        let mut entries: Vec<Entry> = Vec::new();
        for turn in 1u64.. {
            if self.over.get() || self.live.is_stopped() {
                return;
            }
            if turn.is_multiple_of(TURNS) {
                // A target that is always ready must not keep the other slots from their turn.
                tokio::task::yield_now().await;
            }
            let Some(op) = self.plan.borrow_mut().next() else { return };
            let done = match &self.verifier {
                None => self.io(op, &mut buffer).await,
                Some(verifier) => self.verified(verifier, op, &mut buffer, &mut entries).await,
            };
            if let Err(error) = done {
                self.over.set(self.over.get() || error.is_final);
                self.live.error();
                self.tally.borrow_mut().failed(&error);
                tokio::time::sleep(ERROR_PAUSE).await;
            }
        }
    }

    /// One IO, timed.
    async fn io(&self, op: Op, buffer: &mut T::Buffer) -> Result<(), TargetError> {
        let (offset, len) = (self.region.offset_of(op.block), self.region.len_of(&op));
        let start = now();
        let done = match op.verb {
            Verb::Read => self.target.read(offset, len, buffer).await,
            Verb::Write => self.target.write(offset, len, buffer).await,
            Verb::Flush => self.target.flush().await,
            Verb::Discard => self.target.discard(offset, len as u64).await,
        };
        let end = now();
        if end >= self.window.to {
            self.over.set(true);
        }
        if done.is_ok() {
            self.tally.borrow_mut().of(op.verb).record(start, end, &self.window);
            self.live.done(len as u64);
        }
        done
    }

    /// One IO on blocks that nobody else uses meanwhile; what is read is checked.
    async fn verified(
        &self, verifier: &Verifier, op: Op, buffer: &mut T::Buffer, entries: &mut Vec<Entry>,
    ) -> Result<(), TargetError> {
        if op.verb == Verb::Flush {
            return self.io(op, buffer).await;
        }
        let Some(op) = self.claim(verifier, op, entries).await else { return Ok(()) };
        let size = self.region.block_bytes;
        let place = |i: usize| self.region.offset_of(op.block) + (i * size) as u64;
        if op.verb == Verb::Write {
            for (i, (block, entry)) in buffer.fill().chunks_exact_mut(size).zip(&*entries).enumerate() {
                verifier.fill(block, place(i), entry.next());
            }
        }
        let done = self.io(op, buffer).await;
        for entry in entries.iter_mut().filter(|_| op.verb == Verb::Write) {
            let generation = entry.next();
            *entry = if done.is_ok() { entry.written(generation) } else { entry.uncertain(generation) };
        }
        if op.verb == Verb::Read && done.is_ok() {
            let blocks = buffer.contents().chunks_exact(size);
            for (i, (block, entry)) in blocks.zip(&*entries).enumerate() {
                verifier.check(block, place(i), *entry);
            }
        }
        for (block, entry) in (op.block..).zip(entries.iter()) {
            verifier.ledger.give_back(index(block), *entry);
        }
        done
    }

    /// Takes the operation's blocks, or, if another IO is on them, the next ones that are free.
    async fn claim(&self, verifier: &Verifier, op: Op, entries: &mut Vec<Entry>) -> Option<Op> {
        let last = self.region.blocks.saturating_sub(op.count);
        let mut block = op.block;
        loop {
            entries.clear();
            for at in block..block + op.count {
                match verifier.ledger.take(index(at)) {
                    Some(entry) => entries.push(entry),
                    None => break,
                }
            }
            if entries.len() as u64 == op.count {
                return Some(Op { block, ..op });
            }
            for (at, entry) in (block..).zip(entries.iter()) {
                verifier.ledger.give_back(index(at), *entry);
            }
            block = if block >= last { 0 } else { block + 1 };
            if block == op.block {
                // More IOs in flight than blocks: wait for one of them.
                tokio::task::yield_now().await;
                if self.over.get() || self.live.is_stopped() || now() >= self.window.to {
                    return None;
                }
            }
        }
    }
}

fn index(block: u64) -> usize {
    usize::try_from(block).expect("a ledger has an entry for every block")
}

/// Fills a buffer with what is written when nothing is verified: noise, so that nothing below can compress it.
pub(crate) fn noise(buffer: &mut impl IoBuffer, seed: u64) {
    let mut random = SplitMix64(seed);
    let (words, _) = buffer.fill().as_chunks_mut::<8>();
    for word in words {
        *word = random.next_u64().to_le_bytes();
    }
}
