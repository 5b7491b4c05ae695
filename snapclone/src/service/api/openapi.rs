//! The OpenAPI 3.1 document of the REST API, made from the handlers and views.
//!
//! `docs/openapi.json` is the same document, checked in; the test below fails when they differ, and writes it with `OGEE_UPDATE_OPENAPI=1`.

use super::{backups, router, schedules, tasks, volumes};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Ogee snapclone", version = "1", license(name = "Apache-2.0", identifier = "Apache-2.0"),
        description = "Snapshots, clones, backups, restores, tasks and schedules. docs/rest.md says what is promised.",
    ),
    paths(
        router::health,
        volumes::volume, volumes::list_snapshots, volumes::create_snapshot, volumes::delete_snapshot,
        volumes::rollback, volumes::flatten, volumes::stop_flatten, volumes::create_clone,
        backups::repositories, backups::list, backups::create, backups::get, backups::remove, backups::verify, backups::gc, backups::restore,
        tasks::list, tasks::get, tasks::cancel,
        schedules::list, schedules::put, schedules::delete,
    ),
    modifiers(&Bearer),
    security(("token" = [])),
)]
struct Document;

/// Says that tokens are bearer tokens.
struct Bearer;

impl Modify for Bearer {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let components = openapi.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    }
}

/// The document, with a newline at its end.
#[must_use]
pub fn openapi_json() -> String {
    let json = Document::openapi().to_pretty_json().expect("the document is text");
    format!("{json}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checked_in_document_is_this_one() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
        let made = openapi_json();
        let parsed: serde_json::Value = serde_json::from_str(&made).expect("JSON");
        assert!(parsed["openapi"].as_str().is_some_and(|v| v.starts_with("3.1")), "{}", parsed["openapi"]);
        let methods = parsed["paths"].as_object().expect("paths").values().filter_map(serde_json::Value::as_object).flat_map(|m| m.values());
        let mut ids: Vec<&str> = methods.map(|m| m["operationId"].as_str().expect("an identity")).collect();
        let count = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), count, "each operation has its own identity: {ids:?}");
        if std::env::var_os("OGEE_UPDATE_OPENAPI").is_some() {
            std::fs::write(&path, &made).expect("written");
        }
        let known = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(known == made, "docs/openapi.json is not what the code says; OGEE_UPDATE_OPENAPI=1 cargo test -p ogee-snapclone --lib openapi writes it");
    }
}
