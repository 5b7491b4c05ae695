//! NBD servers over one local file: `ogee nbd serve` and qemu-nbd.
//!
//! All are driven by the same client, `ogee bench --nbd-socket`, over one connection. Ours reads and writes in the page cache; qemu-nbd
//! is measured with the page cache and past it, because with which of the two it takes less CPU differs between reads and writes.
//! Nothing is flushed, so no write is durable. The volume of a cluster through `ogee nbd serve` is in `ogee.rs`.

use crate::generator::{Settings, Subject};
use crate::load::NBD_SMALL;
use crate::raw;
use crate::row::{NBD_SERVER, Run};
use crate::system::{Group, Point, points};
use crate::usage::Process;
use anyhow::{Context, Result};
use ogee_vm_tests::vhost::{Readiness, VhostBackend};
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::path::{Path, PathBuf};

/// `ogee nbd serve --file`.
pub(crate) const OGEE_NBD_FILE: &str = "ogee-nbd-file";
/// qemu-nbd through the page cache.
pub(crate) const QEMU_NBD_FILE: &str = "qemu-nbd-file";
/// qemu-nbd past the page cache.
pub(crate) const QEMU_NBD_DIRECT: &str = "qemu-nbd-direct";
/// Of several ways of qemu-nbd to use the page cache, the one that took least CPU for reads (threads: twice as much).
const QEMU_CACHED: [&str; 2] = ["--cache=writeback", "--aio=io_uring"];
/// The way that took least CPU for writes.
const QEMU_DIRECT: [&str; 2] = ["--cache=none", "--aio=native"];

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Ours.
    Ogee,
    /// QEMU's, with the page cache.
    QemuCached,
    /// QEMU's, past it.
    QemuDirect,
}

/// One server.
#[derive(Debug)]
pub(crate) struct Nbd {
    kind: Kind,
    server: Option<VhostBackend>,
}

impl Nbd {
    /// A server that does not run yet.
    #[must_use]
    pub(crate) const fn new(kind: Kind) -> Self {
        Self { kind, server: None }
    }

    const fn system(&self) -> &'static str {
        match self.kind {
            Kind::Ogee => OGEE_NBD_FILE,
            Kind::QemuCached => QEMU_NBD_FILE,
            Kind::QemuDirect => QEMU_NBD_DIRECT,
        }
    }

    fn socket(&self, settings: &Settings) -> PathBuf {
        settings.folder.join(format!("{}.sock", self.system()))
    }

    fn processes(&self) -> Vec<Process> {
        self.server.iter().map(|server| Process { name: NBD_SERVER.to_owned(), pid: server.pid() }).collect()
    }

    fn serve(&self, settings: &Settings) -> Result<VhostBackend> {
        let (socket, file) = (self.socket(settings), raw::file(settings));
        let log = format!("bench-{}", self.system());
        let how = match self.kind {
            Kind::Ogee => {
                return VhostBackend::start(&log, &settings.ogee, &socket, Readiness::Says, |command| {
                    command.args(["nbd", "serve", "--file"]).arg(&file).arg("--socket").arg(&socket);
                });
            }
            Kind::QemuCached => QEMU_CACHED,
            Kind::QemuDirect => QEMU_DIRECT,
        };
        // It is ready when there is a socket: not one of an earlier turn.
        drop(std::fs::remove_file(&socket));
        VhostBackend::start(&log, Path::new("qemu-nbd"), &socket, Readiness::Socket, |command| {
            command.args(["--persistent", "--shared=4", "--format=raw"]).args(how);
            command.arg("--socket").arg(&socket).arg(&file);
        })
    }

    /// Has the whole file in the page cache, or nothing of it.
    fn set_page_cache(&self, settings: &Settings) -> Result<()> {
        let path = raw::file(settings);
        let doing = || format!("prepare {}", path.display());
        let mut file = File::open(&path).with_context(doing)?;
        if self.kind == Kind::QemuDirect {
            file.sync_all().with_context(doing)?;
            return fadvise(&file, 0, None, Advice::DontNeed).with_context(doing);
        }
        std::io::copy(&mut file, &mut std::io::sink()).map(drop).with_context(doing)
    }
}

impl Group for Nbd {
    fn what(&self) -> &'static str {
        match self.kind {
            Kind::Ogee => "ogee nbd serve over a file",
            Kind::QemuCached => "qemu-nbd over a file",
            Kind::QemuDirect => "qemu-nbd over a file, past the page cache",
        }
    }

    fn points(&self) -> Vec<Point> {
        points(self.system(), &NBD_SMALL)
    }

    fn start(&mut self, settings: &Settings) -> Result<()> {
        raw::ensure_file(settings)?;
        self.set_page_cache(settings)?;
        self.server = Some(self.serve(settings)?);
        settings.raise(&self.processes())
    }

    fn run(&mut self, settings: &Settings, point: &Point, seed: u64) -> Result<Run> {
        let processes = self.processes();
        let target = ["--nbd-socket".to_owned(), self.socket(settings).display().to_string()];
        settings.ogee_bench(&point.load, seed, &target, &Subject { processes: &processes, replicas: 1 })
    }

    fn stop(&mut self) -> Result<()> {
        self.server.take().map_or(Ok(()), VhostBackend::stop).context("stop the server")
    }
}
