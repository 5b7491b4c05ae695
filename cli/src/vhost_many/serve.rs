//! `ogee vhost-blk serve`: the daemon from its start to its end.
//!
//! Life: claim the control socket, read the state file, bind, begin to attach what it had, answer, say `ready` when each was tried once;
//! on SIGINT or SIGTERM close the control socket, stop, drain and give back all volumes at once, and end with 0. A second signal ends
//! it at once; nothing acknowledged is lost then either. The claim (`claim.rs`) names the one client of the daemon: a daemon
//! that follows a killed one on the control socket attaches as the same client, so the MDS lets it have each volume at once.

use super::ServeArgs;
use super::book::Book;
use super::control::Control;
use super::daemon::{Daemon, Site};
use super::figures::DaemonFigures;
use super::protocol::Listed;
use super::state::{Kept, StateFile};
use crate::claim::Claim;
use crate::connect::Context;
use crate::daemon::allow_many_files;
use crate::error::{CliError, ErrorKind};
use crate::logging;
use crate::output::counted;
use crate::signals::StopSignals;
use crate::volume_metrics::serve_figures;
use ogee_common::limits::VHOST_ATTACHES_PARALLEL;
use ogee_metrics::MetricsServer;
use rustix::fs::Mode;
use rustix::process::umask;
use serde::Serialize;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;

/// What the claim says in place of a volume's name; no name has spaces.
const CLAIMED: &str = "many volumes";

#[derive(Debug, Serialize)]
struct Ready<'a> {
    ready: bool,
    control: &'a Path,
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'a PathBuf>,
    /// What the state file had, and how it is.
    volumes: Vec<Listed>,
    /// Where `/metrics` is.
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics: Option<SocketAddr>,
}

impl Ready<'_> {
    fn text(&self) -> String {
        let mut text = format!("ready: {} on {}", counted(self.volumes.len(), "volume"), self.control.display());
        for listed in &self.volumes {
            let reason = listed.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
            text += &format!("\n  {} on {} ({}{reason})", listed.volume, listed.socket.display(), listed.state.word());
        }
        if let Some(addr) = self.metrics {
            text += &format!("\nmetrics: http://{addr}/metrics");
        }
        text
    }
}

/// Carries out `ogee vhost-blk serve`.
///
/// # Errors
/// The control socket or the metrics cannot be served, the state file makes no sense, or a volume was not given back.
pub(super) async fn run(context: &Context, args: &ServeArgs) -> Result<(), CliError> {
    let mut signals = StopSignals::listen()?;
    // A volume in use has some descriptors for each queue.
    allow_many_files();
    let claim = Claim::take(&args.control, CLAIMED)?;
    let prepared = match prepare(context, args, claim.client()) {
        Ok(prepared) => prepared,
        Err(error) => {
            claim.not_attached();
            return Err(error);
        }
    };
    let Prepared { daemon, control, metrics, volumes } = prepared;
    logging::start_for_daemon();
    let begun = daemon.resume(volumes);
    let accepting = tokio::spawn(control.serve(Arc::clone(&daemon)));
    let tried = async {
        for first in begun {
            // How it went is shown and logged where it happened.
            let _ = first.await;
        }
    };
    let served = tokio::select! {
        () = tried => {
            let said = say_ready(context, args, &daemon, metrics.as_ref());
            if said.is_ok() {
                signals.wait().await;
            }
            said
        }
        () = signals.wait() => Ok(()),
    };
    // The control socket goes first: nobody is told of a volume that is about to go.
    accepting.abort();
    let _ = accepting.await;
    let ended = tokio::select! {
        ended = daemon.end() => ended,
        () = signals.wait() => Err(CliError::new(ErrorKind::Failure, "second signal: volumes stay attached")),
    };
    // Else the next daemon follows as the same client.
    if let Ok(true) = ended {
        claim.given_back();
    }
    served?;
    ended.map(drop)
}

struct Prepared {
    daemon: Arc<Daemon>,
    control: Control,
    metrics: Option<MetricsServer>,
    volumes: Vec<Kept>,
}

fn prepare(context: &Context, args: &ServeArgs, client: u64) -> Result<Prepared, CliError> {
    // No other thread makes files yet.
    let before = umask(Mode::from_raw_mode(0o177));
    let control = Control::bind(&args.control, args.control_group);
    umask(before);
    let control = control?;
    let (state, volumes) = match &args.state {
        Some(path) => StateFile::open(path).map(|(file, volumes)| (Some(file), volumes))?,
        None => (None, vec![]),
    };
    let cluster = context.cluster_as(NonZeroU64::new(client), args.io_timeout.map(Duration::from_secs))?;
    let site = Site {
        cluster,
        socket_mode: args.socket_mode,
        socket_group: args.socket_group,
        attaches: Semaphore::new(VHOST_ATTACHES_PARALLEL),
        book: Book::new(state),
    };
    let daemon = Arc::new(Daemon::new(site));
    let serve_metrics = |addr| serve_figures(addr, Arc::new(DaemonFigures(Arc::clone(&daemon))));
    let metrics = args.metrics.map(serve_metrics).transpose()?;
    Ok(Prepared { daemon, control, metrics, volumes })
}

fn say_ready(context: &Context, args: &ServeArgs, daemon: &Daemon, metrics: Option<&MetricsServer>) -> Result<(), CliError> {
    let ready = Ready {
        ready: true,
        control: &args.control,
        state: args.state.as_ref(),
        volumes: daemon.list(),
        metrics: metrics.map(MetricsServer::addr),
    };
    context.out.result(&ready, Ready::text)
}
