//! The systems under test: how each is brought up, loaded and brought down.
//!
//! | file | systems |
//! | --- | --- |
//! | `raw.rs` | the disk through a file, with fio |
//! | `ogee.rs` | an Ogee cluster, through the SDK, through a vhost-user socket and through an NBD connection |
//! | `ceph.rs` | Ceph RBD, with and without its client's cache |
//! | `vhost.rs` | qemu-storage-daemon over a file; null devices of both |
//! | `nbd.rs` | NBD servers over a file: ours and qemu-nbd |
//!
//! Invariants: of several groups only one is up at a time; data of a group stays from one start to the next; everything is gone
//! when the group is dropped, or when this process dies.

use crate::generator::Settings;
use crate::load::Load;
use crate::row::Run;
use anyhow::Result;

/// One thing to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Point {
    /// The system.
    pub(crate) system: &'static str,
    /// The load on it.
    pub(crate) load: Load,
}

impl Point {
    /// For `--only` and for people.
    #[must_use]
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.system, self.load.name)
    }
}

/// Systems that are brought up together.
pub(crate) trait Group {
    /// What it is, in a few words.
    fn what(&self) -> &'static str;

    /// What can be measured while it is up, in order.
    fn points(&self) -> Vec<Point>;

    /// Brings it up, the first time with new data, and waits until it serves and is quiet.
    ///
    /// # Errors
    /// It does not come up.
    fn start(&mut self, settings: &Settings) -> Result<()>;

    /// Runs one load.
    ///
    /// # Errors
    /// The load could not be run. IO that failed is counted in the run.
    fn run(&mut self, settings: &Settings, point: &Point, seed: u64) -> Result<Run>;

    /// Brings it down; its data stays.
    ///
    /// # Errors
    /// It does not go down.
    fn stop(&mut self) -> Result<()>;
}

/// The points of one system under each of these loads.
#[must_use]
pub(crate) fn points(system: &'static str, loads: &[Load]) -> Vec<Point> {
    loads.iter().map(|load| Point { system, load: *load }).collect()
}
