//! The keeper of one mapping: starts the server, hands connections to the kernel, and replaces what dies.
//!
//! ```text
//!            server ready, CONNECT                      all sockets live
//! (nothing) ───────────────────────> mended ─────────────────────────────> watching
//!     device found attached to us ─────^  ^────── a socket or the server died ──┘
//! watching, mended ── SIGTERM: the keeper goes, device and server stay ──> left
//! watching, mended ── the kernel has no such device any more: the server is ended ──> detached
//! ```
//!
//! Requests in flight when a server dies: the kernel sends each again, on a new connection, when it is as old as `--timeout` says. The new
//! server attached before it serves, with a higher attach epoch, so a late copy of the dead one's write is refused by the copysets;
//! a copy that a live server has not finished goes first (`WriteOrder`), and what it has not begun is dropped with its connection
//! (`nbd/src/transmission.rs`). So each write is in effect once, or twice with nothing newer between.
//!
//! Invariants: one keeper for a mapping (a lock); a socket counts as live only if the kernel took it and it has not hung up; the keeper
//! holds its own descriptors of them only to see that, and never reads. It runs on a thread of its own, which blocks.

use super::child::{self, END_LIMIT, Ready, Session};
use super::device::System;
use super::options::{MapOptions, device_path};
use super::place::{Place, Record};
use crate::error::{CliError, ErrorKind};
use crate::logging;
use ogee_common::name::VolumeRef;
use ogee_nbd::client::{self, Negotiated};
use ogee_nbd::kernel::{Attach, KernelError, KernelNbd, is_taken};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A handshake with a server of this host.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(20);
/// Before what the kernel or the server would not take is tried again.
const MEND_PAUSE: Duration = Duration::from_millis(100);
/// Between two starts of a server that does not get ready.
const START_PAUSE_MIN: Duration = Duration::from_millis(200);
const START_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Connections that the server lets in: those that the kernel gave up live on until their requests have ended.
const SERVER_CONNECTIONS: u16 = 1024;
const EINVAL: i32 = 22;

/// What is to be kept.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    /// The volume or snapshot.
    pub volume: VolumeRef,
    /// How.
    pub options: MapOptions,
    /// Its files.
    pub place: Place,
    /// Where the cluster is.
    pub cluster: Vec<OsString>,
}

impl Plan {
    /// By what the kernel knows the mapping.
    #[must_use]
    pub(crate) fn backend(&self) -> String {
        backend(&self.volume.to_string())
    }
}

/// By what the kernel knows the mapping of a volume.
#[must_use]
pub(crate) fn backend(volume: &str) -> String {
    format!("ogee:{volume}")
}

/// Why the keeper ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It was asked to; the mapping stays.
    Left,
    /// The device is not ours any more.
    Detached,
}

/// What a wait saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Stop,
    Other,
}

#[derive(Debug)]
struct Keeper<'a> {
    plan: &'a Plan,
    kernel: KernelNbd,
    system: System,
    /// Readable or closed when the keeper is to go.
    stop: &'a UnixStream,
    server: Option<Ready>,
    /// Sockets that the kernel took and that have not hung up.
    live: Vec<UnixStream>,
    saved: Option<Record>,
    _lock: File,
}

/// Maps and keeps, until `stop` or the end of the mapping. `ready` is called once, with the mapping. Blocks.
///
/// # Errors
/// The volume cannot be served or the device not attached; afterwards nothing but what the files refuse.
pub(crate) fn keep(
    plan: &Plan, stop: &UnixStream, ready: impl FnOnce(&Record) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let lock = plan.place.lock()?;
    let kernel = KernelNbd::open().map_err(kernel_failed)?;
    // Left by a keeper that was killed: its sockets are not ours to watch. Its successor goes on with what was in flight.
    if let Some(before) = child::find_server(&plan.place) {
        before.end(END_LIMIT)?;
    }
    let system = System::default();
    let found = system.find(&plan.backend());
    let mut keeper = Keeper { plan, kernel, system, stop, server: None, live: vec![], saved: None, _lock: lock };
    let (index, size_bytes) = match (found, plan.options.device) {
        (Some(index), Some(wanted)) if index != wanted => {
            let text = format!("it is mapped already, on {}", device_path(index).display());
            return Err(CliError::new(ErrorKind::Conflict, text));
        }
        (Some(index), _) => (index, plan.place.record().map_or(0, |record| record.size_bytes)),
        (None, _) => match keeper.attach()? {
            Some(attached) => attached,
            None => return Ok(()),
        },
    };
    keeper.save(index, size_bytes)?;
    if let Some(record) = &keeper.saved {
        ready(record)?;
    }
    logging::start_for_daemon();
    tracing::info!(target: "controlpath", volume = %plan.volume, device = %device_path(index).display(), adopted = found.is_some(), "mapped");
    match keeper.watch(index, size_bytes)? {
        End::Left => tracing::info!(target: "controlpath", "the keeper goes, the mapping stays"),
        End::Detached => {
            tracing::info!(target: "controlpath", device = %device_path(index).display(), "detached by the kernel or by somebody else");
            keeper.end_server()?;
            plan.place.forget();
        }
    }
    Ok(())
}

impl Keeper<'_> {
    /// Starts the server and attaches a device; its number and size. `None`: stopped.
    fn attach(&mut self) -> Result<Option<(u32, u64)>, CliError> {
        let Some(server) = self.start_server(self.plan.options.steal)? else { return Ok(None) };
        self.server = Some(server);
        let attached = self.attach_to_server();
        if attached.is_err() {
            // The error counts, whatever becomes of the server.
            let _ = self.end_server();
        }
        attached.map(Some)
    }

    fn attach_to_server(&mut self) -> Result<(u32, u64), CliError> {
        let mut sockets = vec![];
        let mut size_and_flags = Negotiated { size_bytes: 0, flags: 0 };
        for _ in 0..self.plan.options.connections {
            let (socket, negotiated) = self.connect()?;
            size_and_flags = negotiated;
            sockets.push(socket);
        }
        let backend = self.plan.backend();
        let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
        let index = self.kernel.connect(&self.attach_options(size_and_flags, &backend), &fds).map_err(kernel_failed)?;
        drop(fds);
        self.live = sockets;
        Ok((index, size_and_flags.size_bytes))
    }

    fn connect(&self) -> Result<(UnixStream, Negotiated), CliError> {
        let name = self.plan.volume.to_string();
        let connected = client::connect(&self.plan.place.socket(), &name, HANDSHAKE_LIMIT);
        connected.map_err(|e| CliError::caused(ErrorKind::Failure, "connect the kernel", e))
    }

    fn attach_options<'b>(&self, server: Negotiated, backend: &'b str) -> Attach<'b> {
        let options = &self.plan.options;
        Attach {
            index: options.device,
            size_bytes: server.size_bytes,
            block_bytes: options.block_size,
            resend_after: options.resend_after(),
            dead_limit: options.dead_limit(),
            server_flags: server.flags,
            backend,
        }
    }

    /// Watches and mends until the end.
    fn watch(&mut self, index: u32, mut size_bytes: u64) -> Result<End, CliError> {
        let mut pause = START_PAUSE_MIN;
        loop {
            let wait = if self.server.is_none() {
                // Never stolen again: somebody else may have it by right.
                match self.start_server(false) {
                    Ok(None) => return Ok(End::Left),
                    Ok(Some(server)) => {
                        tracing::info!(target: "controlpath", pid = server.child.id(), "the server runs again");
                        self.server = Some(server);
                        pause = START_PAUSE_MIN;
                        continue;
                    }
                    Err(error) => {
                        tracing::warn!(target: "controlpath", "the server did not start: {}", error.chain());
                        pause = (pause * 2).min(START_PAUSE_MAX);
                        Some(pause)
                    }
                }
            } else if self.missing() > 0 {
                match self.mend(index) {
                    Ok(Mended::Detached) => return Ok(End::Detached),
                    Ok(Mended::Tried(size)) => size_bytes = size.unwrap_or(size_bytes),
                    Err(error) => tracing::warn!(target: "controlpath", "{}", error.chain()),
                }
                (self.missing() > 0).then_some(MEND_PAUSE)
            } else {
                None
            };
            if let Err(error) = self.save(index, size_bytes) {
                tracing::warn!(target: "controlpath", "{}", error.chain());
            }
            if self.wait(wait)? == Seen::Stop {
                return Ok(End::Left);
            }
            if !self.system.is_attached(index) {
                return Ok(End::Detached);
            }
        }
    }

    fn missing(&self) -> usize {
        usize::from(self.plan.options.connections) - self.live.len()
    }

    /// Gives the kernel new sockets for dead ones, as many as it takes now.
    fn mend(&mut self, index: u32) -> Result<Mended, CliError> {
        let (backend, mut size) = (self.plan.backend(), None);
        while self.missing() > 0 {
            let (socket, negotiated) = self.connect()?;
            match self.kernel.reconnect(index, &self.attach_options(negotiated, &backend), socket.as_fd()) {
                Ok(()) => size = Some(negotiated.size_bytes),
                Err(KernelError::Refused { source, .. }) if source.raw_os_error() == Some(EINVAL) => return Ok(Mended::Detached),
                Err(error) => return Err(kernel_failed(error)),
            }
            let taken = is_taken(&socket).map_err(|e| CliError::caused(ErrorKind::Failure, "look at a connection", e))?;
            if !taken {
                // The kernel has not noticed yet that the old one is dead.
                break;
            }
            tracing::info!(target: "controlpath", live = self.live.len() + 1, "the kernel has a new connection");
            self.live.push(socket);
        }
        Ok(Mended::Tried(size))
    }

    /// Waits for a stop, the server's end, a dead socket, or the time; takes note of what died.
    fn wait(&mut self, limit: Option<Duration>) -> Result<Seen, CliError> {
        let pid = self.server.as_ref().map(|server| server.child.id());
        let server = pid.and_then(|pid| crate::dev::Running::open(pid, |_| true));
        // A server that is gone already has no handle: then there is nothing to wait for.
        let limit = if pid.is_some() && server.is_none() { Some(Duration::ZERO) } else { limit };
        let mut waits = vec![PollFd::new(self.stop, PollFlags::IN)];
        // Nothing is asked for but the end: answers to the kernel do not wake us.
        waits.extend(self.live.iter().map(|socket| PollFd::new(socket, PollFlags::RDHUP)));
        waits.extend(server.iter().map(|server| PollFd::from_borrowed_fd(server.pidfd(), PollFlags::IN)));
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        match poll(&mut waits, limit.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(CliError::caused(ErrorKind::Failure, "wait for connections", e)),
        }
        let told: Vec<bool> = waits.iter().map(|wait| !wait.revents().is_empty()).collect();
        drop(waits);
        if told[0] {
            return Ok(Seen::Stop);
        }
        let mut dead = told[1..].iter().copied();
        self.live.retain(|_| !dead.next().unwrap_or(false));
        if let Some(running) = &mut self.server
            && let Ok(Some(status)) = running.child.try_wait()
        {
            tracing::warn!(target: "controlpath", pid, %status, "the server ended; IO waits for the next one");
            self.server = None;
        }
        Ok(Seen::Other)
    }

    fn start_server(&self, steal: bool) -> Result<Option<Ready>, CliError> {
        let Plan { volume, options, place, cluster } = self.plan;
        let socket = place.socket();
        let connections = SERVER_CONNECTIONS.to_string();
        let mut arguments: Vec<OsString> = vec!["nbd".into(), "serve".into(), volume.to_string().into()];
        arguments.extend([OsString::from("--socket"), socket.into_os_string()]);
        arguments.extend(["--socket-mode", "600", "--connections", &connections].map(OsString::from));
        arguments.extend(options.read_only.then(|| OsString::from("--read-only")));
        arguments.extend(steal.then(|| OsString::from("--steal")));
        arguments.extend(cluster.iter().cloned());
        child::start(place, &arguments, Session::Parents, Some(self.stop))
    }

    fn end_server(&mut self) -> Result<(), CliError> {
        if let Some(running) = child::find_server(&self.plan.place) {
            running.end(END_LIMIT)?;
        }
        if let Some(mut server) = self.server.take() {
            // It has ended.
            let _ = server.child.wait();
        }
        Ok(())
    }

    /// Writes the record, if it changed.
    fn save(&mut self, index: u32, size_bytes: u64) -> Result<(), CliError> {
        let record = Record {
            volume: self.plan.volume.to_string(),
            index,
            size_bytes,
            read_only: self.plan.options.read_only || self.plan.volume.snapshot.is_some(),
            connections: self.plan.options.connections,
            live: u16::try_from(self.live.len()).unwrap_or(u16::MAX),
            keeper_pid: std::process::id(),
            server_pid: self.server.as_ref().map(|server| server.child.id()),
        };
        if self.saved.as_ref() != Some(&record) {
            self.plan.place.save(&record)?;
            self.saved = Some(record);
        }
        Ok(())
    }
}

/// What came of giving new sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mended {
    /// The size that the server said, if it was asked.
    Tried(Option<u64>),
    /// There is no such device any more.
    Detached,
}

/// The kernel's error, with what can be done.
pub(crate) fn kernel_failed(error: KernelError) -> CliError {
    let (kind, advice) = match &error {
        KernelError::NoModule => (
            ErrorKind::Failure,
            Some("load it: modprobe nbd; without the module use nbdfuse and a loop device (docs/nbd.md), or ogee vhost-blk for a virtual machine"),
        ),
        KernelError::InUse { .. } => (ErrorKind::Conflict, Some("choose another one, or leave --device out")),
        KernelError::Refused { .. } => (ErrorKind::Failure, Some("dmesg may say why")),
        _ => (ErrorKind::Failure, None),
    };
    let text = CliError::caused(kind, "the kernel's NBD client", error).chain();
    CliError::new(kind, advice.map_or_else(|| text.clone(), |advice| format!("{text}; {advice}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_module_says_what_to_do() {
        let error = kernel_failed(KernelError::NoModule);
        assert_eq!(error.kind(), ErrorKind::Failure);
        let line = error.render(false);
        assert!(line.contains("modprobe nbd") && line.contains("nbdfuse") && !line.contains('\n'), "{line}");
        assert_eq!(kernel_failed(KernelError::InUse { index: 3 }).kind(), ErrorKind::Conflict);
    }
}
