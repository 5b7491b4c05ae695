//! Routes, and what happens to every request: who sent it, how long it may take, counting it.
//!
//! Invariants: a request without a known token reaches no handler but those of `/healthz` and `/openapi.json`; one with a read-only token none that
//! changes something; labels of figures are routes as they are written here.

use super::answer::{Answer, Json};
use super::problem::{Problem, ProblemKind, ProblemView};
use super::tokens::Rights;
use super::views::HealthView;
use super::{Api, Principal, backups, openapi, schedules, tasks, volumes};
use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post, put};
use ogee_common::clock;
use ogee_common::limits::API_REQUEST_TIMEOUT;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Pages that everybody may see.
const PUBLIC: [&str; 2] = ["/healthz", "/openapi.json"];
/// The MDS is looked for so often, however often one asks.
const HEALTH_EVERY: Duration = Duration::from_secs(1);
/// It has answered by then, or counts as not there.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(3);

/// All routes.
pub(in crate::service) fn router(api: Arc<Api>) -> Router {
    Router::new()
        .route("/healthz", get(health))
        .route("/openapi.json", get(document))
        .route("/v1/volumes/{volume}", get(volumes::volume))
        .route("/v1/volumes/{volume}/snapshots", get(volumes::list_snapshots).post(volumes::create_snapshot))
        .route("/v1/volumes/{volume}/snapshots/{snapshot}", delete(volumes::delete_snapshot))
        .route("/v1/volumes/{volume}/rollback", post(volumes::rollback))
        .route("/v1/volumes/{volume}/flatten", post(volumes::flatten).delete(volumes::stop_flatten))
        .route("/v1/clones", post(volumes::create_clone))
        .route("/v1/repositories", get(backups::repositories))
        .route("/v1/repositories/{repository}/backups", get(backups::list).post(backups::create))
        .route("/v1/repositories/{repository}/backups/{backup}", get(backups::get).delete(backups::remove))
        .route("/v1/repositories/{repository}/backups/{backup}/verify", post(backups::verify))
        .route("/v1/repositories/{repository}/gc", post(backups::gc))
        .route("/v1/repositories/{repository}/restores", post(backups::restore))
        .route("/v1/tasks", get(tasks::list))
        .route("/v1/tasks/{task}", get(tasks::get))
        .route("/v1/tasks/{task}/cancel", post(tasks::cancel))
        .route("/v1/schedules", get(schedules::list))
        .route("/v1/schedules/{volume}", put(schedules::put).delete(schedules::delete))
        .method_not_allowed_fallback(no_method)
        .fallback(no_route)
        .layer(from_fn_with_state(api.clone(), attend))
        .with_state(api)
}

async fn no_route() -> Problem {
    Problem::new(ProblemKind::NoRoute, "see /openapi.json")
}

async fn no_method() -> Problem {
    Problem::new(ProblemKind::NoMethod, "see /openapi.json")
}

async fn document() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], openapi::openapi_json()).into_response()
}

/// Tells whether the instance can work: whether the MDS answers. Needs no token.
#[utoipa::path(get, operation_id = "health", path = "/healthz", tag = "service", security(()),
    responses((status = 200, description = "the MDS answers", body = HealthView), (status = 503, description = "it does not", body = ProblemView, content_type = "application/problem+json")))]
pub(super) async fn health(State(api): State<Arc<Api>>) -> Answer<HealthView> {
    let last = *api.health.lock().unwrap_or_else(PoisonError::into_inner);
    let answers = match last {
        Some((when, answers)) if when.elapsed() < HEALTH_EVERY => answers,
        _ => {
            let answers = tokio::time::timeout(HEALTH_TIMEOUT, api.mds().cluster_status()).await.is_ok_and(|r| r.is_ok());
            *api.health.lock().unwrap_or_else(PoisonError::into_inner) = Some((clock::now(), answers));
            answers
        }
    };
    if answers { Ok(Json::ok(HealthView { status: "ok" })) } else { Err(Problem::new(ProblemKind::Unavailable, "the MDS does not answer")) }
}

/// What every request goes through.
async fn attend(State(api): State<Arc<Api>>, mut request: Request, next: Next) -> Response {
    let route = route(&request);
    let response = match admit(&api, &request) {
        Ok(principal) => {
            request.extensions_mut().insert(principal);
            match tokio::time::timeout(API_REQUEST_TIMEOUT, next.run(request)).await {
                Ok(response) => response,
                Err(_) => Problem::new(ProblemKind::Timeout, "it may have been done").into_response(),
            }
        }
        Err(problem) => problem.into_response(),
    };
    api.figures.answered(&route, response.status().as_u16());
    response
}

/// The route as it is written above, with its method: a bounded number of words.
fn route(request: &Request) -> String {
    let known = [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::DELETE];
    let method = if known.contains(request.method()) { request.method().as_str() } else { "other" };
    let path = request.extensions().get::<MatchedPath>().map_or("other", |path| path.as_str());
    format!("{method} {path}")
}

fn admit(api: &Api, request: &Request) -> Result<Principal, Problem> {
    let nobody = Principal { name: String::new() };
    let Some(tokens) = &api.tokens else { return Ok(nobody) };
    if PUBLIC.contains(&request.uri().path()) {
        return Ok(nobody);
    }
    let wanted = || Problem::new(ProblemKind::Unauthorized, "send the header Authorization: Bearer TOKEN");
    let token = bearer(request.headers()).ok_or_else(wanted)?;
    let (name, rights) = tokens.find(token).ok_or_else(|| Problem::new(ProblemKind::Unauthorized, "the token is not known"))?;
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if rights == Rights::ReadOnly && !reads {
        return Err(Problem::new(ProblemKind::Forbidden, "use a token that may change something"));
    }
    if !reads {
        tracing::info!(target: "controlpath", token = name, method = %request.method(), path = request.uri().path(), "a request");
    }
    Ok(Principal { name: name.to_owned() })
}

/// The token of the one header that may have it.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut all = headers.get_all(header::AUTHORIZATION).iter();
    let value = all.next().filter(|_| all.next().is_none())?.as_bytes();
    let (scheme, token) = value.split_at_checked(7)?;
    (scheme.eq_ignore_ascii_case(b"bearer ") && !token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_bearer_token_is_taken() {
        let headers = |values: &[&str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, value.parse().expect("a value"));
            }
            headers
        };
        assert_eq!(bearer(&headers(&["Bearer abc"])), Some(b"abc".as_slice()));
        assert_eq!(bearer(&headers(&["bearer abc"])), Some(b"abc".as_slice()));
        for bad in [&["Basic abc"][..], &["Bearer "], &["Bearer"], &[], &["Bearer a", "Bearer b"]] {
            assert_eq!(bearer(&headers(bad)), None, "{bad:?}");
        }
    }
}
