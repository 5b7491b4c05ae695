//! Curve's API: `GET /SnapshotCloneService?Action=...&Version=...`, its 12 actions, for clients that know nothing else.
//!
//! | file | what |
//! | --- | --- |
//! | `params.rs`, `code.rs` | what comes in, and the error codes |
//! | `ids.rs` | UUIDs: what they are of is in them |
//! | `find.rs` | volumes and snapshots by number |
//! | `snapshots.rs`, `clones.rs` | the actions |
//!
//! Invariants: names of parameters and fields, numbers of states and errors are Curve's; nothing is kept between two requests but hints; what has no
//! counterpart here is refused with one of Curve's codes. `docs/curve-api.md` says action by action what is different. Absent: tokens, which
//! these clients cannot send (so it has a listener of its own), and backups.

mod clones;
mod code;
mod find;
mod ids;
mod params;
mod snapshots;

use super::metrics::ServiceFigures;
use axum::Router;
use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use code::Code;
use find::Paths;
use ogee_client::MdsClient;
use ogee_common::limits::API_REQUEST_TIMEOUT;
use ogee_common::rng;
use params::Params;
use serde_json::{Value, json};
use std::sync::Arc;

/// The fields of an answer, or a code.
type Reply = Result<Value, Code>;

/// What actions work with.
#[derive(Debug)]
pub(super) struct Curve {
    mds: MdsClient,
    paths: Paths,
    figures: Arc<ServiceFigures>,
}

/// The names of the actions.
const ACTIONS: [&str; 12] = [
    "CreateSnapshot", "DeleteSnapshot", "CancelSnapshot", "GetFileSnapshotInfo", "GetFileSnapshotList", "Clone", "Recover", "Flatten",
    "GetCloneTasks", "GetCloneTaskList", "CleanCloneTask", "GetCloneRefStatus",
];

/// The one route.
pub(super) fn router(mds: MdsClient, figures: Arc<ServiceFigures>) -> Router {
    let curve = Arc::new(Curve { mds, paths: Paths::default(), figures });
    Router::new()
        .route("/SnapshotCloneService", get(serve))
        .fallback(|| async { (StatusCode::NOT_FOUND, "the only page is /SnapshotCloneService\n") })
        .with_state(curve)
}

async fn serve(State(curve): State<Arc<Curve>>, request: Request) -> Response {
    let params = Query::<Vec<(String, String)>>::try_from_uri(request.uri()).map_or_else(|_| Params(vec![]), |query| Params(query.0));
    let action = ACTIONS.into_iter().find(|action| params.get("Action") == Some(*action));
    let done = match action.filter(|_| params.given("Version").is_some()) {
        Some(action) => {
            let done = tokio::time::timeout(API_REQUEST_TIMEOUT, Box::pin(curve.act(action, &params))).await;
            done.unwrap_or(Err(Code::Internal))
        }
        None => Err(Code::BadRequest),
    };
    if let Err(code) = done {
        tracing::info!(target: "controlpath", action = action.unwrap_or("other"), code = code.number(), "a request of Curve's API was refused");
    }
    let status = done.as_ref().map_or_else(|code| code.status(), |_| 200);
    curve.figures.answered(&format!("curve {}", action.unwrap_or("other")), status);
    answer(status, done)
}

impl Curve {
    async fn act(&self, action: &str, params: &Params) -> Reply {
        match action {
            "CreateSnapshot" => self.create_snapshot(params).await,
            "DeleteSnapshot" => self.delete_snapshot(params).await,
            "CancelSnapshot" => self.cancel_snapshot(params).await,
            "GetFileSnapshotInfo" => self.snapshot_info(params).await,
            "GetFileSnapshotList" => self.snapshot_list(params).await,
            "Clone" => self.clone_file(params).await,
            "Recover" => self.recover(params).await,
            "Flatten" => self.flatten(params).await,
            "GetCloneTasks" => self.tasks(params).await,
            "GetCloneTaskList" => self.task_list(params).await,
            "CleanCloneTask" => self.clean(params).await,
            "GetCloneRefStatus" => self.ref_status(params).await,
            _ => Err(Code::BadRequest),
        }
    }
}

/// `Code`, `Message` and `RequestId`, and the fields of the action.
fn answer(status: u16, done: Reply) -> Response {
    let (number, message, mut body) = match done {
        Ok(fields) => (0, "Exec success.", fields),
        Err(code) => (code.number(), code.message(), json!({})),
    };
    body["Code"] = number.to_string().into();
    body["Message"] = message.into();
    body["RequestId"] = format!("{:016x}{:016x}", rng::nonzero_u64(), rng::nonzero_u64()).into();
    let mut response = Body::from(body.to_string()).into_response();
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_have_curves_fields() {
        let response = answer(500, Err(Code::InUse));
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let response = answer(200, Ok(json!({"UUID": "x"})));
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
        assert_eq!((Code::BadRequest.status(), Code::BadRequest.number()), (400, -5));
    }
}
