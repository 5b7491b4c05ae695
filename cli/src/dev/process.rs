//! Processes of a dev cluster: start one detached, find it again, stop it.
//!
//! Invariant: a signal only ever goes to a process whose command line is exactly that of the daemon, and through a
//! pidfd that was opened before the check, so a process id that was used again by a stranger is never hit. A daemon is
//! found by its pid file or, should that have been lost in a crash, by looking through `/proc`.

use super::layout::DaemonPlace;
use super::record;
use crate::error::{CliError, ErrorKind};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::ffi::OsStr;
use std::fs::OpenOptions;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Tells a daemon that it was started to go on alone: it makes a session of its own.
pub(crate) const DETACH_VARIABLE: &str = "OGEE_DETACH";
/// Bytes of a log's end in which its last line is looked for.
const LOG_TAIL_BYTES: u64 = 4096;

/// A running daemon.
#[derive(Debug)]
pub(crate) struct Running {
    /// Its process id.
    pub pid: u32,
    fd: OwnedFd,
}

/// The process that runs this daemon, if any.
#[must_use]
pub(crate) fn find(daemon: &DaemonPlace) -> Option<Running> {
    recorded_pid(daemon).and_then(|pid| open_checked(daemon, pid)).or_else(|| search(daemon))
}

/// The process id it was last started with, whether it runs or not.
#[must_use]
pub(crate) fn recorded_pid(daemon: &DaemonPlace) -> Option<u32> {
    std::fs::read_to_string(daemon.pid_file()).ok()?.trim().parse().ok()
}

/// Starts the daemon: this very program, in the background, with its output in its log.
///
/// # Errors
/// The log cannot be opened or the process not started.
pub(crate) fn start(daemon: &DaemonPlace) -> Result<Child, CliError> {
    let log = daemon.log();
    let out = OpenOptions::new().create(true).append(true).open(&log).map_err(|e| CliError::file("open", &log, e))?;
    let err = out.try_clone().map_err(|e| CliError::file("open", &log, e))?;
    let spawned = Command::new(program())
        .arg0("ogee")
        .args([OsStr::new(daemon.role.command()), OsStr::new("--config"), daemon.config().as_os_str()])
        .env(DETACH_VARIABLE, "1")
        .current_dir(&daemon.dir)
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn();
    let child = spawned.map_err(|e| CliError::caused(ErrorKind::Failure, format!("start {}", daemon.name), e))?;
    record::replace(&daemon.pid_file(), &format!("{}\n", child.id()))?;
    Ok(child)
}

/// This very program, also when its file was replaced or removed meanwhile.
#[must_use]
pub(crate) fn program() -> PathBuf {
    std::env::current_exe().ok().filter(|path| path.exists()).unwrap_or_else(|| PathBuf::from("/proc/self/exe"))
}

/// The last line of the daemon's log, for an error message.
#[must_use]
pub(crate) fn last_log_line(daemon: &DaemonPlace) -> String {
    let tail = || -> std::io::Result<Vec<u8>> {
        let mut file = std::fs::File::open(daemon.log())?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = tail().unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or("(its log is empty)").to_owned()
}

impl Running {
    /// The process of this id, if it is alive and `is_wanted` knows its arguments (the program's name is not among them).
    pub(crate) fn open(pid: u32, is_wanted: impl Fn(&[&[u8]]) -> bool) -> Option<Self> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw)?;
        // Opened before the look: what is looked at afterwards is this process or gone.
        let fd = pidfd_open(raw, PidfdFlags::empty()).ok()?;
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let arguments: Vec<&[u8]> = line.strip_suffix(b"\0")?.split(|b| *b == 0).skip(1).collect();
        (is_wanted(&arguments) && is_alive(pid)).then_some(Self { pid, fd })
    }

    /// Looks for such a process among all.
    pub(crate) fn search(is_wanted: impl Fn(&[&[u8]]) -> bool) -> Option<Self> {
        let entries = std::fs::read_dir("/proc").ok()?;
        let pids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
        pids.filter_map(|pid| Self::open(pid, &is_wanted)).next()
    }

    /// Readable when the process has ended (pidfd_open(2)).
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Asks the process to end, waits, and ends it when it has not within `limit`. Blocks.
    ///
    /// # Errors
    /// It belongs to somebody else or cannot be watched.
    pub(crate) fn end(&self, limit: Duration) -> Result<(), CliError> {
        self.terminate()?;
        let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        let failed = |e| CliError::caused(ErrorKind::Failure, format!("watch process {}", self.pid), e);
        if poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&limit)).map_err(failed)? > 0 {
            return Ok(());
        }
        self.kill()?;
        // The kernel ends it, whatever it does; it may have to finish its IO first.
        poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&limit)).map_err(failed)?;
        Ok(())
    }

    /// Whether the process has ended, its threads and open files included.
    #[must_use]
    pub(crate) fn has_ended(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A failed call says nothing about the process, and the next look tells.
        poll(&mut [PollFd::new(&self.fd, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Asks the process to end.
    ///
    /// # Errors
    /// It belongs to somebody else. That it has ended already is no error.
    pub(crate) fn terminate(&self) -> Result<(), CliError> {
        self.signal(Signal::TERM)
    }

    /// Ends the process without asking.
    ///
    /// # Errors
    /// As [`Running::terminate`].
    pub(crate) fn kill(&self) -> Result<(), CliError> {
        self.signal(Signal::KILL)
    }

    fn signal(&self, signal: Signal) -> Result<(), CliError> {
        match pidfd_send_signal(&self.fd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(CliError::caused(ErrorKind::Failure, format!("signal process {}", self.pid), e)),
        }
    }

    /// Waits until the process has ended; false when it has not within `limit`.
    ///
    /// # Errors
    /// The process cannot be watched.
    pub(crate) async fn wait_end(&self, limit: Duration) -> Result<bool, CliError> {
        let failed = |e: std::io::Error| CliError::caused(ErrorKind::Failure, format!("watch process {}", self.pid), e);
        let fd = self.fd.try_clone().map_err(failed)?;
        let limit = Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        // A pidfd is readable when its process has ended (pidfd_open(2)).
        let wait = move || poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit));
        match tokio::task::spawn_blocking(wait).await {
            Ok(Ok(ready)) => Ok(ready > 0),
            Ok(Err(e)) => Err(failed(e.into())),
            Err(e) => Err(failed(e.into())),
        }
    }
}

/// A handle of the process, if it is the daemon and alive.
fn open_checked(daemon: &DaemonPlace, pid: u32) -> Option<Running> {
    Running::open(pid, |arguments| is_daemon(daemon, arguments))
}

/// Looks for the daemon among all processes.
fn search(daemon: &DaemonPlace) -> Option<Running> {
    Running::search(|arguments| is_daemon(daemon, arguments))
}

/// Whether the command line is `ogee mds --config FILE` (or `chunkserver`) with this daemon's file.
fn is_daemon(daemon: &DaemonPlace, arguments: &[&[u8]]) -> bool {
    let config = daemon.config();
    arguments == [daemon.role.command().as_bytes(), b"--config", config.as_os_str().as_bytes()]
}

/// Whether the process is more than a zombie.
fn is_alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // "pid (name) state ...": the name may contain anything, so look behind the last bracket (proc(5)).
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dev::layout::Role;

    fn place(dir: &std::path::Path) -> DaemonPlace {
        let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        DaemonPlace { name: "cs-1".to_owned(), role: Role::Chunkserver, number: 1, addr, metrics: None, dir: dir.to_owned() }
    }

    /// A shell that ignores its arguments and waits for input, with the command line of a daemon or a foreign one.
    fn process(arguments: &[&OsStr]) -> Child {
        let shell = Command::new("sh").arg0("ogee").args(["-c", "read line"]).args(arguments).stdin(Stdio::piped()).spawn();
        shell.expect("a shell")
    }

    #[tokio::test]
    async fn a_stranger_with_the_recorded_process_id_is_never_found() {
        let dir = tempfile::tempdir().expect("a folder");
        let daemon = place(dir.path());
        let mut stranger = process(&[]);
        std::fs::write(daemon.pid_file(), stranger.id().to_string()).expect("written");
        assert!(find(&daemon).is_none());
        assert_eq!(recorded_pid(&daemon), Some(stranger.id()));
        drop(stranger.stdin.take());
        assert!(stranger.wait().is_ok());
        // A process id that nobody has, and nonsense.
        for text in ["4194304999", "0", "-1", "x", ""] {
            std::fs::write(daemon.pid_file(), text).expect("written");
            assert!(find(&daemon).is_none(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_process_is_stopped_and_its_end_is_seen() {
        let mut child = process(&[]);
        let raw = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process id");
        let running = Running { pid: child.id(), fd: pidfd_open(raw, PidfdFlags::empty()).expect("a pidfd") };
        assert!(!running.wait_end(Duration::from_millis(20)).await.expect("watched"), "still alive");
        assert!(!running.has_ended());
        running.terminate().expect("signalled");
        assert!(running.wait_end(Duration::from_secs(10)).await.expect("watched") && running.has_ended());
        assert!(!is_alive(child.id()), "a zombie is not alive");
        assert!(child.wait().is_ok());
        running.kill().expect("an ended process is no error");
    }

    #[test]
    fn the_last_line_of_a_log_is_found() {
        let dir = tempfile::tempdir().expect("a folder");
        let daemon = place(dir.path());
        assert_eq!(last_log_line(&daemon), "(its log is empty)");
        std::fs::write(daemon.log(), format!("{}\nthe end\n\n", "x".repeat(10_000))).expect("written");
        assert_eq!(last_log_line(&daemon), "the end");
    }
}
