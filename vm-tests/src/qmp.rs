//! A minimal QMP client: one command at a time, events skipped (QEMU's "QMP protocol specification").

use crate::deadline::wait_for;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long QEMU may take to listen or to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// A connection to one QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects and leaves the negotiation mode.
    ///
    /// # Errors
    /// When QEMU does not listen on `socket` or answers nonsense.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = wait_for("QEMU's QMP socket", ANSWER_LIMIT, || Ok(UnixStream::connect(socket).ok()))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT)).context("set QMP timeout")?;
        let mut qmp = Self { reader: BufReader::new(stream) };
        let greeting = qmp.receive()?;
        if greeting.get("QMP").is_none() {
            bail!("QMP greeting is {greeting}");
        }
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs `command` and gives what it returns.
    ///
    /// # Errors
    /// When QEMU refuses it or is gone.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.reader.get_mut().write_all(request.as_bytes()).with_context(|| format!("send QMP {command}"))?;
        loop {
            let mut answer = self.receive().with_context(|| format!("QMP {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QMP {command}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// The guest's run state, for example `running` or `paused`.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn status(&mut self) -> Result<String> {
        let answer = self.execute("query-status", &json!({}))?;
        Ok(answer["status"].as_str().context("query-status without status")?.to_owned())
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        let length = self.reader.read_line(&mut line).context("read from QMP")?;
        if length == 0 {
            bail!("QEMU closed the QMP connection");
        }
        serde_json::from_str(&line).with_context(|| format!("QMP answer {line:?}"))
    }
}
