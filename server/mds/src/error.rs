//! [`MdsError`]: why a node did not start or stopped.

use crate::config::ConfigError;
use std::error::Error;
use std::fmt;
use std::path::PathBuf;

/// What a node was doing when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MdsErrorStage {
    /// Reading its certificates.
    Certificate,
    /// Listening on its addresses.
    Listen,
    /// Taking its data directory.
    DataDir,
    /// Reading who it is.
    Identity,
    /// Opening its metadata.
    Store,
    /// Opening its log.
    Log,
    /// Joining the group.
    Join,
    /// Serving calls.
    Serve,
    /// Replicating; the disk of the log or the metadata failed.
    Replicate,
}

impl fmt::Display for MdsErrorStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Certificate => "read certificates",
            Self::Listen => "listen for clients and peers",
            Self::DataDir => "open data directory",
            Self::Identity => "read identity of the node",
            Self::Store => "open metadata store",
            Self::Log => "open log",
            Self::Join => "join the MDS group",
            Self::Serve => "serve calls",
            Self::Replicate => "replicate metadata",
        })
    }
}

/// A node that cannot run.
#[derive(Debug, thiserror::Error)]
pub enum MdsError {
    /// The configuration is wrong.
    #[error("read configuration")]
    Config(#[source] ConfigError),
    /// The data directory has no identity and the node was not told that it is new.
    #[error("{} has no identity; set `bootstrap = true` for the first start of a new node", .0.display())]
    NoIdentity(PathBuf),
    /// The data directory belongs to another node or cluster.
    #[error("{} belongs to node {node} of cluster {cluster:?}", dir.display())]
    OtherIdentity {
        /// The directory.
        dir: PathBuf,
        /// The node it belongs to.
        node: u32,
        /// The cluster it belongs to.
        cluster: String,
    },
    /// Something below failed.
    #[error("{stage}")]
    Failed {
        /// What was tried.
        stage: MdsErrorStage,
        /// Why it failed.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
}

impl MdsError {
    /// Wraps what failed below.
    pub(crate) fn at<E: Into<Box<dyn Error + Send + Sync>>>(stage: MdsErrorStage) -> impl FnOnce(E) -> Self {
        move |source| Self::Failed { stage, source: source.into() }
    }
}
