//! Service tasks: work outside the cluster's own processes (backups, restores, ...) that survives whoever does it.
//!
//! The states are drawn at [`super::row::ServiceTaskState`]. A daemon takes a task, which raises its fence; each of the owner's commands
//! names owner and fence, and is refused once another has taken the task. Invariants: of two instances that believe to own a task at most one
//! can change it (the fence is the safety); an owner that gave a task back, or ended it, cannot change it any more; only a task that was to be
//! cancelled ends as cancelled; a task is made once for each key that is still known; at most [`SERVICE_TASKS_OPEN_MAX`] have not ended and
//! [`SERVICE_TASKS_KEPT_MAX`] of those that have are kept. Deliberately absent: time. Whether an owner still lives is the leader's judgement
//! ([`crate::service::leases`]), and a wrong one costs work, never safety. What tasks are about is the daemons' business.

use super::Step;
use super::command::Outcome;
use super::row::{
    Counter, EndedServiceTaskRow, OpenServiceTaskRow, ServiceTaskKeyRow, ServiceTaskRow, ServiceTaskState as State,
};
use super::tx::Tx;
use crate::refusal::Refusal;
use ogee_common::id::ServiceTaskId;
use ogee_common::limits::{SERVICE_TASKS_KEPT_MAX, SERVICE_TASKS_OPEN_MAX};
use serde::{Deserialize, Serialize};

/// Who believes to own a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Holder {
    /// The task.
    pub(crate) task: ServiceTaskId,
    /// The instance, never 0.
    pub(crate) owner: u64,
    /// The fence that it got when it took the task.
    pub(crate) fence: u64,
}

/// How an owner parts with a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum TaskEnd {
    /// It came to its end.
    Done,
    /// It cannot come to its end.
    Failed,
    /// What was begun is undone, as was wished.
    Cancelled,
    /// Somebody else may go on with it.
    Released,
}

/// What can be asked of service tasks. New ones are added at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ServiceTaskCommand {
    /// Makes one.
    Create { kind: String, repository: String, arguments: String, key: Option<[u8; 16]> },
    /// Wishes that it be given up.
    Cancel { task: ServiceTaskId },
    /// Takes one whose fence is still this.
    Take { task: ServiceTaskId, owner: u64, fence: u64 },
    /// Notes what the next owner must know, and how far it is.
    Note { holder: Holder, note: String, done: u64, total: u64 },
    /// Parts with it.
    End { holder: Holder, end: TaskEnd, result: String },
}

/// Carries out a command.
///
/// # Errors
/// `NotFound`, `AlreadyExists` (a key of another task), `Limit`, `Fenced`, `Unavailable` (taken meanwhile), `InvalidArgument`.
pub(crate) fn run(tx: &mut Tx<'_>, command: &ServiceTaskCommand, now_unix_ms: u64) -> Step<Outcome> {
    let task = match command {
        ServiceTaskCommand::Create { kind, repository, arguments, key } => {
            create(tx, (kind, repository, arguments), *key, now_unix_ms)?
        }
        ServiceTaskCommand::Cancel { task } => cancel(tx, *task, now_unix_ms)?,
        ServiceTaskCommand::Take { task, owner, fence } => take(tx, *task, (*owner, *fence), now_unix_ms)?,
        ServiceTaskCommand::Note { holder, note, done, total } => {
            let row = held(tx, *holder)?;
            tx.put(&holder.task, &ServiceTaskRow { note: note.clone(), done: *done, total: *total, ..row });
            holder.task
        }
        ServiceTaskCommand::End { holder, end, result } => end_by(tx, *holder, (*end, result), now_unix_ms)?,
    };
    // A task that ended may have been forgotten at once only if none is kept, which the limit rules out.
    let row = tx.expect(&task)?;
    Ok(Outcome::ServiceTask(Box::new((task, row))))
}

/// The task of this id.
///
/// # Errors
/// `NotFound`.
pub(crate) fn find(tx: &Tx<'_>, task: ServiceTaskId) -> Step<ServiceTaskRow> {
    Ok(tx.get(&task)?.ok_or(Refusal::NoSuchServiceTask(task))?)
}

/// The task, if `holder` owns it and it has not ended.
///
/// # Errors
/// `NotFound`, `Fenced`.
pub(crate) fn held(tx: &Tx<'_>, holder: Holder) -> Step<ServiceTaskRow> {
    let row = find(tx, holder.task)?;
    if row.owner == holder.owner && row.fence == holder.fence && row.state.is_open() {
        return Ok(row);
    }
    Err(Refusal::ServiceTaskFenced { task: holder.task, fence: row.fence }.into())
}

/// Tasks that have not ended, oldest first.
///
/// # Errors
/// Those of the rows only.
pub(crate) fn open(tx: &Tx<'_>) -> Step<Vec<(ServiceTaskId, ServiceTaskRow)>> {
    let ids = tx.scan::<OpenServiceTaskRow>(&(), None, SERVICE_TASKS_OPEN_MAX)?;
    ids.into_iter().map(|(id, OpenServiceTaskRow)| Ok((id, tx.expect(&id)?))).collect()
}

/// Makes a task; with a key that is known, it is the one of the key.
///
/// # Errors
/// `AlreadyExists` (the key of another task), `Limit`.
pub(crate) fn create(
    tx: &mut Tx<'_>,
    (kind, repository, arguments): (&str, &str, &str),
    key: Option<[u8; 16]>,
    now_unix_ms: u64,
) -> Step<ServiceTaskId> {
    if let Some(key) = key
        && let Some(ServiceTaskKeyRow(task)) = tx.get(&key)?
    {
        let row: ServiceTaskRow = tx.expect(&task)?;
        let is_same = (row.kind.as_str(), row.repository.as_str(), row.arguments.as_str()) == (kind, repository, arguments);
        return if is_same { Ok(task) } else { Err(Refusal::ServiceTaskKeyTaken(task).into()) };
    }
    if tx.scan::<OpenServiceTaskRow>(&(), None, SERVICE_TASKS_OPEN_MAX)?.len() >= SERVICE_TASKS_OPEN_MAX {
        return Err(Refusal::TooManyServiceTasks.into());
    }
    let task = ServiceTaskId(tx.next_id(Counter::ServiceTask)?);
    let row = ServiceTaskRow {
        kind: kind.to_owned(),
        repository: repository.to_owned(),
        arguments: arguments.to_owned(),
        state: State::Queued,
        owner: 0,
        fence: 0,
        note: String::new(),
        result: String::new(),
        done: 0,
        total: 0,
        created_unix_ms: now_unix_ms,
        started_unix_ms: 0,
        ended_unix_ms: 0,
        key,
    };
    tx.put(&task, &row);
    tx.put(&task, &OpenServiceTaskRow);
    if let Some(key) = key {
        tx.put(&key, &ServiceTaskKeyRow(task));
    }
    Ok(task)
}

/// What has ended stays as it is; that is no error.
fn cancel(tx: &mut Tx<'_>, task: ServiceTaskId, now_unix_ms: u64) -> Step<ServiceTaskId> {
    let mut row = find(tx, task)?;
    match row.state {
        State::Queued if row.fence == 0 => {
            row.state = State::Cancelled;
            ended(tx, task, row, now_unix_ms)?;
        }
        State::Queued | State::Running => {
            row.state = State::Cancelling;
            tx.put(&task, &row);
        }
        State::Cancelling | State::Done | State::Failed | State::Cancelled => {}
    }
    Ok(task)
}

/// A repetition by who has it already is no error: its first answer may have been lost.
fn take(tx: &mut Tx<'_>, task: ServiceTaskId, (owner, fence): (u64, u64), now_unix_ms: u64) -> Step<ServiceTaskId> {
    let mut row = find(tx, task)?;
    if row.owner == owner && row.fence == fence + 1 && row.state.is_open() {
        return Ok(task);
    }
    if row.fence != fence || !row.state.is_open() {
        return Err(Refusal::ServiceTaskTaken(task).into());
    }
    (row.owner, row.fence) = (owner, fence + 1);
    if row.state == State::Queued {
        row.state = State::Running;
    }
    if row.started_unix_ms == 0 {
        row.started_unix_ms = now_unix_ms;
    }
    tx.put(&task, &row);
    Ok(task)
}

fn end_by(tx: &mut Tx<'_>, holder: Holder, (end, result): (TaskEnd, &str), now_unix_ms: u64) -> Step<ServiceTaskId> {
    let wanted = match end {
        TaskEnd::Done => Some(State::Done),
        TaskEnd::Failed => Some(State::Failed),
        TaskEnd::Cancelled => Some(State::Cancelled),
        TaskEnd::Released => None,
    };
    let known = find(tx, holder.task)?;
    if known.owner == holder.owner && known.fence == holder.fence && Some(known.state) == wanted {
        return Ok(holder.task);
    }
    let mut row = held(tx, holder)?;
    if end == TaskEnd::Cancelled && row.state != State::Cancelling {
        return Err(Refusal::ServiceTaskNotCancelled(holder.task).into());
    }
    result.clone_into(&mut row.result);
    match wanted {
        Some(state) => ended(tx, holder.task, ServiceTaskRow { state, ..row }, now_unix_ms)?,
        None => {
            row.owner = 0;
            if row.state == State::Running {
                row.state = State::Queued;
            }
            tx.put(&holder.task, &row);
        }
    }
    Ok(holder.task)
}

/// Writes down that a task has ended, and forgets the one that ended first if too many are kept.
fn ended(tx: &mut Tx<'_>, task: ServiceTaskId, mut row: ServiceTaskRow, now_unix_ms: u64) -> Step<()> {
    row.ended_unix_ms = now_unix_ms;
    tx.put(&task, &row);
    tx.delete::<OpenServiceTaskRow>(&task);
    let order = tx.next_id(Counter::EndedServiceTask)?;
    tx.put(&order, &EndedServiceTaskRow(task));
    let kept = tx.scan::<EndedServiceTaskRow>(&(), None, SERVICE_TASKS_KEPT_MAX + 1)?;
    if let Some((order, EndedServiceTaskRow(oldest))) = kept.first()
        && kept.len() > SERVICE_TASKS_KEPT_MAX
    {
        let row: ServiceTaskRow = tx.expect(oldest)?;
        if let Some(key) = row.key {
            tx.delete::<ServiceTaskKeyRow>(&key);
        }
        tx.delete::<ServiceTaskRow>(oldest);
        tx.delete::<EndedServiceTaskRow>(order);
    }
    Ok(())
}
