//! The disk itself, through one file that was written in full before, with direct IO.
//!
//! A write at depth 1 is a write and an fdatasync, as a database does it; at higher depths nothing is synced, so those writes are
//! not durable and are the disk's ceiling.

use crate::fio::{FioJob, fill_arguments};
use crate::generator::{Settings, Subject};
use crate::load::{DISK_LOADS, Load};
use crate::row::Run;
use crate::system::{Group, Point, points};
use anyhow::{Context, Result, ensure};
use ogee_vm_tests::process::tied;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// Name of the system.
pub(crate) const RAW: &str = "raw-disk";

/// The file that raw IO and qemu-storage-daemon use.
#[must_use]
pub(crate) fn file(settings: &Settings) -> PathBuf {
    settings.folder.join("raw")
}

/// Writes the file in full, unless that was done.
///
/// # Errors
/// fio cannot do it.
pub(crate) fn ensure_file(settings: &Settings) -> Result<()> {
    let path = file(settings);
    if std::fs::metadata(&path).is_ok_and(|found| found.len() == settings.size) {
        return Ok(());
    }
    let engine = [format!("--filename={}", path.display()), "--ioengine=libaio".to_owned(), "--direct=1".to_owned()];
    fill(&engine, settings.size, &[])
}

/// Has fio write the whole working set.
///
/// # Errors
/// fio cannot do it.
pub(crate) fn fill(engine: &[String], size: u64, env: &[(&str, String)]) -> Result<()> {
    let mut command = tied(Path::new("fio"));
    command.args(fill_arguments(engine, size)).envs(env.iter().cloned()).stdin(Stdio::null());
    let output = command.output().context("run fio")?;
    ensure!(output.status.success(), "fio could not fill {engine:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The disk.
#[derive(Debug)]
pub(crate) struct Raw;

impl Raw {
    fn engine(settings: &Settings, load: &Load) -> Vec<String> {
        let path = format!("--filename={}", file(settings).display());
        let engine = if load.depth == 1 { "--ioengine=psync" } else { "--ioengine=libaio" };
        let mut all = vec![path, engine.to_owned(), "--direct=1".to_owned()];
        if load.depth == 1 && load.pattern.writes() {
            all.push("--fdatasync=1".to_owned());
        }
        all
    }
}

impl Group for Raw {
    fn what(&self) -> &'static str {
        "the disk itself"
    }

    fn points(&self) -> Vec<Point> {
        points(RAW, &DISK_LOADS)
    }

    fn start(&mut self, settings: &Settings) -> Result<()> {
        ensure_file(settings)
    }

    fn run(&mut self, settings: &Settings, point: &Point, seed: u64) -> Result<Run> {
        let job = FioJob {
            load: point.load,
            engine: Self::engine(settings, &point.load),
            size: settings.size,
            ramp: settings.ramp,
            runtime: settings.runtime,
            seed,
        };
        settings.fio(&job, &Subject { processes: &[], replicas: 1 }, &[])
    }

    fn stop(&mut self) -> Result<()> {
        Ok(())
    }
}
