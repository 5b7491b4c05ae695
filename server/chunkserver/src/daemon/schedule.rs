//! When which copyset is checkpointed, and when a log that is too long is trimmed. Pure; driven by [`super::upkeep`].
//!
//! What bounds what:
//! - Replay after a crash: no copyset has entries without a checkpoint that lie more than [`UNCHECKPOINTED_BYTES_MAX`] back
//!   in the log. Under load copysets come due at half of that, one in each turn, so that flushes are spread evenly
//!   instead of meeting in one burst.
//! - The log: above [`LOG_BYTES_MAX`] the copysets that hold its oldest segment give up the tails that they keep for
//!   followers that were away. One that holds it all the same gets a checkpoint.
//!
//! Invariant: a copyset without new entries is never checkpointed for its age.

use ogee_common::clock::Instant;
use ogee_common::id::CopysetId;
use ogee_common::sim;
use std::collections::HashMap;
use std::time::Duration;

/// Entries applied since the last checkpoint that make one due.
const CHECKPOINT_ENTRIES: u64 = 16_384;
/// A copyset with anything applied is checkpointed after this time.
const CHECKPOINT_INTERVAL: Duration = Duration::from_secs(60);
/// The same in a simulation, whose whole life is some seconds.
const CHECKPOINT_INTERVAL_SIMULATED: Duration = Duration::from_secs(1);
/// Bytes of log behind a copyset's last checkpoint that make one due at once.
const UNCHECKPOINTED_BYTES_MAX: u64 = 512 << 20;
/// The same that makes it due when its turn comes.
const UNCHECKPOINTED_BYTES: u64 = UNCHECKPOINTED_BYTES_MAX / 2;
/// Log bytes above which tails are given up.
pub(super) const LOG_BYTES_MAX: u64 = 1 << 30;

/// A copyset as it is now.
#[derive(Debug, Clone, Copy)]
pub(super) struct Now {
    pub(super) copyset: CopysetId,
    /// Index applied.
    pub(super) applied: u64,
    /// Its store asks for a checkpoint: memory for dirty metadata runs short.
    pub(super) asks: bool,
    /// It holds the oldest segment of a log that is too long.
    pub(super) pins: bool,
}

/// What is to be done for a copyset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Checkpoint it.
    Checkpoint(CopysetId),
    /// Give up the tail of its log.
    Trim(CopysetId),
}

struct Last {
    applied: u64,
    /// Bytes that the process had written to its log.
    log_bytes: u64,
    at: Instant,
    trimmed: bool,
}

/// What is known of the last checkpoints.
#[derive(Default)]
pub(super) struct Schedule {
    last: HashMap<CopysetId, Last>,
}

impl Schedule {
    /// Decides what is due. `log_bytes`: written to the log since the process started. What it returns counts as done.
    pub(super) fn turn(&mut self, now: Instant, log_bytes: u64, copysets: &[Now]) -> Vec<Due> {
        let mut due = vec![];
        let mut oldest: Option<(u64, Now)> = None;
        for c in copysets {
            let fresh = Last { applied: c.applied, log_bytes, at: now, trimmed: false };
            let last = self.last.entry(c.copyset).or_insert(fresh);
            let entries = c.applied.saturating_sub(last.applied);
            let behind = log_bytes - last.log_bytes;
            let interval = if sim::running() { CHECKPOINT_INTERVAL_SIMULATED } else { CHECKPOINT_INTERVAL };
            let aged = now.saturating_duration_since(last.at) >= interval || behind >= UNCHECKPOINTED_BYTES_MAX;
            if c.asks || (c.pins && last.trimmed) || entries >= CHECKPOINT_ENTRIES || (entries > 0 && aged) {
                due.push(Due::Checkpoint(c.copyset));
                *last = Last { applied: c.applied, log_bytes, at: now, trimmed: false };
                continue;
            }
            if c.pins {
                due.push(Due::Trim(c.copyset));
            }
            last.trimmed = c.pins;
            if entries > 0 && behind >= UNCHECKPOINTED_BYTES && oldest.is_none_or(|(most, _)| behind > most) {
                oldest = Some((behind, *c));
            }
        }
        if let Some((_, c)) = oldest {
            due.push(Due::Checkpoint(c.copyset));
            self.last.insert(c.copyset, Last { applied: c.applied, log_bytes, at: now, trimmed: false });
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_common::clock;

    const MIB: u64 = 1 << 20;

    fn copyset(id: u32, applied: u64) -> Now {
        Now { copyset: CopysetId(id), applied, asks: false, pins: false }
    }

    #[test]
    fn idle_copysets_rest_and_busy_ones_come_due_by_age_and_count() {
        let (mut schedule, start) = (Schedule::default(), clock::now());
        let mut turn = |seconds: u64, a, b| {
            schedule.turn(start + Duration::from_secs(seconds), 0, &[copyset(1, a), copyset(2, b)])
        };
        assert_eq!(turn(0, 100, 100), []);
        assert_eq!(turn(59, 101, 100), []);
        assert_eq!(turn(60, 101, 100), [Due::Checkpoint(CopysetId(1))]);
        assert_eq!(turn(1000, 101, 100), []);
        assert_eq!(turn(1001, 101, 100 + CHECKPOINT_ENTRIES), [Due::Checkpoint(CopysetId(2))]);
        assert_eq!(turn(1002, 101, 100 + CHECKPOINT_ENTRIES), []);
    }

    /// 24 copysets under an even load that writes 10 MiB of log per turn: after a while one is checkpointed in each
    /// turn or none, and none falls far behind.
    #[test]
    fn under_load_checkpoints_are_spread_evenly() {
        let (mut schedule, start) = (Schedule::default(), clock::now());
        let mut checkpointed = HashMap::from([(0, 0); 0]);
        let mut most = 0;
        for turn in 0..1000u64 {
            let all: Vec<Now> = (0..24).map(|id| copyset(id, turn * 10)).collect();
            let due = schedule.turn(start + Duration::from_millis(250 * turn), turn * 10 * MIB, &all);
            most = most.max(due.len());
            for d in due {
                let Due::Checkpoint(c) = d else { panic!("nothing pins the log") };
                let behind = turn - checkpointed.insert(c.0, turn).unwrap_or(0);
                assert!(behind * 10 * MIB <= UNCHECKPOINTED_BYTES_MAX, "{c} after {behind} turns");
            }
        }
        assert_eq!(most, 1);
        assert_eq!(checkpointed.len(), 24);
        assert!(checkpointed.values().all(|turn| *turn > 900));
    }

    #[test]
    fn a_fast_load_is_not_held_to_one_per_turn() {
        let (mut schedule, start) = (Schedule::default(), clock::now());
        schedule.turn(start, 0, &[copyset(1, 0), copyset(2, 0)]);
        let due = schedule.turn(start, 600 * MIB, &[copyset(1, 9), copyset(2, 9)]);
        assert_eq!(due, [Due::Checkpoint(CopysetId(1)), Due::Checkpoint(CopysetId(2))]);
    }

    #[test]
    fn what_pins_a_long_log_is_trimmed_and_then_checkpointed() {
        let (mut schedule, now) = (Schedule::default(), clock::now());
        let pinning = Now { pins: true, ..copyset(1, 5) };
        assert_eq!(schedule.turn(now, 0, &[pinning]), [Due::Trim(CopysetId(1))]);
        assert_eq!(schedule.turn(now, 0, &[pinning]), [Due::Checkpoint(CopysetId(1))]);
        assert_eq!(schedule.turn(now, 0, &[pinning]), [Due::Trim(CopysetId(1))]);
        assert_eq!(schedule.turn(now, 0, &[copyset(1, 5)]), []);
        assert_eq!(schedule.turn(now, 0, &[pinning]), [Due::Trim(CopysetId(1))]);
    }
}
