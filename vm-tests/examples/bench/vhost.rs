//! vhost-user-blk devices that are not a cluster's: qemu-storage-daemon over the raw file, and null devices of both programs.
//!
//! All are driven by the same front end, `ogee bench --vhost-socket`. The null devices cost nothing themselves, so what is left is
//! the path: ours answers reads with zeros, which it puts into the guest's memory, and copies what is written out of it; QEMU's
//! null-co by default leaves the guest's memory alone in both directions.

use crate::generator::{Settings, Subject};
use crate::load::{DISK_LOADS, NULL_LOADS};
use crate::raw;
use crate::row::Run;
use crate::system::{Group, Point, points};
use crate::usage::Process;
use anyhow::{Context, Result};
use ogee_vm_tests::vhost::{Readiness, VhostBackend};
use std::path::{Path, PathBuf};
use std::process::Command;

/// `ogee vhost-blk --null`.
pub(crate) const OGEE_NULL: &str = "ogee-null";
/// qemu-storage-daemon over null-co.
pub(crate) const QSD_NULL: &str = "qsd-null";
/// qemu-storage-daemon over the raw file; a write is answered after a flush.
pub(crate) const QSD_FILE: &str = "qsd-file";
/// Queues of every device; a load uses some of them.
const QUEUES: u16 = 4;
/// Bytes of a null device.
const NULL_BYTES: u64 = 64 << 30;

/// Which device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Ours over nothing.
    OgeeNull,
    /// QEMU's over nothing.
    QsdNull,
    /// QEMU's over a file, durable.
    QsdFile,
}

/// One device.
#[derive(Debug)]
pub(crate) struct Vhost {
    kind: Kind,
    backend: Option<VhostBackend>,
}

impl Vhost {
    /// A device that is not served yet.
    #[must_use]
    pub(crate) const fn new(kind: Kind) -> Self {
        Self { kind, backend: None }
    }

    const fn system(&self) -> &'static str {
        match self.kind {
            Kind::OgeeNull => OGEE_NULL,
            Kind::QsdNull => QSD_NULL,
            Kind::QsdFile => QSD_FILE,
        }
    }

    fn socket(&self, settings: &Settings) -> PathBuf {
        settings.folder.join(format!("{}.sock", self.system()))
    }

    fn processes(&self) -> Vec<Process> {
        let process = |backend: &VhostBackend| Process { name: self.system().to_owned(), pid: backend.pid() };
        self.backend.iter().map(process).collect()
    }

    fn serve(&self, settings: &Settings) -> Result<VhostBackend> {
        let socket = self.socket(settings);
        let log = format!("bench-{}", self.system());
        if self.kind == Kind::OgeeNull {
            return VhostBackend::start(&log, &settings.ogee, &socket, Readiness::Says, |command| {
                command.args(["vhost-blk", "--null", &NULL_BYTES.to_string(), "--queues", &QUEUES.to_string()]);
                command.arg("--socket").arg(&socket);
            });
        }
        let configure = |command: &mut Command| {
            for word in self.storage_daemon(settings, &socket) {
                command.arg(word);
            }
        };
        VhostBackend::start(&log, Path::new("qemu-storage-daemon"), &socket, Readiness::Socket, configure)
    }

    /// The arguments of qemu-storage-daemon.
    fn storage_daemon(&self, settings: &Settings, socket: &Path) -> [String; 4] {
        let (device, writethrough) = match self.kind {
            Kind::QsdFile => {
                let file = raw::file(settings);
                (format!("driver=file,node-name=disk,filename={},cache.direct=on,aio=io_uring", file.display()), "on")
            }
            Kind::OgeeNull | Kind::QsdNull => (format!("driver=null-co,node-name=disk,size={NULL_BYTES}"), "off"),
        };
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={QUEUES},\
             writethrough={writethrough}",
            socket.display()
        );
        ["--blockdev".to_owned(), device, "--export".to_owned(), export]
    }
}

impl Group for Vhost {
    fn what(&self) -> &'static str {
        match self.kind {
            Kind::OgeeNull => "ogee vhost-blk over nothing",
            Kind::QsdNull => "qemu-storage-daemon over nothing",
            Kind::QsdFile => "qemu-storage-daemon over a file",
        }
    }

    fn points(&self) -> Vec<Point> {
        match self.kind {
            Kind::QsdFile => points(QSD_FILE, &DISK_LOADS),
            Kind::OgeeNull | Kind::QsdNull => points(self.system(), &NULL_LOADS),
        }
    }

    fn start(&mut self, settings: &Settings) -> Result<()> {
        if self.kind == Kind::QsdFile {
            raw::ensure_file(settings)?;
        }
        self.backend = Some(self.serve(settings)?);
        settings.raise(&self.processes())
    }

    fn run(&mut self, settings: &Settings, point: &Point, seed: u64) -> Result<Run> {
        let processes = self.processes();
        let socket = self.socket(settings).display().to_string();
        let queues = point.load.jobs.to_string();
        let target = ["--vhost-socket", &socket, "--num-queues", &queues].map(str::to_owned);
        let replicas = u32::from(self.kind == Kind::QsdFile);
        settings.ogee_bench(&point.load, seed, &target, &Subject { processes: &processes, replicas })
    }

    fn stop(&mut self) -> Result<()> {
        self.backend.take().map_or(Ok(()), VhostBackend::stop).context("stop the device")
    }
}
