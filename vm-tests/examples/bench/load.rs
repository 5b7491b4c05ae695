//! What is measured: the loads, by name.

/// What a load does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Random reads.
    RandomRead,
    /// Random writes.
    RandomWrite,
    /// Sequential reads.
    SequentialRead,
    /// Sequential writes.
    SequentialWrite,
}

impl Pattern {
    /// In the words of fio and of `ogee bench`.
    #[must_use]
    pub(crate) const fn rw(self) -> &'static str {
        match self {
            Self::RandomRead => "randread",
            Self::RandomWrite => "randwrite",
            Self::SequentialRead => "read",
            Self::SequentialWrite => "write",
        }
    }

    /// Whether it writes.
    #[must_use]
    pub(crate) const fn writes(self) -> bool {
        matches!(self, Self::RandomWrite | Self::SequentialWrite)
    }
}

/// One load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    /// Its name in reports.
    pub(crate) name: &'static str,
    /// What it does.
    pub(crate) pattern: Pattern,
    /// Bytes of an IO.
    pub(crate) block_bytes: u32,
    /// IOs in flight of each job.
    pub(crate) depth: u16,
    /// Jobs; each has a queue of its own.
    pub(crate) jobs: u16,
}

const fn load(name: &'static str, pattern: Pattern, block_bytes: u32, depth: u16, jobs: u16) -> Load {
    Load { name, pattern, block_bytes, depth, jobs }
}

/// 4 KiB random writes, 32 in flight.
pub(crate) const RANDWRITE_D32: Load = load("4k-randwrite-d32", Pattern::RandomWrite, 4096, 32, 1);
/// 4 KiB random writes, one after the other.
pub(crate) const RANDWRITE_D1: Load = load("4k-randwrite-d1", Pattern::RandomWrite, 4096, 1, 1);
/// 4 KiB random reads, 32 in flight.
pub(crate) const RANDREAD_D32: Load = load("4k-randread-d32", Pattern::RandomRead, 4096, 32, 1);
/// 4 KiB random reads, one after the other.
pub(crate) const RANDREAD_D1: Load = load("4k-randread-d1", Pattern::RandomRead, 4096, 1, 1);
/// 1 MiB sequential writes, 16 in flight.
pub(crate) const SEQWRITE: Load = load("1m-seqwrite-d16", Pattern::SequentialWrite, 1 << 20, 16, 1);
/// 1 MiB sequential reads, 16 in flight.
pub(crate) const SEQREAD: Load = load("1m-seqread-d16", Pattern::SequentialRead, 1 << 20, 16, 1);

/// The loads of a disk, in the order in which they are run.
pub(crate) const DISK_LOADS: [Load; 6] =
    [RANDWRITE_D32, RANDWRITE_D1, RANDREAD_D32, RANDREAD_D1, SEQWRITE, SEQREAD];

/// The loads that compare `ogee nbd serve` with `ogee vhost-blk`.
pub(crate) const NBD_LARGE: [Load; 2] = [
    load("nbd-128k-randread-d16", Pattern::RandomRead, 128 << 10, 16, 1),
    load("nbd-128k-randwrite-d16", Pattern::RandomWrite, 128 << 10, 16, 1),
];
/// The loads that compare it with other NBD servers.
pub(crate) const NBD_SMALL: [Load; 2] = [
    load("nbd-4k-randread-d32", Pattern::RandomRead, 4096, 32, 1),
    load("nbd-4k-randwrite-d32", Pattern::RandomWrite, 4096, 32, 1),
];

/// The loads of a device that does nothing.
pub(crate) const NULL_LOADS: [Load; 8] = [
    load("4k-randread-d32-q1", Pattern::RandomRead, 4096, 32, 1),
    load("4k-randread-d128-q1", Pattern::RandomRead, 4096, 128, 1),
    load("4k-randread-d32-q4", Pattern::RandomRead, 4096, 32, 4),
    load("4k-randread-d128-q4", Pattern::RandomRead, 4096, 128, 4),
    load("4k-randwrite-d32-q1", Pattern::RandomWrite, 4096, 32, 1),
    load("4k-randwrite-d128-q1", Pattern::RandomWrite, 4096, 128, 1),
    load("4k-randwrite-d32-q4", Pattern::RandomWrite, 4096, 32, 4),
    load("4k-randwrite-d128-q4", Pattern::RandomWrite, 4096, 128, 4),
];
