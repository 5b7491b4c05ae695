//! Disks that are full: new data is refused with a clear word, what is there can be read and overwritten, and when there is space again
//! everything goes on by itself.
//!
//! The disks are made "full" by the configured reserve, which is what an operator's full disk meets first.

use anyhow::{Context, Result, ensure};
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::image::Image;
use std::path::PathBuf;

/// More than any disk has.
const RESERVE: &str = "reserve_bytes = 1125899906842624\n";

fn configurations(cluster: &Cluster) -> Result<Vec<PathBuf>> {
    let folder = cluster.folder().join("cluster");
    let files: Vec<PathBuf> = (1..=3).map(|n| folder.join(format!("cs-{n}/chunkserver.toml"))).collect();
    for file in &files {
        ensure!(file.exists(), "no {}", file.display());
    }
    Ok(files)
}

fn restart_chunkservers(cluster: &mut Cluster) -> Result<()> {
    for name in ["cs-1", "cs-2", "cs-3"] {
        cluster.kill(name)?;
    }
    cluster.revive()
}

#[test]
fn a_full_cluster_refuses_new_data_and_keeps_the_old() -> Result<()> {
    let image = Image::golden()?;
    let mut cluster = Cluster::start("full-disk", 3, 1)?;
    let raw = image.raw.to_string_lossy().into_owned();
    cluster.ok(&["image", "import", &raw, "golden"])?;
    let sum = cluster.checksum("golden")?;
    for file in configurations(&cluster)? {
        let text = std::fs::read_to_string(&file)?;
        std::fs::write(&file, format!("{RESERVE}{text}")).with_context(|| format!("write {}", file.display()))?;
    }
    restart_chunkservers(&mut cluster)?;

    let done = cluster.ogee(&["image", "import", &raw, "second"])?;
    ensure!(done.code == 6, "a full cluster should give exit code 6: {done:?}");
    ensure!(done.stderr.lines().count() == 1 && done.stderr.contains("space"), "the error should say what is wrong: {done:?}");
    ensure!(cluster.checksum("golden")? == sum, "the old data is not readable on a full cluster");
    cluster.ok(&["snapshot", "create", "golden@v1"])?;
    cluster.ok(&["clone", "golden@v1", "copy"])?;
    ensure!(cluster.checksum("copy")? == sum, "a clone is not readable on a full cluster");

    for file in configurations(&cluster)? {
        let text = std::fs::read_to_string(&file)?.replace(RESERVE, "");
        std::fs::write(&file, text)?;
    }
    restart_chunkservers(&mut cluster)?;
    cluster.ok(&["image", "import", &raw, "third"])?;
    ensure!(cluster.checksum("third")? == sum, "the import after the disks had space again is wrong");
    cluster.shut_down()
}
