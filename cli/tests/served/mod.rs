//! A cluster of real processes with real snapclones that serve their APIs, and a small HTTP client. For `rest.rs` and `curve_api.rs`.
//!
//! The client is written here, so that malformed requests can be sent as they are and no test waits for a pool of connections: one request, one connection.

#![allow(dead_code, reason = "each test uses its part")]

use ogee_common::clock::now;
use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// For anything that should take a moment.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// A cluster in a folder of its own.
pub(crate) struct Served {
    folder: tempfile::TempDir,
    mds: String,
}

impl Served {
    /// On a real disk: chunkservers use direct IO.
    pub(crate) fn up() -> Self {
        let folder = tempfile::Builder::new().prefix("ogee-served-").tempdir_in("/var/tmp").expect("a folder");
        let mut served = Self { folder, mds: String::new() };
        let up = served.json(&["dev", "up"]);
        up["mds"][0].as_str().expect("an address").clone_into(&mut served.mds);
        served
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ogee"));
        command.args(args).current_dir(self.folder.path()).env("OGEE_DIR", self.path("cluster"));
        command.stdin(Stdio::null()).env_remove("OGEE_MDS").env_remove("OGEE_LOG").env_remove("OGEE_REPO");
        command
    }

    pub(crate) fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("ogee runs")
    }

    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let done = self.run(&[args, &["--json"]].concat());
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success() && stderr.is_empty(), "ogee {args:?}: {stderr}");
        serde_json::from_slice(&done.stdout).expect("one JSON document")
    }

    /// Writes a configuration with the repository `main` and this.
    pub(crate) fn configure(&self, name: &str, more: &str) {
        let (mds, repo) = (&self.mds, self.path("repo"));
        let text = format!("mds = [\"{mds}\"]\n{more}\n[[repository]]\nname = \"main\"\nurl = \"file://{}\"\n", repo.display());
        std::fs::write(self.path(name), text).expect("written");
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("snapclone.log")).unwrap_or_default()
    }

    /// A snapclone that answers at this address.
    pub(crate) fn snapclone(&self, config: &str, addr: SocketAddr) -> Snapclone {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.path("snapclone.log")).expect("a log");
        let mut command = self.command(&["snapclone", "--config", config]);
        command.stdout(Stdio::null()).stderr(log);
        let mut snapclone = Snapclone(command.spawn().expect("ogee runs"));
        let deadline = now() + LIMIT;
        while TcpStream::connect(addr).is_err() {
            assert!(snapclone.0.try_wait().expect("asked").is_none(), "it ended\n{}", self.log());
            assert!(now() < deadline, "it does not listen\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        snapclone
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- snapclones:\n{}", self.log());
        }
        let done = self.run(&["dev", "destroy", "--yes"]);
        if !done.status.success() {
            eprintln!("---- {}", String::from_utf8_lossy(&done.stderr));
        }
    }
}

/// A process that ends with its owner.
pub(crate) struct Snapclone(pub(crate) Child);

impl Drop for Snapclone {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An address that was free a moment ago.
pub(crate) fn free_addr() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address")
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// Sends one request and reads the answer to its end.
pub(crate) fn http(addr: SocketAddr, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let stream = TcpStream::connect(addr).expect("connected");
    stream.set_read_timeout(Some(LIMIT)).expect("set");
    exchange(stream, method, target, headers, body)
}

/// The same over any stream.
pub(crate) fn exchange(mut stream: impl Read + Write, method: &str, target: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    let mut request = format!("{method} {target} HTTP/1.1\r\nHost: ogee\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    stream.write_all(&[request.as_bytes(), body].concat()).expect("sent");
    let mut answer = vec![];
    stream.read_to_end(&mut answer).expect("answered");
    let text = String::from_utf8(answer).expect("UTF-8");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or_else(|| panic!("no status: {head:?}"));
    Answer { status, head: head.to_owned(), body: body.to_owned() }
}
