//! What can be said of each request by itself, or against one other: what was read was written there, a cut shows one thing, and
//! a fenced writer has no success.
//!
//! Called by `check.rs` before and after the registers. Invariant: a value that is reported here takes no part in the search.

use super::check::{Checker, sectors};
use super::violation::{ViolationKind as Kind, describe};
use super::{Action, Op, Target, Value};
use std::collections::HashMap;

impl Checker<'_> {
    /// Checks each value that was read by itself, and collects what was seen of cuts.
    pub(super) fn look_at_reads(&mut self) {
        let history = self.history;
        for op in &history.ops {
            let Some(done) = op.completed else { continue };
            let Some(layer) = self.layer_of(op.target) else {
                self.report(Kind::NeverWritten, 0, op.first, format!("nobody took the snapshot of {}", describe(op, self.start)));
                continue;
            };
            let lineage = self.lineage(layer);
            let parents = lineage.iter().filter_map(|layer| self.parent_of(*layer));
            let cut = if let Target::Cut(cut) = op.target { Some(cut) } else { None };
            for cut in parents.chain(cut).collect::<Vec<_>>() {
                self.cut_seen.entry(cut).and_modify(|time| *time = done.min(*time)).or_insert(done);
            }
            for (sector, value) in sectors(op) {
                if let Err((kind, text)) = self.judge(op, &lineage, sector, value) {
                    self.reported.insert((op.id, sector));
                    self.report(kind, layer, sector, text);
                } else if let Some(cut) = cut {
                    self.demand(cut, sector, value, op.id);
                }
            }
        }
    }

    fn judge(&self, read: &Op, lineage: &[u64], sector: u32, value: Value) -> Result<(), (Kind, String)> {
        let reader = describe(read, self.start);
        match value {
            Value::Zero => Ok(()),
            Value::Torn { op } => Err((Kind::Torn, format!("parts of several writes, or garbage, that begins as write #{op} does; read by {reader}"))),
            Value::Elsewhere { layer, op, sector } => {
                Err((Kind::Misplaced, format!("what write #{op} put into sector {sector} of layer {layer}; read by {reader}")))
            }
            Value::Write { layer, op } => {
                let Some(write) = self.by_id.get(&op) else {
                    return Err((Kind::NeverWritten, format!("write #{op} of layer {layer}, which nobody made; read by {reader}")));
                };
                let writer = describe(write, self.start);
                let covers = write.action == Action::Write && write.target == Target::Layer(layer) && covers(write, sector);
                if !covers {
                    Err((Kind::NeverWritten, format!("a stamp of {writer}, which does not write it; read by {reader}")))
                } else if !lineage.contains(&layer) {
                    Err((Kind::Foreign, format!("another volume's data: {writer}; read by {reader}")))
                } else if read.completed.is_some_and(|done| done < write.invoked) {
                    Err((Kind::NeverWritten, format!("{writer} was read before it was made, by {reader}")))
                } else {
                    Ok(())
                }
            }
        }
    }

    /// A cut must show this.
    pub(super) fn demand(&mut self, cut: u64, sector: u32, value: Value, witness: u64) {
        let (before, first) = self.demands.put(cut, sector, (value, witness));
        if before == value {
            return;
        }
        let layer = self.cut_layer.get(&cut).copied().unwrap_or_default();
        let text = format!(
            "snapshot #{cut} shows {} and {}:{}",
            self.name(before),
            self.name(value),
            self.lines([first, witness].iter().filter_map(|id| self.by_id.get(id)).map(|op| (*op, String::new())), witness)
        );
        self.report(Kind::CutChanged, layer, sector, text);
    }

    /// No writer has success once a request of a later attach of the same volume has taken effect on the sector, in whatever layer.
    pub(super) fn check_fences(&mut self) {
        let mut fences: HashMap<(u64, u32), (u64, usize)> = HashMap::new();
        let ops = &self.history.ops;
        let done = ops.iter().enumerate().filter(|(_, op)| op.epoch > 0 && op.completed.is_some());
        let mut events: Vec<(u64, bool, usize)> =
            done.flat_map(|(i, op)| [(op.invoked, false, i), (op.completed.unwrap_or(u64::MAX), true, i)]).collect();
        events.sort_unstable();
        for (_, is_end, i) in events {
            let op = &self.history.ops[i];
            let Some(volume) = self.layer_of(op.target).and_then(|l| self.history.layers.get(&l)).map(|l| l.volume) else { continue };
            for sector in op.first..op.first.saturating_add(op.count) {
                let fence = fences.entry((volume, sector)).or_insert((0, i));
                if is_end && op.epoch > fence.0 {
                    *fence = (op.epoch, i);
                } else if !is_end && op.action != Action::Read && fence.0 > op.epoch {
                    let text = format!(
                        "a fenced writer had success{}",
                        self.lines([fence.1, i].iter().map(|i| (&self.history.ops[*i], String::new())), op.id)
                    );
                    let layer = self.layer_of(op.target).unwrap_or_default();
                    self.report(Kind::FencedSuccess, layer, sector, text);
                    break;
                }
            }
        }
    }
}

fn covers(op: &Op, sector: u32) -> bool {
    sector >= op.first && sector - op.first < op.count
}
