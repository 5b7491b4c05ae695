//! At most one replica of a group leads in a term (Ongaro 2014, 3.2 "Election Safety").

use anyhow::{Result, ensure};
use ogee_common::sim::Seen;
use std::collections::BTreeMap;

/// Who led, by group and term.
#[derive(Debug, Default)]
pub(crate) struct OneLeader(BTreeMap<(u64, u64), u64>);

impl OneLeader {
    /// Looks at an event.
    ///
    /// # Errors
    /// A second leader.
    pub(crate) fn saw(&mut self, seen: Seen) -> Result<()> {
        if let Seen::Leads { group, term, replica } = seen {
            let first = *self.0.entry((group, term)).or_insert(replica);
            ensure!(first == replica, "one leader per term: group {group} has leaders {first} and {replica} in term {term}");
        }
        Ok(())
    }
}

