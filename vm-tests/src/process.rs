//! Child processes that cannot outlive the test, and signals.
//!
//! A child is started through `setpriv --pdeathsig KILL`: the kernel kills it when the *thread* that started it ends, so a child
//! must not be handed to a thread that lives longer than the one that started it (libtest runs every test on its own thread).

use crate::deadline::wait_for;
use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

/// A command for `program` whose process dies with the calling thread, in a process group of its own (Ctrl-C at a terminal goes
/// to the test, which cleans up).
#[must_use]
pub fn tied(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).process_group(0);
    command
}

/// Waits until `child` has ended.
///
/// # Errors
/// When it has not within `limit`.
pub fn wait_exit(child: &mut Child, what: &str, limit: Duration) -> Result<ExitStatus> {
    wait_for(&format!("end of {what}"), limit, || child.try_wait().with_context(|| format!("wait for {what}")))
}

/// Runs `command` (see [`tied`]) to its end and gives what it printed on standard output. `what` is for errors.
///
/// # Errors
/// When it cannot be started, takes longer than `limit` (then it is killed) or fails; with all that it said.
pub fn run(mut command: Command, what: &str, limit: Duration) -> Result<String> {
    let (stdout, stderr) = (tempfile::NamedTempFile::new()?, tempfile::NamedTempFile::new()?);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(stdout.reopen()?)
        .stderr(stderr.reopen()?)
        .spawn()
        .with_context(|| format!("start {what}"))?;
    let ended = wait_exit(&mut child, what, limit);
    kill_now(&mut child);
    let said = std::fs::read_to_string(stdout.path())?;
    let complained = std::fs::read_to_string(stderr.path())?;
    let status = ended.with_context(|| format!("it said: {said}{complained}"))?;
    ensure!(status.success(), "{what} ended with {status}: {said}{complained}");
    Ok(said)
}

/// Kills `child` with SIGKILL and takes its exit status, so that no zombie stays. An ended child is fine.
pub fn kill_now(child: &mut Child) {
    // Both fail only for a child that is gone, which is what is wanted.
    drop(child.kill());
    drop(child.wait());
}

/// Sends `signal` to process `pid`.
///
/// # Errors
/// When there is no such process or it is not ours.
pub fn send(pid: u32, signal: Signal) -> Result<()> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).with_context(|| format!("{pid} is no process id"))?;
    kill_process(raw, signal).with_context(|| format!("send {signal:?} to process {pid}"))
}

/// Whether process `pid` exists and is more than a zombie.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    // "pid (name) state ...": the name may contain anything, so look behind the last bracket (proc(5)).
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tied_child_dies_with_the_thread_that_started_it() {
        let pid = std::thread::spawn(|| {
            let mut child = tied("sleep").arg("600").spawn().unwrap();
            // The tie is made before `sleep` is executed; wait until that is so.
            let pid = child.id();
            wait_for("sleep runs", Duration::from_secs(10), || {
                Ok(std::fs::read_to_string(format!("/proc/{pid}/comm"))?.starts_with("sleep").then_some(()))
            })
            .unwrap();
            assert!(is_alive(pid) && child.try_wait().unwrap().is_none());
            pid
        })
        .join()
        .unwrap();
        wait_for("its death", Duration::from_secs(10), || Ok((!is_alive(pid)).then_some(()))).unwrap();
    }

    #[test]
    fn signals_reach_a_child() {
        let mut child = tied("sleep").arg("600").spawn().unwrap();
        send(child.id(), Signal::TERM).unwrap();
        assert!(!wait_exit(&mut child, "sleep", Duration::from_secs(10)).unwrap().success());
        assert!(!is_alive(child.id()));
        assert!(send(0, Signal::TERM).is_err());
    }
}
