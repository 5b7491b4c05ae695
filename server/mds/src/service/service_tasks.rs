//! Calls about service tasks: making, listing and cancelling them; taking, renewing and ending them for those who do them.
//!
//! Invariants: a renewal changes no row, so that hundreds of owners cost the log nothing; it is refused as soon as another has taken the task,
//! because it is a read under the leader's lease; a task is given to a taker only if it has no owner, or its owner was silent for
//! [`ogee_common::limits::SERVICE_TASK_LEASE`]. Two takers at once are told apart by the state machine.

use super::leases::Far;
use super::status::CallError;
use super::{Core, names};
use crate::machine::command::{Command, DecodeError, Outcome};
use crate::machine::row::{OpenServiceTaskRow, ServiceTaskRow};
use crate::machine::service_tasks::{self, Holder, ServiceTaskCommand, TaskEnd};
use crate::refusal::Refusal;
use ogee_common::id::ServiceTaskId;
use ogee_common::limits::{SERVICE_TASK_CHOICES_MAX, SERVICE_TASK_TEXT_BYTES_MAX, SERVICE_TASKS_LISTED_MAX, SERVICE_TASKS_OPEN_MAX};
use ogee_proto::mds;
use std::collections::HashSet;

fn task_id(id: u64) -> Result<ServiceTaskId, CallError> {
    Ok(ServiceTaskId(names::id("task", id)?))
}

fn holder(holder: Option<mds::TaskHolder>) -> Result<Holder, CallError> {
    let wanted = "task, owner and fence";
    let holder = holder.ok_or(CallError::Argument { what: "holder", wanted })?;
    let owner = names::id("owner", holder.owner)?;
    Ok(Holder { task: task_id(holder.id)?, owner, fence: names::id("fence", holder.fence)? })
}

/// Text of a bounded length.
///
/// # Errors
/// `InvalidArgument`.
pub(crate) fn text(what: &'static str, text: String) -> Result<String, CallError> {
    if text.len() > SERVICE_TASK_TEXT_BYTES_MAX {
        return Err(CallError::Argument { what, wanted: "at most 4 KiB" });
    }
    Ok(text)
}

fn choices(what: &'static str, list: Vec<String>) -> Result<HashSet<String>, CallError> {
    if list.len() > SERVICE_TASK_CHOICES_MAX {
        return Err(CallError::TooMany { what, max: SERVICE_TASK_CHOICES_MAX });
    }
    Ok(list.into_iter().collect())
}

fn task_of(outcome: Outcome) -> Result<(ServiceTaskId, ServiceTaskRow), CallError> {
    match outcome {
        Outcome::ServiceTask(task) => Ok(*task),
        _ => Err(CallError::Answer(DecodeError::Trailing)),
    }
}

impl Core {
    /// A task as callers see it, with what its owner said last.
    fn shown(&self, (id, row): (ServiceTaskId, ServiceTaskRow)) -> mds::ServiceTask {
        let noted = Far { done: row.done, total: row.total };
        let far = if row.state.is_open() { self.leases.far(id, row.fence) } else { None };
        let far = far.unwrap_or(noted);
        mds::ServiceTask {
            id: id.0,
            kind: row.kind,
            repository: row.repository,
            arguments: row.arguments,
            state: row.state.as_str().to_owned(),
            owner: row.owner,
            fence: row.fence,
            note: row.note,
            result: row.result,
            done: far.done,
            total: far.total,
            created_unix_ms: row.created_unix_ms,
            started_unix_ms: row.started_unix_ms,
            ended_unix_ms: row.ended_unix_ms,
        }
    }

    async fn change(&self, command: ServiceTaskCommand) -> Result<(ServiceTaskId, ServiceTaskRow), CallError> {
        task_of(self.propose(None, Command::ServiceTask(command)).await?)
    }

    pub(crate) async fn create_service_task(&self, r: mds::CreateServiceTaskRequest) -> Result<mds::ServiceTask, CallError> {
        let key = if r.key.is_empty() { None } else { Some(names::uuid("key", &r.key)?) };
        let (kind, repository) = (names::name("kind", &r.kind)?, names::name("repository", &r.repository)?);
        let arguments = text("arguments", r.arguments)?;
        self.lead().await?;
        Ok(self.shown(self.change(ServiceTaskCommand::Create { kind, repository, arguments, key }).await?))
    }

    pub(crate) async fn stat_service_task(&self, r: mds::ServiceTaskRequest) -> Result<mds::ServiceTask, CallError> {
        let id = task_id(r.id)?;
        self.lead().await?;
        let row = self.read(|tx| service_tasks::find(tx, id))?;
        Ok(self.shown((id, row)))
    }

    pub(crate) async fn list_service_tasks(&self, r: mds::ListServiceTasksRequest) -> Result<mds::ServiceTaskList, CallError> {
        let limit = match r.limit as usize {
            0 => SERVICE_TASKS_LISTED_MAX,
            n => n.min(SERVICE_TASKS_LISTED_MAX),
        };
        self.lead().await?;
        let mut tasks = self.read(|tx| {
            let after = ServiceTaskId(r.start_after);
            if !r.open {
                return Ok(tx.scan::<ServiceTaskRow>(&(), Some(&after), limit + 1)?);
            }
            let ids = tx.scan::<OpenServiceTaskRow>(&(), Some(&after), limit + 1)?;
            ids.into_iter().map(|(id, _)| Ok((id, tx.expect(&id)?))).collect()
        })?;
        let more = tasks.len() > limit;
        tasks.truncate(limit);
        Ok(mds::ServiceTaskList { tasks: tasks.into_iter().map(|task| self.shown(task)).collect(), more })
    }

    pub(crate) async fn cancel_service_task(&self, r: mds::ServiceTaskRequest) -> Result<mds::ServiceTask, CallError> {
        let task = task_id(r.id)?;
        self.lead().await?;
        Ok(self.shown(self.change(ServiceTaskCommand::Cancel { task }).await?))
    }

    pub(crate) async fn take_service_task(&self, r: mds::TakeServiceTaskRequest) -> Result<mds::TakeServiceTaskReply, CallError> {
        let owner = names::id("owner", r.owner)?;
        let (kinds, repositories) = (choices("kinds", r.kinds)?, choices("repositories", r.repositories)?);
        self.lead().await?;
        // Each round that fails lost a task to another taker.
        for _ in 0..SERVICE_TASKS_OPEN_MAX {
            let open = self.read(service_tasks::open)?;
            self.leases.keep(&open.iter().map(|(id, _)| *id).collect());
            let is_free = |id, row: &ServiceTaskRow| row.owner == 0 || self.leases.has_lapsed(id, row.fence);
            let suits = |row: &ServiceTaskRow| kinds.contains(&row.kind) && repositories.contains(&row.repository);
            let Some((task, row)) = open.into_iter().find(|(id, row)| suits(row) && is_free(*id, row)) else { break };
            match self.change(ServiceTaskCommand::Take { task, owner, fence: row.fence }).await {
                Ok((task, row)) => {
                    self.leases.heard(task, row.fence, Far { done: row.done, total: row.total });
                    tracing::info!(target: "controlpath", task = task.0, kind = row.kind, owner, fence = row.fence, "task taken");
                    return Ok(mds::TakeServiceTaskReply { task: Some(self.shown((task, row))) });
                }
                Err(e) if e.is_refusal(|r| matches!(r, Refusal::ServiceTaskTaken(_) | Refusal::NoSuchServiceTask(_))) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(mds::TakeServiceTaskReply { task: None })
    }

    pub(crate) async fn renew_service_task(&self, r: mds::RenewServiceTaskRequest) -> Result<mds::ServiceTask, CallError> {
        let holder = holder(r.holder)?;
        self.lead().await?;
        let row = self.read(|tx| service_tasks::held(tx, holder))?;
        self.leases.heard(holder.task, holder.fence, Far { done: r.done, total: r.total });
        Ok(self.shown((holder.task, row)))
    }

    pub(crate) async fn note_service_task(&self, r: mds::NoteServiceTaskRequest) -> Result<mds::ServiceTask, CallError> {
        let (holder, note) = (holder(r.holder)?, text("note", r.note)?);
        self.lead().await?;
        let task = self.change(ServiceTaskCommand::Note { holder, note, done: r.done, total: r.total }).await?;
        self.leases.heard(holder.task, holder.fence, Far { done: r.done, total: r.total });
        Ok(self.shown(task))
    }

    pub(crate) async fn end_service_task(&self, r: mds::EndServiceTaskRequest) -> Result<mds::ServiceTask, CallError> {
        let (holder, result) = (holder(r.holder)?, text("result", r.result)?);
        let end = match r.end.as_str() {
            "done" => TaskEnd::Done,
            "failed" => TaskEnd::Failed,
            "cancelled" => TaskEnd::Cancelled,
            "released" => TaskEnd::Released,
            _ => return Err(CallError::Argument { what: "end", wanted: "done, failed, cancelled or released" }),
        };
        self.lead().await?;
        let task = self.change(ServiceTaskCommand::End { holder, end, result }).await?;
        tracing::info!(target: "controlpath", task = holder.task.0, owner = holder.owner, end = r.end, "task ended");
        Ok(self.shown(task))
    }
}
