//! `ogee dev up`.

use super::certificates::{self, dev_network};
use super::layout;
use super::ready::{self, Member};
use super::record::Record;
use super::ports;
use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use crate::output::{Table, elapsed_ms};
use crate::sdk_error::call_failed;
use clap::Args;
use ogee_client::{Cluster, ClusterConfig};
use ogee_common::clock;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// Chunkservers of a new cluster unless said otherwise.
const CHUNKSERVERS_DEFAULT: usize = 3;

/// Arguments of `dev up`.
#[derive(Debug, Clone, Args)]
pub(crate) struct UpArgs {
    /// Chunkservers; a new cluster has 3
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    chunkservers: Option<u16>,
    /// MDS nodes, 1, 3 or 5; a new cluster has 1
    // The same id and type as the global --mds, which it stands for here.
    #[arg(long, value_name = "N", value_parser = mds_count)]
    mds: Option<String>,
    /// Encrypt all connections, with certificates made for this cluster; for a new cluster only
    #[arg(long)]
    tls: bool,
    /// Wait this long for the cluster to serve, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u64,
}

fn mds_count(text: &str) -> Result<String, &'static str> {
    if matches!(text, "1" | "3" | "5") { Ok(text.to_owned()) } else { Err("an MDS group has 1, 3 or 5 nodes") }
}

impl UpArgs {
    /// The number of MDS nodes that was asked for.
    fn mds_nodes(&self) -> Result<Option<usize>, CliError> {
        let Some(text) = &self.mds else { return Ok(None) };
        let bad = |e| CliError::caused(ErrorKind::Usage, format!("--mds {text}"), e);
        text.parse().map(Some).map_err(bad)
    }
}

/// One daemon as programs see it.
#[derive(Debug, Serialize)]
struct DaemonView {
    name: String,
    pid: u32,
    addr: String,
    log: String,
    started: bool,
}

/// What `dev up` reports.
#[derive(Debug, Serialize)]
struct UpView {
    mds: Vec<String>,
    daemons: Vec<DaemonView>,
    dir: String,
    elapsed_ms: f64,
}

impl UpView {
    fn text(&self) -> String {
        let mut table = Table::new(&["NAME", "PID", "ADDRESS", "STATE", "LOG"]);
        for d in &self.daemons {
            let state = if d.started { "started" } else { "was running" };
            table.row([d.name.clone(), d.pid.to_string(), d.addr.clone(), state.to_owned(), d.log.clone()]);
        }
        let (seconds, mds) = (self.elapsed_ms / 1000.0, self.mds.join(","));
        format!("{table}ready in {seconds:.1} s; for other commands: export OGEE_MDS={mds}")
    }
}

/// Carries out the command.
///
/// # Errors
/// The folder cannot be used, a port is taken, a daemon ends, or the cluster does not serve in time.
pub(crate) async fn run(context: &Context, args: UpArgs) -> Result<(), CliError> {
    let dir = context.dev_dir();
    let doing = format!("start the cluster in {}", dir.display());
    up(context, &dir, args).await.map_err(|e| e.within(doing))
}

async fn up(context: &Context, dir: &Path, args: UpArgs) -> Result<(), CliError> {
    let start = clock::now();
    std::fs::create_dir_all(dir).map_err(|e| CliError::file("create", dir, e))?;
    let root = dir.canonicalize().map_err(|e| CliError::file("open", dir, e))?;
    let _lock = layout::lock(&root)?;
    let record = record_for(&root, &args)?;
    certificates::prepare(&root, &record)?;
    let tls = certificates::daemon_tls(&root, &record);
    let mut members = Vec::new();
    for place in layout::daemons(&root, &record) {
        place.prepare(&record.mds, tls.as_ref())?;
        members.push(Member::ensure(place).await?);
    }
    let mds: Vec<String> = record.mds.iter().map(ToString::to_string).collect();
    let network = dev_network(&root)?;
    let description = "ogee dev up".to_owned();
    let config = ClusterConfig { mds: mds.clone(), network, description, ..ClusterConfig::default() };
    let cluster = Cluster::connect_lazy(config).map_err(|e| call_failed("connect", &e))?;
    ready::wait(cluster.mds(), &mut members, context.out, Duration::from_secs(args.timeout)).await?;
    for member in &members {
        member.place.settle()?;
    }
    let view = |m: &Member| DaemonView {
        name: m.place.name.clone(),
        pid: m.pid(),
        addr: m.place.addr.to_string(),
        log: m.place.log().display().to_string(),
        started: m.started().is_some(),
    };
    let daemons = members.iter().map(view).collect();
    let up = UpView { mds, daemons, dir: root.display().to_string(), elapsed_ms: elapsed_ms(start) };
    context.out.result(&up, UpView::text)
}

/// The record of the folder, made or extended as asked, and saved.
fn record_for(root: &Path, args: &UpArgs) -> Result<Record, CliError> {
    let (wanted, mds_wanted) = (args.chunkservers.map(usize::from), args.mds_nodes()?);
    let Some(mut record) = Record::load(root)? else {
        let (mds, chunkservers) = (mds_wanted.unwrap_or(1), wanted.unwrap_or(CHUNKSERVERS_DEFAULT));
        refuse_foreign(root)?;
        let mut mds_addrs = ports::choose(2 * (mds + chunkservers))?;
        let mut chunkserver_addrs = mds_addrs.split_off(mds);
        let mut mds_metrics = chunkserver_addrs.split_off(chunkservers);
        let chunkserver_metrics = mds_metrics.split_off(mds);
        let record = Record {
            mds: mds_addrs,
            chunkservers: chunkserver_addrs,
            mds_metrics,
            chunkserver_metrics,
            tls: args.tls,
        };
        record.save(root)?;
        return Ok(record);
    };
    if let Some(mds) = mds_wanted
        && mds != record.mds.len()
    {
        let text = format!("it has {} MDS nodes, which cannot be changed; leave --mds out", record.mds.len());
        return Err(CliError::new(ErrorKind::Conflict, text));
    }
    if args.tls && !record.tls {
        let text = "it was made without TLS, which cannot be changed here; leave --tls out";
        return Err(CliError::new(ErrorKind::Conflict, text));
    }
    let have = record.chunkservers.len();
    match wanted {
        Some(wanted) if wanted < have => {
            let text = format!("it has {have} chunkservers, and none can be taken away; leave --chunkservers out");
            Err(CliError::new(ErrorKind::Conflict, text))
        }
        Some(wanted) if wanted > have => {
            let mut addrs = ports::choose(2 * (wanted - have))?;
            // Chunkservers of a record without metrics would get those of others.
            let metrics = addrs.split_off(wanted - have);
            if record.chunkserver_metrics.len() == have {
                record.chunkserver_metrics.extend(metrics);
            }
            record.chunkservers.extend(addrs);
            record.save(root)?;
            Ok(record)
        }
        _ => Ok(record),
    }
}

/// A folder that holds a daemon's data but no record is not taken for a new cluster.
fn refuse_foreign(root: &Path) -> Result<(), CliError> {
    match ["mds-1", "cs-1"].iter().find(|name| root.join(name).exists()) {
        None => Ok(()),
        Some(name) => {
            let text = format!("{} holds {name} but no dev.toml; choose another folder", root.display());
            Err(CliError::new(ErrorKind::Conflict, text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(chunkservers: Option<u16>, mds: Option<usize>) -> UpArgs {
        UpArgs { chunkservers, mds: mds.map(|n| n.to_string()), tls: false, timeout: 1 }
    }

    #[test]
    fn ports_are_kept_and_chunkservers_are_only_added() {
        let dir = tempfile::tempdir().expect("a folder");
        let root = dir.path().to_owned();
        let first = record_for(&root, &args(None, None)).expect("made");
        assert_eq!((first.mds.len(), first.chunkservers.len()), (1, 3));
        assert_eq!(record_for(&root, &args(None, None)).expect("kept"), first);
        assert_eq!(record_for(&root, &args(Some(3), Some(1))).expect("kept"), first);
        let more = record_for(&root, &args(Some(5), None)).expect("extended");
        assert_eq!((&more.mds, &more.chunkservers[..3], more.chunkservers.len()), (&first.mds, &first.chunkservers[..], 5));
        assert_eq!((&more.mds_metrics, &more.chunkserver_metrics[..3]), (&first.mds_metrics, &first.chunkserver_metrics[..]));
        assert_eq!((more.mds_metrics.len(), more.chunkserver_metrics.len()), (1, 5));
        let encrypted = UpArgs { tls: true, ..args(None, None) };
        for refused in [args(Some(4), None), args(None, Some(3)), encrypted] {
            assert_eq!(record_for(&root, &refused).expect_err("refused").kind(), ErrorKind::Conflict);
        }
        assert_eq!(Record::load(&root).expect("read"), Some(more));
    }

    #[test]
    fn a_folder_with_a_strangers_data_is_left_alone() {
        let dir = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(dir.path().join("cs-1")).expect("made");
        let error = record_for(dir.path(), &args(None, None)).expect_err("refused");
        assert!(error.chain().contains("cs-1"), "{}", error.chain());
    }
}
