//! `BENCHMARKS.md`: its generated parts, each between two marks, and the text of the main one. What people wrote around the marks is kept.

use crate::bars::{Verdict, judge, ratio};
use crate::ceph::CEPH_NOCACHE;
use crate::load::{DISK_LOADS, NULL_LOADS};
use crate::machine::Environment;
use crate::ogee::{OGEE, OGEE_VHOST};
use crate::raw::RAW;
use crate::row::{DiskCount, Row};
use std::fmt::Write as _;

/// A generated part.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    begin: &'static str,
    end: &'static str,
}

/// All but what is below.
pub(crate) const MAIN: Part = Part { begin: "<!-- make bench: begin -->", end: "<!-- make bench: end -->" };
/// `nbd_part.rs`.
pub(crate) const NBD: Part = Part { begin: "<!-- make bench, NBD: begin -->", end: "<!-- make bench, NBD: end -->" };

const INTRODUCTION: &str = "\
# Benchmarks

Written by `make bench` (all of it), `make bench-quick` (Ogee and the raw disk alone) or `make bench-nbd` (the part about NBD). Compare ratios within one run, never
absolute figures of two machines or two runs. All replicas and all peers share one disk and the same CPUs.

";

const HOW: &str = "\
Every figure is a median over the runs; the systems take turns, one up at a time, so a slow hour of the machine meets all of them. CPU is that of all
processes of a system, load generator included, from `/proc`, user and system, without the kernel's own threads. `foreign` is
the worst run's share of the machine's CPU that others took; a run above 25 % is repeated up to twice and marked if it stays.

| system | what a completed write means | load generator |
| --- | --- | --- |
| ogee | durable on a majority of 3 replicas | `ogee bench`, SDK |
| ogee-vhost | the same, through `ogee vhost-blk` and a virtqueue | `ogee bench --vhost-socket` |
| ceph-nocache | durable on 3 replicas (`rbd_cache = false`) | fio, librbd |
| ceph-default | possibly only in the client's memory until a flush (`rbd_cache` as installed) | fio, librbd |
| qsd-file | durable in one file (`writethrough=on`, direct IO) | `ogee bench --vhost-socket` |
| raw-disk | depth 1: write + fdatasync, one copy; deeper: direct IO without a flush, so not durable: the disk's ceiling | fio |
| ogee-null, qsd-null | nothing is kept: the cost of the path alone | `ogee bench --vhost-socket` |

Ceph is Debian's, on files that were written in full, with the settings it gives itself on a solid-state disk (`scripts/bench/ceph.sh`).
The working set fits into memory: Ogee reads through the kernel's page cache, Ceph through the caches of its OSDs (1.5 GiB each), raw-disk and qsd-file
past all caches.
qsd-null is null-co with its default `read-zeroes=off`, which leaves the guest's memory alone; ogee-null writes zeros into it. On raw-disk at
depth 1 a latency percentile is the sum of those of the write and of the fdatasync; the mean is exact.
Flushes per 1,000 writes and bytes per byte are for each replica. Flushes are on `ogee` as its daemons count them, elsewhere as the disk does, which
merges them; bytes are the disk's count, from an empty to an emptied page cache, so they hold the file system's own writes and those of
others; `on disk` is the disk's count of both on every system.


";

/// The generated part.
#[must_use]
pub(crate) fn generated(environment: &Environment, rows: &[Row]) -> String {
    let mut text = String::from("## Measured\n\n");
    for (name, value) in &environment.facts {
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(text, "- {name}: {value}");
    }
    text.push('\n');
    text.push_str(HOW);
    text.push_str("### Bars\n\n");
    text.push_str(&bars_table(&judge(rows)));
    text.push_str("\nBars that this command does not measure: idle groups, longest IO at a kill or a hang, first writes on a clone, stall at a snapshot.\n");
    let loads = DISK_LOADS.iter().chain(&NULL_LOADS);
    for load in loads {
        let of: Vec<&Row> = rows.iter().filter(|row| row.load == load.name).collect();
        if !of.is_empty() {
            let _ = write!(text, "\n### {}\n\n{}", load.name, load_table(&of));
        }
    }
    text.push_str(&marks(rows));
    text.push_str("\nPlots: ![IOPS](docs/bench/iops.svg) ![latency](docs/bench/latency.svg) ![CPU](docs/bench/cpu.svg)\n");
    text
}

/// What a reader must know of these rows; empty if there is nothing.
#[must_use]
pub(crate) fn marks(rows: &[Row]) -> String {
    let of = |row: &Row| row.marks.iter().map(|mark| format!("- {} {}: {mark}\n", row.system, row.load)).collect::<String>();
    let all: String = rows.iter().map(of).collect();
    if all.is_empty() { all } else { format!("\n### Marks\n\n{all}") }
}

/// A table with a head; the first column is text, the others are figures.
#[must_use]
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let rule = (0..head.len()).map(|i| if i == 0 { "---" } else { "--:" }).collect::<Vec<_>>().join(" | ");
    let body: String = rows.iter().map(|row| line(row)).collect();
    format!("{}| {rule} |\n{body}", line(&head))
}

/// The table of bars.
#[must_use]
pub(crate) fn bars_table(verdicts: &[Verdict]) -> String {
    let row = |v: &Verdict| {
        let measured = v.measured.clone().unwrap_or_else(|| "-".to_owned());
        vec![v.what.clone(), v.bar.clone(), v.aim.clone(), measured, v.verdict.clone()]
    };
    table(&["what", "bar", "aim", "measured", ""], &verdicts.iter().map(row).collect::<Vec<_>>())
}

fn load_table(rows: &[&Row]) -> String {
    let iops_of = |system: &str| rows.iter().find(|row| row.system == system).map(|row| row.iops);
    let (ceph, raw) = (iops_of(CEPH_NOCACHE), iops_of(RAW));
    let head = ["system", "IOPS", "min", "max", "MB/s", "x Ceph", "x raw", "mean us", "p50", "p99", "p99.9", "CPU us/IO",
        "of it daemons", "flushes/1000", "bytes/byte", "on disk", "memory MB", "foreign", "runs"];
    let cells = |row: &&Row| {
        let against = |peer: Option<f64>| peer.filter(|p| *p > 0.0).map_or_else(dash, |p| ratio(row.iops / p));
        let system = if row.system == OGEE || row.system == OGEE_VHOST { format!("**{}**", row.system) } else { row.system.clone() };
        let disk = |d: DiskCount| format!("{:.0}, {:.2}", d.flushes_per_1000, d.write_amplification);
        vec![
            system,
            thousands(row.iops),
            thousands(row.iops_min),
            thousands(row.iops_max),
            format!("{:.0}", row.bytes_per_second() / 1e6),
            against(ceph),
            against(raw),
            format!("{:.1}", row.mean_us),
            format!("{:.1}", row.p50_us),
            format!("{:.1}", row.p99_us),
            format!("{:.1}", row.p999_us),
            row.cpu_us_per_io.map_or_else(dash, |v| format!("{v:.2}")),
            row.daemon_cpu().map_or_else(dash, |v| format!("{v:.2}")),
            row.flushes_per_1000.map_or_else(dash, |v| format!("{v:.0}")),
            row.write_amplification.map_or_else(dash, |v| format!("{v:.2}")),
            row.disk.map_or_else(dash, disk),
            row.rss_bytes.map_or_else(dash, |v| (v >> 20).to_string()),
            format!("{:.0} %", row.foreign_cpu * 100.0),
            format!("{}{}", row.runs, if row.marks.is_empty() { "" } else { " (!)" }),
        ]
    };
    table(&head, &rows.iter().map(cells).collect::<Vec<_>>())
}

/// What stands for a figure that was not measured.
#[must_use]
pub(crate) fn dash() -> String {
    "-".to_owned()
}

/// A rounded number with commas.
#[must_use]
pub(crate) fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let lead = digits.len() % 3;
    let (first, rest) = digits.split_at(lead);
    let groups = rest.as_bytes().chunks(3).map(String::from_utf8_lossy);
    let parts: Vec<_> = (!first.is_empty()).then(|| first.into()).into_iter().chain(groups).collect();
    parts.join(",")
}

/// The whole file: `generated` in the place of what was between the marks of the part, or at the end.
#[must_use]
pub(crate) fn file(earlier: Option<&str>, Part { begin, end }: Part, generated: &str) -> String {
    let part = format!("{begin}\n{generated}{end}\n");
    let Some(earlier) = earlier else { return format!("{INTRODUCTION}{part}") };
    let end_len = end.len();
    match (earlier.find(begin), earlier.find(end)) {
        (Some(begin), Some(end)) if begin < end => {
            let after = earlier[end + end_len..].trim_start_matches('\n');
            let gap = if after.is_empty() { "" } else { "\n" };
            format!("{}{part}{gap}{after}", &earlier[..begin])
        }
        _ => format!("{}\n\n{part}", earlier.trim_end()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::RANDWRITE_D32;

    fn row(system: &str, iops: f64) -> Row {
        let load = RANDWRITE_D32;
        Row { system: system.to_owned(), load: load.name.to_owned(), block_bytes: load.block_bytes, iops, runs: 5, ..Row::default() }
    }

    #[test]
    fn numbers_have_commas() {
        for (value, text) in [(0.0, "0"), (999.4, "999"), (1000.0, "1,000"), (12_345.6, "12,346"), (1e6, "1,000,000")] {
            assert_eq!(thousands(value), text);
        }
    }

    #[test]
    fn a_table_has_a_rule_below_its_head() {
        let text = table(&["a", "b"], &[vec!["x".to_owned(), "1".to_owned()]]);
        assert_eq!(text, "| a | b |\n| --- | --: |\n| x | 1 |\n");
    }

    #[test]
    fn a_load_is_compared_with_its_peers() {
        let (ours, ceph) = (row(OGEE, 9000.0), row(CEPH_NOCACHE, 1000.0));
        let text = generated(&Environment::default(), &[ours, ceph]);
        assert!(text.contains("| **ogee** | 9,000 |"), "{text}");
        assert!(text.contains("9.00 x"));
        assert!(!text.contains("### 4k-randread-d32\n"), "a load without rows has no table");
        assert!(!text.contains("### Marks"));
    }

    #[test]
    fn marks_are_told() {
        let mut disturbed = row(OGEE, 1.0);
        disturbed.marks.push("1 of 5 runs with failed IO".to_owned());
        let text = generated(&Environment::default(), &[disturbed]);
        assert!(text.contains("- ogee 4k-randwrite-d32: 1 of 5 runs with failed IO"));
        assert!(text.contains("5 (!)"));
    }

    #[test]
    fn only_the_part_between_the_marks_is_replaced() {
        let first = file(None, MAIN, "one\n");
        assert!(first.starts_with("# Benchmarks") && first.ends_with(&format!("{}\none\n{}\n", MAIN.begin, MAIN.end)));
        let edited = format!("{}## By hand\n", first);
        let second = file(Some(&edited), MAIN, "two\n");
        assert!(second.contains("two") && !second.contains("one\n") && second.ends_with("\n## By hand\n"));
        assert_eq!(file(Some(&second), MAIN, "two\n"), second, "the same again");
        assert!(file(Some("# Mine\n"), MAIN, "x\n").starts_with("# Mine\n\n"));
        let both = file(Some(&second), NBD, "three\n");
        assert!(both.starts_with(second.trim_end()) && both.ends_with(&format!("{}\nthree\n{}\n", NBD.begin, NBD.end)));
        assert_eq!(file(Some(&both), MAIN, "four\n"), both.replace("two\n", "four\n"), "the other part stays");
    }
}
