//! A counter-example for people: what was found, where, what was expected, and the requests on that sector around it.
//!
//! Made by `check.rs` and `cuts.rs`. Times are milliseconds since the first request of the history.

use super::{Action, Op, Target};
use std::fmt;
use std::fmt::Write;

/// Requests that are listed on each side of the one in question.
const AROUND: usize = 12;

/// What kind of promise was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ViolationKind {
    /// A sector held parts of several writes, or garbage.
    Torn,
    /// A sector held what was written to another sector.
    Misplaced,
    /// A sector held what was written to a layer that is none of its own.
    Foreign,
    /// A sector held something that no recorded request had written there by then.
    NeverWritten,
    /// No order explains the register: a stale read, a lost write, one that came back, or one that landed after its fence.
    NotLinearizable,
    /// Two reads of one sector of a snapshot, or of what a fork began with, differ.
    CutChanged,
    /// There is no instant at which all sectors held what the snapshot shows.
    CutNotExact,
    /// A writer that was fenced off by a later attach of the volume got a success.
    FencedSuccess,
    /// Too much happened at once to decide; no proof of a violation.
    Undecided,
}

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// What kind.
    pub kind: ViolationKind,
    /// The layer.
    pub layer: u64,
    /// The sector.
    pub sector: u32,
    /// What was expected, and the requests concerned, in several lines.
    pub text: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: layer {}, sector {}: {}", self.kind, self.layer, self.sector, self.text)
    }
}

/// Milliseconds since `start`.
pub(super) fn at(start: u64, time: u64) -> String {
    if time == u64::MAX { "?".to_owned() } else { format!("{:.3}", time.saturating_sub(start) as f64 / 1e6) }
}

/// One request in a line.
pub(super) fn describe(op: &Op, start: u64) -> String {
    let action = match op.action {
        Action::Write => "write",
        Action::Zero => "zero",
        Action::Read => "read",
        Action::Cut => "snapshot",
    };
    let target = match op.target {
        Target::Layer(layer) => format!("layer {layer}"),
        Target::Cut(cut) => format!("snapshot #{cut}"),
    };
    let end = op.completed.map_or_else(|| "unknown outcome".to_owned(), |time| format!("{} ms", at(start, time)));
    let (client, epoch, first, last) = (op.client, op.epoch, op.first, u64::from(op.first) + u64::from(op.count));
    format!("#{} {action} of {target}, sectors {first}..{last}, client {client}, epoch {epoch}: {} .. {end}", op.id, at(start, op.invoked))
}

/// The requests `ops` (in order of time, each with a remark), those around `centre` only.
pub(super) fn list<'a>(ops: impl IntoIterator<Item = (&'a Op, String)>, centre: u64, start: u64) -> String {
    let ops: Vec<_> = ops.into_iter().collect();
    let middle = ops.iter().position(|(op, _)| op.id == centre).unwrap_or(ops.len());
    let (from, to) = (middle.saturating_sub(AROUND), (middle + AROUND + 1).min(ops.len()));
    let mut text = String::new();
    for (op, remark) in &ops[from..to] {
        let mark = if op.id == centre { ">" } else { " " };
        // Writing to a string cannot fail.
        let _ = write!(text, "\n {mark} {}{remark}", describe(op, start));
    }
    if to - from < ops.len() {
        let _ = write!(text, "\n   ({} requests on this sector in all)", ops.len());
    }
    text
}
