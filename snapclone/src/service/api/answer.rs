//! What handlers answer: JSON with a status, or a [`Problem`].

use super::problem::Problem;
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// An answer or a problem.
pub(super) type Answer<T> = Result<Json<T>, Problem>;

/// A JSON answer.
#[derive(Debug)]
pub(super) struct Json<T>(pub(super) StatusCode, pub(super) T);

impl<T> Json<T> {
    /// Here it is.
    pub(super) fn ok(body: T) -> Self {
        Self(StatusCode::OK, body)
    }

    /// It was made.
    pub(super) fn created(body: T) -> Self {
        Self(StatusCode::CREATED, body)
    }

    /// It will be done.
    pub(super) fn accepted(body: T) -> Self {
        Self(StatusCode::ACCEPTED, body)
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        let json = serde_json::to_vec(&self.1).expect("answers are text and numbers");
        let mut response = Response::new(Body::from(json));
        *response.status_mut() = self.0;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}
