//! A libvirtd of the test's own, and guests that it runs; driven by `virsh`, as an administrator would.
//!
//! It runs in session mode with configuration, sockets and state in a scratch folder, so nothing of the machine's own libvirt is
//! used or touched, and no systemd and no D-Bus are needed. A test that is root gives it (and so its QEMU) to the user `nobody`,
//! who may use a daemon's socket only by its mode and group: what a packaged libvirt has to get right is needed here too.
//!
//! Invariants: as of the crate. libvirtd dies with the thread that started it; a QEMU, which libvirtd detaches, is found by the
//! file with its process id that libvirt keeps in the folder, and killed by the [`Reaper`].

use crate::console::Console;
use crate::deadline::wait_for;
use crate::places;
use crate::process::{is_alive, kill_now, run, send, tied, wait_exit};
use crate::reaper::Reaper;
use crate::shell::Shell;
use crate::vm::BOOT_LIMIT;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Signal, getgid, getuid};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// libvirtd asks QEMU what it can do when it is first connected to: some seconds, many on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(120);
/// For one `virsh` command.
const VIRSH_LIMIT: Duration = Duration::from_secs(120);
/// From SIGTERM to the end of libvirtd.
const STOP_LIMIT: Duration = Duration::from_secs(60);
/// `nobody` and its group, the same everywhere.
const NOBODY: u32 = 65_534;
/// The console of the domain that `ogee libvirt-xml` prints; the test wants it on a socket.
const SERIAL: &str = "<serial type='pty'/>";

/// Why there is no libvirt to test with; `None` when there is one.
///
/// # Errors
/// When it is missing on a system on which it can be installed.
pub fn missing() -> Result<Option<String>> {
    let lacking: Vec<_> = ["libvirtd", "virsh"].into_iter().filter(|name| find(name).is_none()).collect();
    if lacking.is_empty() {
        return Ok(None);
    }
    let lacking = lacking.join(" and ");
    ensure!(find("apt-get").is_none(), "{lacking} not found: run .ci/install-deps.sh");
    Ok(Some(format!("{lacking} not found, and this is no Debian system on which it could be installed")))
}

/// Where a program is, in `PATH` and the folders of administrators' programs.
fn find(program: &str) -> Option<PathBuf> {
    std::env::split_paths(&search_path()).map(|folder| folder.join(program)).find(|path| path.is_file())
}

fn search_path() -> String {
    format!("{}:/usr/bin:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}

/// A running libvirtd.
#[derive(Debug)]
pub struct Libvirt {
    name: String,
    child: Child,
    over: bool,
    scratch: Reaper,
}

impl Libvirt {
    /// Starts it and waits until it answers. `name` must be unique among the tests: it names the logs.
    ///
    /// # Errors
    /// When it does not answer in time; see [`missing`].
    pub fn start(name: &str) -> Result<Self> {
        let qemu = find("qemu-system-x86_64").context("no qemu-system-x86_64: run .ci/install-deps.sh")?;
        let scratch = Reaper::of_daemons(&places::scratch_folder()?, &std::fs::canonicalize(qemu)?)?;
        // Its user has to get through to the sockets in it.
        std::fs::set_permissions(scratch.path(), PermissionsExt::from_mode(0o755))?;
        let home = scratch.path().join("home");
        std::fs::create_dir_all(home.join("libvirt"))?;
        std::fs::write(
            home.join("libvirt/qemu.conf"),
            "security_driver = \"none\"\nstdio_handler = \"file\"\nnamespaces = []\ncgroup_controllers = []\n",
        )?;
        let outputs = format!("log_outputs = \"3:file:{}\"\n", home.join("libvirtd.log").display());
        std::fs::write(home.join("libvirtd.conf"), outputs)?;
        if getuid().is_root() {
            for folder in [&home, &home.join("libvirt")] {
                chown(folder, Some(NOBODY), Some(NOBODY)).with_context(|| format!("give {} away", folder.display()))?;
            }
        }
        let said = std::fs::File::create(places::logs()?.join(format!("{name}.libvirtd")))?;
        let mut command = Self::command("libvirtd", &home);
        command.arg("-f").arg(home.join("libvirtd.conf")).arg("-p").arg(home.join("libvirtd.pid"));
        let child = command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said).spawn().context("start libvirtd")?;
        let mut libvirt = Self { name: name.to_owned(), child, over: false, scratch };
        wait_for("an answer of libvirtd", START_LIMIT, || {
            ensure!(libvirt.child.try_wait()?.is_none(), "libvirtd ended");
            Ok(libvirt.virsh(&["version"]).ok())
        })?;
        Ok(libvirt)
    }

    /// A program as libvirtd's user, tied to the calling thread, who finds everything of his in `home`.
    fn command(program: &str, home: &Path) -> Command {
        let mut command = if getuid().is_root() {
            let mut command = Command::new("setpriv");
            let id = NOBODY.to_string();
            // In one call: a change of the user undoes the tie.
            command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--pdeathsig", "KILL", "--", program]);
            command.process_group(0);
            command
        } else {
            tied(program)
        };
        for variable in ["HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"] {
            command.env(variable, home);
        }
        for variable in ["DBUS_SESSION_BUS_ADDRESS", "DISPLAY"] {
            command.env_remove(variable);
        }
        command.env("PATH", search_path()).env("LC_ALL", "C").current_dir("/");
        command
    }

    /// A folder whose sockets its user can reach, by [`Libvirt::socket_access`].
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.scratch.path()
    }

    /// Arguments for `ogee vhost-blk` that let its user in, and no others.
    #[must_use]
    pub fn socket_access(&self) -> [String; 4] {
        let group = if getuid().is_root() { NOBODY } else { getgid().as_raw() };
        ["--socket-mode".to_owned(), "660".to_owned(), "--socket-group".to_owned(), group.to_string()]
    }

    /// Runs `virsh` and gives what it printed.
    ///
    /// # Errors
    /// When it fails or takes too long.
    pub fn virsh(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Self::command("virsh", &self.home());
        // With the socket named virsh starts no libvirtd of its own when ours is not up yet.
        let uri = format!("qemu+unix:///session?socket={}", self.home().join("libvirt/libvirt-sock").display());
        command.args(["--quiet", "--connect", &uri]).args(arguments);
        run(command, &format!("virsh {}", arguments.join(" ")), VIRSH_LIMIT)
    }

    /// Writes an element into a file for `virsh`, and gives its path.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn file(&self, name: &str, xml: &str) -> Result<String> {
        let path = self.folder().join(name);
        std::fs::write(&path, xml).with_context(|| format!("write {}", path.display()))?;
        path.into_os_string().into_string().ok().context("the folder's name is no UTF-8")
    }

    /// Defines the domain `name` from what `ogee libvirt-xml --domain` printed, which libvirt's schema must allow. Its console is
    /// changed to a socket, nothing else.
    ///
    /// # Errors
    /// When libvirt refuses it.
    pub fn define(&self, name: &str, xml: &str) -> Result<()> {
        let socket = self.serial(name);
        ensure!(xml.matches(SERIAL).count() == 1, "no {SERIAL} in the domain: {xml}");
        let serial = format!("<serial type='unix'><source mode='bind' path='{}'/></serial>", socket.display());
        let file = self.file(&format!("{name}.xml"), &xml.replace(SERIAL, &serial))?;
        self.virsh(&["define", "--validate", &file]).map(drop)
    }

    /// Starts a defined domain and waits for the guest's shell.
    ///
    /// # Errors
    /// When something of it fails.
    pub fn start_domain(&self, name: &str) -> Result<Shell> {
        let socket = self.serial(name);
        self.virsh(&["start", name])?;
        let line = UnixStream::connect(&socket).with_context(|| format!("connect to {}", socket.display()))?;
        let log = places::logs()?.join(format!("{}-{name}.console", self.name));
        let console = Console::collect(&format!("console of {name}"), line.try_clone()?, &log)?;
        let mut shell = Shell::new(name, line, console);
        self.wait_ready(name, &mut shell)?;
        Ok(shell)
    }

    /// Waits for the guest's shell after a start, a reset or a reboot.
    ///
    /// A guest that hangs in its early kernel, as happens under TCG (see [`crate::vm::Vm::boot`]), is reset once, and said so.
    ///
    /// # Errors
    /// When it does not come the second time either.
    pub fn wait_ready(&self, name: &str, shell: &mut Shell) -> Result<()> {
        if let Err(error) = shell.wait_ready(BOOT_LIMIT) {
            eprintln!("domain {name} did not boot under TCG; once more. {error:#}");
            self.virsh(&["reset", name])?;
            shell.wait_ready(BOOT_LIMIT * 2)?;
        }
        Ok(())
    }

    /// Process id of a running domain's QEMU.
    ///
    /// # Errors
    /// When libvirt has noted none.
    pub fn qemu_pid(&self, name: &str) -> Result<u32> {
        let path = self.home().join(format!("libvirt/qemu/run/{name}.pid"));
        let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        text.trim().parse().with_context(|| format!("{} has {text:?}", path.display()))
    }

    /// Destroys a domain and waits until its QEMU is gone.
    ///
    /// # Errors
    /// When something of it fails.
    pub fn destroy(&self, name: &str) -> Result<()> {
        let pid = self.qemu_pid(name)?;
        self.virsh(&["destroy", name])?;
        wait_for(&format!("end of the QEMU of {name}"), STOP_LIMIT, || Ok((!is_alive(pid)).then_some(())))?;
        let state = self.virsh(&["domstate", name])?;
        ensure!(state.trim() == "shut off", "{name} is {state:?} after its end");
        Ok(())
    }

    /// Ends libvirtd.
    ///
    /// # Errors
    /// When it does not end when asked.
    pub fn stop(mut self) -> Result<()> {
        let left = self.virsh(&["list", "--name"])?;
        if !left.trim().is_empty() {
            bail!("domains still run: {left:?}");
        }
        send(self.child.id(), Signal::TERM)?;
        wait_exit(&mut self.child, "libvirtd", STOP_LIMIT)?;
        self.over = true;
        Ok(())
    }

    /// The socket of a domain's console.
    fn serial(&self, name: &str) -> PathBuf {
        self.home().join(format!("{name}.serial"))
    }

    fn home(&self) -> PathBuf {
        self.scratch.path().join("home")
    }

    /// Copies the logs, which are about to be removed, and says where they are.
    fn save_logs(&self) -> Result<PathBuf> {
        let logs = places::logs()?.join(&self.name);
        std::fs::create_dir_all(&logs)?;
        let own = self.home().join("libvirtd.log");
        let domains = std::fs::read_dir(self.home().join("libvirt/qemu/log")).into_iter().flatten().flatten();
        for log in std::iter::once(own).chain(domains.map(|entry| entry.path())) {
            std::fs::copy(&log, logs.join(log.file_name().unwrap_or_default()))?;
        }
        Ok(logs)
    }
}

impl Drop for Libvirt {
    fn drop(&mut self) {
        if !self.over {
            match self.save_logs() {
                Ok(logs) => eprintln!("---- libvirtd {} was not stopped; its logs: {}", self.name, logs.display()),
                Err(error) => eprintln!("---- logs of libvirtd {} are lost: {error:#}", self.name),
            }
        }
        kill_now(&mut self.child);
    }
}
