//! Reads the daemons' `/metrics`: flushes, and bytes by what they were written for.
//!
//! Invariant: a daemon that does not answer, or that restarted in between, has no figures rather than wrong ones.

use super::procs::{Process, Sample};
use serde::Serialize;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A daemon answers within this time or is left out.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Bytes of a page; what the daemons show is far below.
const PAGE_BYTES_MAX: u64 = 1 << 20;

/// What a chunkserver has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Counters {
    /// Durable writes of the log.
    pub(crate) log_flushes: u64,
    /// fdatasync calls on data files.
    pub(crate) data_syncs: u64,
    /// Durable writes of the metadata store.
    pub(crate) meta_syncs: u64,
    /// Bytes written to the log.
    pub(crate) log_bytes: u64,
    /// Zeros written to new segments of the log.
    pub(crate) log_filled_bytes: u64,
    /// Bytes written to data files.
    pub(crate) data_bytes: u64,
    /// Bytes of batches of the metadata store.
    pub(crate) meta_bytes: u64,
}

impl Counters {
    /// From the text of a page; `None` if it is not a chunkserver's.
    fn parse(page: &str) -> Option<Self> {
        Some(Self {
            log_flushes: value(page, "ogee_wal_flushes_total")?,
            data_syncs: value(page, "ogee_data_syncs_total")?,
            meta_syncs: value(page, "ogee_meta_syncs_total")?,
            log_bytes: value(page, "ogee_wal_written_bytes_total")?,
            log_filled_bytes: value(page, "ogee_wal_filled_bytes_total")?,
            data_bytes: value(page, "ogee_data_written_bytes_total")?,
            meta_bytes: value(page, "ogee_meta_batch_bytes_total")?,
        })
    }

    fn each(self, other: Self, f: impl Fn(u64, u64) -> Option<u64>) -> Option<Self> {
        Some(Self {
            log_flushes: f(self.log_flushes, other.log_flushes)?,
            data_syncs: f(self.data_syncs, other.data_syncs)?,
            meta_syncs: f(self.meta_syncs, other.meta_syncs)?,
            log_bytes: f(self.log_bytes, other.log_bytes)?,
            log_filled_bytes: f(self.log_filled_bytes, other.log_filled_bytes)?,
            data_bytes: f(self.data_bytes, other.data_bytes)?,
            meta_bytes: f(self.meta_bytes, other.meta_bytes)?,
        })
    }
}

/// The value of a metric without labels.
fn value(page: &str, name: &str) -> Option<u64> {
    let lines = page.lines().filter_map(|line| line.split_once(' '));
    lines.filter(|(found, _)| *found == name).find_map(|(_, value)| value.trim().parse().ok())
}

/// Asks one daemon.
async fn ask(addr: SocketAddr) -> Option<Counters> {
    let page = async {
        let mut stream = TcpStream::connect(addr).await?;
        let request = format!("GET /metrics HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut page = String::new();
        stream.take(PAGE_BYTES_MAX).read_to_string(&mut page).await?;
        std::io::Result::Ok(page)
    };
    let page = tokio::time::timeout(ANSWER_LIMIT, page).await.ok()?.ok()?;
    Counters::parse(&page)
}

/// What is known of all processes at one moment of the run.
#[derive(Debug, Clone)]
pub(crate) struct Observation {
    /// By the kernel.
    pub(crate) sample: Sample,
    /// By the chunkservers themselves, in the order of the processes.
    pub(crate) counters: Vec<Option<Counters>>,
}

impl Observation {
    /// Looks at all of them.
    pub(crate) async fn take(processes: &[Process]) -> Self {
        let sample = Sample::take(processes);
        let ask_one = async |p: &Process| match p.metrics.filter(|_| p.is_chunkserver()) {
            Some(addr) => ask(addr).await,
            None => None,
        };
        let counters = futures_util::future::join_all(processes.iter().map(ask_one)).await;
        Self { sample, counters }
    }

    /// What all chunkservers together did between two observations; `None` unless every one of them told. Pure.
    #[must_use]
    pub(crate) fn between(processes: &[Process], first: &Self, last: &Self) -> Option<Counters> {
        let pairs = processes.iter().zip(first.counters.iter().zip(&last.counters));
        let mut told = pairs.filter(|(p, _)| p.is_chunkserver()).map(|(_, pair)| match pair {
            (Some(a), Some(b)) => b.each(*a, u64::checked_sub),
            _ => None,
        });
        let one = told.next()??;
        told.try_fold(one, |sum, next| sum.each(next?, u64::checked_add))
    }
}

/// Flushes for 1,000 writes, each replica.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Flushes {
    /// Of the write-ahead log.
    pub(crate) log: f64,
    /// Of data files.
    pub(crate) data: f64,
    /// Of the metadata store.
    pub(crate) meta: f64,
}

impl Flushes {
    /// From what the chunkservers did for so many writes, times the replicas; `None` without writes.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // figures for people
    pub(crate) fn of(did: &Counters, replica_writes: u64) -> Option<Self> {
        let per = |n: u64| n as f64 * 1000.0 / replica_writes as f64;
        let each = Self { log: per(did.log_flushes), data: per(did.data_syncs), meta: per(did.meta_syncs) };
        (replica_writes > 0).then_some(each)
    }

    /// All together.
    #[must_use]
    pub(crate) fn sum(&self) -> f64 {
        self.log + self.data + self.meta
    }
}

/// Bytes handed to files for each byte written, each replica.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Amplification {
    /// Batches of the write-ahead log.
    pub(crate) log: f64,
    /// Zeros that new segments of the log are filled with.
    pub(crate) log_fill: f64,
    /// Data files.
    pub(crate) data: f64,
    /// Batches of the metadata store.
    pub(crate) meta: f64,
}

impl Amplification {
    /// From what the chunkservers did for so many bytes, times the replicas; `None` without bytes.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // figures for people
    pub(crate) fn of(did: &Counters, replica_bytes: u64) -> Option<Self> {
        let per = |n: u64| n as f64 / replica_bytes as f64;
        let each = Self {
            log: per(did.log_bytes),
            log_fill: per(did.log_filled_bytes),
            data: per(did.data_bytes),
            meta: per(did.meta_bytes),
        };
        (replica_bytes > 0).then_some(each)
    }

    /// All of them.
    #[must_use]
    pub(crate) fn sum(&self) -> f64 {
        self.log + self.log_fill + self.data + self.meta
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "HTTP/1.1 200 OK\r\n\r\n# HELP ogee_wal_flushes Durable.\nogee_wal_flushes_total 7\n\
        ogee_data_syncs_total 1\nogee_meta_syncs_total 2\nogee_wal_written_bytes_total 8192\n\
        ogee_wal_filled_bytes_total 12288\n\
        ogee_data_written_bytes_total 4096\nogee_meta_batch_bytes_total 100\nogee_x{kind=\"a\"} 3\n# EOF\n";

    fn process(name: &str) -> Process {
        Process { name: name.to_owned(), pid: 1, metrics: None }
    }

    fn observation(counters: Vec<Option<Counters>>) -> Observation {
        Observation { sample: Sample { usage: vec![], machine: None }, counters }
    }

    #[test]
    fn a_page_is_read_by_name() {
        let c = Counters::parse(PAGE).expect("a chunkserver's page");
        assert_eq!((c.log_flushes, c.data_syncs, c.meta_syncs), (7, 1, 2));
        assert_eq!((c.log_bytes, c.data_bytes, c.meta_bytes), (8192, 4096, 100));
        assert_eq!(Counters::parse("ogee_wal_flushes_total 7\n"), None, "an MDS has no data files");
        assert_eq!(value(PAGE, "ogee_wal_flushes"), None);
    }

    #[test]
    fn only_chunkservers_that_told_all_the_time_count() {
        let c = |log_flushes| Some(Counters { log_flushes, ..Counters::default() });
        let processes = [process("bench"), process("cs-1"), process("cs-2")];
        let first = observation(vec![None, c(10), c(20)]);
        let between = |last| Observation::between(&processes, &first, &observation(last)).map(|c| c.log_flushes);
        assert_eq!(between(vec![None, c(15), c(27)]), Some(12));
        assert_eq!(between(vec![None, c(15), None]), None, "one does not answer");
        assert_eq!(between(vec![None, c(15), c(3)]), None, "one restarted");
        assert_eq!(Observation::between(&processes[..1], &first, &first), None);
    }

    #[test]
    fn figures_are_by_replica() {
        let did = Counters::parse(PAGE).expect("parsed");
        let flushes = Flushes::of(&did, 100).expect("some writes");
        assert_eq!((flushes.log, flushes.data, flushes.meta, flushes.sum()), (70.0, 10.0, 20.0, 100.0));
        let bytes = Amplification::of(&did, 4096).expect("some bytes");
        assert_eq!((bytes.log, bytes.log_fill, bytes.data), (2.0, 3.0, 1.0));
        assert_eq!((Flushes::of(&did, 0), Amplification::of(&did, 0)), (None, None));
    }
}
