//! [`check`]: the whole history, layer by layer, forks before what they were forked from.
//!
//! Used by tests. Invariants: what a fork shows of its beginning, and what was read of a snapshot, is one demand per cut and sector;
//! a layer is checked when the demands on all its cuts are known. Registers next to each other with the same requests are checked once.

use super::demands::Demands;
use super::cuts::{Inexact, Register, Window, instants};
use super::register::{Effect, Entry, Seen, Stuck};
use super::violation::{Violation, ViolationKind as Kind, at, list};
use super::{Action, History, Layer, Op, Run, Target, Value};
use std::collections::{HashMap, HashSet};

/// Violations that are reported of one history.
const REPORTED_MAX: usize = 8;

/// How much was checked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Checked {
    /// Requests.
    pub operations: usize,
    /// Of these, such without a known outcome.
    pub unknown: usize,
    /// Sectors of layers that something was known of.
    pub registers: usize,
    /// Snapshots that something was seen of.
    pub cuts: usize,
    /// Snapshots whose instant was narrowed down by requests under way.
    pub cuts_under_load: usize,
}

/// Decides whether the promises explain the history.
///
/// # Errors
/// The violations, some of them at least.
pub fn check(history: &History) -> Result<Checked, Vec<Violation>> {
    let mut checker = Checker::new(history);
    checker.look_at_reads();
    for id in checker.layers_children_first() {
        checker.check_layer(id);
    }
    checker.check_fences();
    if checker.violations.is_empty() { Ok(checker.checked) } else { Err(checker.violations) }
}

/// What a request saw of a sector, or nothing for one that stores.
type Touch = (usize, Option<Value>);

pub(super) struct Checker<'a> {
    pub(super) history: &'a History,
    pub(super) by_id: HashMap<u64, &'a Op>,
    /// Begin of the history.
    pub(super) start: u64,
    /// When each cut had been seen at the latest.
    pub(super) cut_seen: HashMap<u64, u64>,
    /// Layer of each cut.
    pub(super) cut_layer: HashMap<u64, u64>,
    /// What each cut must show, and the request that says so.
    pub(super) demands: Demands,
    /// What a request found in a sector and was reported at once; it takes no further part.
    pub(super) reported: HashSet<(u64, u32)>,
    checked: Checked,
    violations: Vec<Violation>,
}

impl<'a> Checker<'a> {
    fn new(history: &'a History) -> Self {
        let by_id: HashMap<u64, &Op> = history.ops.iter().map(|op| (op.id, op)).collect();
        let cut_layer = history.ops.iter().filter(|op| op.action == Action::Cut);
        let cut_layer = cut_layer.filter_map(|op| if let Target::Layer(layer) = op.target { Some((op.id, layer)) } else { None }).collect();
        let unknown = history.ops.iter().filter(|op| op.completed.is_none()).count();
        Self {
            history,
            by_id,
            start: history.ops.first().map_or(0, |op| op.invoked),
            cut_seen: HashMap::new(),
            cut_layer,
            demands: Demands::default(),
            reported: HashSet::new(),
            checked: Checked { operations: history.ops.len(), unknown, ..Checked::default() },
            violations: vec![],
        }
    }

    pub(super) fn report(&mut self, kind: Kind, layer: u64, sector: u32, text: String) {
        if self.violations.len() < REPORTED_MAX {
            self.violations.push(Violation { kind, layer, sector, text });
        }
    }

    /// The layer that a target belongs to.
    pub(super) fn layer_of(&self, target: Target) -> Option<u64> {
        match target {
            Target::Layer(layer) => Some(layer),
            Target::Cut(cut) => self.cut_layer.get(&cut).copied(),
        }
    }

    pub(super) fn parent_of(&self, layer: u64) -> Option<u64> {
        self.history.layers.get(&layer).and_then(|l| l.parent)
    }

    /// The layer and those below it. Bounded by the number of layers, should they form a ring.
    pub(super) fn lineage(&self, layer: u64) -> Vec<u64> {
        let below = |layer: &u64| self.cut_layer.get(&self.parent_of(*layer)?).copied();
        std::iter::successors(Some(layer), below).take(self.history.layers.len() + 1).collect()
    }

    fn layers_children_first(&self) -> Vec<u64> {
        let mut layers: Vec<u64> = self.history.layers.keys().copied().collect();
        layers.sort_by_key(|layer| std::cmp::Reverse(self.lineage(*layer).len()));
        layers
    }

    pub(super) fn name(&self, value: Value) -> String {
        match value {
            Value::Zero => "zeros".to_owned(),
            Value::Write { layer, op } => format!("write #{op} of layer {layer}"),
            other => format!("{other:?}"),
        }
    }

    pub(super) fn lines<'b>(&self, ops: impl Iterator<Item = (&'b Op, String)>, centre: u64) -> String {
        list(ops, centre, self.start)
    }

    fn windows(&self, layer: u64) -> Vec<Window> {
        let cuts = self.history.ops.iter().filter(|op| op.action == Action::Cut && op.target == Target::Layer(layer));
        let seen = cuts.filter_map(|op| {
            let seen = *self.cut_seen.get(&op.id)?;
            Some(Window { cut: op.id, from: op.invoked, to: op.completed.map_or(seen, |done| done.min(seen)) })
        });
        seen.collect()
    }

    fn check_layer(&mut self, id: u64) {
        let layer = self.history.layers[&id];
        let windows = self.windows(id);
        if let Some(window) = windows.iter().find(|w| w.to < w.from) {
            let text = format!("snapshot #{} was seen before it was taken", window.cut);
            return self.report(Kind::NeverWritten, id, 0, text);
        }
        self.checked.cuts += windows.len();
        let touches = self.touches(id, layer);
        let mut different: Vec<Register> = vec![];
        for (sector, touched) in (0u32..).zip(&touches) {
            let shown = windows.iter().any(|w| self.demands.get(w.cut, sector).is_some());
            if touched.is_empty() && !shown {
                continue;
            }
            self.checked.registers += 1;
            let Some(register) = self.register(id, layer, sector, touched, &windows) else { continue };
            match different.last_mut() {
                Some(before) if before.same(&register) => before.also.push(sector),
                _ => different.push(register),
            }
        }
        let mut tight = vec![];
        for register in different {
            let touched = usize::try_from(register.sector).ok().and_then(|s| touches.get(s)).map_or(&[][..], Vec::as_slice);
            let Some(initial) = self.solve(id, touched, &register, &windows) else { continue };
            if register.is_tight(&windows) {
                tight.push(register);
            } else {
                self.demand_zeros(layer, &register, initial);
            }
        }
        self.check_cuts(id, &windows, &tight, &touches);
    }

    /// A register whose beginning was not known had to begin with zeros.
    fn demand_zeros(&mut self, layer: Layer, register: &Register, initial: Seen) {
        let Some(parent) = layer.parent.filter(|_| register.open && initial == Seen::Zero) else { return };
        let witness = register.entries.first().map_or(0, |entry| entry.op);
        for sector in register.also.iter().copied().chain([register.sector]) {
            self.demand(parent, sector, Value::Zero, witness);
        }
    }

    /// The requests on each sector of the layer, in order of their invocation.
    fn touches(&self, id: u64, layer: Layer) -> Vec<Vec<Touch>> {
        let mut touches: Vec<Vec<Touch>> = vec![vec![]; usize::try_from(layer.sectors).unwrap_or(0)];
        let mut touch = |sector: u32, touch: Touch| {
            if let Some(list) = usize::try_from(sector).ok().and_then(|s| touches.get_mut(s)) {
                list.push(touch);
            }
        };
        for (i, op) in self.history.ops.iter().enumerate().filter(|(_, op)| op.target == Target::Layer(id)) {
            match op.action {
                Action::Cut => {}
                Action::Read => {
                    let sound = sectors(op).filter(|(sector, _)| !self.reported.contains(&(op.id, *sector)));
                    sound.for_each(|(sector, value)| touch(sector, (i, Some(value))));
                }
                Action::Write | Action::Zero => (op.first..op.first.saturating_add(op.count)).for_each(|sector| touch(sector, (i, None))),
            }
        }
        touches
    }

    /// Puts a register together. `None` when what is known of its beginning contradicts itself, which was reported.
    fn register(&mut self, id: u64, layer: Layer, sector: u32, touched: &[Touch], windows: &[Window]) -> Option<Register> {
        let seen = |value: Value| match value {
            Value::Write { layer, op } if layer == id => Seen::Op(op),
            Value::Zero => Seen::Zero,
            _ => Seen::Base,
        };
        let shown = |(i, w): (usize, &Window)| Some((i, self.demands.get(w.cut, sector)?));
        let shown: Vec<(usize, (Value, u64))> = windows.iter().enumerate().filter_map(shown).collect();
        let reported = self.violations.len();
        if let Some(parent) = layer.parent {
            let read = touched.iter().filter_map(|(i, value)| Some(((*value)?, self.history.ops[*i].id)));
            let inherited: Vec<_> = read.chain(shown.iter().map(|(_, d)| *d)).filter(|(v, _)| seen(*v) == Seen::Base).collect();
            inherited.into_iter().for_each(|(value, witness)| self.demand(parent, sector, value, witness));
        }
        let base = layer.parent.map(|parent| self.demands.get(parent, sector).map(|(value, _)| value));
        let initial = match base {
            None | Some(Some(Value::Zero)) => Seen::Zero,
            Some(_) => Seen::Base,
        };
        // When each write was first seen: an unknown one has taken effect by then.
        let mut first_seen: HashMap<u64, u64> = HashMap::new();
        let reads = touched.iter().filter_map(|(i, value)| Some((seen((*value)?), self.history.ops[*i].completed?)));
        for (value, time) in reads.chain(shown.iter().map(|(i, (value, _))| (seen(*value), windows[*i].to))) {
            if let Seen::Op(op) = value {
                first_seen.entry(op).and_modify(|t| *t = time.min(*t)).or_insert(time);
            }
        }
        let entries = touched.iter().filter_map(|(i, value)| entry(&self.history.ops[*i], value.map(seen), &first_seen)).collect();
        let shown = shown.into_iter().map(|(i, (value, _))| (i, seen(value))).collect();
        let register = Register { sector, also: vec![], initial, open: base == Some(None), entries, shown };
        (self.violations.len() == reported).then_some(register)
    }

    /// Checks a register alone. Returns what it begins with.
    fn solve(&mut self, id: u64, touched: &[Touch], register: &Register, windows: &[Window]) -> Option<Seen> {
        let entries = register.with_cuts(windows, &[]);
        if let Some(early) = entries.iter().find(|entry| entry.to < entry.from) {
            let text = format!("write #{} was seen before it was made{}", early.op, self.requests(touched, register, windows, early.op));
            self.report(Kind::NeverWritten, id, register.sector, text);
            return None;
        }
        match register.explain(windows, &[]) {
            Ok(initial) => Some(initial),
            Err(Stuck::Undecided) => {
                self.report(Kind::Undecided, id, register.sector, "too many requests at once".to_owned());
                None
            }
            Err(Stuck::At { entry, held }) => {
                let entry = &entries[entry];
                let held: Vec<String> = held.iter().map(|value| seen_name(*value)).collect();
                let what = match entry.effect {
                    Effect::Find(value) => format!("found {}", seen_name(value)),
                    _ => "took effect in none of the possible orders".to_owned(),
                };
                let (by, held) = (at(self.start, entry.to), held.join(", "));
                let text = format!(
                    "request #{} {what}; by {by} ms the register could only hold: {held}{}",
                    entry.op,
                    self.requests(touched, register, windows, entry.op)
                );
                self.report(Kind::NotLinearizable, id, register.sector, text);
                None
            }
        }
    }

    /// The requests on a sector, cuts among them, for people.
    fn requests(&self, touched: &[Touch], register: &Register, windows: &[Window], centre: u64) -> String {
        let remark = |value: &Option<Value>| value.map_or_else(String::new, |value| format!(", found {}", self.name(value)));
        let mut ops: Vec<(&Op, String)> = touched.iter().map(|(i, value)| (&self.history.ops[*i], remark(value))).collect();
        let cuts = register.shown.iter().filter_map(|(i, seen)| Some((*self.by_id.get(&windows[*i].cut)?, format!(", shows {}", seen_name(*seen)))));
        ops.extend(cuts);
        ops.sort_by_key(|(op, _)| op.invoked);
        self.lines(ops.into_iter(), centre)
    }

    fn check_cuts(&mut self, id: u64, windows: &[Window], tight: &[Register], touches: &[Vec<Touch>]) {
        let loaded: HashSet<usize> = tight.iter().flat_map(|r| r.shown.iter().map(|(i, _)| *i)).collect();
        self.checked.cuts_under_load += loaded.len();
        let requests = |sector: u32, cut: u64| {
            let touched = usize::try_from(sector).ok().and_then(|s| touches.get(s)).map_or(&[][..], Vec::as_slice);
            let register = tight.iter().find(|r| r.sector == sector);
            register.map_or_else(String::new, |r| format!("\n  sector {sector}:{}", self.requests(touched, r, windows, cut)))
        };
        let (kind, sector, text) = match instants(windows, tight) {
            Ok(chosen) => {
                let chosen: Vec<Option<u64>> = chosen.into_iter().map(Some).collect();
                for register in tight {
                    // What was chosen explains them all.
                    let initial = register.explain(windows, &chosen).unwrap_or(register.initial);
                    self.demand_zeros(self.history.layers[&id], register, initial);
                }
                return;
            }
            Err(Inexact::Undecided { sector }) => (Kind::Undecided, sector, "no instants of all snapshots were found that agree".to_owned()),
            Err(Inexact::Cut { cut, sector, against }) => {
                let cut = windows[cut].cut;
                let others = against.map_or_else(|| "others together".to_owned(), |s| format!("sector {s}"));
                let more = against.map_or_else(String::new, |s| requests(s, cut));
                let text = format!(
                    "snapshot #{cut} shows no single instant: what it shows of this sector and of {others} was never there at once{}{more}",
                    requests(sector, cut)
                );
                (Kind::CutNotExact, sector, text)
            }
        };
        self.report(kind, id, sector, text);
    }
}

impl Register {
    fn same(&self, other: &Self) -> bool {
        self.open == other.open && self.initial == other.initial && self.entries == other.entries && self.shown == other.shown
    }

    /// Whether something happens within the window of a cut that shows it.
    fn is_tight(&self, windows: &[Window]) -> bool {
        let mut shown = self.shown.iter().map(|(i, _)| windows[*i]);
        shown.any(|w| self.entries.iter().any(|e| (w.from..=w.to).contains(&e.from) || (w.from..=w.to).contains(&e.to)))
    }
}

/// What a read found, sector by sector.
pub(super) fn sectors(op: &Op) -> impl Iterator<Item = (u32, Value)> + '_ {
    let values = op.found.iter().flat_map(|&Run { count, value }| std::iter::repeat_n(value, usize::try_from(count).unwrap_or(0)));
    (op.first..op.first.saturating_add(op.count)).zip(values)
}

/// A request as the search wants it; `None` for one that cannot matter.
fn entry(op: &Op, found: Option<Seen>, first_seen: &HashMap<u64, u64>) -> Option<Entry> {
    let (effect, to) = match (op.action, found, op.completed) {
        (Action::Read, Some(found), Some(done)) => (Effect::Find(found), done),
        (Action::Write, _, Some(done)) => (Effect::Store(Seen::Op(op.id)), done),
        (Action::Write, _, None) => (Effect::Store(Seen::Op(op.id)), *first_seen.get(&op.id)?),
        (Action::Zero, _, Some(done)) => (Effect::Store(Seen::Zero), done),
        (Action::Zero, _, None) => (Effect::MaybeZero, u64::MAX),
        _ => return None,
    };
    Some(Entry { op: op.id, effect, from: op.invoked, to, epoch: op.epoch })
}

fn seen_name(value: Seen) -> String {
    match value {
        Seen::Zero => "zeros".to_owned(),
        Seen::Base => "what the layer began with".to_owned(),
        Seen::Op(op) => format!("#{op}"),
    }
}
