//! Hostile bytes for every decoder of the workspace. Each target takes any bytes and panics when a decoder breaks a promise: nothing
//! panics, nothing is allocated by an unchecked length, what decodes keeps its meaning when it is encoded again.
//!
//! Two drivers call them. `make fuzz` runs libFuzzer, which looks for new paths (`vm-tests/fuzz`); the test `fuzz_smoke` replays the
//! corpora that libFuzzer left (`vm-tests/fuzz/corpus`) and changes of them by seed, in the gate. Decoders that a crate keeps to
//! itself are reached through its module `fuzzing`.

mod config;
mod frames;
mod nbd;
mod qcow2;
mod request;

/// One decoder, or a family of them.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name: that of its corpus, and of `OGEE_FUZZ` for libFuzzer.
    pub name: &'static str,
    /// Feeds it.
    pub run: fn(&[u8]),
    /// Runs in the gate: those that touch files are slower.
    pub smoke_runs: u32,
}

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run, smoke_runs: 20_000 }
}

/// All targets.
pub const TARGETS: [Target; 12] = [
    target("frames", frames::run),
    target("raft_messages", ogee_raft::fuzzing::raft_messages),
    target("log_batch", ogee_raft::fuzzing::log_batch),
    target("superblock", ogee_chunkserver::fuzzing::superblock),
    target("checkpoint_rows", ogee_chunkserver::fuzzing::checkpoint_rows),
    target("manifests", ogee_chunkserver::fuzzing::manifests),
    target("mds_records", ogee_mds::fuzzing::mds_records),
    target("virtio_request", request::run),
    target("nbd", nbd::run),
    target("config", config::run),
    Target { name: "backup_objects", run: ogee_snapclone::fuzzing::backup_objects, smoke_runs: 5_000 },
    Target { name: "qcow2", run: qcow2::run, smoke_runs: 2_000 },
];

/// The target of that name.
#[must_use]
pub fn find(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|t| t.name == name)
}
