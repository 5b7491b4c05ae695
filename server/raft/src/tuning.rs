//! The times of the Raft layer and how they hang together.
//!
//! Invariants, checked by [`RaftTuning::validate`]: a follower's lease outlives several heartbeats; a leader's lease is
//! never longer than its followers' (openraft uses one value, the upper election timeout, for both, counted from the
//! sending at the leader and from the receipt at the follower).

use openraft::{Config, SnapshotPolicy, StepDownPolicy};
use std::time::Duration;

/// Times and lengths. The defaults suit a busy machine with two cores and a flush of up to 50 ms at p99.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftTuning {
    /// A leader shows itself this often to followers that it has nothing else to send to. Default 200 ms: four chances
    /// within a lease.
    pub heartbeat: Duration,
    /// A follower waits at least this long after the lease before it asks for votes. Default 500 ms: ten times the p99
    /// flush, and with the lease more than six heartbeats.
    pub election_min: Duration,
    /// It waits less than this; and this is the lease: for so long after it heard of a leader a follower votes for
    /// nobody, and for so long after a majority heard of it a leader serves reads without asking. Default 900 ms: a
    /// killed leader, noticed by its closed connections, is replaced when the lease ends; a hung one in at most twice
    /// this.
    pub election_max: Duration,
    /// How often timers are looked at. Default 25 ms: all groups together, so that their heartbeats leave in one
    /// system call.
    pub tick: Duration,
    /// When a follower's process closed its connections to its leader, it asks for votes this much later than the
    /// follower before it in the order of the group, so that they do not split the votes. Default 60 ms: a vote with
    /// its flush.
    pub election_step: Duration,
    /// Entries that stay in the log after a checkpoint, so that a follower that was away for a moment needs no
    /// snapshot. Default 4,096.
    pub tail_entries: u64,
    /// Bytes of those entries: the tail ends at whichever is reached first. Default 64 MiB.
    pub tail_bytes: u64,
}

impl Default for RaftTuning {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(200),
            election_min: Duration::from_millis(500),
            election_max: Duration::from_millis(900),
            tick: Duration::from_millis(25),
            election_step: Duration::from_millis(60),
            tail_entries: 4096,
            tail_bytes: 64 << 20,
        }
    }
}

/// Why times do not go together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TuningError {
    /// `election_min` must be below `election_max`.
    #[error("the lower election timeout must be below the upper one")]
    ElectionOrder,
    /// `election_min` must exceed twice the heartbeat and a tick.
    #[error("the lower election timeout must exceed two heartbeats and a tick")]
    HeartbeatTooLong,
    /// `tick` must be at least a millisecond and below the heartbeat.
    #[error("the tick must be at least 1 ms and at most half a heartbeat")]
    Tick,
}

impl RaftTuning {
    /// Checks that the times go together.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub fn validate(&self) -> Result<(), TuningError> {
        if self.election_min >= self.election_max {
            return Err(TuningError::ElectionOrder);
        }
        if self.tick < Duration::from_millis(1) || self.tick * 2 > self.heartbeat {
            return Err(TuningError::Tick);
        }
        // A heartbeat that was suppressed leaves up to one and a half intervals after the last contact.
        if self.election_min <= self.heartbeat * 2 + self.tick {
            return Err(TuningError::HeartbeatTooLong);
        }
        Ok(())
    }

    /// For so long nobody else can be elected after a majority heard of a leader.
    pub(crate) fn lease(&self) -> Duration {
        self.election_max
    }

    /// A leader trusts its lease for reads only this long: the rest is for clocks that do not run equally fast.
    pub(crate) fn read_lease(&self) -> Duration {
        self.election_max * 9 / 10
    }

    /// openraft's form of this. Its own ticks are off: [`crate::ticker`] drives elections and heartbeats of all groups
    /// with one timer. Leader restore is off because a restarted leader may have forgotten what it had committed and
    /// answered. It never makes snapshots nor purges by itself: the owner calls [`crate::RaftGroup::checkpoint`].
    pub(crate) fn openraft(&self) -> Config {
        let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        Config {
            cluster_name: "ogee".into(),
            heartbeat_interval: ms(self.heartbeat),
            // Half: the answer to one heartbeat must not suppress the next.
            heartbeat_min_interval: Some(ms(self.heartbeat / 2)),
            election_timeout_min: ms(self.election_min),
            election_timeout_max: ms(self.election_max),
            // Two leases: then a majority that can still talk to each other has had time to elect another leader.
            quorum_loss_probe_interval: Some(2 * ms(self.election_max)),
            enable_tick: false,
            enable_pre_vote: Some(true),
            enable_leader_restore: Some(false),
            allow_log_reversion: Some(false),
            removed_leader_step_down: StepDownPolicy::Never,
            snapshot_policy: SnapshotPolicy::Never,
            max_in_snapshot_log_to_keep: u64::MAX,
            max_payload_entries: 1024,
            // A connection that comes back resets the backoff, so its upper end may be long.
            backoff: "30ms 60ms 120ms ...1000ms".into(),
            ..Config::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_for_us_and_for_openraft() {
        let tuning = RaftTuning::default();
        assert_eq!(tuning.validate(), Ok(()));
        tuning.openraft().validate().expect("openraft accepts the defaults");
    }

    #[test]
    fn each_rule_is_checked() {
        let good = RaftTuning::default();
        let order = RaftTuning { election_min: good.election_max, ..good.clone() };
        assert_eq!(order.validate(), Err(TuningError::ElectionOrder));
        let heartbeat = RaftTuning { heartbeat: Duration::from_millis(300), ..good.clone() };
        assert_eq!(heartbeat.validate(), Err(TuningError::HeartbeatTooLong));
        let tick = RaftTuning { tick: Duration::ZERO, ..good };
        assert_eq!(tick.validate(), Err(TuningError::Tick));
    }
}
