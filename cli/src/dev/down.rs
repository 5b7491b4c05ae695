//! `ogee dev down` and `ogee dev destroy`.

use super::layout::{self, DaemonPlace};
use super::process::{self, Running};
use super::record::Record;
use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use crate::output::counted;
use clap::Args;
use serde::Serialize;
use std::path::Path;
use std::time::Duration;

/// From SIGTERM to SIGKILL.
const TERM_LIMIT: Duration = Duration::from_secs(10);
/// From SIGKILL to giving up: the kernel may have to finish a write.
const KILL_LIMIT: Duration = Duration::from_secs(30);

/// Arguments of `dev destroy`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DestroyArgs {
    /// Yes, delete all volumes of the cluster
    #[arg(long, required = true)]
    yes: bool,
}

/// How a daemon was found and left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Outcome {
    NotRunning,
    Stopped,
    Killed,
}

#[derive(Debug, Serialize)]
struct DaemonView {
    name: String,
    pid: Option<u32>,
    outcome: Outcome,
}

#[derive(Debug, Serialize)]
struct DownView {
    dir: String,
    daemons: Vec<DaemonView>,
}

/// Carries out `dev down`.
///
/// # Errors
/// The folder holds no dev cluster, or a daemon does not end.
pub(crate) async fn run(context: &Context) -> Result<(), CliError> {
    let (root, record) = layout::existing_root(&context.dev_dir())?;
    let _lock = layout::lock(&root)?;
    let daemons = stop_all(&root, &record).await?;
    let view = DownView { dir: root.display().to_string(), daemons };
    context.out.result(&view, |v| {
        let stopped = v.daemons.iter().filter(|d| d.outcome != Outcome::NotRunning).count();
        let killed: Vec<&str> = v.daemons.iter().filter(|d| d.outcome == Outcome::Killed).map(|d| d.name.as_str()).collect();
        let note = if killed.is_empty() { String::new() } else { format!(" (killed: {})", killed.join(", ")) };
        format!("stopped {}{note}; the data stays in {}", counted(stopped, "daemon"), v.dir)
    })
}

/// Carries out `dev destroy`. Deletes only what `dev up` made.
///
/// # Errors
/// As [`run`], or something cannot be deleted.
pub(crate) async fn destroy(context: &Context, _confirmed: &DestroyArgs) -> Result<(), CliError> {
    let (root, record) = layout::existing_root(&context.dev_dir())?;
    let _lock = layout::lock(&root)?;
    stop_all(&root, &record).await?;
    for place in layout::daemons(&root, &record) {
        match std::fs::remove_dir_all(&place.dir) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(CliError::file("delete", &place.dir, e)),
            _ => {}
        }
    }
    // The record goes after the data: a crash in between leaves a folder that can be destroyed again.
    for name in ["dev.toml", ".lock"] {
        let path = root.join(name);
        std::fs::remove_file(&path).map_err(|e| CliError::file("delete", &path, e))?;
    }
    // Somebody may keep things of his own in it.
    let _ = std::fs::remove_dir(&root);
    let dir = root.display().to_string();
    context.out.result(&serde_json::json!({"destroyed": dir}), |_| format!("destroyed the cluster in {dir}"))
}

/// Asks all daemons at once to end, and kills those that do not.
async fn stop_all(root: &Path, record: &Record) -> Result<Vec<DaemonView>, CliError> {
    let found: Vec<(DaemonPlace, Option<Running>)> =
        layout::daemons(root, record).into_iter().map(|place| (place.clone(), process::find(&place))).collect();
    for running in found.iter().filter_map(|(_, running)| running.as_ref()) {
        running.terminate()?;
    }
    let deadline = ogee_common::clock::now() + TERM_LIMIT;
    let mut views = Vec::new();
    for (place, running) in found {
        let outcome = match &running {
            None => Outcome::NotRunning,
            Some(running) => stop_one(&place, running, deadline).await?,
        };
        views.push(DaemonView { name: place.name, pid: running.map(|r| r.pid), outcome });
    }
    Ok(views)
}

async fn stop_one(
    place: &DaemonPlace, running: &Running, deadline: ogee_common::clock::Instant,
) -> Result<Outcome, CliError> {
    let left = deadline.saturating_duration_since(ogee_common::clock::now());
    if running.wait_end(left).await? {
        return Ok(Outcome::Stopped);
    }
    running.kill()?;
    if running.wait_end(KILL_LIMIT).await? {
        return Ok(Outcome::Killed);
    }
    let text = format!("{} (process {}) does not end, not even by SIGKILL", place.name, running.pid);
    Err(CliError::new(ErrorKind::Failure, text))
}
