//! The REST API under `/v1`: what programs ask of an instance over HTTP. All it does is call the MDS and look into repositories.
//!
//! | file | what |
//! | --- | --- |
//! | `router.rs` | routes; who is let in; time limits; counting |
//! | `tokens.rs` | the tokens file |
//! | `problem.rs`, `answer.rs` | problems (RFC 9457) and answers |
//! | `input.rs` | paths, queries, bodies, idempotency keys, cursors |
//! | `views.rs` | objects as JSON |
//! | `volumes.rs`, `backups.rs`, `tasks.rs`, `schedules.rs` | the routes of each subject |
//! | `openapi.rs` | the document, made from the handlers: `docs/openapi.json` |
//!
//! Invariants: an instance keeps nothing between two requests but figures, so any of them may answer any request; a request is let in by a token, or
//! nobody but this host can send one; what changes something for longer than a moment is a task, and has its idempotency key.
//! Absent: Curve's API (`super::curve`), sockets (`super::listen`).

mod answer;
mod backups;
mod input;
mod openapi;
mod problem;
mod router;
mod schedules;
mod tasks;
mod tokens;
mod views;
mod volumes;

pub use openapi::openapi_json;
pub(super) use router::router;
pub(super) use tokens::Tokens;
pub use tokens::TokensError;

use super::metrics::ServiceFigures;
use crate::place::Place;
use ogee_client::MdsClient;
use ogee_common::clock::Instant;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// What handlers work with.
#[derive(Debug)]
pub(super) struct Api {
    mds: MdsClient,
    places: BTreeMap<String, Place>,
    /// `None`: everybody who can connect is let in.
    tokens: Option<Tokens>,
    figures: Arc<ServiceFigures>,
    /// When the MDS was looked for last, and whether it answered.
    health: Mutex<Option<(Instant, bool)>>,
}

impl Api {
    /// An API over a cluster and repositories.
    pub(super) fn new(
        mds: MdsClient, places: BTreeMap<String, Place>, tokens: Option<Tokens>, figures: Arc<ServiceFigures>,
    ) -> Self {
        Self { mds, places, tokens, figures, health: Mutex::new(None) }
    }

    fn mds(&self) -> &MdsClient {
        &self.mds
    }
}

/// Who sent a request.
#[derive(Debug, Clone)]
struct Principal {
    /// The token's name; empty: there are no tokens.
    name: String,
}
