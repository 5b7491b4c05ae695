//! A foreground process that serves a disk on a vhost-user socket: `ogee vhost-blk`, or a stand-in such as `qemu-storage-daemon`
//! against which the harness itself is tested.

use crate::console::Console;
use crate::deadline::wait_for;
use crate::process::{kill_now, send, tied, wait_exit};
use crate::places;
use crate::qemu::QemuDisk;
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// From the start to the socket.
const START_LIMIT: Duration = Duration::from_secs(30);
/// From SIGTERM to the end.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// How a back end says that its socket can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// It prints a line with the word `ready`.
    Says,
    /// The socket exists.
    Socket,
}

/// A running back end.
#[derive(Debug)]
pub struct VhostBackend {
    name: String,
    child: Child,
    output: Console,
    socket: PathBuf,
}

impl VhostBackend {
    /// Starts `program` with what `configure` adds, and waits until it serves `socket`. `name` names its log.
    ///
    /// # Errors
    /// When it ends or is not ready in time; what it said is in the error.
    pub fn start(name: &str, program: &Path, socket: &Path, readiness: Readiness, configure: impl FnOnce(&mut Command)) -> Result<Self> {
        let mut command = tied(program);
        configure(&mut command);
        // Both streams in one pipe, so that an error message is seen in its place.
        let (reader, writer) = std::io::pipe().context("make a pipe")?;
        let child = command
            .stdin(Stdio::null())
            .stdout(writer.try_clone().context("copy a pipe")?)
            .stderr(writer)
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        drop(command); // it holds the pipe's writing end, which must close with the child
        let output = Console::collect(name, reader, &places::logs()?.join(format!("{name}.log")))?;
        let mut backend = Self { name: name.to_owned(), child, output, socket: socket.to_owned() };
        match readiness {
            Readiness::Says => drop(backend.output.expect("ready", START_LIMIT)?),
            Readiness::Socket => wait_for(&format!("socket of {name}"), START_LIMIT, || {
                ensure!(backend.child.try_wait()?.is_none(), "{name} ended: {}", backend.output.tail());
                Ok(std::fs::metadata(socket).is_ok_and(|found| found.file_type().is_socket()).then_some(()))
            })?,
        }
        Ok(backend)
    }

    /// `qemu-storage-daemon` serving the raw file `file`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn storage_daemon(name: &str, file: &Path, socket: &Path) -> Result<Self> {
        let export = format!(
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable=on,num-queues={}",
            socket.display(),
            crate::qemu::CPUS
        );
        Self::start(name, Path::new("qemu-storage-daemon"), socket, Readiness::Socket, |command| {
            command
                .args(["--blockdev", &format!("driver=file,filename={},node-name=file", file.display())])
                .args(["--blockdev", "driver=raw,node-name=disk,file=file", "--export", &export]);
        })
    }

    /// The disk for a guest.
    #[must_use]
    pub fn disk(&self) -> QemuDisk {
        QemuDisk::VhostUser { socket: self.socket.clone() }
    }

    /// What it said so far.
    #[must_use]
    pub fn output(&self) -> &Console {
        &self.output
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks it to end (SIGTERM) and waits.
    ///
    /// # Errors
    /// When it does not end in time or not with exit code 0.
    pub fn stop(mut self) -> Result<()> {
        send(self.child.id(), Signal::TERM)?;
        let status = wait_exit(&mut self.child, &self.name, STOP_LIMIT)?;
        ensure!(status.success(), "{} ended with {status}: {}", self.name, self.output.tail());
        Ok(())
    }

    /// Waits until it has ended by itself, with exit code 0: another one has taken over from it.
    ///
    /// # Errors
    /// When it does not end in time or not with exit code 0.
    pub fn handed_over(mut self) -> Result<()> {
        let status = wait_exit(&mut self.child, &self.name, STOP_LIMIT)?;
        ensure!(status.success(), "{} ended with {status}: {}", self.name, self.output.tail());
        Ok(())
    }

    /// Kills it with SIGKILL.
    pub fn kill(mut self) {
        kill_now(&mut self.child);
    }
}

impl Drop for VhostBackend {
    fn drop(&mut self) {
        kill_now(&mut self.child);
    }
}
