//! The processes of the torture: daemons with their folders and addresses, clients and the administrator with their histories.
//!
//! Used by the director. Invariants: a process runs in the namespaces of its member of the network and dies with the thread that started it;
//! a killed daemon is started again with the same data and address, a killed client as a new one with a new number and history.

use super::network::{Network, wait_gone};
use crate::process::{send, tied};
use anyhow::{Context, Result, bail, ensure};
use ogee_disk::fault_file::FAULTS_VARIABLE;
use rustix::process::Signal;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Port of every daemon; each has an address of its own.
const PORT: u16 = 7000;
/// Size of a chunkserver's disk, a sparse file.
const DISK_BYTES: u64 = 3 << 30;

/// Sets the wall clock of each daemon, as its file says. Debian's package `libfaketime`.
const LIBFAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1";
/// The wall clock alone, looked up once a second.
const FAKETIME: [(&str, &str); 3] = [("FAKETIME_DONT_FAKE_MONOTONIC", "1"), ("FAKETIME_CACHE_DURATION", "1"), ("FAKETIME_DISABLE_SHM", "1")];

/// A file is either the old or the new one for whoever reads it.
fn replace(path: &Path, text: &str) -> Result<()> {
    let temp = path.with_extension("new");
    std::fs::write(&temp, format!("{text}\n")).and_then(|()| std::fs::rename(&temp, path)).with_context(|| format!("write {}", path.display()))
}

/// A daemon, a client or the administrator.
#[derive(Debug)]
pub(super) struct Process {
    /// Its name, which is also its member of the network.
    pub name: String,
    child: Child,
    /// Whether it was stopped with SIGSTOP.
    pub stopped: bool,
}

/// Everything that runs.
#[derive(Debug)]
pub(super) struct Fleet {
    /// The network.
    pub network: Network,
    folder: PathBuf,
    binary: PathBuf,
    /// Addresses of the MDS nodes, with commas.
    pub mds: String,
    /// What runs, or is dead.
    pub processes: Vec<Process>,
    /// Number of the next client.
    next_client: u32,
    /// Histories, one for each client process that ever ran.
    pub histories: Vec<PathBuf>,
}

impl Fleet {
    /// Makes network and folders, and starts the daemons.
    ///
    /// # Errors
    /// When that is not possible, for want of root or of the `ogee` binary for example.
    pub(super) fn start(folder: &Path, chunkservers: u32, mds: u32, clients: u32) -> Result<Self> {
        let binary = crate::cluster::binary()?;
        let mut network = Network::new()?;
        let mut mds_addrs = vec![];
        for n in 1..=mds {
            let addr = network.join(&format!("mds-{n}"), None)?;
            mds_addrs.push(SocketAddr::from((addr, PORT)));
        }
        let list = mds_addrs.iter().map(ToString::to_string).collect::<Vec<_>>();
        for (n, addr) in (1u32..).zip(&list) {
            let data = folder.join(format!("mds-{n}"));
            std::fs::create_dir_all(&data)?;
            let mut text = format!("node = {n}\ncluster = \"torture\"\ndata_dir = {data:?}\nlisten = \"{addr}\"\nbootstrap = true\n");
            for (id, addr) in (1..).zip(&list) {
                text += &format!("[[peers]]\nid = {id}\naddr = \"{addr}\"\n");
            }
            std::fs::write(folder.join(format!("mds-{n}.toml")), text)?;
        }
        for n in 1..=chunkservers {
            let (name, disk) = (format!("cs-{n}"), folder.join(format!("cs-{n}.img")));
            let mount = folder.join(&name);
            std::fs::create_dir_all(&mount)?;
            File::create(&disk)?.set_len(DISK_BYTES)?;
            super::network::run(tied("mkfs.ext4").args(["-q", "-E", "lazy_itable_init=1,lazy_journal_init=1"]).arg(&disk))?;
            let addr = SocketAddr::from((network.join(&name, Some((&disk, &mount)))?, PORT));
            let data = mount.join("data");
            std::fs::create_dir_all(network.path(&name, &data)?)?;
            let text = format!(
                "data_dir = {data:?}\nlisten = \"{addr}\"\nmds = {list:?}\npool = \"default\"\nzone = \"zone-{n}\"\nhost = \"host-{n}\"\nmetadata_cache_mib = 16\nscrub_mib_per_second = 1024\n"
            );
            std::fs::write(folder.join(format!("{name}.toml")), text)?;
        }
        for n in 1..=clients {
            network.join(&format!("client-{n}"), None)?;
        }
        let mut fleet =
            Self { network, folder: folder.to_owned(), binary, mds: list.join(","), processes: vec![], next_client: 1, histories: vec![] };
        ensure!(Path::new(LIBFAKETIME).exists(), "{LIBFAKETIME} is missing: run .ci/install-deps.sh");
        for (kind, count) in [("mds", mds), ("cs", chunkservers)] {
            (1..=count).try_for_each(|n| fleet.set_clock(&format!("{kind}-{n}"), "+0"))?;
            (1..=count).try_for_each(|n| fleet.start_daemon(&format!("{kind}-{n}")))?;
        }
        Ok(fleet)
    }

    /// From now on an MDS that lost its data must not start as a new one.
    ///
    /// # Errors
    /// When a configuration cannot be written.
    pub(super) fn settle(&self) -> Result<()> {
        for name in self.names("mds-") {
            let path = self.folder.join(format!("{name}.toml"));
            std::fs::write(&path, std::fs::read_to_string(&path)?.replace("bootstrap = true", "bootstrap = false"))?;
        }
        Ok(())
    }

    /// Names of the processes whose names begin so.
    #[must_use]
    pub(super) fn names(&self, prefix: &str) -> Vec<String> {
        self.processes.iter().map(|p| p.name.clone()).filter(|name| name.starts_with(prefix)).collect()
    }

    /// The folder of a chunkserver's disk, as seen from here.
    ///
    /// # Errors
    /// When there is no such chunkserver.
    pub(super) fn disk(&self, name: &str) -> Result<PathBuf> {
        self.network.path(name, &self.folder.join(name))
    }

    /// Starts a daemon, whose process must be gone.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn start_daemon(&mut self, name: &str) -> Result<()> {
        let kind = if name.starts_with("mds") { "mds" } else { "chunkserver" };
        let mut command = self.network.command(name, &self.binary)?;
        command.arg(kind).arg("--config").arg(self.folder.join(format!("{name}.toml")));
        command.env(FAULTS_VARIABLE, self.faults_of(name)).env("LD_PRELOAD", LIBFAKETIME).envs(FAKETIME.iter().copied());
        command.env("FAKETIME_TIMESTAMP_FILE", self.clock_of(name));
        self.spawn(name, command)
    }

    fn faults_of(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.faults"))
    }

    fn clock_of(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.clock"))
    }

    /// What the disk of a daemon does wrong from now on: a rule as in `server/disk/src/fault_file.rs`, or nothing.
    ///
    /// # Errors
    /// When it cannot be told.
    pub(super) fn plant(&self, name: &str, rule: &str) -> Result<()> {
        replace(&self.faults_of(name), rule)
    }

    /// Sets the wall clock of a daemon off by seconds, with their sign.
    ///
    /// # Errors
    /// When it cannot be told.
    pub(super) fn set_clock(&self, name: &str, offset: &str) -> Result<()> {
        replace(&self.clock_of(name), offset)
    }

    /// Starts a client on a volume, as the next number.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn start_client(&mut self, name: &str, volume: &str, seed: u64) -> Result<()> {
        let (number, file) = self.next_history();
        let mut command = self.network.command(name, &std::env::current_exe()?)?;
        command.args(["client", &number.to_string(), &self.mds, volume, &(seed ^ u64::from(number)).to_string()]).arg(file);
        command.stdin(Stdio::piped());
        self.spawn(name, command)
    }

    /// Starts the administrator. Returns what it says.
    ///
    /// # Errors
    /// When it cannot be started.
    pub(super) fn start_admin(&mut self, seed: u64, chunkservers: u32) -> Result<std::process::ChildStdout> {
        let (number, file) = self.next_history();
        let mut command = self.network.command(super::network::HUB, &std::env::current_exe()?)?;
        command.args(["admin", &number.to_string(), &self.mds, &seed.to_string()]).arg(file).arg(chunkservers.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(self.log("admin")?).env("RUST_BACKTRACE", "0");
        let mut child = command.spawn().context("start the administrator")?;
        let says = child.stdout.take().context("no output of the administrator")?;
        self.processes.push(Process { name: "admin".to_owned(), child, stopped: false });
        Ok(says)
    }

    fn next_history(&mut self) -> (u32, PathBuf) {
        let number = self.next_client;
        self.next_client += 1;
        let file = self.folder.join(format!("history-{number}"));
        self.histories.push(file.clone());
        (number, file)
    }

    fn log(&self, name: &str) -> Result<File> {
        let path = self.folder.join(format!("{name}.log"));
        File::options().append(true).create(true).open(&path).with_context(|| format!("open {}", path.display()))
    }

    fn spawn(&mut self, name: &str, mut command: Command) -> Result<()> {
        command.stdout(self.log(name)?).stderr(self.log(name)?).env("RUST_BACKTRACE", "0");
        if name.starts_with("mds") || name.starts_with("cs") {
            command.stdin(Stdio::null());
        }
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        self.processes.retain(|p| p.name != name);
        self.processes.push(Process { name: name.to_owned(), child, stopped: false });
        Ok(())
    }

    /// The process of that name.
    ///
    /// # Errors
    /// When there is none.
    pub(super) fn process(&mut self, name: &str) -> Result<&mut Process> {
        self.processes.iter_mut().find(|p| p.name == name).with_context(|| format!("no process {name}"))
    }

    /// Says which process ended by itself, with the end of what it said; `is_dead` names those that are dead on purpose.
    ///
    /// # Errors
    /// That it did.
    pub(super) fn check_alive(&mut self, is_dead: impl Fn(&str) -> bool) -> Result<()> {
        for process in self.processes.iter_mut().filter(|p| !is_dead(&p.name)) {
            if let Some(status) = process.child.try_wait().context("look at a process")? {
                let log = std::fs::read_to_string(self.folder.join(format!("{}.log", process.name))).unwrap_or_default();
                let mut end: Vec<&str> = log.lines().rev().take(8).collect();
                end.reverse();
                bail!("{} ended by itself with {status}; it said last:\n  {}", process.name, end.join("\n  "));
            }
        }
        Ok(())
    }
}

impl Process {
    /// Kills it and waits until it is gone.
    ///
    /// # Errors
    /// When it does not go.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("kill {}", self.name))?;
        self.wait().map(drop)
    }

    /// Whether it has ended by itself.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub(super) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait().with_context(|| format!("look at {}", self.name))?.is_some())
    }

    /// Asks it to end (SIGTERM).
    ///
    /// # Errors
    /// When there is no such process.
    pub(super) fn end(&mut self) -> Result<()> {
        send(self.child.id(), Signal::TERM)
    }

    /// Tells it that nothing more is wanted, by the end of its input.
    pub(super) fn finish(&mut self) {
        drop(self.child.stdin.take());
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it takes longer than half a minute.
    pub(super) fn wait(&mut self) -> Result<std::process::ExitStatus> {
        wait_gone(self.child.id()).with_context(|| format!("wait for {}", self.name))?;
        self.child.wait().with_context(|| format!("wait for {}", self.name))
    }

    /// Stops it in its tracks, or lets it go on.
    ///
    /// # Errors
    /// When there is no such process.
    pub(super) fn stop(&mut self, stopped: bool) -> Result<()> {
        self.stopped = stopped;
        send(self.child.id(), if stopped { Signal::STOP } else { Signal::CONT })
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for process in &mut self.processes {
            crate::process::kill_now(&mut process.child);
        }
    }
}
