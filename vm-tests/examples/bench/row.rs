//! Figures of one run, and of several runs of the same load on the same system.
//!
//! Invariants: a figure that was not measured is absent, never 0; a row's figures are medians over its runs, each figure by
//! itself; a run that was disturbed is in the row only with a mark that says so.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// One run. Latencies in microseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Run {
    /// IOs completed each second.
    pub(crate) iops: f64,
    /// Mean latency.
    pub(crate) mean_us: f64,
    /// Median latency.
    pub(crate) p50_us: f64,
    /// 99 of 100 are as fast.
    pub(crate) p99_us: f64,
    /// 999 of 1,000 are as fast.
    pub(crate) p999_us: f64,
    /// The slowest.
    pub(crate) max_us: f64,
    /// IOs that failed.
    pub(crate) errors: u64,
    /// Seconds that were measured.
    pub(crate) seconds: f64,
    /// CPU microseconds for each IO, by process, and in `total`.
    pub(crate) cpu_us_per_io: BTreeMap<String, f64>,
    /// Share of the machine's CPU that neither the system under test nor the kernel's own threads took, 0 to 1.
    pub(crate) foreign_cpu: f64,
    /// Memory of all daemons at the end.
    pub(crate) rss_bytes: Option<u64>,
    /// Cache flushes for 1,000 writes and replica: by the daemons' own count, else by the disk's.
    pub(crate) flushes_per_1000: Option<f64>,
    /// Bytes written to the disk for each byte and replica, by the disk's count.
    pub(crate) write_amplification: Option<f64>,
    /// More of what the daemons counted, by name.
    pub(crate) parts: BTreeMap<String, Value>,
    /// The same two as the disk counted them, which merges flushes and sees the file system's own writes.
    pub(crate) disk: Option<DiskCount>,
}

/// What the disk counted, for each replica.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct DiskCount {
    /// Cache flushes for 1,000 writes.
    pub(crate) flushes_per_1000: f64,
    /// Bytes written for each byte.
    pub(crate) write_amplification: f64,
}

impl Run {
    /// The CPU of an IO, all processes.
    #[must_use]
    pub(crate) fn cpu_total(&self) -> Option<f64> {
        self.cpu_us_per_io.get(TOTAL).copied()
    }
}

/// Name of the sum in [`Run::cpu_us_per_io`].
pub(crate) const TOTAL: &str = "total";
/// Name of the load generator there.
pub(crate) const CLIENT: &str = "client";
/// Name of an NBD server there.
pub(crate) const NBD_SERVER: &str = "nbd";
/// Name of `ogee vhost-blk` of a volume there.
pub(crate) const VHOST_SERVER: &str = "vhost-blk";

/// Medians over the runs of one load on one system.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    /// The system.
    pub(crate) system: String,
    /// The load.
    pub(crate) load: String,
    /// Bytes of an IO.
    pub(crate) block_bytes: u32,
    /// IOs in flight of each job.
    pub(crate) depth: u16,
    /// Jobs.
    pub(crate) jobs: u16,
    /// See [`Run`].
    pub(crate) iops: f64,
    /// The slowest run.
    pub(crate) iops_min: f64,
    /// The fastest run.
    pub(crate) iops_max: f64,
    /// See [`Run`].
    pub(crate) mean_us: f64,
    /// See [`Run`].
    pub(crate) p50_us: f64,
    /// See [`Run`].
    pub(crate) p99_us: f64,
    /// See [`Run`].
    pub(crate) p999_us: f64,
    /// The slowest IO of all runs.
    pub(crate) max_us: f64,
    /// CPU of all processes.
    pub(crate) cpu_us_per_io: Option<f64>,
    /// The same by process.
    pub(crate) cpu_us_per_io_by_process: BTreeMap<String, f64>,
    /// The same of each run, in order.
    #[serde(default)]
    pub(crate) cpu_us_per_io_runs: BTreeMap<String, Vec<f64>>,
    /// See [`Run`].
    pub(crate) flushes_per_1000: Option<f64>,
    /// See [`Run`].
    pub(crate) write_amplification: Option<f64>,
    /// See [`Run`]; of the last run.
    #[serde(flatten)]
    pub(crate) parts: BTreeMap<String, Value>,
    /// See [`Run`].
    pub(crate) disk: Option<DiskCount>,
    /// See [`Run`]; the worst run.
    pub(crate) foreign_cpu: f64,
    /// See [`Run`].
    pub(crate) rss_bytes: Option<u64>,
    /// Failed IOs of all runs.
    pub(crate) errors: u64,
    /// Seconds of one run.
    pub(crate) seconds: f64,
    /// How many runs.
    pub(crate) runs: usize,
    /// Their IOPS, in order.
    pub(crate) iops_runs: Vec<f64>,
    /// When the last was done.
    pub(crate) date: String,
    /// What a reader must know.
    pub(crate) marks: Vec<String>,
}

impl Row {
    /// CPU of everything but the load generator.
    #[must_use]
    pub(crate) fn daemon_cpu(&self) -> Option<f64> {
        let client = self.cpu_us_per_io_by_process.get(CLIENT)?;
        self.cpu_us_per_io.map(|total| total - client)
    }

    /// CPU of the process that the load generator talks to, if that is an NBD server or a vhost daemon of a volume.
    #[must_use]
    pub(crate) fn server_cpu(&self) -> Option<f64> {
        [NBD_SERVER, VHOST_SERVER].iter().find_map(|name| self.cpu_us_per_io_by_process.get(*name)).copied()
    }

    /// The same of each run; empty if it is not known.
    #[must_use]
    pub(crate) fn server_cpu_runs(&self) -> &[f64] {
        [NBD_SERVER, VHOST_SERVER].iter().find_map(|name| self.cpu_us_per_io_runs.get(*name)).map(Vec::as_slice).unwrap_or_default()
    }

    /// Bytes each second.
    #[must_use]
    pub(crate) fn bytes_per_second(&self) -> f64 {
        self.iops * f64::from(self.block_bytes)
    }
}

/// The middle value, or the mean of the two middle ones; 0 of none.
#[must_use]
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut all: Vec<f64> = values.into_iter().collect();
    all.sort_by(f64::total_cmp);
    match (all.len(), all.get(all.len() / 2)) {
        (_, None) => 0.0,
        (n, Some(high)) if n % 2 == 0 => f64::midpoint(all[n / 2 - 1], *high),
        (_, Some(middle)) => *middle,
    }
}

fn median_of_known(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let known: Vec<f64> = values.flatten().collect();
    (!known.is_empty()).then(|| median(known))
}

/// Which row: what all runs have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Head {
    /// The system.
    pub(crate) system: String,
    /// The load.
    pub(crate) load: crate::load::Load,
}

/// More foreign CPU than this share of the machine disturbs a run.
pub(crate) const FOREIGN_MAX: f64 = 0.25;

/// The row of at least one run.
#[must_use]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a median of memory sizes
pub(crate) fn row(head: &Head, runs: &[Run], date: &str) -> Row {
    let of = |f: fn(&Run) -> f64| median(runs.iter().map(f));
    let processes: std::collections::BTreeSet<&String> = runs.iter().flat_map(|r| r.cpu_us_per_io.keys()).collect();
    let by_process = || processes.iter().filter(|name| **name != TOTAL);
    let cpu = |name: &str| median_of_known(runs.iter().map(|r| r.cpu_us_per_io.get(name).copied()));
    let cpu_runs = |name: &str| runs.iter().filter_map(|r| r.cpu_us_per_io.get(name).copied()).collect::<Vec<f64>>();
    let disk = |f: fn(&DiskCount) -> f64| median_of_known(runs.iter().map(|r| r.disk.as_ref().map(f)));
    let rss = median_of_known(runs.iter().map(|r| r.rss_bytes.map(|b| b as f64)));
    Row {
        system: head.system.clone(),
        load: head.load.name.to_owned(),
        block_bytes: head.load.block_bytes,
        depth: head.load.depth,
        jobs: head.load.jobs,
        iops: of(|r| r.iops),
        iops_min: runs.iter().map(|r| r.iops).fold(f64::INFINITY, f64::min),
        iops_max: runs.iter().map(|r| r.iops).fold(0.0, f64::max),
        mean_us: of(|r| r.mean_us),
        p50_us: of(|r| r.p50_us),
        p99_us: of(|r| r.p99_us),
        p999_us: of(|r| r.p999_us),
        max_us: runs.iter().map(|r| r.max_us).fold(0.0, f64::max),
        cpu_us_per_io: cpu(TOTAL),
        cpu_us_per_io_by_process: by_process().filter_map(|name| Some(((*name).clone(), cpu(name)?))).collect(),
        cpu_us_per_io_runs: by_process().map(|name| ((*name).clone(), cpu_runs(name))).collect(),
        flushes_per_1000: median_of_known(runs.iter().map(|r| r.flushes_per_1000)),
        write_amplification: median_of_known(runs.iter().map(|r| r.write_amplification)),
        parts: runs.last().map(|r| r.parts.clone()).unwrap_or_default(),
        disk: disk(|d| d.flushes_per_1000).zip(disk(|d| d.write_amplification)).map(
            |(flushes_per_1000, write_amplification)| DiskCount { flushes_per_1000, write_amplification },
        ),
        foreign_cpu: runs.iter().map(|r| r.foreign_cpu).fold(0.0, f64::max),
        rss_bytes: rss.map(|b| b as u64),
        errors: runs.iter().map(|r| r.errors).sum(),
        seconds: of(|r| r.seconds),
        runs: runs.len(),
        iops_runs: runs.iter().map(|r| r.iops).collect(),
        date: date.to_owned(),
        marks: marks(runs),
    }
}

fn marks(runs: &[Run]) -> Vec<String> {
    let disturbed = runs.iter().filter(|r| r.foreign_cpu > FOREIGN_MAX).count();
    let failed = runs.iter().filter(|r| r.errors > 0).count();
    let mut marks = vec![];
    if disturbed > 0 {
        marks.push(format!("{disturbed} of {} runs with more than {:.0} % foreign CPU", runs.len(), FOREIGN_MAX * 100.0));
    }
    if failed > 0 {
        marks.push(format!("{failed} of {} runs with failed IO", runs.len()));
    }
    marks
}

/// Rows of this time take the place of those of an earlier time for the same system and load; others stay.
#[must_use]
pub(crate) fn merge(earlier: Vec<Row>, now: Vec<Row>) -> Vec<Row> {
    let is_new = |old: &Row| !now.iter().any(|new| (&new.system, &new.load) == (&old.system, &old.load));
    let mut all: Vec<Row> = earlier.into_iter().filter(is_new).collect();
    all.extend(now);
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::RANDWRITE_D32;

    fn run(iops: f64) -> Run {
        let cpu = [(TOTAL.to_owned(), 1e6 / iops), (CLIENT.to_owned(), 1.0)].into();
        Run { iops, p50_us: iops / 10.0, max_us: iops, seconds: 8.0, cpu_us_per_io: cpu, ..Run::default() }
    }

    fn head(system: &str) -> Head {
        Head { system: system.to_owned(), load: RANDWRITE_D32 }
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median([7.0]), 7.0);
        assert_eq!(median([]), 0.0);
    }

    #[test]
    fn each_figure_of_a_row_is_a_median_by_itself_and_extremes_are_kept() {
        let mut runs = vec![run(100.0), run(400.0), run(200.0)];
        runs[1].p50_us = 1.0;
        runs[2].flushes_per_1000 = Some(50.0);
        runs[0].errors = 2;
        runs[2].foreign_cpu = 0.4;
        let row = row(&head("a"), &runs, "today");
        assert_eq!((row.iops, row.iops_min, row.iops_max, row.runs), (200.0, 100.0, 400.0, 3));
        assert_eq!((row.p50_us, row.max_us, row.errors), (10.0, 400.0, 2));
        assert_eq!(row.cpu_us_per_io, Some(5000.0));
        assert_eq!(row.daemon_cpu(), Some(4999.0));
        assert_eq!(row.cpu_us_per_io_runs, BTreeMap::from([(CLIENT.to_owned(), vec![1.0; 3])]));
        assert!(row.server_cpu().is_none() && row.server_cpu_runs().is_empty());
        assert_eq!((row.flushes_per_1000, row.write_amplification, row.disk), (Some(50.0), None, None));
        assert_eq!(row.marks.len(), 2, "{:?}", row.marks);
        let clean = super::row(&head("a"), &[run(100.0)], "today");
        assert!(clean.marks.is_empty());
    }

    #[test]
    fn new_rows_replace_old_ones_of_the_same_name() {
        let of = |system: &str, iops, date: &str| row(&head(system), &[run(iops)], date);
        let merged = merge(vec![of("a", 1.0, "old"), of("b", 2.0, "old")], vec![of("a", 3.0, "new"), of("c", 4.0, "new")]);
        let found: Vec<(&str, f64, &str)> = merged.iter().map(|r| (&*r.system, r.iops, &*r.date)).collect();
        assert_eq!(found, [("b", 2.0, "old"), ("a", 3.0, "new"), ("c", 4.0, "new")]);
    }

    #[test]
    fn rows_survive_json() {
        let row = row(&head("a"), &[run(3.0)], "today");
        let text = serde_json::to_string(&row).expect("JSON");
        assert_eq!(serde_json::from_str::<Row>(&text).expect("read"), row);
        for key in ["system", "load", "block_bytes", "depth", "iops", "mean_us", "p50_us", "p99_us", "p999_us",
            "cpu_us_per_io", "flushes_per_1000", "write_amplification", "runs"] {
            assert!(text.contains(&format!("\"{key}\":")), "{key}");
        }
    }
}
