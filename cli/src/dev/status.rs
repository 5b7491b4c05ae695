//! `ogee dev status`.

use super::certificates::dev_network;
use super::layout::{self, DaemonPlace};
use super::process;
use crate::cluster::StatusView;
use crate::connect::Context;
use crate::error::CliError;
use crate::output::Table;
use ogee_client::{Cluster, ClusterConfig};
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// The cluster gets this long to answer; the daemons are shown in any case.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

#[derive(Debug, Serialize)]
struct DaemonView {
    name: String,
    /// As last started; whose it is now only `alive` says.
    pid: Option<u32>,
    addr: String,
    log: String,
    alive: bool,
}

#[derive(Debug, Serialize)]
struct DevStatusView {
    mds: Vec<String>,
    daemons: Vec<DaemonView>,
    dir: String,
    /// Absent when the MDS does not answer.
    cluster: Option<StatusView>,
}

/// Carries out the command. Dead daemons are a result, not an error.
///
/// # Errors
/// The folder holds no dev cluster.
pub(crate) async fn run(context: &Context) -> Result<(), CliError> {
    let (root, record) = layout::existing_root(&context.dev_dir())?;
    let daemons: Vec<DaemonView> = layout::daemons(&root, &record).iter().map(view).collect();
    let mds: Vec<String> = record.mds.iter().map(ToString::to_string).collect();
    let any_mds = daemons.iter().any(|d| d.alive && mds.contains(&d.addr));
    let cluster = if any_mds { ask(&root, mds.clone()).await } else { None };
    let status = DevStatusView { mds, daemons, dir: root.display().to_string(), cluster };
    context.out.result(&status, |s| {
        let mut table = Table::new(&["NAME", "PID", "ADDRESS", "STATE", "LOG"]);
        for d in &s.daemons {
            let pid = d.pid.filter(|_| d.alive).map_or_else(|| "-".to_owned(), |p| p.to_string());
            let state = if d.alive { "running" } else { "dead" };
            table.row([d.name.clone(), pid, d.addr.clone(), state.to_owned(), d.log.clone()]);
        }
        match &s.cluster {
            Some(cluster) => format!("{table}\n{}", cluster.text()),
            None => format!("{table}\nthe MDS does not answer; start what is dead: ogee dev up --dir {}", s.dir),
        }
    })
}

fn view(place: &DaemonPlace) -> DaemonView {
    let running = process::find(place).map(|r| r.pid);
    DaemonView {
        name: place.name.clone(),
        pid: running.or_else(|| process::recorded_pid(place)),
        addr: place.addr.to_string(),
        log: place.log().display().to_string(),
        alive: running.is_some(),
    }
}

async fn ask(root: &Path, mds: Vec<String>) -> Option<StatusView> {
    let description = "ogee dev status".to_owned();
    let config = ClusterConfig { mds, network: dev_network(root).ok()?, description, ..ClusterConfig::default() };
    let cluster = Cluster::connect_lazy(config).ok()?;
    let reply = tokio::time::timeout(ANSWER_LIMIT, cluster.mds().cluster_status()).await;
    Some(reply.ok()?.ok()?.into())
}
