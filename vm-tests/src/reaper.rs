//! Cleans up what is detached from the test process: scratch folders, and daemons that `ogee dev up` leaves running.
//!
//! The reaper is a small shell process that waits for the end of its standard input, whose other end only the test process holds.
//! So it acts when the test drops it, fails, is interrupted or is killed with SIGKILL. It kills the processes that are registered
//! at that time, if they still run the registered program (a process id may be someone else's by then), and removes the folder.

use crate::process::wait_exit;
use anyhow::{Context, Result};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// File in the folder that names the registered processes, one a line.
const PIDS: &str = ".reaper-pids";

/// `$1` = folder, `$2` = program, empty when there is none. Acts once its input has ended. Processes that others started and noted
/// in a file `*.pid` in the folder, as libvirt does (without a line end), count as registered.
const SCRIPT: &str = r#"
trap '' HUP INT TERM
while read -r line; do :; done
[ -z "$2" ] || for pid in $(cat "$1/.reaper-pids" 2>/dev/null; find "$1" -name '*.pid' -exec cat {} \; -exec echo \; 2>/dev/null); do
    case $(readlink "/proc/$pid/exe" 2>/dev/null) in
        "$2" | "$2 (deleted)") kill -KILL "$pid" 2>/dev/null ;;
    esac
done
# A dying process may still make files; a few tries are enough.
for try in 1 2 3 4 5 6 7 8 9 10; do rm -rf "$1" 2>/dev/null && break; sleep 0.2; done
"#;

/// Owns a folder and the detached processes that work in it.
#[derive(Debug)]
pub struct Reaper {
    folder: PathBuf,
    shell: Child,
}

impl Reaper {
    /// Takes over `folder`.
    ///
    /// # Errors
    /// When the shell cannot be started.
    pub fn of_folder(folder: &Path) -> Result<Self> {
        Self::start(folder, Path::new(""))
    }

    /// Takes over `folder` and the processes of `program` (an absolute path) that will be registered.
    ///
    /// # Errors
    /// When the shell cannot be started.
    pub fn of_daemons(folder: &Path, program: &Path) -> Result<Self> {
        Self::start(folder, program)
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.folder
    }

    fn start(folder: &Path, program: &Path) -> Result<Self> {
        let shell = Command::new("sh")
            .args(["-c", SCRIPT, "reaper"])
            .arg(folder)
            .arg(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("start the reaper")?;
        Ok(Self { folder: folder.to_owned(), shell })
    }

    /// Adds processes to those that must not survive.
    ///
    /// # Errors
    /// When the list cannot be written.
    pub fn register(&self, pids: impl IntoIterator<Item = u32>) -> Result<()> {
        use std::io::Write;
        let path = self.folder.join(PIDS);
        let mut file = std::fs::File::options().append(true).create(true).open(&path).context("register processes")?;
        for pid in pids {
            writeln!(file, "{pid}").context("register processes")?;
        }
        Ok(())
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        if let Err(error) = wait_exit(&mut self.shell, "the reaper", Duration::from_secs(20)) {
            eprintln!("{error:#}; {} stays", self.folder.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::{is_alive, kill_now};

    #[test]
    fn registered_processes_of_the_program_die_with_it_and_others_stay() {
        let folder = tempfile::tempdir().unwrap().keep();
        let sleep = std::fs::canonicalize("/bin/sleep").unwrap();
        let mut ours = Command::new(&sleep).arg("600").spawn().unwrap();
        let mut foreign = Command::new("tail").args(["-f", "/dev/null"]).spawn().unwrap();
        let reaper = Reaper::of_daemons(&folder, &sleep).unwrap();
        let mut noted = Command::new(&sleep).arg("600").spawn().unwrap();
        std::fs::write(folder.join("noted.pid"), noted.id().to_string()).unwrap();
        std::fs::write(folder.join("old.pid"), "1").unwrap();
        reaper.register([ours.id(), foreign.id()]).unwrap();
        drop(reaper);
        wait_exit(&mut ours, "the registered process", Duration::from_secs(10)).unwrap();
        wait_exit(&mut noted, "the process of the file", Duration::from_secs(10)).unwrap();
        assert!(is_alive(foreign.id()));
        assert!(!folder.exists());
        kill_now(&mut foreign);
    }
}
