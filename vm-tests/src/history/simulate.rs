//! A machine of registers that keeps the promises by construction, and its random histories; and an oracle that tries every order.
//!
//! Used by the tests of the checker. The machine gives each request an instant per sector between its begin and its end and carries the
//! instants out in order of time; a writer whose epoch is below the sector's fence is refused, which makes its request unknown.

use super::{Action, Event, History, Layer, Op, Outcome, Run, Target, Value};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, HashSet};

/// How big a random history is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub sectors: u32,
    pub ops: usize,
    pub cuts: usize,
    pub forks: usize,
    /// The time in which everything begins.
    pub span: u64,
    /// The longest request.
    pub longest: u64,
}

/// A request before it is carried out.
struct Plan {
    op: Op,
    /// Instant per sector; for a cut the one instant. `u64::MAX`: never.
    instants: Vec<u64>,
    known: bool,
}

#[derive(Default)]
struct Machine {
    layers: BTreeMap<u64, Vec<Value>>,
    fences: BTreeMap<(u64, u32), u64>,
    cuts: BTreeMap<u64, Vec<Value>>,
}

/// A random history that keeps the promises. Layer 1 is the root; layer `n` is forked from a cut.
pub(super) fn history(seed: u64, size: Size) -> History {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut layers = vec![(1u64, 0u64, None)];
    let mut plans = vec![];
    for cut in 0..size.cuts as u64 {
        plans.push(plan_cut(&mut rng, size, 1_000_000 + cut, 1));
    }
    for fork in 0..size.forks.min(size.cuts) {
        let (cut, ready) = (plans[fork].op.id, plans[fork].op.completed.unwrap_or(0));
        let layer = 2 + fork as u64;
        layers.push((layer, ready, Some(cut)));
        // A cut of the fork, and later a fork of that.
        let late = Size { span: size.span.max(ready + 1), ..size };
        let mut nested = plan_cut(&mut rng, late, 2_000_000 + layer, layer);
        let shift = ready;
        nested.op.invoked += shift;
        nested.op.completed = nested.op.completed.map(|t| t + shift);
        nested.instants.iter_mut().for_each(|t| *t += shift);
        plans.push(nested);
    }
    for i in 0..size.ops {
        let (layer, born, _) = layers[rng.random_range(0..layers.len())];
        plans.push(plan_io(&mut rng, size, 1 + i as u64, layer, born));
    }
    run(&mut rng, size, plans, &layers)
}

fn plan_cut(rng: &mut StdRng, size: Size, id: u64, layer: u64) -> Plan {
    let invoked = rng.random_range(0..size.span);
    let end = invoked + rng.random_range(0..size.longest);
    let op = Op {
        id,
        client: 99,
        action: Action::Cut,
        target: Target::Layer(layer),
        epoch: 0,
        first: 0,
        count: 0,
        invoked,
        completed: Some(end),
        found: vec![],
    };
    Plan { op, instants: vec![rng.random_range(invoked..=end)], known: rng.random_range(0..5) > 0 }
}

fn plan_io(rng: &mut StdRng, size: Size, id: u64, layer: u64, born: u64) -> Plan {
    let first = rng.random_range(0..size.sectors);
    let count = rng.random_range(1..=(size.sectors - first).min(3));
    let invoked = born + rng.random_range(0..size.span);
    let end = invoked + rng.random_range(0..size.longest);
    let action = [Action::Write, Action::Write, Action::Write, Action::Zero, Action::Read, Action::Read, Action::Read][rng.random_range(0..7)];
    let known = rng.random_range(0..8) > 0;
    // A new epoch every third of the span, and some who do not know of it yet.
    let epoch = 1 + invoked * 3 / size.span.max(1);
    let epoch = if rng.random_range(0..6) == 0 { epoch.max(2) - 1 } else { epoch };
    let late = if known { end } else { end + size.span };
    let instant = |rng: &mut StdRng| if !known && rng.random_range(0..3) == 0 { u64::MAX } else { rng.random_range(invoked..=late) };
    let instants = (0..count).map(|_| instant(rng)).collect();
    let client = u32::try_from(epoch).expect("small");
    let op = Op { id, client, action, target: Target::Layer(layer), epoch, first, count, invoked, completed: Some(end), found: vec![] };
    Plan { op, instants, known }
}

/// Carries the plans out in order of their instants.
fn run(rng: &mut StdRng, size: Size, mut plans: Vec<Plan>, layers: &[(u64, u64, Option<u64>)]) -> History {
    let mut machine = Machine::default();
    machine.layers.insert(1, vec![Value::Zero; size.sectors as usize]);
    let mut steps: Vec<(u64, usize, usize)> = vec![];
    for (p, plan) in plans.iter().enumerate() {
        steps.extend(plan.instants.iter().enumerate().filter(|(_, t)| **t != u64::MAX).map(|(i, t)| (*t, p, i)));
    }
    steps.sort_unstable();
    let mut found: Vec<BTreeMap<u32, Value>> = plans.iter().map(|_| BTreeMap::new()).collect();
    for (_, p, i) in steps {
        let plan = &mut plans[p];
        let sector = plan.op.first + u32::try_from(i).expect("small");
        if let Some(value) = machine.step(plan, sector) {
            found[p].insert(sector, value);
        }
        if plan.op.action == Action::Cut {
            let state = machine.cuts[&plan.op.id].clone();
            for (layer, _, _) in layers.iter().filter(|(_, _, parent)| *parent == Some(plan.op.id)) {
                machine.layers.insert(*layer, state.clone());
            }
        }
    }
    let reads: Vec<Op> = (0..size.cuts * 4).filter_map(|i| read_cut(rng, size, &machine, 3_000_000 + i as u64)).collect();
    let mut events = vec![];
    for (id, _, parent) in layers {
        events.push(Event::Layer { id: *id, layer: Layer { volume: *id, sectors: size.sectors, parent: *parent } });
    }
    for (plan, found) in plans.into_iter().zip(found) {
        let runs: Vec<Run> = found.into_values().map(|value| Run { count: 1, value }).collect();
        let whole = plan.op.action != Action::Read || runs.len() == plan.op.count as usize;
        push(&mut events, plan.op, plan.known && whole, runs);
    }
    for read in reads {
        let runs = read.found.clone();
        push(&mut events, Op { found: vec![], ..read }, true, runs);
    }
    History::new(events).expect("consistent")
}

fn push(events: &mut Vec<Event>, op: Op, known: bool, found: Vec<Run>) {
    let (id, time) = (op.id, op.completed.unwrap_or(op.invoked));
    events.push(Event::Invoke(Op { completed: None, ..op }));
    let outcome = if known { Outcome::Ok(found) } else { Outcome::Unknown };
    events.push(Event::Complete { op: id, time, outcome });
}

fn read_cut(rng: &mut StdRng, size: Size, machine: &Machine, id: u64) -> Option<Op> {
    let cuts: Vec<_> = machine.cuts.iter().collect();
    let (cut, state) = cuts.get(rng.random_range(0..cuts.len().max(1)))?;
    let (first, invoked) = (rng.random_range(0..size.sectors), size.span * 9);
    let count = size.sectors - first;
    let found = state[first as usize..].iter().map(|value| Run { count: 1, value: *value }).collect();
    let target = Target::Cut(**cut);
    Some(Op { id, client: 98, action: Action::Read, target, epoch: 0, first, count, invoked, completed: Some(invoked + 1), found })
}

impl Machine {
    fn step(&mut self, plan: &mut Plan, sector: u32) -> Option<Value> {
        let Target::Layer(layer) = plan.op.target else { return None };
        let op = plan.op.id;
        let state = self.layers.get_mut(&layer).expect("forks begin after their cut");
        if plan.op.action == Action::Cut {
            self.cuts.insert(op, state.clone());
            return None;
        }
        let fence = self.fences.entry((layer, sector)).or_default();
        if plan.op.action != Action::Read && plan.op.epoch < *fence {
            plan.known = false;
            return None;
        }
        // A read of an earlier epoch is refused as well, or not; both keep the promises.
        *fence = plan.op.epoch.max(*fence);
        let cell = &mut state[sector as usize];
        match plan.op.action {
            Action::Write => *cell = Value::Write { layer, op },
            Action::Zero => *cell = Value::Zero,
            _ => return Some(*cell),
        }
        None
    }
}

/// One sector's part of a request, or a cut.
struct Piece {
    from: u64,
    to: u64,
    optional: bool,
    epoch: u64,
    sector: usize,
    effect: Option<Result<Value, Value>>,
    /// For cuts: what it shows.
    shows: Vec<Option<Value>>,
}

/// Tries every order of the requests of a history with the single layer 1. Only for a handful of requests.
pub(super) fn any_order_explains(history: &History, sectors: usize) -> bool {
    let mut pieces = vec![];
    for op in &history.ops {
        let to = op.completed.unwrap_or(u64::MAX);
        let piece = |sector, effect| Piece { from: op.invoked, to, optional: op.completed.is_none(), epoch: op.epoch, sector, effect: Some(effect), shows: vec![] };
        match (op.action, op.target) {
            (Action::Read, Target::Layer(_)) => pieces.extend(op.found.iter().enumerate().map(|(i, run)| piece(op.first as usize + i, Err(run.value)))),
            (Action::Write, Target::Layer(layer)) => {
                pieces.extend((0..op.count).map(|i| piece((op.first + i) as usize, Ok(Value::Write { layer, op: op.id }))));
            }
            (Action::Zero, _) => pieces.extend((0..op.count).map(|i| piece((op.first + i) as usize, Ok(Value::Zero)))),
            (Action::Cut, _) => {
                let mut shows = vec![None; sectors];
                let mut seen = u64::MAX;
                for read in history.ops.iter().filter(|r| r.target == Target::Cut(op.id)) {
                    let Some(done) = read.completed else { continue };
                    seen = done.min(seen);
                    for (i, run) in read.found.iter().enumerate() {
                        let cell: &mut Option<Value> = &mut shows[read.first as usize + i];
                        if cell.replace(run.value).is_some_and(|before| before != run.value) {
                            return false;
                        }
                    }
                }
                if seen != u64::MAX {
                    pieces.push(Piece { from: op.invoked, to: to.min(seen), optional: false, epoch: 0, sector: 0, effect: None, shows });
                }
            }
            (Action::Read | Action::Write, Target::Cut(_)) => {}
        }
    }
    assert!(pieces.len() <= 64, "too many for the oracle");
    search(&pieces, 0, &mut vec![(Value::Zero, 0); sectors], &mut HashSet::new())
}

fn search(pieces: &[Piece], done: u64, state: &mut Vec<(Value, u64)>, failed: &mut HashSet<(u64, Vec<(Value, u64)>)>) -> bool {
    let left = |i: &usize| done & (1 << i) == 0;
    if (0..pieces.len()).filter(left).all(|i| pieces[i].optional) {
        return true;
    }
    if failed.contains(&(done, state.clone())) {
        return false;
    }
    let bound = (0..pieces.len()).filter(left).filter(|i| !pieces[*i].optional).map(|i| pieces[i].to).min().unwrap_or(u64::MAX);
    for i in (0..pieces.len()).filter(left) {
        let piece = &pieces[i];
        if piece.from > bound {
            continue;
        }
        let (value, fence) = state[piece.sector];
        let next = match piece.effect {
            None => piece.shows.iter().zip(state.iter()).all(|(show, (value, _))| show.is_none_or(|s| s == *value)).then_some((value, fence)),
            Some(Ok(new)) => (piece.epoch >= fence).then_some((new, piece.epoch)),
            Some(Err(found)) => (found == value).then_some((value, fence.max(piece.epoch))),
        };
        let Some(next) = next else { continue };
        state[piece.sector] = next;
        if search(pieces, done | 1 << i, state, failed) {
            return true;
        }
        state[piece.sector] = (value, fence);
    }
    failed.insert((done, state.clone()));
    false
}
