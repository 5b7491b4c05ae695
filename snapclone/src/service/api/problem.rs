//! [`Problem`]: what the REST API answers instead of what was asked for, as `application/problem+json` (RFC 9457). Pure.
//!
//! Invariants: `type` is one of the words below, and programs act on it alone; each has one status. `detail` is for people and may change.
//! Nothing of a request but names of volumes and tasks is repeated in it, never a token.

use crate::error::{RepoError, RepoErrorKind};
use crate::service::failure::chain;
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use ogee_client::MdsCallError;
use ogee_proto::MdsErrorKind;
use serde::Serialize;
use utoipa::ToSchema;

/// The media type of problems.
pub(super) const PROBLEM_JSON: &str = "application/problem+json";

macro_rules! problem_kinds {
    ($($(#[$doc:meta])* $name:ident = $word:literal, $status:ident, $title:literal;)+) => {
        /// What went wrong, as far as programs care.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(super) enum ProblemKind { $($(#[$doc])* $name),+ }

        impl ProblemKind {
            /// All of them.
            #[cfg(test)]
            pub(super) const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The last word of `type`.
            pub(super) const fn word(self) -> &'static str {
                match self { $(Self::$name => $word),+ }
            }

            /// The status of the answer.
            pub(super) const fn status(self) -> StatusCode {
                match self { $(Self::$name => StatusCode::$status),+ }
            }

            const fn title(self) -> &'static str {
                match self { $(Self::$name => $title),+ }
            }
        }
    };
}

problem_kinds! {
    /// The request cannot be understood.
    Malformed = "malformed", BAD_REQUEST, "The request cannot be understood";
    /// A value is out of range or malformed.
    InvalidArgument = "invalid-argument", BAD_REQUEST, "A value cannot be";
    /// No token, or none that is known.
    Unauthorized = "unauthorized", UNAUTHORIZED, "A known token is needed";
    /// The token is for reading only.
    Forbidden = "read-only-token", FORBIDDEN, "The token is for reading only";
    /// There is no such path in the API.
    NoRoute = "no-such-route", NOT_FOUND, "The API has no such path";
    /// The path has other methods.
    NoMethod = "method-not-allowed", METHOD_NOT_ALLOWED, "The path does not have this method";
    /// The object does not exist.
    NotFound = "not-found", NOT_FOUND, "There is no such object";
    /// The name is taken.
    AlreadyExists = "already-exists", CONFLICT, "The name is taken";
    /// The volume is attached.
    Attached = "attached", CONFLICT, "The volume is attached";
    /// Something still refers to it.
    InUse = "in-use", CONFLICT, "Something still refers to it";
    /// The owner does not match, or the attach is over.
    WrongOwner = "wrong-owner", FORBIDDEN, "It belongs to another owner";
    /// The idempotency key was used for something else.
    KeyReused = "idempotency-key-reused", UNPROCESSABLE_ENTITY, "The idempotency key was used for another request";
    /// The body is too long.
    TooLarge = "body-too-large", PAYLOAD_TOO_LARGE, "The body is too long";
    /// The body is no JSON.
    MediaType = "unsupported-media-type", UNSUPPORTED_MEDIA_TYPE, "The body must be application/json";
    /// A limit of the system is reached.
    Limit = "limit-reached", TOO_MANY_REQUESTS, "A limit of the system is reached";
    /// Too few chunkservers or bytes.
    NoSpace = "no-space", INSUFFICIENT_STORAGE, "There is not enough space";
    /// This instance does not know the repository.
    UnknownRepository = "unknown-repository", NOT_FOUND, "This instance does not know the repository";
    /// A backup or the repository is damaged.
    Damaged = "damaged", INTERNAL_SERVER_ERROR, "The repository or the backup is damaged";
    /// Not built yet.
    LazyRestore = "lazy-restore-not-supported", NOT_IMPLEMENTED, "Lazy restores do not exist yet";
    /// The MDS or the repository does not answer.
    Unavailable = "unavailable", SERVICE_UNAVAILABLE, "The cluster or the repository does not answer";
    /// It took too long; it may have been done.
    Timeout = "timeout", GATEWAY_TIMEOUT, "It took too long";
    /// A fault of this program or of its configuration.
    Internal = "internal", INTERNAL_SERVER_ERROR, "Something is wrong in the service";
}

/// A refused or failed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    /// What programs act on.
    pub(super) kind: ProblemKind,
    /// For people.
    pub(super) detail: String,
}

/// As it is sent (RFC 9457, section 3.1).
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub(super) struct ProblemView {
    /// `urn:ogee:problem:` and a word that programs act on.
    #[serde(rename = "type")]
    pub(super) kind: String,
    /// The kind in words.
    pub(super) title: &'static str,
    /// The status of the answer.
    pub(super) status: u16,
    /// This case in words.
    pub(super) detail: String,
}

impl Problem {
    /// With a text for people.
    pub(super) fn new(kind: ProblemKind, detail: impl Into<String>) -> Self {
        Self { kind, detail: detail.into() }
    }

    /// A failed call to the MDS.
    pub(super) fn call(doing: &str, error: &MdsCallError) -> Self {
        let kind = match error.kind {
            MdsErrorKind::NotFound => ProblemKind::NotFound,
            MdsErrorKind::AlreadyExists => ProblemKind::AlreadyExists,
            MdsErrorKind::InvalidArgument => ProblemKind::InvalidArgument,
            MdsErrorKind::Attached => ProblemKind::Attached,
            MdsErrorKind::InUse => ProblemKind::InUse,
            MdsErrorKind::WrongOwner | MdsErrorKind::Fenced => ProblemKind::WrongOwner,
            MdsErrorKind::NoSpace => ProblemKind::NoSpace,
            MdsErrorKind::Limit => ProblemKind::Limit,
            MdsErrorKind::WrongCluster => ProblemKind::Internal,
            MdsErrorKind::NotLeader | MdsErrorKind::Unavailable => ProblemKind::Unavailable,
        };
        let unknown = if error.outcome_unknown { " (it may have been done)" } else { "" };
        Self::new(kind, format!("{doing}: {}{unknown}", error.message))
    }

    /// A failed look into a repository.
    pub(super) fn repo(error: &RepoError) -> Self {
        let kind = match error.kind {
            RepoErrorKind::NotFound => ProblemKind::NotFound,
            RepoErrorKind::Unavailable | RepoErrorKind::Abandoned => ProblemKind::Unavailable,
            RepoErrorKind::Corrupt => ProblemKind::Damaged,
            RepoErrorKind::NoSpace => ProblemKind::NoSpace,
            _ => ProblemKind::Internal,
        };
        Self::new(kind, chain(error))
    }

    fn view(self) -> ProblemView {
        ProblemView {
            kind: format!("urn:ogee:problem:{}", self.kind.word()),
            title: self.kind.title(),
            status: self.kind.status().as_u16(),
            detail: self.detail,
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let kind = self.kind;
        let json = serde_json::to_vec(&self.view()).expect("a problem is text and numbers");
        let mut response = Response::new(Body::from(json));
        *response.status_mut() = kind.status();
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        if kind == ProblemKind::Unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_own_word_and_a_status_of_errors() {
        let mut words: Vec<&str> = ProblemKind::ALL.iter().map(|k| k.word()).collect();
        assert!(ProblemKind::ALL.iter().all(|k| k.status().is_client_error() || k.status().is_server_error()));
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), ProblemKind::ALL.len());
    }

    #[test]
    fn a_refusal_of_the_mds_keeps_its_kind() {
        let error = |kind| MdsCallError { kind, rpc: "clone_volume", message: "m".to_owned(), outcome_unknown: true };
        let problem = Problem::call("clone", &error(MdsErrorKind::InUse));
        assert_eq!((problem.kind, problem.detail.as_str()), (ProblemKind::InUse, "clone: m (it may have been done)"));
        let response = Problem::new(ProblemKind::Unauthorized, "x").into_response();
        assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
        assert!(response.headers().contains_key(header::WWW_AUTHENTICATE));
    }
}
