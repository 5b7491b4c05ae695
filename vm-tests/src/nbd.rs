//! `ogee nbd serve` for one test, and the clients that talk to it.
//!
//! Invariants: as of the crate; a client that hangs is killed at its limit, and a client that fails fails the test with
//! all that it said.

use crate::cluster::Cluster;
use crate::console::Console;
use crate::deadline::wait_for;
use crate::process::{run, tied};
use crate::vhost::{Readiness, VhostBackend};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::Duration;

/// From "ready" to the whole line.
const LINE_LIMIT: Duration = Duration::from_secs(5);
/// For one run of a client.
const CLIENT_LIMIT: Duration = Duration::from_secs(120);

/// A running server.
#[derive(Debug)]
pub struct NbdServer {
    process: VhostBackend,
    ready: Value,
}

impl NbdServer {
    /// Serves volumes of `cluster` on a UNIX socket and a free TCP port.
    ///
    /// # Errors
    /// When `ogee nbd serve` does not become ready.
    pub fn start(cluster: &Cluster, name: &str, arguments: &[&str]) -> Result<Self> {
        let socket = cluster.folder().join(format!("{name}.nbd"));
        let process =
            VhostBackend::start(name, &crate::cluster::binary()?, &socket, Readiness::Says, |command| {
                command.env("OGEE_MDS", cluster.mds().join(",")).args(["nbd", "serve", "--json", "--listen"]);
                command.args(["127.0.0.1:0", "--socket"]).arg(&socket).args(arguments);
            })?;
        let ready = first_line(process.output())?;
        Ok(Self { process, ready })
    }

    /// The URI of an export on the UNIX socket.
    ///
    /// # Errors
    /// When there is no such export.
    pub fn unix(&self, export: &str) -> Result<String> {
        self.uri(export, 0)
    }

    /// The URI of an export on TCP.
    ///
    /// # Errors
    /// When there is no such export.
    pub fn tcp(&self, export: &str) -> Result<String> {
        self.uri(export, 1)
    }

    fn uri(&self, export: &str, index: usize) -> Result<String> {
        let exports = self.ready["exports"].as_array().context("exports")?;
        let found = exports.iter().find(|found| found["name"] == export);
        let uri = found.and_then(|found| found["uris"][index].as_str());
        Ok(uri.with_context(|| format!("no URI {index} of {export} in {}", self.ready))?.to_owned())
    }

    /// The page of `/metrics` as it is now; the server was started with `--metrics`.
    ///
    /// # Errors
    /// When there is none.
    pub fn metrics(&self) -> Result<String> {
        use std::io::{Read as _, Write as _};
        let addr = self.ready["metrics"].as_str().context("the server was started without --metrics")?;
        let mut stream = std::net::TcpStream::connect(addr).with_context(|| format!("connect to {addr}"))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?;
        let mut page = String::new();
        stream.read_to_string(&mut page)?;
        ensure!(page.starts_with("HTTP/1.1 200"), "{page}");
        Ok(page)
    }

    /// What it printed.
    #[must_use]
    pub fn output(&self) -> &Console {
        self.process.output()
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Kills it with SIGKILL.
    pub fn kill(self) {
        self.process.kill();
    }

    /// Asks it to end (SIGTERM) and waits.
    ///
    /// # Errors
    /// When it does not end in time or not with exit code 0.
    pub fn stop(self) -> Result<()> {
        self.process.stop()
    }
}

/// The JSON document that a server prints first.
fn first_line(output: &Console) -> Result<Value> {
    let line = wait_for("the line that says ready", LINE_LIMIT, || {
        Ok(output.text().split_once('\n').map(|(line, _)| line.to_owned()))
    })?;
    serde_json::from_str(&line).with_context(|| format!("the server said {line:?}"))
}

/// Runs a client to its end and gives what it printed.
///
/// # Errors
/// When it cannot be started (is its package installed? `.ci/install-deps.sh`), takes too long, or fails.
pub fn client<S: AsRef<OsStr> + std::fmt::Debug>(program: &str, arguments: &[S]) -> Result<String> {
    client_within(CLIENT_LIMIT, program, arguments)
}

/// As [`client`], with a limit of its own.
///
/// # Errors
/// The same.
pub fn client_within<S: AsRef<OsStr> + std::fmt::Debug>(limit: Duration, program: &str, arguments: &[S]) -> Result<String> {
    let mut command = tied(program);
    // Debian's python3 has the module nbd; another one earlier in the path may not.
    let path = std::env::var("PATH").unwrap_or_default();
    command.args(arguments).env("PATH", format!("/usr/bin:/usr/sbin:{path}"));
    run(command, &format!("{program} {arguments:?}"), limit)
}

/// A script of this crate.
#[must_use]
pub fn script(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("scripts").join(name)
}
