//! The result: one JSON object, or a table.
//!
//! Invariant: a figure that was not measured is `null` and shown as `-`, never 0.

use super::args::BenchArgs;
use super::procs::{Process, Sample, Used};
use super::scrape::{Amplification, Flushes};
use super::tally::Row;
use ogee_common::size::ByteLen;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// The JSON document of `ogee bench`. Latencies in microseconds.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Whose figures these are.
    pub(crate) system: &'static str,
    /// As given with `--rw`.
    pub(crate) load: &'static str,
    /// Bytes of an IO.
    pub(crate) block_bytes: u64,
    /// IOs in flight of each job.
    pub(crate) depth: u32,
    /// Jobs of each volume.
    pub(crate) jobs: u32,
    /// Volumes.
    pub(crate) volumes: usize,
    /// Reads, writes and discards together.
    #[serde(flatten)]
    pub(crate) all: Row,
    /// Bytes read and written each second.
    pub(crate) bytes_per_second: f64,
    /// Reads alone.
    pub(crate) read: Option<Row>,
    /// Writes alone.
    pub(crate) write: Option<Row>,
    /// Discards alone.
    pub(crate) discard: Option<Row>,
    /// Flushes, which are no IOs of the load.
    pub(crate) flush: Option<Row>,
    /// CPU of each process and in total, microseconds for each IO.
    pub(crate) cpu_us_per_io: BTreeMap<String, f64>,
    /// Share of the machine's CPU that processes took which are not ours, 0 to 1.
    pub(crate) foreign_cpu: Option<f64>,
    /// Flushes of chunkservers for 1,000 writes, each replica.
    pub(crate) flushes_per_1000: Option<f64>,
    /// The same by what was flushed.
    pub(crate) flushes_per_1000_of: Option<Flushes>,
    /// Bytes that chunkservers write to log, data files and metadata store for each byte written, each replica. What is
    /// overwritten before it reaches the disk counts each time. (`/proc` is no help: it counts whole folios of the page
    /// cache, up to 2 MiB, when a page of them becomes dirty.)
    pub(crate) write_amplification: Option<f64>,
    /// The same by what was written.
    pub(crate) write_amplification_of: Option<Amplification>,
    /// Bytes each process wrote, as `/proc` has it: whole folios of the page cache when they become dirty.
    pub(crate) written_bytes: BTreeMap<String, u64>,
    /// Memory of each process at the end.
    pub(crate) rss_bytes: BTreeMap<String, u64>,
    /// Failed IOs and wrong blocks.
    pub(crate) errors: u64,
    /// The first of them.
    pub(crate) first_error: Option<String>,
    /// Blocks that were read and compared; `null` without `--verify`.
    pub(crate) verified_blocks: Option<u64>,
    /// What was measured.
    pub(crate) seconds: f64,
}

/// Figures by process.
#[derive(Debug, Default)]
pub(crate) struct ByProcess {
    /// CPU of each process and in total, microseconds for each IO.
    pub(crate) cpu_us_per_io: BTreeMap<String, f64>,
    /// See [`Used::foreign_cpu`].
    pub(crate) foreign_cpu: Option<f64>,
    /// Bytes each process wrote, as `/proc` has it: whole folios of the page cache when they become dirty.
    pub(crate) written_bytes: BTreeMap<String, u64>,
    /// Memory of each process.
    pub(crate) rss_bytes: BTreeMap<String, u64>,
}

impl ByProcess {
    /// From the samples at both ends of a window with so many IOs. Pure.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // figures for people
    pub(crate) fn between(processes: &[Process], first: &Sample, last: &Sample, ios: u64) -> Self {
        let used = Used::between(first, last);
        let mut by = Self { foreign_cpu: used.foreign_cpu, ..Self::default() };
        let mut total = 0;
        for (process, cpu_us) in processes.iter().zip(&used.cpu_us) {
            let Some(cpu_us) = *cpu_us else { continue };
            total += cpu_us;
            if ios > 0 {
                by.cpu_us_per_io.insert(process.name.clone(), cpu_us as f64 / ios as f64);
            }
        }
        if ios > 0 {
            by.cpu_us_per_io.insert("total".to_owned(), total as f64 / ios as f64);
        }
        for (process, usage) in processes.iter().zip(&last.usage) {
            by.rss_bytes.extend(usage.map(|u| (process.name.clone(), u.rss_bytes)));
        }
        for (process, written) in processes.iter().zip(&used.written_bytes) {
            by.written_bytes.extend(written.map(|w| (process.name.clone(), w)));
        }
        by
    }
}

impl Report {
    /// A report of this load without figures of processes.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // figures for people
    pub(crate) fn new(args: &BenchArgs, all: Row, seconds: f64) -> Self {
        Self {
            system: "ogee",
            load: args.rw.as_str(),
            block_bytes: args.bs,
            depth: args.iodepth,
            jobs: args.numjobs,
            volumes: args.volumes.len(),
            all,
            bytes_per_second: all.iops * args.bs as f64,
            read: None,
            write: None,
            discard: None,
            flush: None,
            cpu_us_per_io: BTreeMap::new(),
            foreign_cpu: None,
            flushes_per_1000: None,
            flushes_per_1000_of: None,
            write_amplification: None,
            write_amplification_of: None,
            written_bytes: BTreeMap::new(),
            rss_bytes: BTreeMap::new(),
            errors: 0,
            first_error: None,
            verified_blocks: None,
            seconds,
        }
    }

    /// Takes over the figures by process.
    pub(crate) fn set_processes(&mut self, by: ByProcess) {
        self.cpu_us_per_io = by.cpu_us_per_io;
        self.foreign_cpu = by.foreign_cpu;
        self.written_bytes = by.written_bytes;
        self.rss_bytes = by.rss_bytes;
    }

    /// As a table for people.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // shown rounded
    pub(crate) fn text(&self) -> String {
        let head = format!(
            "{} of {}, depth {}, {} x {} jobs, {:.1} s, {}/s",
            self.load, ByteLen(self.block_bytes), self.depth, self.volumes, self.jobs, self.seconds,
            ByteLen(self.bytes_per_second as u64),
        );
        let mut table =
            crate::output::Table::new(&["", "IOPS", "MEAN us", "P50 us", "P99 us", "P99.9 us", "MAX us"]);
        let kinds = [("all", Some(self.all)), ("read", self.read), ("write", self.write), ("discard", self.discard),
            ("flush", self.flush)];
        for (name, row) in kinds {
            let Some(r) = row else { continue };
            let us = |v: f64| format!("{v:.1}");
            let iops = format!("{:.0}", r.iops);
            table.row([name.to_owned(), iops, us(r.mean_us), us(r.p50_us), us(r.p99_us), us(r.p999_us), us(r.max_us)]);
        }
        let mut processes = crate::output::Table::new(&["PROCESS", "CPU us/IO", "MEMORY"]);
        for (name, cpu) in &self.cpu_us_per_io {
            let bytes = |map: &BTreeMap<String, u64>| map.get(name).map_or("-".to_owned(), |b| ByteLen(*b).to_string());
            processes.row([name.clone(), format!("{cpu:.2}"), bytes(&self.rss_bytes)]);
        }
        let ratio = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{v:.2}"));
        let flushes = self.flushes_per_1000_of.map_or(String::new(), |f| {
            format!(" (log {:.2}, data {:.2}, metadata {:.2})", f.log, f.data, f.meta)
        });
        let bytes = self.write_amplification_of.map_or(String::new(), |a| {
            format!(" (log {:.2}, new log {:.2}, data {:.2}, metadata {:.2})", a.log, a.log_fill, a.data, a.meta)
        });
        let mut text = format!("{head}\n\n{table}\n{processes}\n");
        let figures = [
            ("foreign CPU, share of the machine", ratio(self.foreign_cpu)),
            ("flushes per 1000 writes", ratio(self.flushes_per_1000) + &flushes),
            ("bytes written per byte and replica", ratio(self.write_amplification) + &bytes),
        ];
        for (name, value) in figures {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{name:<36} {value}");
        }
        if let Some(blocks) = self.verified_blocks {
            let _ = writeln!(text, "{:<36} {blocks}", "blocks compared");
        }
        let _ = write!(text, "{:<36} {}", "errors", self.errors);
        if let Some(error) = &self.first_error {
            let _ = write!(text, " ({error})");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::procs::{Machine, Usage};

    #[test]
    fn figures_by_process_are_per_io_and_the_dead_are_left_out() {
        let names = ["bench", "cs-1", "cs-2"];
        let processes: Vec<Process> =
            (1u32..).zip(names).map(|(pid, name)| Process { name: name.to_owned(), pid, metrics: None }).collect();
        let usage = |cpu_us, written_bytes| Some(Usage { cpu_us, rss_bytes: 7, written_bytes });
        let machine = Some(Machine { busy_us: 0, total_us: 0 });
        let first = Sample { usage: vec![usage(0, 0), usage(100, 1000), usage(50, 0)], machine };
        let last = Sample { usage: vec![usage(500, 0), usage(400, 3000), usage(250, 500)], machine };
        let by = ByProcess::between(&processes, &first, &last, 100);
        assert_eq!(by.cpu_us_per_io.get("bench"), Some(&5.0));
        assert_eq!(by.cpu_us_per_io.get("total"), Some(&10.0));
        assert_eq!((by.written_bytes.get("bench"), by.foreign_cpu), (Some(&0), None));
        let dead = Sample { usage: vec![usage(500, 0), usage(400, 3000), None], machine };
        let by = ByProcess::between(&processes, &first, &dead, 100);
        assert_eq!((by.written_bytes.len(), by.rss_bytes.len()), (2, 2));
        assert!(ByProcess::between(&processes, &first, &last, 0).cpu_us_per_io.is_empty());
    }
}
