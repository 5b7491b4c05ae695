//! If a replica has applied an entry at an index of a group, no replica ever applies another one there, after a restart neither (Ongaro 2014,
//! 3.2 "State Machine Safety"; with it log matching up to the commit index). Also "what is committed is never lost": an index that was
//! applied and lost would be filled again, by another entry.

use anyhow::{Result, ensure};
use ogee_common::sim::Seen;
use std::collections::BTreeMap;

/// Term and checksum of what was applied, by group and index.
#[derive(Debug, Default)]
pub(crate) struct Committed(BTreeMap<(u64, u64), (u64, u32, u64)>);

impl Committed {
    /// Looks at an event.
    ///
    /// # Errors
    /// Two different entries.
    pub(crate) fn saw(&mut self, seen: Seen) -> Result<()> {
        if let Seen::Applied { group, index, term, crc, replica } = seen {
            let (first_term, first_crc, first) = *self.0.entry((group, index)).or_insert((term, crc, replica));
            ensure!(
                (first_term, first_crc) == (term, crc),
                "committed entries never change: at {index} of group {group} replica {first} applied an entry of term {first_term}, replica {replica} one of term {term}"
            );
        }
        Ok(())
    }
}
