//! Schedules: service tasks that are made every so often.
//!
//! Due times are the multiples of the interval since 1970, so all leaders mean the same ones. The leader proposes what is due by its clock; the
//! machine makes the task and moves the last due time in one step. Invariants: for each due time one task at most is made, whoever proposes it how
//! often; a due time is left out while the last task of the schedule has not ended, and of several that passed (no leader, no
//! snapclone) one is made up for. A last due time that lies further ahead than one interval comes of a clock that was ahead, and counts for nothing.

use super::Step;
use super::command::Outcome;
use super::row::{ScheduleRow, ServiceTaskRow};
use super::service_tasks;
use super::tx::Tx;
use crate::refusal::Refusal;
use ogee_common::id::ServiceTaskId;
use ogee_common::limits::SCHEDULES_MAX;
use serde::{Deserialize, Serialize};

/// What can be asked of schedules. New ones are added at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ScheduleCommand {
    /// Makes or changes one; the first due time is the next one.
    Set { name: String, kind: String, repository: String, arguments: String, every_ms: u64 },
    /// Forgets one; its tasks stay.
    Delete { name: String },
    /// A due time has come.
    Run { name: String, due_unix_ms: u64 },
}

/// Carries out a command.
///
/// # Errors
/// `NotFound`, `Limit`.
pub(crate) fn run(tx: &mut Tx<'_>, command: &ScheduleCommand, now_unix_ms: u64) -> Step<Outcome> {
    match command {
        ScheduleCommand::Set { name, kind, repository, arguments, every_ms } => {
            set(tx, name, (kind, repository, arguments), (*every_ms, now_unix_ms))?;
        }
        ScheduleCommand::Delete { name } => {
            tx.get::<ScheduleRow>(name)?.ok_or_else(|| Refusal::NoSuchSchedule { name: name.clone() })?;
            tx.delete::<ScheduleRow>(name);
        }
        ScheduleCommand::Run { name, due_unix_ms } => {
            if let Some(row) = tx.get::<ScheduleRow>(name)?
                && due(tx, &row, now_unix_ms)? == Some(*due_unix_ms)
            {
                let of = (row.kind.as_str(), row.repository.as_str(), row.arguments.as_str());
                let last_task = service_tasks::create(tx, of, None, now_unix_ms)?;
                tx.put(name, &ScheduleRow { last_due_unix_ms: *due_unix_ms, last_task, ..row });
            }
        }
    }
    Ok(Outcome::Done)
}

/// The due time for which a task is to be made now, if there is one.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn due(tx: &Tx<'_>, row: &ScheduleRow, now_unix_ms: u64) -> Step<Option<u64>> {
    let due = before(row.every_ms, now_unix_ms);
    let was_ahead = row.last_due_unix_ms > now_unix_ms.saturating_add(row.every_ms);
    if due <= row.last_due_unix_ms && !was_ahead {
        return Ok(None);
    }
    let last = tx.get::<ServiceTaskRow>(&row.last_task)?;
    Ok(last.is_none_or(|task| !task.state.is_open()).then_some(due))
}

/// The last multiple of the interval.
fn before(every_ms: u64, now_unix_ms: u64) -> u64 {
    now_unix_ms - now_unix_ms % every_ms.max(1)
}

fn set(
    tx: &mut Tx<'_>,
    name: &String,
    (kind, repository, arguments): (&str, &str, &str),
    (every_ms, now_unix_ms): (u64, u64),
) -> Step<()> {
    let known = tx.get::<ScheduleRow>(name)?;
    if known.is_none() && tx.scan::<ScheduleRow>(&(), None, SCHEDULES_MAX)?.len() >= SCHEDULES_MAX {
        return Err(Refusal::TooManySchedules.into());
    }
    let last_due_unix_ms = before(every_ms, now_unix_ms);
    let row = ScheduleRow {
        kind: kind.to_owned(),
        repository: repository.to_owned(),
        arguments: arguments.to_owned(),
        every_ms,
        last_due_unix_ms: known.as_ref().filter(|k| k.every_ms == every_ms).map_or(last_due_unix_ms, |k| k.last_due_unix_ms),
        last_task: known.as_ref().map_or(ServiceTaskId(0), |k| k.last_task),
        created_unix_ms: known.as_ref().map_or(now_unix_ms, |k| k.created_unix_ms),
    };
    tx.put(name, &row);
    Ok(())
}
