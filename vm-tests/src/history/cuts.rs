//! Whether each snapshot of a layer shows all sectors at one instant. Pure.
//!
//! Used by `check.rs` once every register alone is explained with the cuts anywhere in their windows. Only registers with an event
//! within the window of a cut are given: for all others every instant of the window is the same. Invariants: an instant that is left out
//! is impossible for the register that left it out, whatever the instants of the other cuts; the instants that are accepted were
//! checked together in every register.

use super::register::{Effect, Entry, Seen, Stuck, explain};

/// Choices of instants that are tried before the answer is "not decided".
const CHOICES_MAX: usize = 300;

/// One snapshot of the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    /// The operation.
    pub cut: u64,
    /// Its invocation.
    pub from: u64,
    /// When it was complete.
    pub to: u64,
}

/// What is known of one register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Register {
    /// Its sector.
    pub sector: u32,
    /// Further sectors of which all else is the same.
    pub also: Vec<u32>,
    /// What it begins with.
    pub initial: Seen,
    /// What it begins with is not known: zeros would do as well, but then its parent must show them.
    pub open: bool,
    /// Its requests without cuts.
    pub entries: Vec<Entry>,
    /// Which cuts (by index) show what of it.
    pub shown: Vec<(usize, Seen)>,
}

/// Why there are no instants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Inexact {
    /// Cut `cut` cannot have been taken at one instant; these registers exclude each other, or one alone with all others.
    Cut { cut: usize, sector: u32, against: Option<u32> },
    /// Nothing was proven.
    Undecided { sector: u32 },
}

/// Closed ranges of time, apart and in order.
type Times = Vec<(u64, u64)>;

impl Register {
    /// Its requests with the cuts; `instants[i]` is when cut `i` was taken, if that is fixed.
    pub(super) fn with_cuts(&self, windows: &[Window], instants: &[Option<u64>]) -> Vec<Entry> {
        let cut = |&(i, seen): &(usize, Seen)| {
            let window: &Window = &windows[i];
            let (from, to) = instants.get(i).copied().flatten().map_or((window.from, window.to), |t| (t, t));
            Entry { op: window.cut, effect: Effect::Find(seen), from, to, epoch: 0 }
        };
        self.entries.iter().copied().chain(self.shown.iter().map(cut)).collect()
    }

    /// Checks it with the cuts. Returns what it began with.
    ///
    /// # Errors
    /// [`Stuck`], that of an unknown beginning other than zeros.
    pub(super) fn explain(&self, windows: &[Window], instants: &[Option<u64>]) -> Result<Seen, Stuck> {
        let entries = self.with_cuts(windows, instants);
        match explain(self.initial, &entries) {
            Ok(()) => Ok(self.initial),
            Err(Stuck::At { .. }) if self.open && explain(Seen::Zero, &entries).is_ok() => Ok(Seen::Zero),
            Err(stuck) => Err(stuck),
        }
    }

    fn shows(&self, cut: usize) -> bool {
        self.shown.iter().any(|(i, _)| *i == cut)
    }

    /// Which of `times` are possible for `cut`.
    fn possible(&self, cut: usize, windows: &[Window], times: &Times) -> Result<Times, Stuck> {
        let mut result = Times::new();
        for &(from, to) in times {
            let mut marks: Vec<u64> = self.entries.iter().flat_map(|e| [e.from, e.to]).filter(|t| (from..=to).contains(t)).collect();
            marks.extend([from, to]);
            marks.sort_unstable();
            marks.dedup();
            for (i, &mark) in marks.iter().enumerate() {
                if self.allows(cut, mark, windows)? {
                    add(&mut result, mark, mark);
                }
                // Between two marks nothing happens here, so one instant stands for all; and then the marks themselves, where more is
                // pending, are possible too.
                let next = marks.get(i + 1).copied().unwrap_or(mark);
                if next - mark > 1 && self.allows(cut, mark + 1, windows)? {
                    add(&mut result, mark, next);
                }
            }
        }
        Ok(result)
    }

    fn allows(&self, cut: usize, instant: u64, windows: &[Window]) -> Result<bool, Stuck> {
        let mut instants = vec![None; windows.len()];
        instants[cut] = Some(instant);
        match self.explain(windows, &instants) {
            Ok(_) => Ok(true),
            Err(Stuck::At { .. }) => Ok(false),
            Err(Stuck::Undecided) => Err(Stuck::Undecided),
        }
    }
}

/// Adds a range that begins at or after the begin of the last.
fn add(times: &mut Times, from: u64, to: u64) {
    match times.last_mut() {
        Some(last) if from <= last.1 => last.1 = last.1.max(to),
        _ => times.push((from, to)),
    }
}

/// Finds instants for all cuts at which all registers agree.
///
/// # Errors
/// [`Inexact`] when there are none, or none was found.
pub(super) fn instants(windows: &[Window], registers: &[Register]) -> Result<Vec<u64>, Inexact> {
    let mut possible = vec![];
    for (cut, window) in windows.iter().enumerate() {
        let mut times = vec![(window.from, window.to)];
        for register in registers.iter().filter(|r| r.shows(cut)) {
            let sector = register.sector;
            times = register.possible(cut, windows, &times).map_err(|_| Inexact::Undecided { sector })?;
            if times.is_empty() {
                return Err(opponents(cut, windows, registers, register));
            }
        }
        possible.push(times);
    }
    choose(windows, registers, &possible)
}

/// Finds a register that excludes what `register` allows.
fn opponents(cut: usize, windows: &[Window], registers: &[Register], register: &Register) -> Inexact {
    let window = windows[cut];
    let alone = register.possible(cut, windows, &vec![(window.from, window.to)]).unwrap_or_default();
    let excludes = |other: &&Register| other.shows(cut) && other.possible(cut, windows, &alone).is_ok_and(|left| left.is_empty());
    let against = registers.iter().find(excludes).map(|r| r.sector);
    Inexact::Cut { cut, sector: register.sector, against }
}

/// Tries instants out of the possible ones.
fn choose(windows: &[Window], registers: &[Register], possible: &[Times]) -> Result<Vec<u64>, Inexact> {
    let candidates: Vec<Vec<u64>> =
        possible.iter().map(|times| times.iter().flat_map(|(from, to)| [from.midpoint(*to), *from, *to]).collect()).collect();
    let mut sector = 0;
    for choice in 0..CHOICES_MAX {
        // First the same candidate everywhere, then combinations as the digits of the number.
        let mut rest = choice.saturating_sub(3);
        let pick = |list: &Vec<u64>| {
            let i = if choice < 3 { choice.min(list.len() - 1) } else { rest % list.len() };
            rest /= list.len();
            list[i]
        };
        let chosen: Vec<u64> = candidates.iter().map(pick).collect();
        let fixed: Vec<Option<u64>> = chosen.iter().copied().map(Some).collect();
        match registers.iter().find(|r| r.explain(windows, &fixed).is_err()) {
            None => return Ok(chosen),
            Some(register) => sector = register.sector,
        }
    }
    Err(Inexact::Undecided { sector })
}
