//! `ogee cluster moves`: replicas that are being rebuilt.

use crate::connect::{Context, Mds};
use crate::error::CliError;
use crate::output::{Progress, Table, counted};
use crate::sdk_error::call_failed;
use ogee_common::clock;
use ogee_proto::mds as m;
use serde::Serialize;
use std::time::Duration;

/// The MDS decides once a second.
const LOOK: Duration = Duration::from_millis(500);

#[derive(Debug, Serialize)]
struct MoveView {
    copyset: u32,
    from: u32,
    to: u32,
    state: String,
    seconds: u64,
    applied: u64,
    leader_applied: u64,
}

#[derive(Debug, Serialize)]
struct MovesView {
    moves: Vec<MoveView>,
    /// Replicas on chunkservers that are out, which have no move yet.
    waiting: u32,
}

impl From<m::MoveList> for MovesView {
    fn from(list: m::MoveList) -> Self {
        let now = clock::unix_ms();
        let view = |v: m::Move| MoveView {
            copyset: v.copyset,
            from: v.from,
            to: v.to,
            state: v.state,
            seconds: now.saturating_sub(v.started_unix_ms) / 1000,
            applied: v.applied,
            leader_applied: v.leader_applied,
        };
        Self { moves: list.moves.into_iter().map(view).collect(), waiting: list.waiting }
    }
}

impl MovesView {
    fn left(&self) -> u64 {
        self.moves.len() as u64 + u64::from(self.waiting)
    }

    fn text(&self) -> String {
        let mut table = Table::new(&["COPYSET", "FROM", "TO", "STATE", "SECONDS", "APPLIED", "LEADER"]);
        for v in &self.moves {
            table.row([
                v.copyset.to_string(),
                v.from.to_string(),
                v.to.to_string(),
                v.state.clone(),
                v.seconds.to_string(),
                v.applied.to_string(),
                v.leader_applied.to_string(),
            ]);
        }
        format!("{table}{}, {} waiting", counted(self.moves.len(), "move"), self.waiting)
    }
}

async fn list(mds: &Mds) -> Result<MovesView, CliError> {
    Ok(mds.list_moves().await.map_err(|e| call_failed("list moves", &e))?.into())
}

/// Carries out the command.
///
/// # Errors
/// The MDS does not answer.
pub(super) async fn run(context: &Context, watch: bool) -> Result<(), CliError> {
    let mds = context.mds()?;
    let mut view = list(&mds).await?;
    if watch {
        let mut left = view.left();
        let progress = Progress::items("rebuild", left, context.global.json);
        while left > 0 {
            tokio::time::sleep(LOOK).await;
            view = list(&mds).await?;
            progress.advance(left.saturating_sub(view.left()));
            left = view.left();
        }
        progress.finish();
    }
    context.out.result(&view, MovesView::text)
}
