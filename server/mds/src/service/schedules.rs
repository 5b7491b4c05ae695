//! Calls about schedules of service tasks, and the leader's duty to make the tasks that are due.
//!
//! Invariant: whose turn it is to make a task is nobody's: whoever leads proposes what its clock says, and the state machine makes
//! each due time's task once ([`crate::machine::schedules`]).

use super::service_tasks::text;
use super::status::CallError;
use super::{Core, names};
use crate::machine::command::Command;
use crate::machine::row::ScheduleRow;
use crate::machine::schedules::{self, ScheduleCommand};
use ogee_common::clock;
use ogee_common::limits::{SCHEDULE_EVERY_MAX, SCHEDULE_EVERY_MIN, SCHEDULES_MAX, SERVICE_TASKS_LISTED_MAX};
use ogee_proto::mds;

fn shown((name, row): (String, ScheduleRow)) -> mds::Schedule {
    mds::Schedule {
        name,
        kind: row.kind,
        repository: row.repository,
        arguments: row.arguments,
        every_ms: row.every_ms,
        last_due_unix_ms: row.last_due_unix_ms,
        last_task: row.last_task.0,
        created_unix_ms: row.created_unix_ms,
    }
}

impl Core {
    /// Makes the tasks that are due.
    pub(crate) async fn run_schedules(&self) -> Result<(), CallError> {
        let now = clock::unix_ms();
        let due = self.read(|tx| {
            let rows = tx.scan::<ScheduleRow>(&(), None, SCHEDULES_MAX)?;
            rows.into_iter().map(|(name, row)| Ok((name, schedules::due(tx, &row, now)?))).collect::<Result<Vec<_>, _>>()
        })?;
        for (name, due) in due {
            let Some(due_unix_ms) = due else { continue };
            let command = Command::Schedule(ScheduleCommand::Run { name: name.clone(), due_unix_ms });
            match self.propose(None, command).await {
                Ok(_) => tracing::info!(target: "controlpath", schedule = name, due_unix_ms, "a scheduled task is due"),
                // Too many tasks have not ended: it is tried again.
                Err(error @ CallError::Refused(_)) => {
                    tracing::warn!(target: "controlpath", schedule = name, error = &error as &dyn std::error::Error, "a scheduled task waits");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(crate) async fn set_schedule(&self, r: mds::SetScheduleRequest) -> Result<mds::Schedule, CallError> {
        let (name, kind) = (names::path("name", &r.name)?, names::name("kind", &r.kind)?);
        let (repository, arguments) = (names::name("repository", &r.repository)?, text("arguments", r.arguments)?);
        let range = SCHEDULE_EVERY_MIN.as_millis()..=SCHEDULE_EVERY_MAX.as_millis();
        if !range.contains(&u128::from(r.every_ms)) {
            return Err(CallError::Argument { what: "interval", wanted: "10 seconds to 366 days" });
        }
        self.lead().await?;
        let command = ScheduleCommand::Set { name: name.clone(), kind, repository, arguments, every_ms: r.every_ms };
        self.propose(None, Command::Schedule(command)).await?;
        let row = self.read(|tx| Ok(tx.get::<ScheduleRow>(&name)?))?;
        // Somebody may have deleted it meanwhile.
        row.map(|row| shown((name.clone(), row))).ok_or_else(|| crate::refusal::Refusal::NoSuchSchedule { name }.into())
    }

    pub(crate) async fn delete_schedule(&self, r: mds::DeleteScheduleRequest) -> Result<mds::Empty, CallError> {
        let name = names::path("name", &r.name)?;
        self.lead().await?;
        self.propose(None, Command::Schedule(ScheduleCommand::Delete { name })).await?;
        Ok(mds::Empty {})
    }

    pub(crate) async fn list_schedules(&self, r: mds::ListSchedulesRequest) -> Result<mds::ScheduleList, CallError> {
        self.lead().await?;
        let after = Some(r.start_after).filter(|after| !after.is_empty());
        let mut rows = self.read(|tx| Ok(tx.scan::<ScheduleRow>(&(), after.as_ref(), SERVICE_TASKS_LISTED_MAX + 1)?))?;
        let more = rows.len() > SERVICE_TASKS_LISTED_MAX;
        rows.truncate(SERVICE_TASKS_LISTED_MAX);
        Ok(mds::ScheduleList { schedules: rows.into_iter().map(shown).collect(), more })
    }
}
