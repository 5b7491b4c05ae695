//! Ogee: one MDS and three chunkservers as `ogee dev up` starts them, with the defaults that users get.
//!
//! One volume, loaded through the SDK (`ogee`) and through `ogee vhost-blk` (`ogee-vhost`). It may be attached only once, so the
//! vhost daemon runs only while its own loads do.

use crate::generator::{Settings, Subject};
use crate::load::DISK_LOADS;
use crate::quiet::wait_quiet;
use crate::row::Run;
use crate::system::{Group, Point, points};
use crate::usage::Process;
use anyhow::{Context, Result, bail};
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::qemu::QemuDisk;
use ogee_vm_tests::vhost::VhostBackend;
use std::path::PathBuf;

/// Through the SDK.
pub(crate) const OGEE: &str = "ogee";
/// Through a vhost-user socket.
pub(crate) const OGEE_VHOST: &str = "ogee-vhost";
const VOLUME: &str = "bench";

/// The cluster.
#[derive(Debug, Default)]
pub(crate) struct Ogee {
    backend: Option<(VhostBackend, PathBuf)>,
    cluster: Option<Cluster>,
    up: bool,
}

impl Ogee {
    fn cluster(&self) -> Result<&Cluster> {
        self.cluster.as_ref().context("the cluster was not started")
    }

    /// The folder of `ogee dev up`.
    fn data(&self) -> Result<String> {
        Ok(self.cluster()?.folder().join("cluster").display().to_string())
    }

    fn processes(&self) -> Result<Vec<Process>> {
        let daemons = self.cluster()?.daemons().iter().map(|d| Process { name: d.name.clone(), pid: d.pid });
        let backend = self.backend.iter().map(|(b, _)| Process { name: "vhost-blk".to_owned(), pid: b.pid() });
        Ok(daemons.chain(backend).collect())
    }

    /// Starts or ends the vhost daemon, whichever the point needs; gives the target for `ogee bench`.
    fn target(&mut self, settings: &Settings, point: &Point) -> Result<Vec<String>> {
        if point.system == OGEE {
            if let Some((backend, _)) = self.backend.take() {
                backend.stop()?;
            }
            // From the folder `ogee bench` knows the daemons, and asks them what they flushed and wrote.
            return Ok(vec![VOLUME.to_owned(), "--dir".to_owned(), self.data()?]);
        }
        let socket = match &self.backend {
            Some((_, socket)) => socket.clone(),
            None => {
                let cluster = self.cluster.as_mut().context("the cluster was not started")?;
                let backend = cluster.serve(VOLUME)?;
                let QemuDisk::VhostUser { socket } = backend.disk() else { bail!("not a vhost-user device") };
                settings.raise(&[Process { name: "vhost-blk".to_owned(), pid: backend.pid() }])?;
                self.backend = Some((backend, socket.clone()));
                socket
            }
        };
        let queues = point.load.jobs.to_string();
        Ok(vec!["--vhost-socket".to_owned(), socket.display().to_string(), "--num-queues".to_owned(), queues])
    }
}

impl Group for Ogee {
    fn what(&self) -> &'static str {
        "Ogee: 1 MDS, 3 chunkservers"
    }

    fn points(&self) -> Vec<Point> {
        let mut all = points(OGEE, &DISK_LOADS);
        all.extend(points(OGEE_VHOST, &DISK_LOADS));
        all
    }

    fn start(&mut self, settings: &Settings) -> Result<()> {
        if let Some(cluster) = &mut self.cluster {
            cluster.revive()?;
        } else {
            let cluster = self.cluster.insert(Cluster::start("bench", 3, 1)?);
            let size = settings.size.to_string();
            cluster.ok(&["volume", "create", VOLUME, "--size", &size])?;
            // The reads after the filling are of no interest.
            cluster.ok(&["bench", VOLUME, "--prefill", "--rw", "randread", "--runtime", "1", "--ramp", "0", "--json"])?;
        }
        self.up = true;
        let processes = self.processes()?;
        wait_quiet(&processes);
        settings.raise(&processes)
    }

    fn run(&mut self, settings: &Settings, point: &Point, seed: u64) -> Result<Run> {
        let target = self.target(settings, point)?;
        let processes = self.processes()?;
        settings.ogee_bench(&point.load, seed, &target, &Subject { processes: &processes, replicas: 3 })
    }

    fn stop(&mut self) -> Result<()> {
        if let Some((backend, _)) = self.backend.take() {
            backend.stop()?;
        }
        if std::mem::take(&mut self.up) {
            self.cluster()?.ok(&["dev", "down", "--dir", &self.data()?])?;
        }
        Ok(())
    }
}

impl Drop for Ogee {
    fn drop(&mut self) {
        // The daemon of the volume first.
        drop(self.backend.take());
        if let Some(cluster) = self.cluster.take()
            && let Err(error) = cluster.shut_down()
        {
            eprintln!("{error:#}");
        }
    }
}
