//! What requests bring: parts of the path, the query, a JSON body, an idempotency key, a cursor. All of it is hostile.
//!
//! Invariants: whatever cannot be understood is a [`Problem`], never a panic; unknown fields are errors, in queries as in bodies; a body is read
//! up to [`API_BODY_BYTES_MAX`] and no further.

use super::problem::{Problem, ProblemKind};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use ogee_common::limits::{API_BODY_BYTES_MAX, API_PAGE_DEFAULT, API_PAGE_MAX};
use ogee_common::name::{VolumePath, check_name};
use ring::digest::{SHA256, digest};
use serde::de::DeserializeOwned;

/// The header of idempotency keys.
const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Characters of an idempotency key, at most.
const KEY_BYTES_MAX: usize = 256;

/// Parts of the path, percent-decoded.
pub(super) struct Parted<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Parted<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let found = Path::<T>::from_request_parts(parts, state).await;
        let found = found.map_err(|e| Problem::new(ProblemKind::Malformed, format!("the path: {}", e.body_text())))?;
        Ok(Self(found.0))
    }
}

/// The query.
pub(super) struct Filter<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Filter<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let found = Query::<T>::from_request_parts(parts, state).await;
        let found = found.map_err(|e| Problem::new(ProblemKind::Malformed, format!("the query: {}", e.body_text())))?;
        Ok(Self(found.0))
    }
}

/// A JSON body; an empty one counts as `{}`.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _state: &S) -> Result<Self, Problem> {
        let (parts, body) = request.into_parts();
        let bytes = match Limited::new(body, API_BODY_BYTES_MAX).collect().await {
            Ok(collected) => collected.to_bytes(),
            Err(e) if e.is::<LengthLimitError>() => {
                return Err(Problem::new(ProblemKind::TooLarge, format!("a body has at most {API_BODY_BYTES_MAX} bytes")));
            }
            Err(_) => return Err(Problem::new(ProblemKind::Malformed, "the body ended early")),
        };
        if bytes.is_empty() {
            return parse(b"{}");
        }
        let media = parts.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        let media = media.split(';').next().unwrap_or_default().trim();
        if !media.eq_ignore_ascii_case("application/json") {
            return Err(Problem::new(ProblemKind::MediaType, "send the header Content-Type: application/json"));
        }
        parse(&bytes)
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<Body<T>, Problem> {
    serde_json::from_slice(bytes).map(Body).map_err(|e| Problem::new(ProblemKind::Malformed, format!("the body: {e}")))
}

/// A volume's path.
///
/// # Errors
/// `invalid-argument`.
pub(super) fn volume_path(what: &str, text: &str) -> Result<String, Problem> {
    let path = VolumePath::parse(text).map_err(|e| Problem::new(ProblemKind::InvalidArgument, format!("{what} {text:?}: {e}")))?;
    Ok(path.to_string())
}

/// The name of a snapshot, owner or pool.
///
/// # Errors
/// `invalid-argument`.
pub(super) fn name(what: &str, text: &str) -> Result<(), Problem> {
    check_name(text).map_err(|e| Problem::new(ProblemKind::InvalidArgument, format!("{what} {text:?}: {e}")))
}

/// The task's key that follows from the request's idempotency key, if it has one. `who` used it: keys of others are other keys.
///
/// # Errors
/// `malformed`.
pub(super) fn task_key(headers: &HeaderMap, who: &str) -> Result<Vec<u8>, Problem> {
    let mut all = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = all.next() else { return Ok(vec![]) };
    let text = value.to_str().unwrap_or_default();
    let fits = (1..=KEY_BYTES_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    if !fits || all.next().is_some() {
        let why = format!("Idempotency-Key has 1 to {KEY_BYTES_MAX} visible ASCII characters, and is given once");
        return Err(Problem::new(ProblemKind::Malformed, why));
    }
    let whole = format!("ogee-idempotency-key\n{who}\n{text}");
    Ok(digest(&SHA256, whole.as_bytes()).as_ref()[..16].to_vec())
}

/// How many entries a page may have.
///
/// # Errors
/// `invalid-argument`.
pub(super) fn page_limit(limit: Option<u32>) -> Result<usize, Problem> {
    match limit {
        None => Ok(API_PAGE_DEFAULT),
        Some(n) if (1..=API_PAGE_MAX).contains(&(n as usize)) => Ok(n as usize),
        Some(n) => Err(Problem::new(ProblemKind::InvalidArgument, format!("limit {n}: 1 to {API_PAGE_MAX} are possible"))),
    }
}

/// Where the next page of a list begins, for clients an opaque word: what list it is of, and the last entry of the page before.
pub(super) fn cursor(list: &str, last: &str) -> String {
    crate::layout::hex(format!("{list}\n{last}").as_bytes())
}

/// The last entry of the page before, from a cursor of this list.
///
/// # Errors
/// `malformed`.
pub(super) fn after(list: &str, cursor: Option<&str>) -> Result<Option<String>, Problem> {
    let Some(text) = cursor else { return Ok(None) };
    let wrong = || Problem::new(ProblemKind::Malformed, "the cursor is not one of this list");
    if !text.len().is_multiple_of(2) || !text.is_ascii() {
        return Err(wrong());
    }
    let byte = |i: usize| u8::from_str_radix(&text[i..i + 2], 16).ok();
    let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(byte).collect();
    let whole = bytes.and_then(|bytes| String::from_utf8(bytes).ok()).ok_or_else(wrong)?;
    let (of, last) = whole.split_once('\n').ok_or_else(wrong)?;
    if of == list { Ok(Some(last.to_owned())) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_key_is_the_users_and_always_the_same() {
        let headers = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.append(IDEMPOTENCY_KEY, value.parse().expect("a value"));
            headers
        };
        let key = |value: &str, who: &str| task_key(&headers(value), who);
        assert_eq!(task_key(&HeaderMap::new(), "ops"), Ok(vec![]));
        assert_eq!(key("a", "ops").map(|k| k.len()), Ok(16));
        assert_eq!(key("a", "ops"), key("a", "ops"));
        assert_ne!(key("a", "ops"), key("b", "ops"));
        assert_ne!(key("a", "ops"), key("a", "dev"));
        assert!(key("", "ops").is_err() && key(&"x".repeat(257), "ops").is_err());
        let mut twice = headers("a");
        twice.append(IDEMPOTENCY_KEY, "b".parse().expect("a value"));
        assert!(task_key(&twice, "ops").is_err());
    }

    proptest! {
        #[test]
        fn cursors_come_back_and_others_are_refused(last in "[ -~é]{0,40}", text in "[0-9a-fé]{0,20}") {
            prop_assert_eq!(after("tasks", Some(&cursor("tasks", &last))), Ok(Some(last.clone())));
            prop_assert!(after("backups", Some(&cursor("tasks", &last))).is_err());
            prop_assert!(after("tasks", Some(&text)).is_err());
        }
    }
}
