//! [`Doors`]: what an instance listens on, from its configuration.
//!
//! Invariant: everything is opened before anything is served, so that an instance that cannot do what it was told says so and ends.

use super::api::{self, Api, Tokens, TokensError};
use super::config::SnapcloneConfig;
use super::curve;
use super::listen::{Door, ListenError};
use super::metrics::ServiceFigures;
use crate::place::Place;
use ogee_client::MdsClient;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// An API that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// Its address.
    #[error("serve {api}")]
    Listen {
        /// Which API.
        api: &'static str,
        /// Why not.
        #[source]
        source: ListenError,
    },
    /// Its tokens.
    #[error("tokens file {path:?}")]
    Tokens {
        /// Which file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: TokensError,
    },
}

/// The listeners of an instance.
pub(super) struct Doors {
    api: Option<(Door, Option<Tokens>)>,
    curve: Option<Door>,
}

impl Doors {
    /// Opens what the configuration names. Must be called within a runtime.
    ///
    /// # Errors
    /// [`DoorError`].
    pub(super) fn open(config: &SnapcloneConfig) -> Result<Self, DoorError> {
        let mut doors = Self { api: None, curve: None };
        if let Some(api) = &config.api {
            let load = |path: &PathBuf| Tokens::load(path).map_err(|source| DoorError::Tokens { path: path.clone(), source });
            let tokens = api.tokens.as_ref().map(load).transpose()?;
            let door = Door::open(&api.listen, api.tls_dir.as_deref());
            let door = door.map_err(|source| DoorError::Listen { api: "the REST API", source })?;
            if tokens.is_some() && api.tls_dir.is_none() && !api.listen.is_local() {
                tracing::warn!(target: "controlpath", listen = %api.listen, "tokens travel in the clear: set api.tls_dir");
            }
            tracing::info!(target: "controlpath", listen = %api.listen, "the REST API is served");
            doors.api = Some((door, tokens));
        }
        if let Some(curve) = &config.curve {
            let door = Door::open(&curve.listen, None);
            doors.curve = Some(door.map_err(|source| DoorError::Listen { api: "Curve's API", source })?);
            tracing::info!(target: "controlpath", listen = %curve.listen, "Curve's API is served");
        }
        Ok(doors)
    }

    /// Serves until told to stop; whoever holds what is returned waits for the end.
    pub(super) fn serve(
        self, (mds, places): (&MdsClient, &BTreeMap<String, Place>), figures: &Arc<ServiceFigures>, stop: &watch::Sender<bool>,
    ) -> JoinSet<()> {
        let mut serving = JoinSet::new();
        if let Some((door, tokens)) = self.api {
            let api = Arc::new(Api::new(mds.clone(), places.clone(), tokens, figures.clone()));
            serving.spawn(door.serve(api::router(api), stop.subscribe()));
        }
        if let Some(door) = self.curve {
            serving.spawn(door.serve(curve::router(mds.clone(), figures.clone()), stop.subscribe()));
        }
        serving
    }
}
