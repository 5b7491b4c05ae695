//! `ogee snapclone`: does the tasks that the MDS keeps.

use super::{DaemonArgs, allow_many_files};
use crate::error::{CliError, ErrorKind};
use crate::logging;
use crate::signals::StopSignals;
use ogee_snapclone::service::{self, SnapcloneConfig};

/// Work of all tasks runs on the thread that calls this; renewals of leases run on others.
const WORKER_THREADS: usize = 2;

/// Runs an instance until SIGINT or SIGTERM; what is under way is given back then.
///
/// # Errors
/// The configuration is wrong ([`ErrorKind::Usage`]), or the instance does not start.
pub(crate) fn run(args: &DaemonArgs) -> Result<(), CliError> {
    allow_many_files();
    let doing = || format!("snapclone {}", args.config.display());
    let config = SnapcloneConfig::load(&args.config).map_err(|e| CliError::caused(ErrorKind::Usage, doing(), e))?;
    logging::start_for_daemon();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(WORKER_THREADS).enable_all().build();
    let runtime = runtime.map_err(|e| CliError::caused(ErrorKind::Failure, "start the runtime", e))?;
    let done = runtime.block_on(async {
        let mut signals = StopSignals::listen()?;
        let shutdown = async move { signals.wait().await };
        let done = Box::pin(service::run(config, shutdown)).await;
        done.map_err(|e| CliError::caused(ErrorKind::Failure, doing(), e))
    });
    // Blocks that are being written by a task that was given back are nobody's: not waited for.
    runtime.shutdown_background();
    done
}
