//! Ogee: one MDS and three chunkservers as `ogee dev up` starts them, with the defaults that users get.
//!
//! One volume, loaded through the SDK (`ogee`), through `ogee vhost-blk` (`ogee-vhost`) and through `ogee nbd serve` (`ogee-nbd`). It
//! may be attached only once, so each of these daemons runs only while its own loads do.

use crate::generator::{Settings, Subject};
use crate::load::{DISK_LOADS, NBD_LARGE, NBD_SMALL};
use crate::quiet::wait_quiet;
use crate::row::{NBD_SERVER, Run, VHOST_SERVER};
use crate::system::{Group, Point, points};
use crate::usage::Process;
use anyhow::{Context, Result, bail};
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::qemu::QemuDisk;
use ogee_vm_tests::vhost::{Readiness, VhostBackend};
use std::path::PathBuf;

/// Through the SDK.
pub(crate) const OGEE: &str = "ogee";
/// Through a vhost-user socket.
pub(crate) const OGEE_VHOST: &str = "ogee-vhost";
/// Through an NBD connection.
pub(crate) const OGEE_NBD: &str = "ogee-nbd";
const VOLUME: &str = "bench";

/// A daemon that serves the volume.
#[derive(Debug)]
struct FrontEnd {
    /// Whose loads it is for.
    system: &'static str,
    process: Process,
    daemon: VhostBackend,
    socket: PathBuf,
}

/// The cluster.
#[derive(Debug, Default)]
pub(crate) struct Ogee {
    front_end: Option<FrontEnd>,
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
        let front_end = self.front_end.iter().map(|front_end| front_end.process.clone());
        Ok(daemons.chain(front_end).collect())
    }

    /// Starts the daemon of this system; gives its socket.
    fn serve(&mut self, settings: &Settings, system: &'static str) -> Result<PathBuf> {
        let cluster = self.cluster.as_mut().context("the cluster was not started")?;
        let (name, daemon, socket) = if system == OGEE_NBD {
            let (socket, mds) = (cluster.folder().join("bench.nbd"), cluster.mds().join(","));
            let daemon = VhostBackend::start("bench-nbd", &settings.ogee, &socket, Readiness::Says, |command| {
                command.env("OGEE_MDS", mds).args(["nbd", "serve", VOLUME, "--socket"]).arg(&socket);
            })?;
            (NBD_SERVER, daemon, socket)
        } else {
            let daemon = cluster.serve(VOLUME)?;
            let QemuDisk::VhostUser { socket } = daemon.disk() else { bail!("not a vhost-user device") };
            (VHOST_SERVER, daemon, socket)
        };
        let process = Process { name: name.to_owned(), pid: daemon.pid() };
        settings.raise(std::slice::from_ref(&process))?;
        self.front_end = Some(FrontEnd { system, process, daemon, socket: socket.clone() });
        // What the loads of another front end left to do in the background is not this one's.
        wait_quiet(&self.processes()?);
        Ok(socket)
    }

    fn end_front_end(&mut self) -> Result<()> {
        self.front_end.take().map_or(Ok(()), |front_end| front_end.daemon.stop())
    }

    /// Starts or ends the daemon that the point needs; gives the target for `ogee bench`.
    fn target(&mut self, settings: &Settings, point: &Point) -> Result<Vec<String>> {
        if self.front_end.as_ref().is_some_and(|front_end| front_end.system != point.system) {
            self.end_front_end()?;
        }
        if point.system == OGEE {
            // From the folder `ogee bench` knows the daemons, and asks them what they flushed and wrote.
            return Ok(vec![VOLUME.to_owned(), "--dir".to_owned(), self.data()?]);
        }
        let socket = match &self.front_end {
            Some(front_end) => front_end.socket.clone(),
            None => self.serve(settings, point.system)?,
        };
        let socket = socket.display().to_string();
        if point.system == OGEE_NBD {
            return Ok(vec!["--nbd-socket".to_owned(), socket]);
        }
        let queues = point.load.jobs.to_string();
        Ok(vec!["--vhost-socket".to_owned(), socket, "--num-queues".to_owned(), queues])
    }
}

impl Group for Ogee {
    fn what(&self) -> &'static str {
        "Ogee: 1 MDS, 3 chunkservers"
    }

    fn points(&self) -> Vec<Point> {
        let mut all = points(OGEE, &DISK_LOADS);
        all.extend(points(OGEE_VHOST, &DISK_LOADS));
        // What is compared runs one after the other, and the reads come before the writes.
        for (large, small) in NBD_LARGE.into_iter().zip(NBD_SMALL) {
            let compared = [(OGEE_VHOST, large), (OGEE_NBD, large), (OGEE_NBD, small)];
            all.extend(compared.map(|(system, load)| Point { system, load }));
        }
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
        self.end_front_end()?;
        if std::mem::take(&mut self.up) {
            self.cluster()?.ok(&["dev", "down", "--dir", &self.data()?])?;
        }
        Ok(())
    }
}

impl Drop for Ogee {
    fn drop(&mut self) {
        // The daemon of the volume first.
        drop(self.front_end.take());
        if let Some(cluster) = self.cluster.take()
            && let Err(error) = cluster.shut_down()
        {
            eprintln!("{error:#}");
        }
    }
}
