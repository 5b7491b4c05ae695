//! Whether the requests on one sector of one layer can be put in an order that a register explains. Pure.
//!
//! Used by `check.rs` and `cuts.rs`; the algorithm is named in the module documentation. A state of the search:
//!
//! ```text
//!   value    what the register holds          fence   highest attach epoch that has taken effect
//!   done     pending requests that have       zeros   unknown zeroings that were drawn
//!            taken effect (a bit per slot)
//! ```
//!
//! Invariants: the set of states after an event holds every state that any valid order allows, up to steps that lose nothing: a pending
//! read whose value is there takes effect at once when that does not raise the fence, and an unknown zeroing is drawn only right
//! before a read that needs it. So an empty set means that there is no valid order.

use std::collections::HashSet;

/// Requests that may be pending at once in one sector, and unknown zeroings of one sector; more is not decided.
const SLOTS_MAX: usize = 64;
/// States of the search after one event; more is not decided.
const STATES_MAX: usize = 1 << 16;

/// What the register holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Seen {
    /// Zeros.
    Zero,
    /// What the layer began with, other than zeros.
    Base,
    /// What that operation wrote.
    Op(u64),
}

/// What a request does to the register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Effect {
    /// Stores its own value or zeros.
    Store(Seen),
    /// Zeros that may take effect or not.
    MaybeZero,
    /// Finds this.
    Find(Seen),
}

/// One request on the register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Entry {
    /// The operation.
    pub op: u64,
    /// What it does.
    pub effect: Effect,
    /// Begin of the time in which it takes effect.
    pub from: u64,
    /// End of that time; `u64::MAX` if it has none.
    pub to: u64,
    /// Its attach epoch; 0 has no part in fencing.
    pub epoch: u64,
}

/// Why there is no order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stuck {
    /// This entry cannot take effect in its time; the register may have held only these values then.
    At { entry: usize, held: Vec<Seen> },
    /// Too many requests at once, or too many orders, to say.
    Undecided,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct State {
    value: Seen,
    fence: u64,
    done: u64,
    zeros: u64,
}

struct Search<'a> {
    entries: &'a [Entry],
    /// Entries that are pending, by slot.
    slots: Vec<Option<usize>>,
    /// Unknown zeroings that were invoked.
    zeros: Vec<usize>,
    states: HashSet<State>,
}

/// Looks for an order in which the register begins with `initial`.
///
/// # Errors
/// [`Stuck`] when there is none.
pub(super) fn explain(initial: Seen, entries: &[Entry]) -> Result<(), Stuck> {
    // Invocations before completions of the same time: those requests are concurrent.
    let mut events: Vec<(u64, bool, usize)> = vec![];
    for (i, entry) in entries.iter().enumerate() {
        events.push((entry.from, false, i));
        if entry.effect != Effect::MaybeZero {
            events.push((entry.to, true, i));
        }
    }
    events.sort_unstable();
    let state = State { value: initial, fence: 0, done: 0, zeros: 0 };
    let mut search = Search { entries, slots: vec![], zeros: vec![], states: HashSet::from([state]) };
    for (_, is_end, entry) in events {
        if is_end { search.end(entry)? } else { search.begin(entry)? }
    }
    Ok(())
}

impl Search<'_> {
    fn begin(&mut self, entry: usize) -> Result<(), Stuck> {
        if self.entries[entry].effect == Effect::MaybeZero {
            self.zeros.push(entry);
            return if self.zeros.len() > SLOTS_MAX { Err(Stuck::Undecided) } else { Ok(()) };
        }
        match self.slots.iter().position(Option::is_none) {
            Some(slot) => self.slots[slot] = Some(entry),
            None if self.slots.len() < SLOTS_MAX => self.slots.push(Some(entry)),
            None => return Err(Stuck::Undecided),
        }
        if matches!(self.entries[entry].effect, Effect::Find(_)) {
            self.states = self.states.iter().map(|state| self.settle(*state)).collect();
        }
        Ok(())
    }

    /// `entry` must have taken effect by now.
    fn end(&mut self, entry: usize) -> Result<(), Stuck> {
        let slot = self.slots.iter().position(|s| *s == Some(entry)).expect("every entry begins before it ends");
        let (mut after, mut visited) = (HashSet::new(), HashSet::new());
        let mut open: Vec<State> = self.states.iter().copied().collect();
        while let Some(state) = open.pop() {
            if state.done & (1 << slot) != 0 {
                after.insert(State { done: state.done & !(1 << slot), ..state });
                continue;
            }
            if !visited.insert(state) {
                continue;
            }
            if visited.len() + after.len() > STATES_MAX {
                return Err(Stuck::Undecided);
            }
            let pending = (0..self.slots.len()).filter(|s| state.done & (1 << s) == 0);
            open.extend(pending.filter_map(|s| self.take_effect(state, s)));
        }
        if after.is_empty() {
            let mut held: Vec<Seen> = visited.iter().map(|state| state.value).collect();
            held.sort_unstable();
            held.dedup();
            return Err(Stuck::At { entry, held });
        }
        self.slots[slot] = None;
        self.states = after;
        Ok(())
    }

    /// The state after the request in `slot` has taken effect, if it can.
    fn take_effect(&self, mut state: State, slot: usize) -> Option<State> {
        let entry = &self.entries[self.slots[slot]?];
        match entry.effect {
            Effect::Store(_) if entry.epoch < state.fence => return None,
            Effect::Store(value) => state.value = value,
            Effect::Find(value) if value == state.value => {}
            Effect::Find(Seen::Zero) => state = self.draw_zero(state)?,
            Effect::Find(_) | Effect::MaybeZero => return None,
        }
        state.done |= 1 << slot;
        state.fence = state.fence.max(entry.epoch);
        Some(self.settle(state))
    }

    /// The unknown zeroing of the lowest epoch that may still take effect does so.
    fn draw_zero(&self, state: State) -> Option<State> {
        let free = self.zeros.iter().enumerate().filter(|(i, _)| state.zeros & (1 << i) == 0);
        let epochs = free.map(|(i, zero)| (self.entries[*zero].epoch, i));
        let (epoch, i) = epochs.filter(|(epoch, _)| *epoch >= state.fence).min()?;
        Some(State { value: Seen::Zero, fence: epoch, zeros: state.zeros | 1 << i, ..state })
    }

    /// Pending reads that find their value take effect, if that does not raise the fence.
    fn settle(&self, mut state: State) -> State {
        for (slot, entry) in self.slots.iter().enumerate() {
            let Some(entry) = entry.map(|e| &self.entries[e]) else { continue };
            if entry.effect == Effect::Find(state.value) && entry.epoch <= state.fence {
                state.done |= 1 << slot;
            }
        }
        state
    }
}
