//! History of what clients did to volumes and what they saw, and a checker that decides whether the promises of section 6 and 7 of
//! the target architecture explain it.
//!
//! | file | what it gives |
//! | --- | --- |
//! | `stamp.rs` | contents of a sector that name layer, sector and write, and show a tear |
//! | `recorder.rs` | [`Recorder`] (one per client, in memory or to a file) and [`Recorded`], a device that records what it does |
//! | `log.rs` | events as lines of text, so that clients may be processes that are killed |
//! | `check.rs` | [`check`]: sorts the history by layer and sector, and puts forks and cuts together |
//! | `reads.rs` | what can be said of single values |
//! | `demands.rs` | what each snapshot must show |
//! | `register.rs` | whether one sector of one layer is a linearizable register |
//! | `cuts.rs` | whether each snapshot shows all sectors at one instant |
//! | `violation.rs` | the counter-example for people |
//!
//! # What is promised, as a model
//!
//! Each sector of each layer is a register; a write and a zeroing (discard, write-zeroes) of a range is one write for each of its
//! sectors, and nothing is promised about the order among the sectors of one request. The registers are linearizable (Herlihy and Wing
//! 1990): every request takes effect at one instant between its invocation and its completion. A write without a known outcome takes
//! effect at one instant after its invocation, or never. It may do so late, until it is fenced: once a request of a later attach epoch
//! has taken effect in a sector, no write of an earlier one does. A snapshot is a *cut*: there is one instant between its invocation
//! and the time when it is ready at which all registers of the layer hold what it shows. A clone or a rollback is a *fork*: a layer
//! whose registers begin with what a cut shows. A new volume begins with zeros.
//!
//! # Algorithm
//!
//! Linearizability is local, so each register is checked alone; that makes the general problem, which is NP-complete, nearly linear here
//! (P-compositionality: Horn and Kroening, "Faster linearizability checking via P-compositionality", 2015). One register is checked
//! by *just-in-time linearization* (Lowe, "Testing for linearizability", 2017): events are taken in order of time, with the set of all
//! states the register may be in; when a request completes, each state is extended by pending requests until that one has taken effect.
//! Values are unique (Gibbons and Korach, "Testing shared memories", 1997, say why that matters), so an unknown write that nobody saw
//! is left out, and one that was seen has to take effect before the first request that saw it completed. Zeros are not unique: an
//! unknown zeroing is an option that is drawn only when a read of zeros needs it, lowest epoch first, which loses no solution
//! because an earlier draw, or one of a later epoch, allows nothing more.
//!
//! A cut is a read of every register at one unknown instant. For each register the instants that are possible are computed by trying
//! every gap between its events within the snapshot's window, and the sets of all registers are intersected. With several cuts of one
//! layer each set is computed with the other cuts anywhere in their windows, which is necessary; then instants are chosen and all
//! registers checked with them, which is sufficient. What falls between is tried a bounded number of times and else reported as
//! [`ViolationKind::Undecided`], never passed over. A fork is checked before its parent, and what it shows of its beginning is
//! demanded of the parent's cut.
//!
//! Deliberately absent: flushes (a completed write is durable already), sizes that change, reads that failed.

mod check;
mod cuts;
mod demands;
mod log;
mod reads;
mod recorder;
mod register;
#[cfg(test)]
mod simulate;
mod stamp;
#[cfg(test)]
mod tests;
mod violation;

pub use check::{Checked, check};
pub use log::parse;
pub use recorder::{Recorded, Recorder, now};
pub use stamp::{SECTOR_BYTES, decode, fill};
pub use violation::{Violation, ViolationKind};

use anyhow::{Result, bail};
use std::collections::{BTreeMap, HashMap};

/// What a sector was seen to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Value {
    /// Zeros.
    Zero,
    /// What write `op` of `layer` put into this very sector.
    Write {
        /// The layer that was written.
        layer: u64,
        /// The write's operation.
        op: u64,
    },
    /// What a write put into another sector.
    Elsewhere {
        /// The layer that was written.
        layer: u64,
        /// The write's operation.
        op: u64,
        /// The sector it was written to.
        sector: u64,
    },
    /// No sector that was ever written: parts of several, or garbage.
    Torn {
        /// The operation that its first bytes name.
        op: u64,
    },
}

/// So many sectors with one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Sectors.
    pub count: u32,
    /// What each holds.
    pub value: Value,
}

/// What a request does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Writes its stamp to each sector.
    Write,
    /// Discard or write-zeroes.
    Zero,
    /// Reads.
    Read,
    /// Takes a snapshot; the operation's number names the cut.
    Cut,
}

/// What a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Target {
    /// The live layer of that number.
    Layer(u64),
    /// The snapshot that operation took.
    Cut(u64),
}

/// One request from its invocation to its completion. Times are nanoseconds of the machine's monotonic clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Op {
    /// Unique in the history, never 0.
    pub id: u64,
    /// Who asked.
    pub client: u32,
    /// What it does.
    pub action: Action,
    /// To what.
    pub target: Target,
    /// The attach epoch it carries; 0 for readers that are not attached for writing, and for cuts.
    pub epoch: u64,
    /// First sector.
    pub first: u32,
    /// Sectors.
    pub count: u32,
    /// When it was asked for.
    pub invoked: u64,
    /// When it succeeded; `None` when its outcome is not known.
    pub completed: Option<u64>,
    /// What a read that succeeded found.
    pub found: Vec<Run>,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeded; a read found this.
    Ok(Vec<Run>),
    /// It failed, and may have taken effect or may do so yet.
    Unknown,
    /// It was refused and certainly never takes effect.
    Void,
}

/// Where a layer comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// The volume it is or was the head of.
    pub volume: u64,
    /// Its size.
    pub sectors: u32,
    /// The cut it began with; `None` for zeros.
    pub parent: Option<u64>,
}

/// One thing that was recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A layer exists. The same may be said several times.
    Layer {
        /// Its number.
        id: u64,
        /// What it is.
        layer: Layer,
    },
    /// A request was made: `completed` is `None` and `found` empty.
    Invoke(Op),
    /// A request ended.
    Complete {
        /// Which.
        op: u64,
        /// When.
        time: u64,
        /// How.
        outcome: Outcome,
    },
}

/// Everything that happened.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// All requests but those that certainly had no effect, in order of their invocation.
    pub ops: Vec<Op>,
    /// All layers.
    pub layers: BTreeMap<u64, Layer>,
}

impl History {
    /// Puts the events of all clients together, in any order.
    ///
    /// # Errors
    /// When they contradict each other: an operation that was invoked twice or ended without having begun, a layer with two origins.
    pub fn new(events: impl IntoIterator<Item = Event>) -> Result<Self> {
        let (mut ops, mut ends, mut layers) = (Vec::new(), HashMap::new(), BTreeMap::new());
        for event in events {
            match event {
                Event::Layer { id, layer } => {
                    if layers.insert(id, layer).is_some_and(|before| before != layer) {
                        bail!("layer {id} was recorded with two origins");
                    }
                }
                Event::Invoke(op) => ops.push(op),
                Event::Complete { op, time, outcome } => {
                    if ends.insert(op, (time, outcome)).is_some() {
                        bail!("operation {op} ended twice");
                    }
                }
            }
        }
        for op in &mut ops {
            match ends.remove(&op.id) {
                Some((time, _)) if time < op.invoked => bail!("operation {} ended before it began", op.id),
                Some((time, Outcome::Ok(found))) => (op.completed, op.found) = (Some(time), found),
                // Marked to be left out.
                Some((_, Outcome::Void)) => op.count = 0,
                Some((_, Outcome::Unknown)) | None => {}
            }
        }
        if let Some(op) = ends.keys().next() {
            bail!("operation {op} ended but was never made (or twice)");
        }
        ops.retain(|op| op.count > 0 || op.action == Action::Cut);
        ops.sort_by_key(|op| (op.invoked, op.id));
        Ok(Self { ops, layers })
    }
}
