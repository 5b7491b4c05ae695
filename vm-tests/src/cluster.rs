//! A real Ogee cluster for one test, driven only through the `ogee` command as a user would: `ogee dev up` starts its daemons,
//! detached, in a scratch folder; every other command gets the addresses through `OGEE_MDS`.
//!
//! The binary is `OGEE_BIN`, else `ogee` in the build folder of the running test. Without it every test fails and says so; none is skipped.
//! Life: `start` -> commands, `kill`, `pause`, `resume`, `revive` -> `shut_down`. However the test ends, the
//! [`Reaper`] kills the daemons and removes the folder. The daemons' logs are copied to the log folder first.

use crate::places;
use crate::process::{is_alive, send, tied};
use crate::reaper::Reaper;
use crate::vhost::{Readiness, VhostBackend};
use crate::deadline::wait_for;
use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// For the death of a process after SIGKILL: the kernel may have to finish its IO.
const DEATH_LIMIT: Duration = Duration::from_secs(20);

/// What an `ogee` command left.
#[derive(Debug, Clone)]
pub struct Done {
    /// Its exit code; -1 when a signal ended it.
    pub code: i32,
    /// What it printed.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

/// One daemon of the cluster, as `ogee dev up` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Daemon {
    /// For example `mds-1` or `cs-2`.
    pub name: String,
    /// Its process id.
    pub pid: u32,
    /// Its log file.
    pub log: PathBuf,
}

/// A cluster of one test.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    binary: PathBuf,
    folder: PathBuf,
    size: [String; 2],
    mds: String,
    daemons: Vec<Daemon>,
    sockets: u32,
    over: bool,
    reaper: Option<Reaper>,
}

/// The `ogee` binary under test.
///
/// # Errors
/// When it does not exist: it has to be built before the tests run.
pub fn binary() -> Result<PathBuf> {
    let path = match std::env::var_os("OGEE_BIN") {
        Some(path) => PathBuf::from(path),
        None => {
            // The test is <build folder>/deps/<name>-<hash>.
            let test = std::env::current_exe().context("find the running test")?;
            test.parent().and_then(Path::parent).context("the running test has no build folder")?.join("ogee")
        }
    };
    std::fs::canonicalize(&path)
        .with_context(|| format!("no ogee binary at {}: build it first (cargo build --release -p ogee-cli) or set OGEE_BIN", path.display()))
}

impl Cluster {
    /// Starts a cluster and waits until it serves. `name` must be unique among the tests: it names the log folder.
    ///
    /// # Errors
    /// When there is no binary or `ogee dev up` fails.
    pub fn start(name: &str, chunkservers: u32, mds: u32) -> Result<Self> {
        let binary = binary()?;
        let folder = places::scratch_folder()?;
        let reaper = Some(Reaper::of_daemons(&folder, &binary)?);
        let mut cluster = Self {
            name: name.to_owned(),
            binary,
            folder,
            size: [chunkservers.to_string(), mds.to_string()],
            mds: String::new(),
            daemons: Vec::new(),
            sockets: 0,
            over: false,
            reaper,
        };
        cluster.revive()?;
        let expected = usize::try_from(chunkservers + mds).context("size of the cluster")?;
        ensure!(cluster.daemons.len() == expected, "{expected} daemons expected, found {:?}", cluster.daemons);
        Ok(cluster)
    }

    /// Addresses of the MDS nodes.
    #[must_use]
    pub fn mds(&self) -> Vec<String> {
        self.mds.split(',').map(str::to_owned).collect()
    }

    /// Starts the daemons that are dead (`ogee dev up` again) and waits until the cluster serves.
    ///
    /// # Errors
    /// When it does not serve again.
    pub fn revive(&mut self) -> Result<()> {
        let data = self.data();
        let [chunkservers, mds] = self.size.clone();
        let arguments = ["dev", "up", "--dir", &data, "--chunkservers", &chunkservers, "--mds", &mds, "--json"];
        let up = self.json(&arguments);
        // What was started before a failure must be known too, for the reaper.
        let state = match &up {
            Ok(state) => Ok(state.clone()),
            Err(_) => self.json(&["dev", "status", "--dir", &data, "--json"]),
        };
        if let Ok(state) = state {
            self.daemons = parse_daemons(&state)?;
            let addresses = state["mds"].as_array().context("no \"mds\" in the answer of dev up")?;
            self.mds = addresses.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(",");
            if let Some(reaper) = &self.reaper {
                reaper.register(self.daemons.iter().map(|daemon| daemon.pid))?;
            }
        }
        up.map(drop)
    }

    /// Runs `ogee` with these arguments.
    ///
    /// # Errors
    /// When it cannot be started. Its failure is no error here; see [`Cluster::ok`].
    pub fn ogee(&self, arguments: &[&str]) -> Result<Done> {
        let output = self.command().args(arguments).output().with_context(|| format!("run ogee {arguments:?}"))?;
        Ok(Done {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs `ogee` and gives what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        let done = self.ogee(arguments)?;
        ensure!(done.code == 0, "ogee {} ended with {}: {}{}", arguments.join(" "), done.code, done.stderr, done.stdout);
        Ok(done.stdout)
    }

    /// Runs `ogee` with arguments that contain `--json`, and gives the answer.
    ///
    /// # Errors
    /// When it fails or answers something else.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let answer = self.ok(arguments)?;
        serde_json::from_str(&answer).with_context(|| format!("ogee {} answered {answer:?}", arguments.join(" ")))
    }

    /// Runs `ogee` with arguments that must be refused, and gives its one line of explanation.
    ///
    /// # Errors
    /// When it succeeds, is ended by a signal or says more or less than one line.
    pub fn refused(&self, arguments: &[&str]) -> Result<String> {
        let done = self.ogee(arguments)?;
        let lines: Vec<&str> = done.stderr.lines().collect();
        ensure!(done.code > 0, "ogee {arguments:?} should fail with an exit code: {done:?}");
        ensure!(lines.len() == 1 && !done.stderr.contains("panicked"), "ogee {arguments:?} should say one line: {done:?}");
        Ok(lines.concat())
    }

    /// SHA-256 of the contents of a volume or snapshot, in hexadecimal digits, as `ogee checksum` reads them.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn checksum(&self, volume: &str) -> Result<String> {
        let answer = self.json(&["checksum", volume, "--json"])?;
        Ok(answer["sha256"].as_str().with_context(|| format!("no \"sha256\" in {answer}"))?.to_owned())
    }

    /// Serves `volume` on a new socket.
    ///
    /// # Errors
    /// When `ogee vhost-blk` does not become ready.
    pub fn serve(&mut self, volume: &str) -> Result<VhostBackend> {
        let socket = self.folder.join(format!("{}.sock", self.sockets + 1));
        self.serve_on(volume, &socket)
    }

    /// Serves `volume` on a socket that a dead daemon may have left.
    ///
    /// # Errors
    /// When `ogee vhost-blk` does not become ready.
    pub fn serve_on(&mut self, volume: &str, socket: &Path) -> Result<VhostBackend> {
        self.serve_with(volume, socket, &[])
    }

    /// The same with more arguments.
    ///
    /// # Errors
    /// The same.
    pub fn serve_with(&mut self, volume: &str, socket: &Path, more: &[&str]) -> Result<VhostBackend> {
        self.sockets += 1;
        let log = format!("{}-vhost-{}", self.name, self.sockets);
        VhostBackend::start(&log, &self.binary, socket, Readiness::Says, |command| {
            command.env("OGEE_MDS", &self.mds).args(["vhost-blk", volume, "--socket"]).arg(socket).args(more);
        })
    }

    /// Kills a daemon with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn kill(&self, daemon: &str) -> Result<()> {
        let pid = self.daemon(daemon)?.pid;
        send(pid, Signal::KILL)?;
        wait_for(&format!("death of {daemon}"), DEATH_LIMIT, || Ok((!is_alive(pid)).then_some(())))
    }

    /// Kills every daemon with SIGKILL, all before waiting for any.
    ///
    /// # Errors
    /// When one was dead already.
    pub fn kill_all(&self) -> Result<()> {
        for daemon in &self.daemons {
            send(daemon.pid, Signal::KILL).with_context(|| format!("kill {}", daemon.name))?;
        }
        for daemon in &self.daemons {
            wait_for(&format!("death of {}", daemon.name), DEATH_LIMIT, || Ok((!is_alive(daemon.pid)).then_some(())))?;
        }
        Ok(())
    }

    /// Stops a daemon in its tracks (SIGSTOP): it keeps its connections and answers nothing.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn pause(&self, daemon: &str) -> Result<()> {
        send(self.daemon(daemon)?.pid, Signal::STOP)
    }

    /// Lets a paused daemon go on (SIGCONT).
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn resume(&self, daemon: &str) -> Result<()> {
        send(self.daemon(daemon)?.pid, Signal::CONT)
    }

    /// The daemon of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn daemon(&self, name: &str) -> Result<&Daemon> {
        self.daemons.iter().find(|daemon| daemon.name == name).with_context(|| format!("no daemon {name} in {:?}", self.daemons))
    }

    /// All daemons, as last reported by `ogee dev up`.
    #[must_use]
    pub fn daemons(&self) -> &[Daemon] {
        &self.daemons
    }

    /// A scratch folder that is removed with the cluster.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Ends the cluster with `ogee dev down` and checks that no daemon survives.
    ///
    /// # Errors
    /// When it fails or one does survive.
    pub fn shut_down(mut self) -> Result<()> {
        self.ok(&["dev", "down", "--dir", &self.data()])?;
        if let Some(left) = self.daemons.iter().find(|daemon| is_alive(daemon.pid)) {
            bail!("{} (process {}) is alive after dev down", left.name, left.pid);
        }
        self.over = true;
        Ok(())
    }

    /// `ogee` with the cluster's addresses; it dies with the test.
    fn command(&self) -> Command {
        let mut command = tied(&self.binary);
        command.stdin(Stdio::null()).env("OGEE_MDS", &self.mds);
        command
    }

    fn data(&self) -> String {
        self.folder.join("cluster").to_string_lossy().into_owned()
    }

    /// Copies the daemons' logs to the log folder; the scratch folder is about to be removed.
    fn save_logs(&self) -> Result<PathBuf> {
        let logs = places::logs()?.join(&self.name);
        std::fs::create_dir_all(&logs)?;
        for daemon in &self.daemons {
            std::fs::copy(&daemon.log, logs.join(format!("{}.log", daemon.name)))
                .with_context(|| format!("copy {}", daemon.log.display()))?;
        }
        Ok(logs)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        match self.save_logs() {
            Ok(logs) if !self.over => eprintln!("---- cluster {} was not shut down; its logs: {}", self.name, logs.display()),
            Ok(_) => {}
            Err(error) => eprintln!("---- logs of cluster {} are lost: {error:#}", self.name),
        }
        drop(self.reaper.take());
    }
}

/// The daemons in the answer of `ogee dev up` or `dev status`.
fn parse_daemons(state: &Value) -> Result<Vec<Daemon>> {
    let list = state["daemons"].as_array().with_context(|| format!("no \"daemons\" in {state}"))?;
    list.iter()
        .map(|entry| {
            let text = |key: &str| entry[key].as_str().with_context(|| format!("no {key:?} in {entry}"));
            let pid = entry["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).with_context(|| format!("no \"pid\" in {entry}"))?;
            Ok(Daemon { name: text("name")?.to_owned(), pid, log: text("log")?.into() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_answer_of_dev_up_is_read_and_a_wrong_one_is_named() {
        let state = json!({"mds": ["127.0.0.1:1"], "daemons": [{"name": "cs-1", "pid": 7, "log": "/l"}]});
        let daemons = parse_daemons(&state).unwrap();
        assert_eq!(daemons, [Daemon { name: "cs-1".into(), pid: 7, log: "/l".into() }]);
        assert!(parse_daemons(&json!({"daemons": [{"name": "cs-1", "log": "/l"}]})).unwrap_err().to_string().contains("pid"));
        assert!(parse_daemons(&json!({})).unwrap_err().to_string().contains("daemons"));
    }
}
