//! The table of what is attached, and the state file that follows it.
//!
//! Used by the daemon and by the volumes' keepers. Invariants: writes of the file are one after another, each with the table as it is then, so
//! that the last one is the truth; whoever is told that it is saved finds his change in it; no lock is held while anything but the file is waited for.

use super::protocol::Refusal;
use super::state::StateFile;
use super::table::Table;
use crate::error::{CliError, ErrorKind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The state file and its turns.
struct Record {
    file: StateFile,
    /// How often it was to be written.
    asked: AtomicU64,
    /// Who has this lock writes; up to which asking it is written.
    written: Mutex<u64>,
}

/// See the module.
pub(super) struct Book {
    table: Arc<Mutex<Table>>,
    record: Option<Arc<Record>>,
}

impl Book {
    /// One without volumes.
    pub(super) fn new(state: Option<StateFile>) -> Self {
        let record = state.map(|file| Arc::new(Record { file, asked: AtomicU64::new(0), written: Mutex::new(0) }));
        Self { table: Arc::default(), record }
    }

    /// What is attached.
    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// Writes the table to the state file, if there is one. Those who ask while it is written are served by one write together.
    ///
    /// # Errors
    /// As [`StateFile::save`].
    pub(super) async fn save(&self) -> Result<(), Refusal> {
        let Some(record) = self.record.clone() else { return Ok(()) };
        let table = Arc::clone(&self.table);
        let number = record.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let write = move || -> Result<(), CliError> {
            let mut written = lock(&record.written);
            if *written >= number {
                return Ok(());
            }
            // Whoever has asked by now had changed the table before.
            let asked = record.asked.load(Ordering::SeqCst);
            let volumes = lock(&table).kept();
            record.file.save(volumes)?;
            *written = asked;
            Ok(())
        };
        match tokio::task::spawn_blocking(write).await {
            Ok(written) => written.map_err(Refusal::from),
            Err(_) => Err(Refusal::new(ErrorKind::Failure, "the state was not written; see the daemon's log")),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
