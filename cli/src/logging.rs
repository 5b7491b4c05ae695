//! Logs: on standard error, wanted or not by the environment variable `OGEE_LOG` (the syntax of `RUST_LOG`).
//!
//! Commands log nothing unless asked, so that an error is one line. Daemons log from `info`, the Raft library from `error`: it repeats itself while a peer is down.

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;

/// The environment variable.
pub(crate) const VARIABLE: &str = "OGEE_LOG";

/// Starts the log of a command: nothing, unless `OGEE_LOG` is set.
pub(crate) fn start_for_command() {
    if let Ok(filter) = std::env::var(VARIABLE) {
        start(EnvFilter::new(filter));
    }
}

/// Starts the log of a daemon: from `info` (the Raft library from `error`), unless `OGEE_LOG` says otherwise.
pub(crate) fn start_for_daemon() {
    start(EnvFilter::new(std::env::var(VARIABLE).unwrap_or_else(|_| "info,openraft=error".to_owned())));
}

fn start(filter: EnvFilter) {
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    // A second start leaves the first one in place.
    let _ = log.try_init();
}
