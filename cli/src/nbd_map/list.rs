//! `ogee nbd ls`: the mappings of this host, as they are now.

use super::DirArgs;
use super::child;
use super::device::System;
use super::keeper::backend;
use super::options::device_path;
use super::place::{Record, records};
use crate::connect::Context;
use crate::error::CliError;
use crate::output::Table;
use ogee_common::size::ByteLen;
use serde::Serialize;
use std::path::PathBuf;

/// How a mapping is.
///
/// ```text
/// Mapped <── a connection dies, is replaced ──> Reconnecting
///    └── the keeper dies ──> Unattended ── map ──> Mapped        any ── the device is detached ──> Gone ── map or unmap ──> (nothing)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// All connections are there.
    Mapped,
    /// Some are not; IO goes over the others, or waits.
    Reconnecting,
    /// Nobody would replace a connection: map it once more.
    Unattended,
    /// The device is not attached to it any more.
    Gone,
}

impl State {
    fn of(record: &Record, is_attached: bool, is_kept: bool) -> Self {
        match (is_attached, is_kept) {
            (false, _) => Self::Gone,
            (true, false) => Self::Unattended,
            (true, true) if record.live < record.connections => Self::Reconnecting,
            (true, true) => Self::Mapped,
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Mapped => "mapped",
            Self::Reconnecting => "reconnecting",
            Self::Unattended => "unattended",
            Self::Gone => "gone",
        }
    }
}

#[derive(Debug, Serialize)]
struct Line {
    device: PathBuf,
    volume: String,
    size_bytes: u64,
    read_only: bool,
    state: State,
    connections: u16,
    live_connections: u16,
    server_pid: Option<u32>,
    keeper_pid: Option<u32>,
}

/// Carries out `ogee nbd ls`.
///
/// # Errors
/// The folder of mappings cannot be read.
pub(crate) fn run(context: &Context, args: &DirArgs) -> Result<(), CliError> {
    let system = System::default();
    let lines: Vec<Line> = records(&args.socket_dir)?.into_iter().map(|record| line(&system, record)).collect();
    context.out.result(&lines, |lines| table(lines))
}

fn line(system: &System, record: Record) -> Line {
    let is_attached = system.is_attached_to(record.index, &backend(&record.volume));
    let keeper = child::find_keeper(record.keeper_pid, &record.volume);
    let state = State::of(&record, is_attached, keeper.is_some());
    Line {
        device: device_path(record.index),
        size_bytes: record.size_bytes,
        read_only: record.read_only,
        state,
        connections: record.connections,
        live_connections: if state == State::Gone { 0 } else { record.live },
        server_pid: record.server_pid,
        keeper_pid: keeper.map(|keeper| keeper.pid),
        volume: record.volume,
    }
}

fn table(lines: &[Line]) -> String {
    let mut table = Table::new(&["DEVICE", "VOLUME", "SIZE", "MODE", "STATE", "CONNECTIONS", "SERVER", "KEEPER"]);
    let pid = |pid: Option<u32>| pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
    for line in lines {
        table.row([
            line.device.display().to_string(),
            line.volume.clone(),
            ByteLen(line.size_bytes).to_string(),
            if line.read_only { "ro" } else { "rw" }.to_owned(),
            line.state.word().to_owned(),
            format!("{}/{}", line.live_connections, line.connections),
            pid(line.server_pid),
            pid(line.keeper_pid),
        ]);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_has_its_cause() {
        let record = |live| Record {
            volume: "vm1".to_owned(),
            index: 0,
            size_bytes: 1 << 30,
            read_only: false,
            connections: 4,
            live,
            keeper_pid: 1,
            server_pid: Some(2),
        };
        assert_eq!(State::of(&record(4), true, true), State::Mapped);
        assert_eq!(State::of(&record(3), true, true), State::Reconnecting);
        assert_eq!(State::of(&record(4), true, false), State::Unattended);
        assert_eq!(State::of(&record(4), false, true), State::Gone);
        let words = [State::Mapped, State::Reconnecting, State::Unattended, State::Gone].map(State::word);
        let json = [State::Mapped, State::Reconnecting, State::Unattended, State::Gone].map(|s| serde_json::json!(s));
        assert_eq!(json.map(|word| word.as_str().unwrap_or_default().to_owned()), words.map(str::to_owned));
    }
}
