//! Tasks: making, listing, showing and cancelling them. What they do is `daemon.rs`'s business; they survive any instance ([`super`]).

use super::answer::{Answer, Json};
use super::input::{Filter, Parted, after, cursor, page_limit, task_key};
use super::problem::{Problem, ProblemKind, ProblemView};
use super::views::{PageView, TaskView};
use super::{Api, Principal};
use crate::service::task::{KINDS, Work};
use axum::extract::State;
use axum::http::HeaderMap;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds as m;
use serde::Deserialize;
use std::sync::Arc;
use utoipa::IntoParams;

/// The states of tasks that have not ended; `open` means any of them.
const OPEN_STATES: [&str; 3] = ["queued", "running", "cancelling"];
/// The states of tasks that have ended.
const ENDED_STATES: [&str; 3] = ["done", "failed", "cancelled"];
const LIST: &str = "tasks";

/// Which tasks.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct TaskQuery {
    /// Entries of the page, 1 to 256; 64 unless given.
    limit: Option<u32>,
    /// `next_cursor` of the page before.
    cursor: Option<String>,
    /// Only those in this state; `open`: only those that have not ended.
    state: Option<String>,
    /// Only those of this kind.
    kind: Option<String>,
}

impl TaskQuery {
    fn check(&self) -> Result<(), Problem> {
        let known = |state: &str| state == "open" || OPEN_STATES.contains(&state) || ENDED_STATES.contains(&state);
        if let Some(state) = self.state.as_deref().filter(|state| !known(state)) {
            return Err(Problem::new(ProblemKind::InvalidArgument, format!("there is no state {state:?}")));
        }
        if let Some(kind) = self.kind.as_deref().filter(|kind| !KINDS.contains(kind)) {
            return Err(Problem::new(ProblemKind::InvalidArgument, format!("there is no kind of task {kind:?}")));
        }
        Ok(())
    }

    fn suits(&self, task: &m::ServiceTask) -> bool {
        let state = match self.state.as_deref() {
            None => true,
            Some("open") => OPEN_STATES.contains(&task.state.as_str()),
            Some(state) => task.state == state,
        };
        state && self.kind.as_ref().is_none_or(|kind| *kind == task.kind)
    }

    fn is_open(&self) -> bool {
        self.state.as_deref().is_some_and(|state| state == "open" || OPEN_STATES.contains(&state))
    }
}

fn task_id(text: &str) -> Result<u64, Problem> {
    let id = text.parse().ok().filter(|id| *id > 0);
    id.ok_or_else(|| Problem::new(ProblemKind::InvalidArgument, format!("task {text:?}: a task is a number from 1 on")))
}

/// Lists tasks, oldest first; those that ended long ago are forgotten.
#[utoipa::path(get, operation_id = "list_tasks", path = "/v1/tasks", tag = "tasks", params(TaskQuery),
    responses((status = 200, description = "a page", body = PageView<TaskView>), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn list(State(api): State<Arc<Api>>, Filter(query): Filter<TaskQuery>) -> Answer<PageView<TaskView>> {
    query.check()?;
    let (limit, last) = (page_limit(query.limit)?, after(LIST, query.cursor.as_deref())?);
    let mut start_after = last.map_or(Ok(0), |last| last.parse().map_err(|_| Problem::new(ProblemKind::Malformed, "the cursor is not one of this list")))?;
    let mut found: Vec<m::ServiceTask> = vec![];
    // The MDS keeps a bounded number of tasks, so this ends.
    loop {
        let request = m::ListServiceTasksRequest { start_after, limit: 0, open: query.is_open() };
        let page = api.mds().list_service_tasks(request).await.map_err(|e| Problem::call("list tasks", &e))?;
        let seen = page.tasks.last().map(|t| t.id);
        found.extend(page.tasks.into_iter().filter(|t| query.suits(t)));
        match seen {
            Some(seen) if page.more && found.len() <= limit => start_after = seen,
            _ => break,
        }
    }
    let more = found.len() > limit;
    found.truncate(limit);
    let next_cursor = found.last().filter(|_| more).map(|t| cursor(LIST, &t.id.to_string()));
    Ok(Json::ok(PageView { items: found.into_iter().map(Into::into).collect(), next_cursor }))
}

/// Shows a task: how far it is, what came of it.
#[utoipa::path(get, operation_id = "get_task", path = "/v1/tasks/{task}", tag = "tasks", params(("task" = u64, Path, description = "its number")),
    responses((status = 200, description = "the task", body = TaskView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn get(State(api): State<Arc<Api>>, Parted(task): Parted<String>) -> Answer<TaskView> {
    let found = api.mds().stat_service_task(m::ServiceTaskRequest { id: task_id(&task)? }).await;
    Ok(Json::ok(found.map_err(|e| Problem::call("look for the task", &e))?.into()))
}

/// Has a task given up; what it began is undone. One that has ended stays as it is.
#[utoipa::path(post, operation_id = "cancel_task", path = "/v1/tasks/{task}/cancel", tag = "tasks", params(("task" = u64, Path, description = "its number")),
    responses((status = 202, description = "it is being cancelled, or has ended: its state tells", body = TaskView), (status = "default", description = "a problem", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn cancel(State(api): State<Arc<Api>>, Parted(task): Parted<String>) -> Answer<TaskView> {
    let done = api.mds().cancel_service_task(m::ServiceTaskRequest { id: task_id(&task)? }).await;
    Ok(Json::accepted(done.map_err(|e| Problem::call("cancel the task", &e))?.into()))
}

/// Makes a task; with an idempotency key that was used before, the one that was made then.
///
/// # Errors
/// What the MDS refused.
pub(super) async fn make(
    api: &Api, work: &Work, repository: String, (headers, principal): (&HeaderMap, &Principal),
) -> Answer<TaskView> {
    let key = task_key(headers, &principal.name)?;
    let kind = work.kind().to_owned();
    let request = m::CreateServiceTaskRequest { kind, repository, arguments: work.arguments(), key: key.into() };
    match api.mds().create_service_task(request).await {
        Ok(task) => Ok(Json::accepted(task.into())),
        Err(e) if e.kind == MdsErrorKind::AlreadyExists => Err(Problem::new(ProblemKind::KeyReused, e.message)),
        Err(e) => Err(Problem::call("make a task", &e)),
    }
}
