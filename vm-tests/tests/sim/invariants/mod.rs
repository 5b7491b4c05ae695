//! What must hold in every world, one file each.
//!
//! | invariant | source | file |
//! | --- | --- | --- |
//! | the history is explained: linearizable sectors, fences, durable acknowledgements over power cuts, exact snapshots, forks | promises in `vm-tests/src/history` | `history.rs` |
//! | one leader per term and group | Raft, election safety | `one_leader.rs` |
//! | what is applied at an index is the same on all replicas and for ever | Raft, state machine safety | `committed.rs` |
//! | replicas are equal at the end | `server/chunkserver/src/store/mod.rs` | compared by the administrator (`vm-tests/src/torture/replicas.rs`) |
//! | a process ends only for a reason; none panics | STYLE | `hosts.rs` |

pub(crate) mod committed;
pub(crate) mod history;
pub(crate) mod one_leader;

use anyhow::Result;
use ogee_common::sim::Seen;

/// Those that look at every event.
#[derive(Debug, Default)]
pub(crate) struct Invariants {
    leaders: one_leader::OneLeader,
    committed: committed::Committed,
}

impl Invariants {
    /// Looks at an event.
    ///
    /// # Errors
    /// The violation.
    pub(crate) fn saw(&mut self, seen: Seen) -> Result<()> {
        self.leaders.saw(seen)?;
        self.committed.saw(seen)
    }
}

/// An event, for the trace.
pub(crate) fn parts(seen: &Seen) -> [u64; 4] {
    match *seen {
        Seen::Leads { group, term, replica } => [1, group, term, replica],
        Seen::Applied { group, index, term, crc, replica } => [group, index, (term << 32) | u64::from(crc), replica],
    }
}
