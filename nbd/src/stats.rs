//! What a server did, in counters that only grow.
//!
//! Each thread of the server counts for itself, so that threads share no cache line on the way of a request; a reader adds
//! them up. Invariants: a request is counted when it ends, well or not, and as in flight from when it was taken until
//! then; a refused one too. DISC, which has no reply, is not. Absent: names of exports and clients.

use crate::wire::command;
use ogee_common::clock::Instant;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A request by its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommandKind {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// FLUSH.
    Flush,
    /// TRIM.
    Trim,
    /// WRITE_ZEROES.
    WriteZeroes,
    /// CACHE.
    Cache,
    /// BLOCK_STATUS.
    BlockStatus,
    /// One that is not known here.
    Other,
}

impl CommandKind {
    /// Every kind.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Trim,
        Self::WriteZeroes,
        Self::Cache,
        Self::BlockStatus,
        Self::Other,
    ];

    /// A word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::WriteZeroes => "write_zeroes",
            Self::Cache => "cache",
            Self::BlockStatus => "block_status",
            Self::Other => "other",
        }
    }

    pub(crate) const fn of(kind: u16) -> Self {
        match kind {
            command::READ => Self::Read,
            command::WRITE => Self::Write,
            command::FLUSH => Self::Flush,
            command::TRIM => Self::Trim,
            command::WRITE_ZEROES => Self::WriteZeroes,
            command::CACHE => Self::Cache,
            command::BLOCK_STATUS => Self::BlockStatus,
            _ => Self::Other,
        }
    }
}

/// Where a connection failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// In the handshake of NBD, its time limit and a lack of TLS included.
    Handshake,
    /// In the handshake of TLS.
    Tls,
    /// Among requests.
    Transmission,
}

impl Stage {
    /// Every stage.
    pub const ALL: [Self; 3] = [Self::Handshake, Self::Tls, Self::Transmission];

    /// A word for it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Handshake => "handshake",
            Self::Tls => "tls",
            Self::Transmission => "transmission",
        }
    }
}

/// Counters of one kind of requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CommandFigures {
    /// Requests that ended, well or not.
    pub requests: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Bytes of the ranges of requests that ended well.
    pub bytes: u64,
    /// Microseconds from when requests were taken to when their replies could be sent, added up.
    pub microseconds: u64,
}

#[derive(Debug, Default)]
struct CommandCounters {
    requests: AtomicU64,
    errors: AtomicU64,
    bytes: AtomicU64,
    microseconds: AtomicU64,
}

/// The counters of one thread.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    connections: AtomicU64,
    connections_ended: AtomicU64,
    tls_connections: AtomicU64,
    failed: [AtomicU64; Stage::ALL.len()],
    taken: AtomicU64,
    commands: [CommandCounters; CommandKind::ALL.len()],
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// A request that was taken.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    kind: CommandKind,
    range_len: u64,
    at: Instant,
}

impl Counters {
    pub(crate) fn connected(&self) {
        add(&self.connections, 1);
    }

    pub(crate) fn disconnected(&self) {
        add(&self.connections_ended, 1);
    }

    pub(crate) fn tls_begun(&self) {
        add(&self.tls_connections, 1);
    }

    pub(crate) fn failed(&self, stage: Stage) {
        add(&self.failed[stage as usize], 1);
    }

    /// A request of this type was taken, now.
    pub(crate) fn take(&self, kind: u16, range_len: u64, now: Instant) -> Taken {
        add(&self.taken, 1);
        Taken { kind: CommandKind::of(kind), range_len, at: now }
    }

    /// It ended, now.
    pub(crate) fn end(&self, taken: Taken, is_well: bool, now: Instant) {
        let counters = &self.commands[taken.kind as usize];
        add(&counters.requests, 1);
        if is_well {
            add(&counters.bytes, taken.range_len);
        } else {
            add(&counters.errors, 1);
        }
        let micros = now.saturating_duration_since(taken.at).as_micros();
        add(&counters.microseconds, u64::try_from(micros).unwrap_or(u64::MAX));
    }
}

/// The counters of a server; clones are the same ones.
#[derive(Debug, Clone)]
pub struct NbdStats {
    threads: Arc<[Arc<Counters>]>,
    refused: Arc<AtomicU64>,
}

/// [`NbdStats`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NbdFigures {
    /// Connections that were taken.
    pub connections: u64,
    /// Those of them that have not ended.
    pub connections_open: u64,
    /// Connections that were closed at once, because all were in use.
    pub connections_refused: u64,
    /// Connections on which TLS began.
    pub tls_connections: u64,
    /// Requests that were taken and have not ended.
    pub in_flight: u64,
    failed: [u64; Stage::ALL.len()],
    commands: [CommandFigures; CommandKind::ALL.len()],
}

impl NbdFigures {
    /// Connections that ended in an error.
    #[must_use]
    pub const fn failed(&self, stage: Stage) -> u64 {
        self.failed[stage as usize]
    }

    /// Requests of this kind.
    #[must_use]
    pub const fn of(&self, kind: CommandKind) -> CommandFigures {
        self.commands[kind as usize]
    }
}

impl NbdStats {
    pub(crate) fn new(threads: usize) -> Self {
        Self { threads: (0..threads).map(|_| Arc::default()).collect(), refused: Arc::default() }
    }

    /// The counters of one thread.
    pub(crate) fn thread(&self, number: usize) -> Arc<Counters> {
        self.threads[number].clone()
    }

    pub(crate) fn refused(&self) {
        add(&self.refused, 1);
    }

    /// What was counted so far.
    #[must_use]
    pub fn now(&self) -> NbdFigures {
        let mut sum = NbdFigures { connections_refused: get(&self.refused), ..NbdFigures::default() };
        for thread in self.threads.iter() {
            // What ends is read before what begins, so that nothing ends that has not begun.
            let ended = get(&thread.connections_ended);
            let connections = get(&thread.connections);
            sum.connections += connections;
            sum.connections_open += connections.saturating_sub(ended);
            sum.tls_connections += get(&thread.tls_connections);
            for (sum, count) in sum.failed.iter_mut().zip(&thread.failed) {
                *sum += get(count);
            }
            let mut requests = 0;
            for (sum, counters) in sum.commands.iter_mut().zip(&thread.commands) {
                let ended = get(&counters.requests);
                requests += ended;
                sum.requests += ended;
                sum.errors += get(&counters.errors);
                sum.bytes += get(&counters.bytes);
                sum.microseconds += get(&counters.microseconds);
            }
            sum.in_flight += get(&thread.taken).saturating_sub(requests);
        }
        sum
    }
}
