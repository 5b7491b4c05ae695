//! Flipping single bytes on the disks of a cluster's chunkservers, and seeing what they make of it.
//!
//! Used by the tests of damage. Invariant: a flip changes one bit of one byte in place, so the same call takes it back.

use crate::cluster::Cluster;
use crate::deadline::wait_for;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The data directory of a chunkserver, by its number in `ogee dev up`.
#[must_use]
pub fn data(cluster: &Cluster, number: u64) -> PathBuf {
    cluster.folder().join(format!("cluster/cs-{number}/data"))
}

/// All files under a folder, in order.
///
/// # Errors
/// When it cannot be listed.
pub fn files(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() { files(&path, found)? } else { found.push(path) }
    }
    found.sort();
    Ok(())
}

/// Flips bits of the byte at `at`.
///
/// # Errors
/// No such file, or it is shorter.
pub fn flip(path: &Path, at: u64, bit: u8) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at)?;
    file.write_all_at(&[byte[0] ^ bit], at)?;
    Ok(())
}

/// The id of a chunkserver that is up, by its number in `ogee dev up`. Those that were there before it on other disks are down.
///
/// # Errors
/// When it is not up.
pub fn id_of(cluster: &Cluster, number: u64) -> Result<u64> {
    let dir = cluster.folder().join("cluster").display().to_string();
    let state = cluster.json(&["dev", "status", "--dir", &dir, "--json"])?;
    let daemons = state["daemons"].as_array().context("daemons")?;
    let addr = daemons.iter().find(|d| d["name"] == format!("cs-{number}")).context("known")?["addr"].clone();
    let list = cluster.json(&["cluster", "chunkservers", "--json"])?;
    let up = |c: &&Value| c["addr"] == addr && c["state"] == "up";
    list.as_array().context("a list")?.iter().find(up).context("up")?["id"].as_u64().context("an id")
}

/// Scrubs one chunkserver and gives pages read, bad, mended.
///
/// # Errors
/// When the scrub does not come to its end.
pub fn scrub(cluster: &Cluster, id: u64) -> Result<[u64; 3]> {
    let views = cluster.json(&["scrub", "start", &id.to_string(), "--watch", "--json"])?;
    let view = &views[0];
    ensure!(view["state"] == "done" && view["skipped_copysets"] == 0, "the scrub did not come to its end: {view}");
    let number = |key: &str| view[key].as_u64().with_context(|| format!("no {key} in {view}"));
    Ok([number("pages")?, number("bad_pages")?, number("mended_pages")?])
}

/// What a chunkserver has said so far.
///
/// # Errors
/// When it has no log.
pub fn log_of(cluster: &Cluster, number: u64) -> Result<String> {
    Ok(std::fs::read_to_string(&cluster.daemon(&format!("cs-{number}"))?.log)?)
}

/// Waits until every copyset has all its replicas.
///
/// # Errors
/// When that takes two minutes.
pub fn wait_whole(cluster: &Cluster) -> Result<()> {
    wait_for("the rebuild", Duration::from_secs(120), || {
        let status = cluster.json(&["status", "--json"])?;
        let left = status["moves"].as_u64().context("moves")? + status["moves_waiting"].as_u64().context("waiting")?;
        Ok((left == 0 && status["copysets_degraded"] == 0).then_some(()))
    })
}

