//! A guest moved from one QEMU to another while it runs.
//!
//! Both QEMUs are [`Vm`]s; the guest's serial line goes on at the destination. A migration that ends well leaves the source's QEMU paused,
//! with its connection to its daemon; the test decides when to end it.

use crate::deadline::wait_for;
use crate::qmp::Qmp;
use crate::vm::Vm;
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// From the start to the end of a migration: seconds on a quiet machine, for all that a small guest has to be sent.
const MIGRATION_LIMIT: Duration = Duration::from_secs(240);
/// As fast as the socket takes it.
pub const UNLIMITED: u64 = 1 << 40;
/// The guest may be stopped for so long, so that a migration comes to its end on a machine that is slower than the guest writes memory.
const DOWNTIME_LIMIT_MS: u64 = 10_000;

/// A migration that is under way.
#[derive(Debug)]
pub struct Migration {
    source: Qmp,
}

impl Migration {
    /// Starts to move the guest of `source` to `destination`, over the socket `path`, at so many bytes per second.
    ///
    /// # Errors
    /// When a QEMU refuses or is gone.
    pub fn begin(source: &mut Vm, destination: &mut Vm, path: &Path, bytes_per_second: u64) -> Result<Self> {
        let uri = json!({ "uri": format!("unix:{}", path.display()) });
        destination.qmp()?.execute("migrate-incoming", &uri)?;
        let mut source = source.qmp()?;
        let limits = json!({ "downtime-limit": DOWNTIME_LIMIT_MS, "max-bandwidth": bytes_per_second });
        source.execute("migrate-set-parameters", &limits)?;
        source.execute("migrate", &uri)?;
        Ok(Self { source })
    }

    /// What QEMU says of it.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn info(&mut self) -> Result<Value> {
        self.source.execute("query-migrate", &json!({}))
    }

    /// Waits until memory of the guest was sent.
    ///
    /// # Errors
    /// When it ends before.
    pub fn wait_under_way(&mut self) -> Result<()> {
        wait_for("a migration under way", MIGRATION_LIMIT, || {
            let info = self.info()?;
            let status = info["status"].as_str().unwrap_or_default();
            ensure!(["setup", "active", "none"].contains(&status), "the migration has ended: {info}");
            Ok(info["ram"]["transferred"].as_u64().filter(|bytes| status == "active" && *bytes > 1 << 20).map(drop))
        })
    }

    /// Asks QEMU to give it up.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn cancel(&mut self) -> Result<()> {
        self.source.execute("migrate_cancel", &json!({})).map(drop)
    }

    /// Waits for its end, which must be `completed`, `failed` or `cancelled`, and gives what QEMU says of it.
    ///
    /// # Errors
    /// When it ends otherwise, or not in time.
    pub fn wait_end(&mut self, wanted: &str) -> Result<Value> {
        wait_for(&format!("a migration {wanted}"), MIGRATION_LIMIT, || {
            let info = self.info()?;
            let status = info["status"].as_str().unwrap_or_default().to_owned();
            let over = ["completed", "failed", "cancelled"].contains(&status.as_str());
            ensure!(!over || status == wanted, "the migration is {status}, {wanted} was expected: {info}");
            Ok(over.then_some(info))
        })
    }
}

/// Moves the guest of `source` to `destination` and waits until it runs there; gives for how long it was stopped, as QEMU has it.
///
/// # Errors
/// When the migration fails.
pub fn move_guest(source: &mut Vm, destination: &mut Vm, path: &Path) -> Result<Duration> {
    let mut migration = Migration::begin(source, destination, path, UNLIMITED)?;
    let info = migration.wait_end("completed")?;
    wait_running(destination)?;
    Ok(Duration::from_millis(info["downtime"].as_u64().with_context(|| format!("no downtime in {info}"))?))
}

/// Waits until the guest of this QEMU runs.
///
/// # Errors
/// When it does not.
pub fn wait_running(vm: &mut Vm) -> Result<()> {
    let mut qmp = vm.qmp()?;
    wait_for("a running guest", MIGRATION_LIMIT, || Ok((qmp.status()? == "running").then_some(())))
}
