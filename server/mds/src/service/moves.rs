//! Lost and given-up chunkservers: who is out, what moves, and what chunkservers are told about it.
//!
//! The leader decides once a second ([`Core::look_after_replicas`]) by [`crate::rebuild`]; the rest happens in heartbeats. A
//! move is a conversation: the target is told to make a replica, the leader of the group to take it in and to let the old
//! one go, and the MDS believes what the leader of the group reports as committed. Every step may be repeated or lost.
//! Invariant: a replica is ordered to be deleted only if the rows, read by a node that leads, know nothing of it.

use super::status::CallError;
use super::{Core, names};
use crate::balance::{self, Led};
use crate::liveness::Health;
use crate::machine::command::Command;
use crate::machine::moves::members_after;
use crate::machine::row::{ChunkserverRow, CopysetRow, MoveRow, MoveState, OutReason, OutRow, PoolNameRow};
use crate::machine::tx::Tx;
use crate::machine::{Step, backups};
use crate::rebuild::{Action, Candidate, Scene};
use ogee_common::id::{ChunkserverId, CopysetId, ReplicaId};
use ogee_proto::data::PASTE_SINCE;
use ogee_proto::mds;
use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

/// Leads change hands only between chunkservers that have been up for this long.
const STEADY_FOR: Duration = Duration::from_secs(10);

/// What a heartbeat's answer says about moves.
#[derive(Debug, Default)]
pub(super) struct Orders {
    pub(super) join: Vec<mds::Join>,
    pub(super) moves: Vec<mds::MoveOrder>,
    pub(super) drop: Vec<mds::HeldReplica>,
}

impl Core {
    /// Everything that a rebuild depends on.
    pub(super) fn scene(&self) -> Result<Scene, CallError> {
        self.read(|tx| {
            let out: HashMap<ChunkserverId, OutRow> = tx.scan::<OutRow>(&(), None, usize::MAX)?.into_iter().collect();
            let mut scene = Scene {
                copysets: tx.scan::<CopysetRow>(&(), None, usize::MAX)?,
                moves: tx.scan::<MoveRow>(&(), None, usize::MAX)?.into_iter().collect(),
                ..Scene::default()
            };
            let has_pastes = backups::is_any(tx)?;
            for (id, row) in tx.scan::<ChunkserverRow>(&(), None, usize::MAX)? {
                let pool = tx.get::<PoolNameRow>(&row.pool)?.map(|PoolNameRow(pool)| pool);
                let up = self.live.health(id) == Health::Up;
                let vitals = self.live.vitals(id).0;
                let understands = !has_pastes || vitals.as_ref().is_some_and(|v| v.protocol >= u32::from(PASTE_SINCE));
                scene.failed.extend(vitals.filter(|_| up).into_iter().flat_map(|v| v.failed));
                scene.chunkservers.insert(id, Candidate { zone: row.zone, pool, up, out: out.contains_key(&id), understands });
            }
            Ok(scene)
        })
    }

    /// Gives up who is silent for too long, takes back who came back, and begins and ends moves.
    pub(crate) async fn look_after_replicas(&self) -> Result<(), CallError> {
        let mut scene = self.scene()?;
        let out = self.read(|tx| Ok(tx.scan::<OutRow>(&(), None, usize::MAX)?))?;
        let reason_of: HashMap<ChunkserverId, OutReason> = out.into_iter().map(|(id, row)| (id, row.reason)).collect();
        let ids: Vec<ChunkserverId> = scene.chunkservers.keys().copied().collect();
        for id in ids {
            let (_, silent) = self.live.vitals(id);
            let up = self.live.health(id) == Health::Up;
            let reason = match reason_of.get(&id) {
                Some(OutReason::Silent) if up && self.live.heard_of(id) => None,
                None if !up && silent >= self.rebuild_after && scene.may_give_up(id) => Some(OutReason::Silent),
                _ => continue,
            };
            tracing::warn!(target: "controlpath", chunkserver = %id, out = reason.is_some(), "a chunkserver is given up or taken back");
            self.propose(None, Command::SetOut { chunkserver: id, reason }).await?;
            if let Some(known) = scene.chunkservers.get_mut(&id) {
                known.out = reason.is_some();
            }
        }
        for action in scene.plan() {
            tracing::info!(target: "controlpath", ?action, "replica move");
            let command = match action {
                Action::Start { copyset, conf_epoch, removed, to } => Command::StartMove { copyset, conf_epoch, removed, to },
                Action::Cancel { copyset, added } => Command::CancelMove { copyset, added },
            };
            match self.propose(None, command).await {
                // Decided on what has changed since; the next second sees more.
                Ok(_) | Err(CallError::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Asks for leads to change hands, so that all chunkservers lead about as many copysets.
    pub(crate) fn balance_leads(&self) -> Result<(), CallError> {
        let scene = self.scene()?;
        let leads = scene.copysets.iter().filter_map(|(copyset, row)| {
            let leader = self.live.leader(*copyset).chunkserver;
            let applied = row.replicas.iter().map(|r| (r.chunkserver, self.live.applied(*copyset, r.chunkserver)));
            let fixed = scene.moves.contains_key(copyset) || self.live.was_asked(*copyset);
            let known = row.replicas.iter().any(|r| r.chunkserver == leader);
            known.then(|| Led { copyset: *copyset, row, leader, applied: applied.collect(), fixed })
        });
        let leads: Vec<Led<'_>> = leads.collect();
        if leads.len() < scene.copysets.len() {
            // Somebody elects, or this node has not heard of everybody yet.
            return Ok(());
        }
        let out = scene.chunkservers.iter().filter(|(_, c)| c.out).map(|(id, _)| *id).collect();
        let orders = balance::plan(&leads, &self.live.steady(STEADY_FOR), &out);
        for order in &orders {
            tracing::info!(target: "controlpath", ?order, "a lead is to change hands");
        }
        self.live.ask_hand_overs(orders);
        Ok(())
    }

    /// Replicas of moves that a heartbeat shows to exist and that were not known to.
    pub(super) fn joined(
        &self,
        id: ChunkserverId,
        hosted: &[(CopysetId, CopysetRow)],
        reported: &HashMap<u32, u64>,
    ) -> Result<Vec<(CopysetId, ReplicaId)>, CallError> {
        self.read(|tx| {
            let mut joined = vec![];
            for (copyset, _) in hosted {
                if let Some(row) = tx.get::<MoveRow>(copyset)?
                    && row.added.chunkserver == id
                    && !row.added.created
                    && reported.get(&copyset.0) == Some(&row.added.replica.0)
                {
                    joined.push((*copyset, row.added.replica));
                }
            }
            Ok(joined)
        })
    }

    /// Ends the moves whose group has the members it should have, by the word of its leader.
    pub(super) async fn settle_moves(&self, id: ChunkserverId, reports: &[mds::CopysetReport]) -> Result<(), CallError> {
        let led = reports.iter().filter(|r| r.leader == id.0 && !r.voters.is_empty());
        let commands = self.read(|tx| {
            let mut commands = vec![];
            for report in led {
                let copyset = CopysetId(report.copyset);
                let Some(moving) = tx.get::<MoveRow>(&copyset)? else { continue };
                let row: CopysetRow = tx.expect(&copyset)?;
                commands.extend(settled(copyset, &row, &moving, report));
            }
            Ok(commands)
        })?;
        for command in commands {
            tracing::info!(target: "controlpath", ?command, "replica move ends");
            self.propose(None, command).await?;
        }
        Ok(())
    }

    /// What to tell a chunkserver about moves.
    pub(super) fn move_orders(
        &self,
        tx: &Tx<'_>,
        id: ChunkserverId,
        hosted: &[(CopysetId, CopysetRow)],
        r: &mds::HeartbeatRequest,
        addrs: &HashMap<ChunkserverId, String>,
    ) -> Step<Orders> {
        let mut orders = Orders::default();
        let mut own: BTreeSet<(u32, u64)> = BTreeSet::new();
        for (copyset, row) in hosted {
            let moving = tx.get::<MoveRow>(copyset)?;
            // One that is rebuilt in its place goes first.
            let replaced = moving.as_ref().filter(|m| m.added.chunkserver == id).map(|m| m.removed);
            let of_row = row.replicas.iter().filter(|r| r.chunkserver == id).map(|r| r.replica);
            own.extend(of_row.filter(|r| Some(*r) != replaced).map(|replica| (copyset.0, replica.0)));
            let Some(moving) = moving else { continue };
            if moving.added.chunkserver == id {
                own.insert((copyset.0, moving.added.replica.0));
                if moving.state == MoveState::Adding {
                    let (replica, create) = (moving.added.replica.0, !moving.added.created);
                    orders.join.push(mds::Join { copyset: copyset.0, replica, create });
                }
            }
        }
        for report in r.copysets.iter().filter(|c| c.leader == id.0) {
            let Some(moving) = tx.get::<MoveRow>(&CopysetId(report.copyset))? else { continue };
            let cancel = moving.state == MoveState::Cancelling;
            // A replica that does not exist yet cannot answer.
            if moving.added.created || cancel {
                let chunkserver = moving.added.chunkserver;
                let addr = addrs.get(&chunkserver).cloned().unwrap_or_default();
                let added = mds::Replica { replica: moving.added.replica.0, chunkserver: chunkserver.0, addr };
                let removed = moving.removed.0;
                orders.moves.push(mds::MoveOrder { copyset: report.copyset, added: Some(added), removed, cancel });
            }
        }
        let nobodys = r.held.iter().filter(|held| !own.contains(&(held.copyset, held.replica)));
        orders.drop = nobodys.cloned().collect();
        Ok(orders)
    }

    pub(crate) async fn set_out(&self, r: mds::SetOutRequest) -> Result<mds::Empty, CallError> {
        let chunkserver = ChunkserverId(names::id("chunkserver", r.chunkserver)?);
        let reason = r.out.then_some(OutReason::Asked);
        self.propose(None, Command::SetOut { chunkserver, reason }).await?;
        Ok(mds::Empty {})
    }

    pub(crate) async fn remove_chunkserver(&self, r: mds::RemoveChunkserverRequest) -> Result<mds::Empty, CallError> {
        let chunkserver = ChunkserverId(names::id("chunkserver", r.chunkserver)?);
        self.propose(None, Command::RemoveChunkserver { chunkserver }).await?;
        Ok(mds::Empty {})
    }

    pub(crate) async fn list_moves(&self) -> Result<mds::MoveList, CallError> {
        self.lead().await?;
        let scene = self.scene()?;
        let copysets: HashMap<CopysetId, &CopysetRow> = scene.copysets.iter().map(|(id, row)| (*id, row)).collect();
        let mut moves: Vec<mds::Move> = scene.moves.iter().map(|(id, row)| self.show(*id, row, copysets.get(id).copied())).collect();
        moves.sort_by_key(|m| (m.started_unix_ms, m.copyset));
        Ok(mds::MoveList { moves, waiting: u32::try_from(scene.waiting()).unwrap_or(u32::MAX) })
    }

    fn show(&self, id: CopysetId, row: &MoveRow, copyset: Option<&CopysetRow>) -> mds::Move {
        let from = copyset.and_then(|c| c.replicas.iter().find(|r| r.replica == row.removed)).map_or(0, |r| r.chunkserver.0);
        let state = match (row.state, row.added.created) {
            (MoveState::Cancelling, _) => "cancelling",
            (MoveState::Adding, false) => "waiting",
            (MoveState::Adding, true) => "copying",
        };
        let applied = |chunkserver| self.live.applied(id, chunkserver);
        mds::Move {
            copyset: id.0,
            from,
            to: row.added.chunkserver.0,
            started_unix_ms: row.started_unix_ms,
            state: state.to_owned(),
            applied: applied(row.added.chunkserver),
            leader_applied: applied(self.live.leader(id).chunkserver),
        }
    }
}

/// The command that ends a move, if the group has the members that it should end with.
fn settled(copyset: CopysetId, row: &CopysetRow, moving: &MoveRow, report: &mds::CopysetReport) -> Option<Command> {
    let voters: BTreeSet<ReplicaId> = report.voters.iter().map(|v| ReplicaId(*v)).collect();
    let added = moving.added.replica;
    if voters == members_after(row, moving).into_iter().collect() {
        // Also when it was to be cancelled: it was through already.
        return Some(Command::FinishMove { copyset, added });
    }
    let old: BTreeSet<ReplicaId> = row.replicas.iter().map(|r| r.replica).collect();
    let gone = !report.learners.contains(&added.0);
    (moving.state == MoveState::Cancelling && voters == old && gone).then_some(Command::EndMove { copyset, added })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::row::ReplicaRow;
    use ogee_common::id::PoolId;

    #[test]
    fn a_move_ends_when_the_group_says_so_and_not_before() {
        let copyset = CopysetId(7);
        let replica = |n: u64| ReplicaRow { replica: ReplicaId(n), chunkserver: ChunkserverId(1), created: true };
        let row = CopysetRow { pool: PoolId(1), conf_epoch: 1, replicas: vec![replica(1), replica(2), replica(3)] };
        let moving = |state| MoveRow { removed: ReplicaId(2), added: replica(9), state, started_unix_ms: 0 };
        let report = |voters: &[u64], learners: &[u64]| mds::CopysetReport {
            voters: voters.to_vec(),
            learners: learners.to_vec(),
            ..mds::CopysetReport::default()
        };
        let added = ReplicaId(9);
        for state in [MoveState::Adding, MoveState::Cancelling] {
            let done = settled(copyset, &row, &moving(state), &report(&[1, 3, 9], &[]));
            assert_eq!(done, Some(Command::FinishMove { copyset, added }));
            assert_eq!(settled(copyset, &row, &moving(state), &report(&[1, 2, 3, 9], &[])), None);
            assert_eq!(settled(copyset, &row, &moving(state), &report(&[1, 2, 3], &[9])), None);
        }
        let (adding, cancelling) = (moving(MoveState::Adding), moving(MoveState::Cancelling));
        assert_eq!(settled(copyset, &row, &adding, &report(&[1, 2, 3], &[])), None);
        let ended = settled(copyset, &row, &cancelling, &report(&[1, 2, 3], &[]));
        assert_eq!(ended, Some(Command::EndMove { copyset, added }));
    }
}
