//! An exact snapshot: hold the attached client, commit, let go, confirm. Runs on the leader, in the volume's turn.
//!
//! ```text
//!              not attached ───────────────────────────> CreateSnapshot(Detached): ready
//!   expected ─┤ attached, stream ── Hold ── ack ────────> CreateSnapshot(Held) ── State ──┬─> ConfirmSnapshot: ready
//!              │                        │                                               └─> SealSnapshot, if the hold broke
//!              └ no stream ─────────────┴─ no ack ──────> CreateSnapshot(Bypassed) ── State: sealing
//! ```
//!
//! Invariants: a snapshot is confirmed only if the client's hold was unbroken when the commit was applied, and the
//! commit came before a client may let go by itself; in every other case the copysets are sealed. The client is let go
//! whatever happens, also when the commit fails: it then hears the old seq. If this leader dies between commit and
//! confirmation, the next one seals (`duties`). A command that finds the volume changed makes the whole start again.
//! The answers of these commands are not kept for repeated requests: a later hold must not confirm an earlier commit.

use super::Core;
use super::status::CallError;
use crate::machine::attach;
use crate::machine::command::{Command, Expected, Outcome, SnapshotInfo};
use crate::machine::row::{Hold, VolumeRow};
use crate::refusal::Refusal;
use ogee_common::clock::{self, Instant};
use ogee_common::id::{AttachEpoch, VolumeId};
use ogee_common::limits::{HOLD_RELEASE_AFTER, HOLD_TIMEOUT};
use std::time::Duration;

/// How often the volume may change under the operation before it gives up.
pub(super) const ATTEMPTS: usize = 4;
/// Kept from [`HOLD_RELEASE_AFTER`] for clocks that run unequally fast.
const RELEASE_MARGIN: Duration = Duration::from_millis(500);

const _: () = assert!(HOLD_TIMEOUT.as_millis() + RELEASE_MARGIN.as_millis() < HOLD_RELEASE_AFTER.as_millis());

/// A client that holds its writes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Held {
    pub(super) token: u64,
    since: Instant,
}

impl Held {
    /// Until when the client surely does not let go by itself.
    pub(super) fn lasts_until(self) -> Instant {
        self.since + (HOLD_RELEASE_AFTER - RELEASE_MARGIN)
    }
}

/// What an answer to a snapshot command says.
///
/// # Errors
/// As [`super::volumes::volume`].
pub(crate) fn snapshot(outcome: Outcome) -> Result<SnapshotInfo, CallError> {
    match outcome {
        Outcome::Snapshot(info) => Ok(*info),
        _ => Err(CallError::Answer(crate::machine::command::DecodeError::Trailing)),
    }
}

impl Core {
    /// Makes a snapshot of a volume's head; hidden without a name. The caller has the volume's turn.
    ///
    /// # Errors
    /// What the state machine refuses; `Unavailable`.
    pub(super) async fn snapshot_head(
        &self,
        volume: VolumeId,
        name: Option<&str>,
    ) -> Result<SnapshotInfo, CallError> {
        let mut attempts = ATTEMPTS;
        loop {
            self.lead().await?;
            self.drop_leftovers(&[volume]).await?;
            let expected = self.read(|tx| {
                let row: VolumeRow = tx.get(&volume)?.ok_or(Refusal::VolumeGone)?;
                attach::expected(tx, &row)
            })?;
            attempts -= 1;
            match self.snapshot_once(volume, name, expected).await {
                Err(e) if attempts > 0 && e.is_refusal(|r| matches!(r, Refusal::Moved { .. })) => {}
                other => return other,
            }
        }
    }

    async fn snapshot_once(
        &self,
        volume: VolumeId,
        name: Option<&str>,
        expected: Expected,
    ) -> Result<SnapshotInfo, CallError> {
        let held = match expected.attached {
            Some(epoch) => self.hold_client(volume, epoch).await,
            None => None,
        };
        let hold = match (expected.attached, held) {
            (None, _) => Hold::Detached,
            (Some(_), Some(_)) => Hold::Held,
            (Some(_), None) => Hold::Bypassed,
        };
        let name = name.map(str::to_owned);
        let committed = self.propose(None, Command::CreateSnapshot { volume, name, expected, hold }).await;
        let unbroken = held.is_some_and(|h| self.hub.is_held(volume, h.token));
        self.hub.release(volume, || self.current(volume));
        let info = snapshot(committed?)?;
        if !info.confirming {
            return Ok(info);
        }
        let in_time = held.is_some_and(|h| clock::now() < h.lasts_until());
        let settle = if unbroken && in_time {
            Command::ConfirmSnapshot { snapshot: info.id }
        } else {
            tracing::warn!(target: "controlpath", %volume, snapshot = %info.id, "the hold broke; sealing instead");
            Command::SealSnapshot { snapshot: info.id }
        };
        snapshot(self.propose(None, settle).await?)
    }

    /// Asks the client to hold and waits for its word. `None`: it cannot be reached or does not answer in time.
    pub(super) async fn hold_client(&self, volume: VolumeId, epoch: AttachEpoch) -> Option<Held> {
        if !self.hub.is_alive(volume, epoch) {
            return None;
        }
        let began = clock::now();
        let deadline = began + HOLD_TIMEOUT;
        tokio::time::timeout_at(deadline, self.hub.stream_open(volume, epoch)).await.ok()?;
        let since = clock::now();
        let (token, acknowledged) = self.hub.hold(volume, epoch)?;
        match tokio::time::timeout_at(deadline, acknowledged).await {
            Ok(Ok(())) => Some(Held { token, since }),
            _ => {
                tracing::info!(target: "controlpath", %volume, "the client did not hold in time; bypassing it");
                None
            }
        }
    }
}
