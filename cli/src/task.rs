//! `ogee task`: the work that commands with `--detach` leave to snapclone, and leaving it ([`leave`]).
//!
//! Invariant: a command that leaves a task does so once, whatever answers are lost: its request has a key.

use crate::connect::{Context, Mds};
use crate::error::{CliError, ErrorKind};
use crate::output::{Progress, Table, counted, date};
use crate::sdk_error::call_failed;
use clap::{Args, Subcommand};
use ogee_client::MdsClient;
use ogee_common::rng;
use ogee_common::size::ByteLen;
use ogee_proto::mds as m;
use ogee_snapclone::service::{HydrateTask, Work};
use serde::Serialize;
use serde_json::Value;
use std::time::Duration;

/// Owners say every second how far they are.
const LOOK: Duration = Duration::from_millis(500);

/// The commands of `ogee task`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum TaskCommand {
    /// List tasks; those that ended long ago are forgotten
    #[command(after_help = "Examples:\n  ogee task ls\n  ogee task ls --open")]
    Ls(LsArgs),
    /// Show a task: its arguments, how far it is, what came of it
    #[command(after_help = "Example:\n  ogee task show 7")]
    Show(TaskArg),
    /// Wait for the end of a task, with a progress bar; fails as the task does
    #[command(after_help = "Example:\n  ogee task watch 7")]
    Watch(TaskArg),
    /// Have a task given up; what it began is undone
    #[command(after_help = "Example:\n  ogee task cancel 7")]
    Cancel(TaskArg),
}

/// Arguments of `task ls`.
#[derive(Debug, Clone, Args)]
pub(crate) struct LsArgs {
    /// Only those that have not ended
    #[arg(long)]
    open: bool,
}

/// A task.
#[derive(Debug, Clone, Args)]
pub(crate) struct TaskArg {
    /// Its number
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    task: u64,
}

/// A task as programs see it.
#[derive(Debug, Serialize)]
struct TaskView {
    task: u64,
    kind: String,
    repository: String,
    arguments: Value,
    state: String,
    /// Who took it last, hexadecimal; empty: nobody.
    owner: String,
    /// How often it was taken.
    takes: u64,
    done_bytes: u64,
    total_bytes: u64,
    /// An object of what came of it, or the text why nothing did.
    result: Value,
    created_unix_ms: u64,
    started_unix_ms: u64,
    ended_unix_ms: u64,
}

/// JSON if it is, else the text as it is.
fn json_or_text(text: String) -> Value {
    serde_json::from_str(&text).unwrap_or(Value::String(text))
}

impl From<m::ServiceTask> for TaskView {
    fn from(t: m::ServiceTask) -> Self {
        Self {
            task: t.id,
            kind: t.kind,
            repository: t.repository,
            arguments: json_or_text(t.arguments),
            state: t.state,
            owner: if t.owner == 0 { String::new() } else { format!("{:016x}", t.owner) },
            takes: t.fence,
            done_bytes: t.done,
            total_bytes: t.total,
            result: json_or_text(t.result),
            created_unix_ms: t.created_unix_ms,
            started_unix_ms: t.started_unix_ms,
            ended_unix_ms: t.ended_unix_ms,
        }
    }
}

impl TaskView {
    /// What the task is about, in a few words.
    fn about(&self) -> String {
        let word = |name: &str| self.arguments[name].as_str().unwrap_or_default().to_owned();
        match self.kind.as_str() {
            "backup" if self.arguments["snapshot"].is_string() => format!("{}@{}", word("volume"), word("snapshot")),
            "backup" => word("volume"),
            "restore" => format!("{} as {}", word("backup"), word("volume")),
            "hydrate" => word("volume"),
            _ => word("backup"),
        }
    }

    fn far(&self) -> String {
        let is_open = matches!(self.state.as_str(), "running" | "cancelling");
        if is_open && self.total_bytes > 0 { format!("{}%", self.done_bytes.min(self.total_bytes) * 100 / self.total_bytes) } else { String::new() }
    }

    fn why(&self) -> &str {
        self.result.as_str().unwrap_or_default()
    }

    fn text(&self) -> String {
        let result = match &self.result {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        format!(
            "task        {}\nkind        {}\nrepository  {}\narguments   {}\nstate       {}\nowner       {}, taken {}\n\
             progress    {} of {}\ncreated     {}\nstarted     {}\nended       {}\nresult      {result}",
            self.task, self.kind, self.repository, self.arguments, self.state,
            if self.owner.is_empty() { "-" } else { &self.owner },
            counted(usize::try_from(self.takes).unwrap_or(usize::MAX), "time"),
            ByteLen(self.done_bytes), ByteLen(self.total_bytes),
            date(self.created_unix_ms), date(self.started_unix_ms), date(self.ended_unix_ms),
        )
    }
}

/// Carries out a command of `ogee task`.
///
/// # Errors
/// There is no such task, the MDS does not answer, or the task that was watched failed.
pub(crate) async fn run(context: &Context, command: TaskCommand) -> Result<(), CliError> {
    let mds = context.mds()?;
    match command {
        TaskCommand::Ls(args) => ls(context, &mds, args.open).await,
        TaskCommand::Show(TaskArg { task }) => context.out.result(&stat(&mds, task).await?, TaskView::text),
        TaskCommand::Watch(TaskArg { task }) => watch(context, &mds, task).await,
        TaskCommand::Cancel(TaskArg { task }) => {
            let done = mds.cancel_service_task(m::ServiceTaskRequest { id: task }).await;
            let view = TaskView::from(done.map_err(|e| call_failed(&format!("cancel task {task}"), &e))?);
            context.out.result(&view, |v| match v.state.as_str() {
                "cancelling" => format!("task {task} is being cancelled: ogee task watch {task}"),
                state => format!("task {task} has ended: {state}"),
            })
        }
    }
}

/// Leaves work to snapclone.
///
/// # Errors
/// What the MDS refused.
pub(crate) async fn leave(context: &Context, work: &Work, repository: String) -> Result<(), CliError> {
    let mds = context.mds()?;
    let view = make(&mds, work, repository).await?;
    context.out.result(&view, |v| format!("task {} is queued: ogee task watch {}", v.task, v.task))
}

/// Leaves the filling of a volume that stands on a backup to snapclone; the task's number.
///
/// # Errors
/// What the MDS refused.
pub(crate) async fn leave_hydrate(mds: &MdsClient, path: &str, parent: &m::BackupParent, throttle: u64) -> Result<u64, CliError> {
    let work = Work::Hydrate(HydrateTask { volume: path.to_owned(), layer: parent.layer, throttle });
    Ok(make(mds, &work, parent.repository.clone()).await?.task)
}

async fn make(mds: &MdsClient, work: &Work, repository: String) -> Result<TaskView, CliError> {
    let key = [rng::nonzero_u64().to_be_bytes(), rng::nonzero_u64().to_be_bytes()].concat();
    let request = m::CreateServiceTaskRequest {
        kind: work.kind().to_owned(),
        repository,
        arguments: work.arguments(),
        key: key.into(),
    };
    let made = mds.create_service_task(request).await;
    made.map(TaskView::from).map_err(|e| call_failed(&format!("make a task of kind {}", work.kind()), &e))
}

async fn stat(mds: &Mds, id: u64) -> Result<TaskView, CliError> {
    let found = mds.stat_service_task(m::ServiceTaskRequest { id }).await;
    found.map(TaskView::from).map_err(|e| call_failed(&format!("task {id}"), &e))
}

async fn ls(context: &Context, mds: &Mds, open: bool) -> Result<(), CliError> {
    let mut tasks: Vec<TaskView> = vec![];
    loop {
        let start_after = tasks.last().map_or(0, |t| t.task);
        let page = mds.list_service_tasks(m::ListServiceTasksRequest { start_after, limit: 0, open }).await;
        let page = page.map_err(|e| call_failed("list tasks", &e))?;
        let more = page.more && !page.tasks.is_empty();
        tasks.extend(page.tasks.into_iter().map(TaskView::from));
        if !more {
            break;
        }
    }
    context.out.result(&tasks, |tasks| {
        let mut table = Table::new(&["TASK", "KIND", "REPOSITORY", "ABOUT", "STATE", "PROGRESS", "CREATED", "ERROR"]);
        for t in tasks {
            table.row([
                t.task.to_string(),
                t.kind.clone(),
                t.repository.clone(),
                t.about(),
                t.state.clone(),
                t.far(),
                date(t.created_unix_ms),
                t.why().to_owned(),
            ]);
        }
        format!("{table}{}", counted(tasks.len(), "task"))
    })
}

async fn watch(context: &Context, mds: &Mds, id: u64) -> Result<(), CliError> {
    let mut view = stat(mds, id).await?;
    let mut bar: Option<(Progress, u64)> = None;
    while matches!(view.state.as_str(), "queued" | "running" | "cancelling") {
        if view.total_bytes > 0 {
            let total = view.total_bytes;
            let (progress, shown) = bar.get_or_insert_with(|| (Progress::new("task", total, context.global.json), 0));
            // An owner that takes the task over begins anew, but goes faster; the bar waits for it.
            progress.advance(view.done_bytes.saturating_sub(*shown));
            *shown = view.done_bytes.max(*shown);
        }
        tokio::time::sleep(LOOK).await;
        view = stat(mds, id).await?;
    }
    if let Some((progress, _)) = bar {
        progress.finish();
    }
    match view.state.as_str() {
        "done" => context.out.result(&view, |v| format!("task {} is done: {}", v.task, v.result)),
        "cancelled" => Err(CliError::new(ErrorKind::Conflict, format!("task {id} was cancelled"))),
        _ => Err(CliError::new(ErrorKind::Failure, format!("task {id} failed: {}", view.why()))),
    }
}
