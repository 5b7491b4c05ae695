//! A connection to a cluster: the MDS client, the control thread, and what its volumes share.
//!
//! Called by every front end before it opens a volume. Invariants: one [`Cluster`] has one client identity; the
//! knowledge of who leads a copyset is shared by all volumes and threads, and its term never goes back (`routing.rs`).
//! Absent: IO.

use crate::backup::BackupOpener;
use crate::control::ControlThread;
use crate::mds_client::{MdsCallError, MdsClient};
use crate::routing::RouteTable;
use ogee_common::limits as l;
use ogee_common::rng;
use ogee_proto::MdsErrorKind;
use ogee_proto::net::Network;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;

/// What a full cluster does to a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NoSpacePolicy {
    /// The write fails with [`crate::IoErrorKind::NoSpace`]; the front end or the guest decides. The default, because
    /// a guest's file system can act on an error, and nobody can act on silence.
    #[default]
    Fail,
    /// The write waits until there is space, or until the IO timeout.
    Wait,
}

/// What a client makes of the limits of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LimitsPolicy {
    /// It does no more than they allow. The default, for whoever serves a volume.
    #[default]
    Obey,
    /// They do not concern it: a command that copies a volume for an administrator.
    Ignore,
}

/// How long things may take. The defaults are those of [`ogee_common::limits`]; tests shorten them.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// One attempt of a data request.
    pub attempt_timeout: Duration,
    /// Waiting for an answer to "who leads".
    pub status_timeout: Duration,
    /// First pause of a retry.
    pub backoff_min: Duration,
    /// Longest pause between retries.
    pub backoff_max: Duration,
    /// In-flight writes must drain within this time for a hold to be acknowledged.
    pub hold_timeout: Duration,
    /// A hold that was not acknowledged is let go after this time.
    pub hold_release_after: Duration,
    /// How long a read-only client of a live volume believes that a segment is unallocated.
    pub live_layout_ttl: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            attempt_timeout: l::ATTEMPT_TIMEOUT,
            status_timeout: l::STATUS_TIMEOUT,
            backoff_min: l::RETRY_BACKOFF_MIN,
            backoff_max: l::RETRY_BACKOFF_MAX,
            hold_timeout: l::HOLD_TIMEOUT,
            hold_release_after: l::HOLD_RELEASE_AFTER,
            live_layout_ttl: l::LIVE_LAYOUT_TTL,
        }
    }
}

/// How to reach a cluster and how its volumes behave.
#[derive(Debug, Clone, Default)]
pub struct ClusterConfig {
    /// Addresses of the MDS nodes, `host:port`; at least one.
    pub mds: Vec<String>,
    /// How connections are made: plainly by default, or with certificates.
    pub network: Network,
    /// Shown to people in `volume info` as the one who attached: host, program, pid.
    pub description: String,
    /// Who attaches: a client may take a volume from itself at once. `None`: somebody new. Only for a process that knows that
    /// its predecessor of this id is dead.
    pub client: Option<NonZeroU64>,
    /// An IO that takes longer fails with [`crate::IoErrorKind::TimedOut`]; `None` retries for ever.
    pub io_timeout: Option<Duration>,
    /// What a full cluster does to a write.
    pub no_space: NoSpacePolicy,
    /// What limits of volumes are to this client.
    pub limits: LimitsPolicy,
    /// The repositories that it can read backups from. Without it volumes that stand on a backup are refused to it.
    pub backups: Option<Arc<dyn BackupOpener>>,
    /// Times of single steps.
    pub timing: Timing,
}

#[derive(Debug)]
pub(crate) struct ClusterInner {
    pub(crate) config: ClusterConfig,
    pub(crate) mds: MdsClient,
    pub(crate) client: u64,
    pub(crate) routes: RouteTable,
    control: ControlThread,
}

impl ClusterInner {
    /// Where control work is spawned.
    pub(crate) fn control(&self) -> &Handle {
        self.control.handle()
    }
}

/// A connection to a cluster. Clones share it; the control thread ends with the last clone and the last volume.
#[derive(Debug, Clone)]
pub struct Cluster(pub(crate) Arc<ClusterInner>);

impl Cluster {
    /// Starts the control thread and asks the MDS for the cluster's identity, to say early that nobody answers.
    ///
    /// # Errors
    /// `invalid-argument` without an address, `unavailable` when no MDS leader answers within
    /// [`ogee_common::limits::MDS_CALL_TIMEOUT`].
    pub async fn connect(config: ClusterConfig) -> Result<Self, MdsCallError> {
        let cluster = Self::connect_lazy(config)?;
        cluster.mds().cluster_status().await?;
        Ok(cluster)
    }

    /// As [`Cluster::connect`], without asking the MDS anything yet.
    ///
    /// # Errors
    /// `invalid-argument` without an address, `unavailable` when no thread can be started.
    pub fn connect_lazy(config: ClusterConfig) -> Result<Self, MdsCallError> {
        let fail = |kind, message: String| MdsCallError { kind, rpc: "connect", message, outcome_unknown: false };
        if config.mds.is_empty() || config.mds.len() > l::MDS_NODES_MAX {
            let message = format!("1 to {} MDS addresses are needed", l::MDS_NODES_MAX);
            return Err(fail(MdsErrorKind::InvalidArgument, message));
        }
        let control = ControlThread::start().map_err(|e| fail(MdsErrorKind::Unavailable, e.to_string()))?;
        let mds = MdsClient::new(control.handle().clone(), &config.mds, config.network.clone());
        let routes = RouteTable::default();
        let client = config.client.map_or_else(rng::nonzero_u64, NonZeroU64::get);
        Ok(Self(Arc::new(ClusterInner { config, mds, client, routes, control })))
    }

    /// Calls to the MDS.
    #[must_use]
    pub fn mds(&self) -> &MdsClient {
        &self.0.mds
    }
}
