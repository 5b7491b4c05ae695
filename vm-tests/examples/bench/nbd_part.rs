//! The part of `BENCHMARKS.md` about NBD. It has marks of its own, so that it can be measured without the rest.

use crate::bars::judge_nbd;
use crate::load::{Load, NBD_LARGE, NBD_SMALL};
use crate::machine::Environment;
use crate::markdown::{bars_table, dash, marks, table, thousands};
use crate::row::{CLIENT, Row};
use std::fmt::Write as _;

/// Facts about what has no part in this.
const FOREIGN_FACTS: [&str; 2] = ["Ceph", "qemu-storage-daemon"];

const HOW: &str = "\
Every figure is a median over the runs, `min` and `max` beside it; the systems take turns within one run. CPU is user and system time from `/proc`,
divided by all IOs: `server` is the one process that the load generator talks to, `all daemons` has chunkservers and MDS besides, neither has
the load generator, which is `client`. A copy between two processes by a socket is made by the kernel for whoever calls it: half of the cost of NBD's
copies is the server's, half the client's; on a virtqueue only the server copies.

| system | what it is | load generator |
| --- | --- | --- |
| ogee-vhost | a volume of a cluster (3 replicas) through `ogee vhost-blk` | `ogee bench --vhost-socket` |
| ogee-nbd | the same volume through `ogee nbd serve`, UNIX socket, one connection | `ogee bench --nbd-socket` |
| ogee-nbd-file | a local file in the page cache through `ogee nbd serve --file`, without a cluster | the same |
| qemu-nbd-file | the same file through `qemu-nbd --cache=writeback --aio=io_uring` | the same |
| qemu-nbd-direct | the same file through `qemu-nbd --cache=none --aio=native` | the same |

The working set is written before and fits into memory. Over the file nothing is flushed, so no write there is durable; on the volume every write is, on a majority.
The load generator keeps the depth in flight over one connection with simple replies, sends what is ready at once with one call, and looks at no data.

";

/// Whether a row belongs to this part.
#[must_use]
pub(crate) fn has(row: &Row) -> bool {
    loads().any(|load| load.name == row.load)
}

fn loads() -> impl Iterator<Item = &'static Load> {
    NBD_LARGE.iter().chain(&NBD_SMALL)
}

/// The generated part.
#[must_use]
pub(crate) fn generated(environment: &Environment, rows: &[Row]) -> String {
    let mut text = String::from("## NBD beside vhost-blk and qemu-nbd\n\n");
    for (name, value) in environment.facts.iter().filter(|(name, _)| !FOREIGN_FACTS.contains(&name.as_str())) {
        // Writing to a String cannot fail, here and below.
        let _ = writeln!(text, "- {name}: {value}");
    }
    text.push('\n');
    text.push_str(HOW);
    text.push_str(&bars_table(&judge_nbd(rows)));
    for load in loads() {
        let of: Vec<&Row> = rows.iter().filter(|row| row.load == load.name).collect();
        if !of.is_empty() {
            let _ = write!(text, "\n### {}\n\n{}", load.name, load_table(&of));
        }
    }
    text.push_str(&marks(rows));
    text
}

fn load_table(rows: &[&Row]) -> String {
    let head = ["system", "IOPS", "min", "max", "MiB/s", "mean us", "p50", "p99", "server us/IO", "min", "max", "IOPS/CPU s of server",
        "all daemons us/IO", "client us/IO", "foreign", "runs"];
    let micros = |value: Option<f64>| value.map_or_else(dash, |us| format!("{us:.2}"));
    let cells = |row: &&Row| {
        let server = row.server_cpu_runs();
        let extreme = |pick: fn(f64, f64) -> f64| server.iter().copied().reduce(pick);
        let efficiency = row.server_cpu().filter(|us| *us > 0.0).map(|us| 1e6 / us);
        vec![
            row.system.clone(),
            thousands(row.iops),
            thousands(row.iops_min),
            thousands(row.iops_max),
            format!("{:.0}", row.bytes_per_second() / f64::from(1 << 20)),
            format!("{:.1}", row.mean_us),
            format!("{:.1}", row.p50_us),
            format!("{:.1}", row.p99_us),
            micros(row.server_cpu()),
            micros(extreme(f64::min)),
            micros(extreme(f64::max)),
            efficiency.map_or_else(dash, thousands),
            micros(row.daemon_cpu()),
            micros(row.cpu_us_per_io_by_process.get(CLIENT).copied()),
            format!("{:.0} %", row.foreign_cpu * 100.0),
            format!("{}{}", row.runs, if row.marks.is_empty() { "" } else { " (!)" }),
        ]
    };
    table(&head, &rows.iter().map(cells).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::RANDWRITE_D32;
    use crate::row::NBD_SERVER;

    #[test]
    fn a_row_has_the_cpu_of_its_server_alone() {
        let load = NBD_SMALL[0];
        let row = Row {
            system: "some-nbd".to_owned(),
            load: load.name.to_owned(),
            block_bytes: load.block_bytes,
            iops: 25_600.0,
            cpu_us_per_io: Some(60.0),
            cpu_us_per_io_by_process: [(CLIENT.to_owned(), 10.0), (NBD_SERVER.to_owned(), 20.0), ("cs-1".to_owned(), 30.0)].into(),
            cpu_us_per_io_runs: [(NBD_SERVER.to_owned(), vec![19.0, 20.0, 22.5])].into(),
            runs: 3,
            ..Row::default()
        };
        assert!(has(&row) && !has(&Row { load: RANDWRITE_D32.name.to_owned(), ..Row::default() }));
        let facts = vec![("kernel".to_owned(), "K".to_owned()), ("Ceph".to_owned(), "C".to_owned())];
        let text = generated(&Environment { facts }, &[row]);
        assert!(text.contains("- kernel: K\n") && !text.contains("- Ceph"), "{text}");
        assert!(text.contains("| 100 |") && text.contains("| 20.00 | 19.00 | 22.50 | 50,000 | 50.00 | 10.00 |"), "{text}");
        assert!(!text.contains(&format!("### {}", NBD_LARGE[0].name)), "a load without rows has no table");
    }
}
