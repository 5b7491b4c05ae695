//! Rebuilding the state from records, and the running summary that heads of segments repeat. Pure; called by recovery
//! for every record found, and by the encoder for every record written, so that both see the same history.
//!
//! Invariant: after the same records, `logged` is the same whether they were written or read back. Segments that were
//! freed are missing at the front, so entries may seem to be missing until a later purge or truncation covers them.

use super::core::Core;
use super::format::{GroupState, Record};
use super::group::{Location, Slot};
use std::collections::{BTreeMap, HashMap};

impl Core {
    /// Takes a record found by recovery. A state at the head of a later segment repeats what is known already.
    pub(super) fn replay(&mut self, group: u64, record: Record, payload: usize, location: Location) {
        let known = self.logged.contains_key(&group);
        note_logged(&mut self.logged, group, &record);
        let log = self.groups.entry(group).or_default();
        match record {
            Record::Entry { kind, point } => {
                self.stamp += 1;
                let slot = Slot {
                    term: point.term,
                    kind,
                    len: payload,
                    stamp: self.stamp,
                    location: Some(location),
                    cached: None,
                };
                log.replay(point.index, slot);
            }
            Record::Vote(vote) => log.vote = Some(vote),
            Record::TruncateFrom(from) => drop(log.truncate_from(from)),
            Record::Purge(point) => drop(log.purge(point)),
            Record::State(state) if !known => {
                (log.vote, log.purged, log.base) = (state.vote, state.purged, state.base);
            }
            Record::State(_) => {}
            Record::Remove => drop(self.groups.remove(&group)),
        }
    }

    /// Ends recovery: counts what is live and names a group whose log has a hole.
    pub(super) fn recovered(&mut self) -> Result<(), u64> {
        self.durable_stamp = self.stamp;
        let mut live: HashMap<u64, u64> = HashMap::new();
        for (group, log) in &self.groups {
            if log.hole.is_some() {
                return Err(*group);
            }
            for location in log.slots.iter().filter_map(|s| s.location) {
                *live.entry(location.segment).or_default() += 1;
            }
        }
        for segment in &mut self.segments {
            segment.live = live.get(&segment.number).copied().unwrap_or(0);
        }
        Ok(())
    }
}

/// Keeps the state that the next segment's head must say.
pub(super) fn note_logged(logged: &mut BTreeMap<u64, GroupState>, group: u64, record: &Record) {
    if matches!(record, Record::Remove) {
        logged.remove(&group);
        return;
    }
    let known = logged.contains_key(&group);
    let state = logged.entry(group).or_default();
    match record {
        Record::Entry { point, .. } => {
            state.base.get_or_insert(point.index);
        }
        Record::Vote(vote) => state.vote = Some(*vote),
        Record::TruncateFrom(from) => {
            if state.purged.is_none() && state.base.is_some_and(|b| *from <= b) {
                state.base = None;
            }
        }
        Record::Purge(point) if state.purged.is_none_or(|p| p.index < point.index) => {
            state.purged = Some(*point);
            state.base = Some(point.index + 1).max(state.base.filter(|b| *b > point.index));
        }
        Record::State(found) if !known => *state = *found,
        Record::Purge(_) | Record::State(_) | Record::Remove => {}
    }
}
