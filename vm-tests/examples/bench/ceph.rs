//! Ceph RBD: three OSDs on loopback, brought up by `scripts/bench/ceph.sh`, loaded by fio through librbd.

use crate::fio::FioJob;
use crate::generator::{Settings, Subject};
use crate::load::DISK_LOADS;
use crate::quiet::wait_quiet;
use crate::raw::fill;
use crate::row::Run;
use crate::system::{Group, Point, points};
use crate::usage::Process;
use anyhow::{Context, Result, ensure};
use ogee_vm_tests::process::wait_exit;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// RBD without its client's write-back cache: every completed write is durable on three OSDs.
pub(crate) const CEPH_NOCACHE: &str = "ceph-nocache";
/// RBD as installed: a completed write may be in the client's memory only.
pub(crate) const CEPH_DEFAULT: &str = "ceph-default";
const IMAGE: &str = "bench";
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// The cluster.
#[derive(Debug, Default)]
pub(crate) struct Ceph {
    folder: PathBuf,
    script: Option<Child>,
    processes: Vec<Process>,
    filled: bool,
}

/// The script that brings the cluster up and down.
#[must_use]
pub(crate) fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/bench/ceph.sh")
}

fn engine() -> Vec<String> {
    ["--ioengine=rbd", "--clientname=admin", "--pool=rbd", "--rbdname=bench"].map(str::to_owned).to_vec()
}

impl Ceph {
    /// Which configuration librbd reads.
    fn env(&self, cached: bool) -> [(&'static str, String); 1] {
        let name = if cached { "ceph.conf" } else { "ceph-nocache.conf" };
        [("CEPH_CONF", self.folder.join(name).display().to_string())]
    }

    fn up(&mut self) -> Result<()> {
        // Not tied to us: it ends by itself when its input ends, and then ends the daemons.
        let mut child = Command::new(script())
            .arg("run")
            .arg(&self.folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("start ceph.sh")?;
        let mut line = String::new();
        let output = child.stdout.take().context("ceph.sh has no output")?;
        self.script = Some(child);
        BufReader::new(output).read_line(&mut line).context("read from ceph.sh")?;
        let pids = line.strip_prefix("ready ").with_context(|| format!("ceph.sh did not get ready: {line:?}"))?;
        let process = |pid: &str| -> Result<Process> {
            let pid = pid.parse().with_context(|| format!("ceph.sh said {line:?}"))?;
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).with_context(|| format!("{pid} is gone"))?;
            Ok(Process { name: name.trim().to_owned(), pid })
        };
        self.processes = pids.split_whitespace().map(process).collect::<Result<_>>()?;
        Ok(())
    }

    fn fill(&self, settings: &Settings) -> Result<()> {
        let mib = settings.size.div_ceil(1 << 20).to_string();
        let mut command = Command::new("rbd");
        let status = command.args(["create", IMAGE, "--size", &mib]).envs(self.env(false)).status().context("run rbd")?;
        ensure!(status.success(), "rbd create ended with {status}");
        fill(&engine(), settings.size, &self.env(true))
    }
}

impl Group for Ceph {
    fn what(&self) -> &'static str {
        "Ceph RBD: 1 monitor, 1 manager, 3 OSDs"
    }

    fn points(&self) -> Vec<Point> {
        let mut all = points(CEPH_NOCACHE, &DISK_LOADS);
        all.extend(points(CEPH_DEFAULT, &DISK_LOADS));
        all
    }

    fn start(&mut self, settings: &Settings) -> Result<()> {
        self.folder = settings.folder.join("ceph");
        self.up()?;
        if !self.filled {
            self.fill(settings)?;
            self.filled = true;
        }
        wait_quiet(&self.processes);
        settings.raise(&self.processes)
    }

    fn run(&mut self, settings: &Settings, point: &Point, seed: u64) -> Result<Run> {
        let job = FioJob {
            load: point.load,
            engine: engine(),
            size: settings.size,
            ramp: settings.ramp,
            runtime: settings.runtime,
            seed,
        };
        let subject = Subject { processes: &self.processes, replicas: 3 };
        settings.fio(&job, &subject, &self.env(point.system == CEPH_DEFAULT))
    }

    fn stop(&mut self) -> Result<()> {
        let Some(mut script) = self.script.take() else { return Ok(()) };
        self.processes.clear();
        drop(script.stdin.take());
        let status = wait_exit(&mut script, "Ceph", STOP_LIMIT)?;
        ensure!(status.success(), "ceph.sh ended with {status}");
        Ok(())
    }
}

impl Drop for Ceph {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("{error:#}");
        }
    }
}
