//! SIGINT and SIGTERM: the wish that a running command ends.

use crate::error::{CliError, ErrorKind};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Listens from its making on, so that a signal that comes early is not lost.
#[derive(Debug)]
pub(crate) struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    /// Takes over SIGINT and SIGTERM of the process. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub(crate) fn listen() -> Result<Self, CliError> {
        let failed = |e| CliError::caused(ErrorKind::Failure, "listen for SIGINT and SIGTERM", e);
        let interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let terminate = signal(SignalKind::terminate()).map_err(failed)?;
        Ok(Self { interrupt, terminate })
    }

    /// Waits for either. Cancellation-safe.
    pub(crate) async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
