//! A guest: its QEMU, its serial line, its monitor.
//!
//! Commands go over the serial line to the shell that the guest's init gives (`shell.rs`).
//!
//! Life: `start` or `start_incoming` -> (`wait_ready` -> `run`* -> `reboot`)* -> `power_off` | `quit`. Dropping a guest at any point kills its QEMU; when it had
//! not been ended in an orderly way, the end of its console is printed, because then a test is failing.

use crate::console::Console;
use crate::process::{kill_now, tied, wait_exit};
use crate::qemu::{Accelerator, Qemu, QemuDisk};
use crate::qmp::Qmp;
use crate::reaper::Reaper;
use crate::shell::Shell;
use crate::places;
use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

pub use crate::shell::{COMMAND_LIMIT, Finished};

/// From power-on to the shell. 3 to 4 s under TCG on a quiet machine; many times that on a loaded one.
pub const BOOT_LIMIT: Duration = Duration::from_secs(90);

/// A running guest.
#[derive(Debug)]
pub struct Vm {
    name: String,
    child: Child,
    shell: Shell,
    log: PathBuf,
    scratch: Reaper,
    over: bool,
}

impl Vm {
    /// Starts a guest with `disk` and waits for its shell. `name` must be unique among the tests: it names the console's log.
    ///
    /// Under translation (TCG) about one boot in fifty hangs in the guest's early kernel on a busy machine, also from a plain
    /// file without any daemon of ours. Such a boot is tried once more, and said so; under KVM never.
    ///
    /// # Errors
    /// When QEMU does not start or the guest's shell does not come up within [`BOOT_LIMIT`].
    pub fn boot(name: &str, disk: &QemuDisk) -> Result<Self> {
        let mut vm = Self::start(name, disk)?;
        match (vm.wait_ready_within(BOOT_LIMIT / 2), &Qemu::find()?.accelerator) {
            (Ok(_), _) => return Ok(vm),
            (Err(error), Accelerator::Kvm) => return Err(error),
            (Err(error), Accelerator::Tcg) => eprintln!("guest {name} did not boot under TCG; once more. {error:#}"),
        }
        drop(vm);
        let mut vm = Self::start(name, disk)?;
        vm.wait_ready()?;
        Ok(vm)
    }

    /// Starts a guest with `disk` and returns at once.
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub fn start(name: &str, disk: &QemuDisk) -> Result<Self> {
        Self::start_with(name, disk, &[])
    }

    /// Starts a QEMU that waits for a guest to be migrated to it (`migrate.rs`), and returns at once.
    ///
    /// # Errors
    /// When QEMU cannot be started.
    pub fn start_incoming(name: &str, disk: &QemuDisk) -> Result<Self> {
        Self::start_with(name, disk, &["-incoming", "defer"])
    }

    fn start_with(name: &str, disk: &QemuDisk, more: &[&str]) -> Result<Self> {
        let qemu = Qemu::find()?;
        let scratch = places::scratch()?;
        let log = places::logs()?.join(format!("{name}.console"));
        let errors = File::create(Self::error_path(&scratch)).context("create QEMU's error log")?;
        let mut child = tied(&qemu.binary)
            .args(qemu.arguments(disk, &Self::qmp_path(&scratch)))
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .context("start QEMU")?;
        let keyboard = child.stdin.take().context("QEMU's input is a pipe")?;
        let screen = child.stdout.take().context("QEMU's output is a pipe")?;
        let console = Console::collect(&format!("console of {name}"), screen, &log)?;
        Ok(Self { name: name.to_owned(), child, shell: Shell::new(name, keyboard, console), log, scratch, over: false })
    }

    /// Waits for the guest's shell, after a start or a reboot, and gives the guest's own uptime then.
    ///
    /// # Errors
    /// When it does not come within [`BOOT_LIMIT`].
    pub fn wait_ready(&mut self) -> Result<Duration> {
        self.wait_ready_within(BOOT_LIMIT)
    }

    fn wait_ready_within(&mut self, limit: Duration) -> Result<Duration> {
        self.said(|shell| shell.wait_ready(limit))
    }

    /// Waits until the console says `text`, takes it, and gives what came before it.
    ///
    /// # Errors
    /// When QEMU ends or `limit` passes first; the error has the end of the console and what QEMU said.
    pub fn expect(&mut self, text: &str, limit: Duration) -> Result<String> {
        self.said(|shell| shell.expect(text, limit))
    }

    /// Runs a shell command in the guest.
    ///
    /// # Errors
    /// When it does not end within [`COMMAND_LIMIT`]. A non-zero exit code is no error here; see [`Vm::run_ok`].
    pub fn run(&mut self, command: &str) -> Result<Finished> {
        self.run_within(command, COMMAND_LIMIT)
    }

    /// Runs a shell command in the guest that may take `limit`.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn run_within(&mut self, command: &str, limit: Duration) -> Result<Finished> {
        self.said(|shell| shell.run_within(command, limit))
    }

    /// Runs a shell command in the guest and gives its output without the last line end.
    ///
    /// # Errors
    /// When it fails or does not end within [`COMMAND_LIMIT`].
    pub fn run_ok(&mut self, command: &str) -> Result<String> {
        self.said(|shell| shell.run_ok(command))
    }

    /// Starts a shell command in the guest that goes on by itself; what it prints is lost.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn spawn(&mut self, command: &str) -> Result<()> {
        self.said(|shell| shell.spawn(command))
    }

    /// Waits until a shell command in the guest succeeds.
    ///
    /// # Errors
    /// When it does not within `limit`, or the guest does not answer.
    pub fn wait_until(&mut self, command: &str, limit: Duration) -> Result<()> {
        self.said(|shell| shell.wait_until(command, limit))
    }

    /// Writes a text file in the guest; for scripts too long for one line.
    ///
    /// # Errors
    /// When the guest cannot write it.
    pub fn put_file(&mut self, path: &str, text: &str) -> Result<()> {
        self.said(|shell| shell.put_file(path, text))
    }

    /// Types keys into the serial line.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn type_keys(&mut self, keys: &str) -> Result<()> {
        self.said(|shell| shell.type_keys(keys))
    }

    /// Reboots the guest at once, as by a reset button: nothing is synced, and the BIOS boots from the disk again.
    ///
    /// # Errors
    /// When the guest does not start again.
    pub fn reboot(&mut self) -> Result<Duration> {
        self.type_keys("reboot -f\n")?;
        self.wait_ready()
    }

    /// Syncs, unmounts and powers the guest off, and waits until QEMU has ended.
    ///
    /// # Errors
    /// When something of it fails.
    pub fn power_off(mut self) -> Result<()> {
        self.run_ok("sync; cd /; umount /mnt")?;
        self.type_keys("poweroff -f\n")?;
        let status = wait_exit(&mut self.child, &format!("QEMU of {}", self.name), COMMAND_LIMIT)?;
        ensure!(status.success(), "QEMU of {} ended with {status}", self.name);
        self.over = true;
        Ok(())
    }

    /// Ends QEMU through its monitor, without a word to the guest: for the guest a power cut.
    ///
    /// # Errors
    /// When QEMU does not end.
    pub fn quit(mut self) -> Result<()> {
        self.qmp()?.execute("quit", &json!({}))?;
        wait_exit(&mut self.child, &format!("QEMU of {}", self.name), COMMAND_LIMIT)?;
        self.over = true;
        Ok(())
    }

    /// Kills QEMU with SIGKILL.
    pub fn kill(mut self) {
        kill_now(&mut self.child);
        self.over = true;
    }

    /// A new connection to QEMU's monitor.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn qmp(&mut self) -> Result<Qmp> {
        if let Some(status) = self.child.try_wait().context("look at QEMU")? {
            bail!("QEMU of {} has ended with {status}", self.name);
        }
        Qmp::connect(&Self::qmp_path(&self.scratch))
    }

    /// Kernel messages that tell of trouble with the disk or the file system; empty when all is well.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn disk_errors(&mut self) -> Result<String> {
        self.said(Shell::disk_errors)
    }

    /// The whole console so far.
    #[must_use]
    pub fn console(&self) -> &Console {
        self.shell.console()
    }

    /// Process id of its QEMU.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The console's log file; it stays after the test.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Adds what QEMU itself said to an error.
    fn said<T>(&mut self, act: impl FnOnce(&mut Shell) -> Result<T>) -> Result<T> {
        let errors = Self::error_path(&self.scratch);
        act(&mut self.shell).with_context(|| {
            let said = std::fs::read_to_string(errors).unwrap_or_default();
            format!("guest {}; QEMU's own messages: {:?}", self.name, said.trim())
        })
    }

    fn qmp_path(scratch: &Reaper) -> PathBuf {
        scratch.path().join("qmp.sock")
    }

    fn error_path(scratch: &Reaper) -> PathBuf {
        scratch.path().join("qemu.err")
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        kill_now(&mut self.child);
        if !self.over {
            eprintln!("---- guest {} was not shut down; its console ends (all of it: {}):", self.name, self.log.display());
            eprintln!("{}\n----", self.shell.console().tail());
        }
    }
}
