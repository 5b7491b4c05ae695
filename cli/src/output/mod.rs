//! Standard output: tables and sentences for people, JSON for programs, never both.
//!
//! Invariants: with `--json` every command prints exactly one JSON document on one line (listings print an array);
//! without it nothing machine-readable is promised. A reader that went away (`ogee volume ls | head -1`) is not an
//! error: the command has done its work, so it ends quietly. Progress goes to standard error and only to a terminal.

mod progress;
mod table;
mod time;

pub(crate) use progress::Progress;
pub(crate) use table::Table;
pub(crate) use time::{bytes_per_second, date, elapsed_ms};

use crate::error::{CliError, ErrorKind};
use serde::Serialize;
use std::io::Write;

/// Where results go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    /// JSON or text.
    #[must_use]
    pub(crate) const fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether programs read it.
    #[must_use]
    pub(crate) const fn is_json(self) -> bool {
        self.json
    }

    /// Prints one result: the value as JSON, or what `text` makes of it.
    ///
    /// # Errors
    /// When standard output cannot be written, except when its reader went away.
    pub(crate) fn result<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> Result<(), CliError> {
        let line = if self.json { to_json(value)? } else { text(value) };
        print_line(&line)
    }

    /// Prints a line for people only; with `--json` nothing.
    ///
    /// # Errors
    /// As [`Output::result`].
    pub(crate) fn say(self, line: &str) -> Result<(), CliError> {
        if self.json { Ok(()) } else { print_line(line) }
    }

    /// Prints a warning for people on standard error; with `--json` nothing.
    pub(crate) fn warn(self, line: &str) {
        if !self.json {
            // Nobody reads standard error: then nobody wants the warning either.
            let _ = writeln!(std::io::stderr(), "ogee: warning: {line}");
        }
    }
}

fn to_json<T: Serialize>(value: &T) -> Result<String, CliError> {
    serde_json::to_string(value).map_err(|e| CliError::caused(ErrorKind::Failure, "write the result as JSON", e))
}

/// One write and one flush, so that a program that reads a pipe gets the whole line at once.
fn print_line(line: &str) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    let text = format!("{}\n", line.trim_end_matches('\n'));
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(CliError::caused(ErrorKind::Failure, "write to standard output", e))
        }
        _ => Ok(()),
    }
}

/// `1 volume`, `2 volumes`.
#[must_use]
pub(crate) fn counted(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}
