//! The guest's shell, over a serial line: whatever carries it, QEMU's own input and output or a socket that libvirt made.
//!
//! Each command is framed by a pair of tags that the echo of the typed line does not contain, so that output, exit code and end of a
//! command are certain whatever the terminal does. Every wait has a limit; nothing here starts or ends a guest.

use crate::console::Console;
use crate::deadline::wait_for;
use crate::image::READY_MARKER;
use anyhow::{Context, Result, ensure};
use std::fmt;
use std::io::Write;
use std::time::Duration;

/// For a command that does not say otherwise.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Longest command line: the guest's line editor takes 1023 bytes, and the tags need some.
const COMMAND_BYTES_MAX: usize = 900;

/// What a command in the guest left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Its exit code.
    pub code: i32,
    /// What it printed, both streams, lines ended by `\n`.
    pub output: String,
}

/// A serial line with the guest's shell at its other end.
pub struct Shell {
    name: String,
    keyboard: Box<dyn Write + Send>,
    console: Console,
    commands: u64,
}

impl fmt::Debug for Shell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shell").field("name", &self.name).field("commands", &self.commands).finish_non_exhaustive()
    }
}

impl Shell {
    /// The shell of guest `name`, which reads from `keyboard` and writes to `console`.
    pub fn new(name: &str, keyboard: impl Write + Send + 'static, console: Console) -> Self {
        Self { name: name.to_owned(), keyboard: Box::new(keyboard), console, commands: 0 }
    }

    /// Waits for the shell, after a start or a reboot, and gives the guest's own uptime then.
    ///
    /// # Errors
    /// When it does not come within `limit`.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<Duration> {
        self.expect(READY_MARKER, limit)?;
        let uptime = self.expect("\r\n", limit)?;
        // The prompt: from now on a typed line is not lost.
        self.expect("/ # ", limit)?;
        let seconds: f64 = uptime.parse().with_context(|| format!("{} says its uptime is {uptime:?}", self.name))?;
        Ok(Duration::from_secs_f64(seconds))
    }

    /// Waits until the console says `text`, takes it, and gives what came before it.
    ///
    /// # Errors
    /// When the stream ends or `limit` passes first; the error has the end of the console.
    pub fn expect(&mut self, text: &str, limit: Duration) -> Result<String> {
        self.console.expect(text, limit)
    }

    /// Runs a command that may take `limit`.
    ///
    /// # Errors
    /// When it does not end in time. A non-zero exit code is no error here; see [`Shell::run_ok`].
    pub fn run_within(&mut self, command: &str, limit: Duration) -> Result<Finished> {
        self.commands += 1;
        let tag = format!("{:04}", self.commands);
        // The typed line has a quote inside each tag, so its echo is no tag.
        let line = format!("echo B'EGIN-{tag}'; eval {}; echo E'ND-{tag}' $?\n", quoted(command));
        ensure!(line.len() <= COMMAND_BYTES_MAX && !command.contains('\n'), "too long for one line, use put_file: {command:?}");
        self.type_keys(&line)?;
        self.expect(&format!("BEGIN-{tag}\r\n"), limit).with_context(|| format!("run {command:?}"))?;
        let output = self.expect(&format!("END-{tag} "), limit).with_context(|| format!("run {command:?}"))?;
        let code = self.expect("\r\n", limit)?;
        let code = code.parse().with_context(|| format!("exit code of {command:?} is {code:?}"))?;
        Ok(Finished { code, output: output.replace('\r', "") })
    }

    /// Runs a command and gives its output without the last line end.
    ///
    /// # Errors
    /// When it fails or does not end within [`COMMAND_LIMIT`].
    pub fn run_ok(&mut self, command: &str) -> Result<String> {
        let done = self.run_within(command, COMMAND_LIMIT)?;
        ensure!(done.code == 0, "guest {}: {command:?} ended with {}: {}", self.name, done.code, done.output.trim());
        Ok(done.output.trim_end().to_owned())
    }

    /// Starts a command that goes on by itself; what it prints is lost.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn spawn(&mut self, command: &str) -> Result<()> {
        // In a shell of its own, so that the interactive one does not announce its end in the middle of other output.
        self.run_ok(&format!("( ( {command} ) </dev/null >/dev/null 2>&1 & )")).map(drop)
    }

    /// Waits until a command succeeds.
    ///
    /// # Errors
    /// When it does not within `limit`, or the guest does not answer.
    pub fn wait_until(&mut self, command: &str, limit: Duration) -> Result<()> {
        wait_for(&format!("{command:?} in guest {}", self.name.clone()), limit, || {
            Ok((self.run_within(command, COMMAND_LIMIT)?.code == 0).then_some(()))
        })
    }

    /// Writes a text file; for scripts too long for one line.
    ///
    /// # Errors
    /// When the guest cannot write it.
    pub fn put_file(&mut self, path: &str, text: &str) -> Result<()> {
        self.run_ok(&format!(": >{path}"))?;
        for line in text.lines() {
            self.run_ok(&format!("echo {} >>{path}", quoted(line)))?;
        }
        Ok(())
    }

    /// Types keys into the serial line.
    ///
    /// # Errors
    /// When there is nobody at the other end any more.
    pub fn type_keys(&mut self, keys: &str) -> Result<()> {
        self.keyboard.write_all(keys.as_bytes()).and_then(|()| self.keyboard.flush()).with_context(|| format!("type into {}", self.name))
    }

    /// Kernel messages that tell of trouble with a disk or a file system; empty when all is well.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn disk_errors(&mut self) -> Result<String> {
        let find = "dmesg | grep -iE 'I/O error|blk_update_request|EXT4-fs (error|warning)|hung|blocked for more' | head -n 20";
        let found = self.run_within(find, COMMAND_LIMIT)?;
        Ok(found.output.trim().to_owned())
    }

    /// The whole console so far.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }
}

/// `text` as one word of a shell command.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
