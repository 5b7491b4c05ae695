//! Processes of a mapping: the server (`ogee nbd serve`) and the keeper (`ogee nbd map --foreground`). Each is this very program, started
//! with its output in the mapping's log; its first line on standard output is a JSON document that says it is ready.
//!
//! Invariants: a process that ends before it is ready is waited for, and what it said becomes the error; a process is
//! found and signalled as in `dev/process.rs`, never a stranger. A child lives on when its parent ends.

use super::place::Place;
use crate::connect::GlobalArgs;
use crate::dev::{self, DETACH_VARIABLE, Running};
use crate::error::{CliError, ErrorKind};
use rustix::event::{PollFd, PollFlags, poll};
use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

/// Longest line that says ready.
const READY_BYTES_MAX: usize = 64 << 10;
/// What of a log's end is looked at for an error.
const LOG_TAIL_BYTES: u64 = 16 << 10;
/// SIGTERM to the server: it answers what is in flight (10 s) and gives the volume back (20 s).
pub(crate) const END_LIMIT: Duration = Duration::from_secs(40);

/// A process that said it is ready.
#[derive(Debug)]
pub(crate) struct Ready {
    /// The process.
    pub child: Child,
    /// Kept open: a process that prints to nobody is ended by it.
    _stdout: ChildStdout,
    /// Its first line.
    pub line: serde_json::Value,
}

/// Whether a process of this program lives on alone or with the terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Session {
    /// Leaves the terminal's session.
    Own,
    /// Only Ctrl-C does not reach it.
    Parents,
}

/// The options by which another process of this program finds the same cluster.
#[must_use]
pub(crate) fn cluster_arguments(global: &GlobalArgs) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec![];
    if !global.mds.is_empty() {
        words.extend([OsString::from("--mds"), global.mds.join(",").into()]);
    }
    for (name, dir) in [("--dir", &global.dir), ("--tls-dir", &global.tls_dir), ("--repo-config", &global.repo_config)] {
        words.extend(dir.iter().flat_map(|dir| [OsString::from(name), dir.into()]));
    }
    words.extend(global.tls_loopback.then(|| OsString::from("--tls-loopback")));
    words
}

/// Starts a process and waits until it is ready. `Ok(None)`: something came over `stop`, or its other end was closed; then the process
/// is asked to end. Blocks.
///
/// # Errors
/// The process ended first: its kind and what it said.
pub(crate) fn start(
    place: &Place, arguments: &[OsString], session: Session, stop: Option<&UnixStream>,
) -> Result<Option<Ready>, CliError> {
    let log = place.open_log()?;
    let logged = log.metadata().map_or(0, |log| log.len());
    let mut command = Command::new(dev::program());
    command.arg0("ogee").args(arguments).arg("--json").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
    match session {
        // It makes the session itself, which the leader of a group could not.
        Session::Own => command.env(DETACH_VARIABLE, "1"),
        Session::Parents => command.env_remove(DETACH_VARIABLE).process_group(0),
    };
    let failed = |e| CliError::caused(ErrorKind::Failure, "start a process of ogee", e);
    let mut child = command.spawn().map_err(failed)?;
    let mut stdout = child.stdout.take().ok_or_else(|| CliError::new(ErrorKind::Failure, "no pipe to the new process"))?;
    match first_line(&mut stdout, stop) {
        Ok(Some(line)) => {
            let line = serde_json::from_str(&line).map_err(|e| CliError::caused(ErrorKind::Failure, "read what the new process says", e))?;
            Ok(Some(Ready { child, _stdout: stdout, line }))
        }
        Ok(None) if stop.is_some_and(is_over) => {
            if let Some(running) = Running::open(child.id(), |_| true) {
                running.end(END_LIMIT)?;
            }
            child.wait().map_err(failed)?;
            Ok(None)
        }
        Ok(None) => {
            let status = child.wait().map_err(failed)?;
            let kind = ErrorKind::of_exit_code(status.code());
            let said = last_error(place, logged).unwrap_or_else(|| format!("it ended with {status}"));
            Err(CliError::new(kind, said))
        }
        Err(e) => Err(failed(e)),
    }
}

/// Whether the other end asked to stop.
fn is_over(stop: &UnixStream) -> bool {
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(stop, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

/// The first line; `None` if the output ends first or `stop` says so.
fn first_line(stdout: &mut ChildStdout, stop: Option<&UnixStream>) -> std::io::Result<Option<String>> {
    let (mut line, mut byte) = (vec![], [0]);
    while line.len() < READY_BYTES_MAX {
        let mut waits = vec![PollFd::new(&*stdout, PollFlags::IN)];
        waits.extend(stop.map(|stop| PollFd::new(stop, PollFlags::IN)));
        match poll(&mut waits, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        if waits.get(1).is_some_and(|stop| !stop.revents().is_empty()) || stdout.read(&mut byte)? == 0 {
            return Ok(None);
        }
        if byte == *b"\n" {
            return Ok(Some(String::from_utf8_lossy(&line).into_owned()));
        }
        line.extend(byte);
    }
    Err(std::io::Error::other("a first line without end"))
}

/// The error that a process wrote into the log since it had `from` bytes.
fn last_error(place: &Place, from: u64) -> Option<String> {
    let mut file = File::open(place.log()).ok()?;
    let len = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(from.max(len.saturating_sub(LOG_TAIL_BYTES)))).ok()?;
    let mut bytes = vec![];
    file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes).ok()?;
    error_in(&String::from_utf8_lossy(&bytes))
}

/// The message of the last line that is an error of `ogee --json`.
fn error_in(text: &str) -> Option<String> {
    let message = |line: &str| {
        let value: serde_json::Value = serde_json::from_str(line).ok()?;
        Some(value["error"]["message"].as_str()?.to_owned())
    };
    text.lines().rev().find_map(message)
}

/// The server of a mapping, whoever started it.
#[must_use]
pub(crate) fn find_server(place: &Place) -> Option<Running> {
    let socket = place.socket();
    Running::search(|arguments| is_server(arguments, socket.as_os_str().as_bytes()))
}

fn is_server(arguments: &[&[u8]], socket: &[u8]) -> bool {
    arguments.starts_with(&[&b"nbd"[..], b"serve"]) && arguments.windows(2).any(|pair| *pair == [&b"--socket"[..], socket])
}

/// The keeper of a volume's mapping, if this is still its process.
#[must_use]
pub(crate) fn find_keeper(pid: u32, volume: &str) -> Option<Running> {
    Running::open(pid, |arguments| is_keeper(arguments, volume))
}

fn is_keeper(arguments: &[&[u8]], volume: &str) -> bool {
    // A person may write options first, and the volume with a leading slash.
    let is_volume = |word: &&[u8]| word.strip_prefix(b"/").unwrap_or(word) == volume.as_bytes();
    arguments.contains(&&b"map"[..]) && arguments.contains(&&b"nbd"[..]) && arguments.iter().any(is_volume)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_known_by_their_arguments() {
        let server: [&[u8]; 5] = [b"nbd", b"serve", b"vm1", b"--socket", b"/run/s"];
        assert!(is_server(&server, b"/run/s"));
        assert!(!is_server(&server, b"/run/other") && !is_server(&server[..4], b"/run/s") && !is_server(&server[1..], b"/run/s"));
        let keeper: [&[u8]; 4] = [b"nbd", b"map", b"vm1", b"--foreground"];
        assert!(is_keeper(&keeper, "vm1") && !is_keeper(&keeper, "vm") && !is_keeper(&server, "vm1"));
    }

    #[test]
    fn the_last_error_of_a_log_is_found() {
        let log = "INFO something\n{\"error\":{\"kind\":\"x\",\"exit_code\":1,\"message\":\"open a: no\"}}\nlast words\n";
        assert_eq!(error_in(log).as_deref(), Some("open a: no"));
        assert_eq!(error_in("INFO something\n{}\n"), None);
    }

    #[test]
    fn the_cluster_is_handed_on() {
        let global = GlobalArgs {
            mds: vec!["a:1".to_owned(), "b:2".to_owned()],
            dir: None,
            tls_dir: Some("/etc/ogee/tls".into()),
            tls_loopback: true,
            repo_config: Some("/etc/ogee/snapclone.toml".into()),
            json: false,
        };
        let repositories = ["--repo-config", "/etc/ogee/snapclone.toml"];
        let tls = ["--tls-dir", "/etc/ogee/tls"];
        assert_eq!(cluster_arguments(&global), [&["--mds", "a:1,b:2"][..], &tls, &repositories, &["--tls-loopback"]].concat());
        assert!(cluster_arguments(&GlobalArgs::default()).is_empty());
    }
}
