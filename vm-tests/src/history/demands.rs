//! What each cut must show, sector by sector. A long run has hundreds of cuts of a hundred thousand sectors, so it is kept in eight bytes each.
//!
//! Used by `check.rs` and `reads.rs`. Invariant: the first demand on a sector of a cut stays.

use super::Value;
use std::collections::HashMap;

/// No demand.
const NONE: u32 = u32::MAX;

/// Gives each thing a small number.
#[derive(Debug)]
struct Numbers<T> {
    things: Vec<T>,
    numbers: HashMap<T, u32>,
}

impl<T: Copy + Eq + std::hash::Hash> Numbers<T> {
    fn of(&mut self, thing: T) -> u32 {
        *self.numbers.entry(thing).or_insert_with(|| {
            self.things.push(thing);
            u32::try_from(self.things.len() - 1).expect("a history has fewer than four billion requests")
        })
    }
}

impl<T> Default for Numbers<T> {
    fn default() -> Self {
        Self { things: vec![], numbers: HashMap::new() }
    }
}

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Demands {
    values: Numbers<Value>,
    witnesses: Numbers<u64>,
    /// Number of the value and of the witness, by sector.
    cuts: HashMap<u64, Vec<(u32, u32)>>,
}

impl Demands {
    /// What `cut` must show of `sector`, and the request that says so.
    pub(super) fn get(&self, cut: u64, sector: u32) -> Option<(Value, u64)> {
        let (value, witness) = *self.cuts.get(&cut)?.get(usize::try_from(sector).ok()?)?;
        Some((*self.values.things.get(value as usize)?, *self.witnesses.things.get(witness as usize)?))
    }

    /// Demands it, unless there is a demand. Returns what is demanded now.
    pub(super) fn put(&mut self, cut: u64, sector: u32, (value, witness): (Value, u64)) -> (Value, u64) {
        if let Some(before) = self.get(cut, sector) {
            return before;
        }
        let numbers = (self.values.of(value), self.witnesses.of(witness));
        let list = self.cuts.entry(cut).or_default();
        let place = sector as usize;
        if list.len() <= place {
            list.resize(place + 1, (NONE, NONE));
        }
        list[place] = numbers;
        (value, witness)
    }
}
