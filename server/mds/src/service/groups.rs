//! A group snapshot: hold every attached client, commit all snapshots in one command, let go, confirm. Runs on the
//! leader, in the turns of all its volumes.
//!
//! ```text
//!   all hold, or nobody is attached ─> CreateGroup ─────────────> let go ─> ConfirmGroup
//!   one does not hold ───────────────> CreateGroup ─> its seal ─> let go ─> ConfirmGroup     (at most HOLD_RELEASE_AFTER)
//!   two do not hold ─────────────────> let go: refused
//!   a hold broke, or a volume changed, before the end ─────────> let go ─> DropGroup, once more
//! ```
//!
//! Why the cut is exact is said in [`crate::machine::groups`]. Invariants: no client is let go before the commit, nor, if
//! a client was bypassed, before its seal is done; a group is confirmed only if every hold was unbroken then; all are let
//! go whatever happens. Turns are taken in the order of the volumes' ids, so that two groups never wait for each other.
//! If this leader dies before the confirmation, the next one drops the group (`duties`), or whoever comes first for one
//! of its volumes does: what is left of a group is never mistaken for a group.

use super::Core;
use super::hold::{ATTEMPTS, Held};
use super::names;
use super::snapshots::detached;
use super::status::CallError;
use crate::machine::command::{Command, DecodeError, GroupPart, Outcome, SnapshotInfo};
use crate::machine::row::{Hold, SnapshotRow, UnsettledRow, VolumeRow};
use crate::machine::{attach, groups};
use crate::refusal::Refusal;
use futures_util::future::join_all;
use ogee_common::clock::{self, Instant};
use ogee_common::id::{SnapshotGroupId, VolumeId};
use ogee_common::limits::{HOLD_RELEASE_AFTER, HOLD_TIMEOUT};
use ogee_proto::mds;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A volume of the group.
#[derive(Debug, Clone)]
struct Wanted {
    volume: VolumeId,
    path: String,
    name: String,
}

/// The client of a volume that is attached: whether it holds.
#[derive(Debug, Clone, Copy)]
struct Client {
    volume: VolumeId,
    held: Option<Held>,
}

type Group = (SnapshotGroupId, Vec<SnapshotInfo>);

fn group(outcome: Outcome) -> Result<Group, CallError> {
    match outcome {
        Outcome::Group { group, snapshots } => Ok((group, snapshots)),
        _ => Err(CallError::Answer(DecodeError::Trailing)),
    }
}

/// Whether the same may succeed at once, because the volumes or clients changed under it; if a volume is gone, the next
/// try says which.
fn may_start_again(error: &CallError) -> bool {
    let changed = |r: &Refusal| matches!(r, Refusal::Moved { .. } | Refusal::VolumeGone);
    matches!(error, CallError::HoldBroken) || error.is_refusal(changed)
}

impl Core {
    pub(crate) async fn create_snapshot_group(
        self: &Arc<Self>,
        r: mds::CreateSnapshotGroupRequest,
    ) -> Result<mds::SnapshotGroup, CallError> {
        let members = names::group(&r.members)?;
        self.lead().await?;
        let wanted = members.into_iter().map(|(path, name)| {
            let volume = self.volume_at(&path)?;
            Ok(Wanted { volume, path, name })
        });
        let wanted = wanted.collect::<Result<Vec<_>, CallError>>()?;
        let core = self.clone();
        let taken = detached(async move {
            let mut volumes: Vec<VolumeId> = wanted.iter().map(|w| w.volume).collect();
            volumes.sort();
            let mut turns = vec![];
            for volume in &volumes {
                turns.push(core.ops.wait(*volume).await);
            }
            core.snapshot_group(&wanted, &volumes).await
        });
        let (group, snapshots) = taken.await?;
        Ok(mds::SnapshotGroup { group: group.0, snapshots: snapshots.into_iter().map(Into::into).collect() })
    }

    async fn snapshot_group(&self, wanted: &[Wanted], volumes: &[VolumeId]) -> Result<Group, CallError> {
        let mut attempts = ATTEMPTS;
        let until = clock::now() + HOLD_RELEASE_AFTER;
        loop {
            self.lead().await?;
            self.drop_leftovers(volumes).await?;
            attempts -= 1;
            match self.group_once(wanted).await {
                Err(e) if attempts > 0 && clock::now() < until && may_start_again(&e) => {
                    tracing::debug!(target: "controlpath", error = %e, "the group starts again");
                }
                other => return other,
            }
        }
    }

    async fn group_once(&self, wanted: &[Wanted]) -> Result<Group, CallError> {
        let mut parts = vec![];
        for Wanted { volume, path, name } in wanted {
            let expected = self.read(|tx| {
                let row: VolumeRow = tx.get(volume)?.ok_or_else(|| Refusal::NoSuchVolume { path: path.clone() })?;
                attach::expected(tx, &row)
            })?;
            parts.push(GroupPart { volume: *volume, name: name.clone(), expected, hold: Hold::Detached });
        }
        let attached = parts.iter().filter_map(|p| p.expected.attached.map(|epoch| (p.volume, epoch)));
        let clients = join_all(attached.map(|(volume, epoch)| async move {
            Client { volume, held: self.hold_client(volume, epoch).await }
        }));
        let clients = clients.await;
        for (part, client) in parts.iter_mut().filter(|p| p.expected.attached.is_some()).zip(&clients) {
            part.hold = if client.held.is_some() { Hold::Held } else { Hold::Bypassed };
        }
        let cut = self.cut(wanted, parts, &clients).await;
        // Also when the cut failed: nobody may wait for ever.
        for client in &clients {
            self.let_go(client.volume);
        }
        self.end_group(cut?).await
    }

    /// Commits the group and waits until the cut is made. The clients hold all the while, unless one is bypassed.
    async fn cut(&self, wanted: &[Wanted], parts: Vec<GroupPart>, clients: &[Client]) -> Result<Cut, CallError> {
        let bypassed: Vec<VolumeId> = clients.iter().filter(|c| c.held.is_none()).map(|c| c.volume).collect();
        if bypassed.len() > 1 {
            let of = |w: &&Wanted| bypassed.contains(&w.volume);
            return Err(CallError::Unreachable { volumes: wanted.iter().filter(of).map(|w| w.path.clone()).collect() });
        }
        let (group, _) = group(self.propose(None, Command::CreateGroup { parts }).await?)?;
        let Some(bypassed) = bypassed.first() else {
            return Ok(Cut { group, sound: self.all_hold(clients) });
        };
        // It did not promise to wait, and learns the new seq the sooner.
        self.let_go(*bypassed);
        let latest = clock::now() + (HOLD_RELEASE_AFTER - HOLD_TIMEOUT);
        let until = clients.iter().filter_map(|c| c.held).map(Held::lasts_until).fold(latest, Instant::min);
        let limit = until.saturating_duration_since(clock::now());
        let what = "sealing off a client that does not answer, while the others hold,";
        let sealed = self
            .wait_for_tasks(what, limit, |tx| Ok(groups::bypassed_are_sealed(tx, group)?.then_some(())))
            .await;
        if let Err(error) = sealed {
            self.drop_group(group).await;
            return Err(error);
        }
        Ok(Cut { group, sound: self.all_hold(clients) })
    }

    async fn end_group(&self, cut: Cut) -> Result<Group, CallError> {
        let Cut { group: id, sound } = cut;
        if !sound {
            self.drop_group(id).await;
            return Err(CallError::HoldBroken);
        }
        let confirmed = self.propose(None, Command::ConfirmGroup { group: id }).await;
        if matches!(confirmed, Err(CallError::Refused(_))) {
            self.drop_group(id).await;
        }
        group(confirmed?)
    }

    /// Whether every client that held still does; the one that never did does not count.
    fn all_hold(&self, clients: &[Client]) -> bool {
        let unbroken = |(volume, held): (VolumeId, Held)| {
            self.hub.is_held(volume, held.token) && clock::now() < held.lasts_until()
        };
        clients.iter().filter_map(|c| c.held.map(|held| (c.volume, held))).all(unbroken)
    }

    fn let_go(&self, volume: VolumeId) {
        self.hub.release(volume, || self.current(volume));
    }

    /// A group that cannot be dropped now is dropped by the duties.
    async fn drop_group(&self, group: SnapshotGroupId) {
        if let Err(error) = self.propose(None, Command::DropGroup { group }).await {
            tracing::info!(target: "controlpath", %group, error = %error, "a group is left to be dropped later");
        }
    }

    /// Drops what is left of groups that were not finished. The caller has the turns of the volumes, so nobody is at it.
    ///
    /// # Errors
    /// Those of the commands.
    pub(super) async fn drop_leftovers(&self, volumes: &[VolumeId]) -> Result<(), CallError> {
        let left = self.read(|tx| {
            let mut left = BTreeSet::new();
            for (id, UnsettledRow) in tx.scan::<UnsettledRow>(&(), None, usize::MAX)? {
                let of_ours = tx.get::<SnapshotRow>(&id)?.is_some_and(|row| volumes.contains(&row.volume));
                left.extend(if of_ours { groups::under_way(tx, id)? } else { None });
            }
            Ok(left)
        })?;
        for group in left {
            self.propose(None, Command::DropGroup { group }).await?;
        }
        Ok(())
    }
}

/// A committed group.
#[derive(Debug, Clone, Copy)]
struct Cut {
    group: SnapshotGroupId,
    /// Every hold was unbroken until the cut was made.
    sound: bool,
}
