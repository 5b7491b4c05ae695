//! The bars: what Ogee has to reach beside its peers, and whether it did in this run.

use crate::ceph::CEPH_NOCACHE;
use crate::load::{Load, NBD_LARGE, NBD_SMALL, NULL_LOADS, RANDREAD_D1, RANDREAD_D32, RANDWRITE_D1, RANDWRITE_D32, SEQREAD, SEQWRITE};
use crate::nbd::{OGEE_NBD_FILE, QEMU_NBD_DIRECT, QEMU_NBD_FILE};
use crate::ogee::{OGEE, OGEE_NBD, OGEE_VHOST};
use crate::raw::RAW;
use crate::row::Row;
use crate::vhost::{OGEE_NULL, QSD_NULL};

/// Which figure of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Figure {
    Iops,
    MedianLatency,
    Cpu,
    /// IOPS per CPU second of the daemon.
    DaemonEfficiency,
    /// CPU of all daemons.
    DaemonCpu,
    /// CPU of the server that the load generator talks to.
    ServerCpu,
    /// IOPS per CPU second of that server.
    ServerEfficiency,
    Flushes,
    WriteAmplification,
}

impl Figure {
    fn of(self, row: &Row) -> Option<f64> {
        let positive = |v: f64| (v > 0.0).then_some(v);
        match self {
            Self::Iops => positive(row.iops),
            Self::MedianLatency => positive(row.p50_us),
            Self::Cpu => row.cpu_us_per_io.and_then(positive),
            Self::DaemonEfficiency => row.daemon_cpu().and_then(positive).map(|us| 1e6 / us),
            Self::DaemonCpu => row.daemon_cpu().and_then(positive),
            Self::ServerCpu => row.server_cpu().and_then(positive),
            Self::ServerEfficiency => row.server_cpu().and_then(positive).map(|us| 1e6 / us),
            Self::Flushes => row.flushes_per_1000,
            Self::WriteAmplification => row.write_amplification,
        }
    }
}

/// Which way is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Better {
    More,
    Less,
}

/// One bar.
#[derive(Debug, Clone)]
struct Bar {
    what: String,
    ours: (&'static str, &'static str),
    /// Absent: the figure itself is judged.
    theirs: Option<(&'static str, &'static str)>,
    figure: Figure,
    better: Better,
    bar: f64,
    aim: f64,
}

/// A bar and what was measured.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Verdict {
    /// What is judged.
    pub(crate) what: String,
    /// The least that counts as done.
    pub(crate) bar: String,
    /// Where the product wants to be.
    pub(crate) aim: String,
    /// The figure of this run; absent if it was not measured.
    pub(crate) measured: Option<String>,
    /// `holds`, `aim reached`, `misses by ..` or `not measured`.
    pub(crate) verdict: String,
}

fn against(what: &str, load: Load, peer: &'static str, figure: Figure, (bar, aim): (f64, f64)) -> Bar {
    let better = if bar >= 1.0 && figure != Figure::MedianLatency { Better::More } else { Better::Less };
    let what = format!("{what} ({}) against {peer}", load.name);
    Bar { what, ours: (OGEE, load.name), theirs: Some((peer, load.name)), figure, better, bar, aim }
}

fn alone(what: &str, load: Load, figure: Figure, (bar, aim): (f64, f64)) -> Bar {
    let what = format!("{what} ({})", load.name);
    Bar { what, ours: (OGEE, load.name), theirs: None, figure, better: Better::Less, bar, aim }
}

fn all() -> Vec<Bar> {
    use Figure::{Cpu, DaemonEfficiency, Flushes, Iops, MedianLatency, WriteAmplification};
    let ceph = CEPH_NOCACHE;
    let mut bars = vec![
        against("random write, IOPS", RANDWRITE_D32, ceph, Iops, (8.0, 16.0)),
        against("random write, CPU per IO", RANDWRITE_D32, ceph, Cpu, (1.0 / 8.0, 1.0 / 16.0)),
        against("random write at depth 1, IOPS", RANDWRITE_D1, ceph, Iops, (5.0, 9.0)),
        against("random write at depth 1, median latency", RANDWRITE_D1, RAW, MedianLatency, (4.5, 2.5)),
        against("random read, IOPS", RANDREAD_D32, ceph, Iops, (4.0, 7.0)),
        against("random read, CPU per IO", RANDREAD_D32, ceph, Cpu, (1.0 / 5.0, 1.0 / 10.0)),
        against("random read at depth 1, median latency", RANDREAD_D1, ceph, MedianLatency, (1.0 / 3.0, 1.0 / 5.0)),
        against("sequential write", SEQWRITE, ceph, Iops, (1.5, 2.5)),
        against("sequential read", SEQREAD, ceph, Iops, (1.1, 1.3)),
        alone("flushes per 1,000 writes and disk", RANDWRITE_D32, Flushes, (150.0, 60.0)),
        alone("bytes to disk per byte and replica", RANDWRITE_D32, WriteAmplification, (2.3, 2.1)),
        alone("bytes to disk per byte and replica", SEQWRITE, WriteAmplification, (2.05, 1.1)),
    ];
    bars.extend(NULL_LOADS.iter().map(|load| Bar {
        what: format!("vhost-blk over nothing, IOPS per CPU second of the daemon ({}) against {QSD_NULL}", load.name),
        ours: (OGEE_NULL, load.name),
        theirs: Some((QSD_NULL, load.name)),
        figure: DaemonEfficiency,
        better: Better::More,
        bar: 1.0,
        aim: 1.5,
    }));
    bars
}

/// NBD within 1.2 times of vhost-blk for large requests, and as good as qemu-nbd for small ones.
fn nbd() -> Vec<Bar> {
    use Figure::{DaemonCpu, Iops, ServerCpu, ServerEfficiency};
    let bar = |what: &str, load: &Load, (ours, peer): (&'static str, &'static str), (figure, better), (bar, aim)| {
        let what = format!("{ours}, {what} ({}) against {peer}", load.name);
        Bar { what, ours: (ours, load.name), theirs: Some((peer, load.name)), figure, better, bar, aim }
    };
    let mut bars = vec![];
    for load in &NBD_LARGE {
        let pair = (OGEE_NBD, OGEE_VHOST);
        bars.push(bar("IOPS", load, pair, (Iops, Better::More), (1.0 / 1.2, 1.0)));
        bars.push(bar("CPU per IO of the server", load, pair, (ServerCpu, Better::Less), (1.2, 1.0)));
        bars.push(bar("CPU per IO of all daemons", load, pair, (DaemonCpu, Better::Less), (1.2, 1.0)));
    }
    for load in &NBD_SMALL {
        for ours in [OGEE_NBD_FILE, OGEE_NBD] {
            for peer in [QEMU_NBD_FILE, QEMU_NBD_DIRECT] {
                let figure = (ServerEfficiency, Better::More);
                bars.push(bar("IOPS per CPU second of the server", load, (ours, peer), figure, (1.0, 1.5)));
            }
        }
    }
    bars
}

/// Every bar of NBD with what these rows say of it.
#[must_use]
pub(crate) fn judge_nbd(rows: &[Row]) -> Vec<Verdict> {
    judge_all(nbd(), rows)
}

/// Every other bar with what these rows say of it.
#[must_use]
pub(crate) fn judge(rows: &[Row]) -> Vec<Verdict> {
    judge_all(all(), rows)
}

fn judge_all(bars: Vec<Bar>, rows: &[Row]) -> Vec<Verdict> {
    let figure = |bar: &Bar, (system, load): (&str, &str)| {
        rows.iter().find(|row| row.system == system && row.load == load).and_then(|row| bar.figure.of(row))
    };
    let verdict = |bar: Bar| {
        let ours = figure(&bar, bar.ours);
        let measured = match bar.theirs {
            None => ours,
            Some(theirs) => ours.zip(figure(&bar, theirs)).map(|(ours, theirs)| ours / theirs),
        };
        bar.against(measured)
    };
    bars.into_iter().map(verdict).collect()
}

impl Bar {
    fn against(self, measured: Option<f64>) -> Verdict {
        let show = |v: f64| if self.theirs.is_some() { ratio(v) } else { format!("{v:.2}") };
        let reaches = |v: f64, goal: f64| match self.better {
            Better::More => v >= goal,
            Better::Less => v <= goal,
        };
        let verdict = match measured {
            None => "not measured".to_owned(),
            Some(v) if reaches(v, self.aim) => "aim reached".to_owned(),
            Some(v) if reaches(v, self.bar) => "holds".to_owned(),
            Some(v) => {
                let short = if self.better == Better::More { self.bar / v } else { v / self.bar };
                format!("**misses by a factor of {short:.2}**")
            }
        };
        let (bar, aim) = (show(self.bar), show(self.aim));
        Verdict { what: self.what, bar, aim, measured: measured.map(show), verdict }
    }
}

/// `8.3 x`, or `1/8.3` below one.
#[must_use]
pub(crate) fn ratio(v: f64) -> String {
    match v {
        v if v >= 0.995 => format!("{v:.2} x"),
        v if v > 0.0 => format!("1/{:.2}", 1.0 / v),
        _ => "0".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::{CLIENT, NBD_SERVER, Row, VHOST_SERVER};

    fn row(system: &str, load: Load, iops: f64, cpu: f64) -> Row {
        Row {
            system: system.to_owned(),
            load: load.name.to_owned(),
            iops,
            p50_us: 1e6 / iops,
            cpu_us_per_io: Some(cpu),
            cpu_us_per_io_by_process: [(CLIENT.to_owned(), 1.0)].into(),
            ..Row::default()
        }
    }

    fn verdict<'a>(all: &'a [Verdict], what: &str) -> &'a Verdict {
        all.iter().find(|v| v.what.starts_with(what)).expect("a bar")
    }

    #[test]
    fn ratios_read_like_the_table_of_bars() {
        assert_eq!(ratio(8.0), "8.00 x");
        assert_eq!(ratio(0.125), "1/8.00");
        assert_eq!(ratio(0.0), "0");
    }

    #[test]
    fn a_bar_holds_misses_or_was_not_measured() {
        let rows = vec![
            row(OGEE, RANDWRITE_D32, 9000.0, 100.0),
            row(CEPH_NOCACHE, RANDWRITE_D32, 1000.0, 400.0),
            row(OGEE, RANDWRITE_D1, 1000.0, 1.0),
            row(RAW, RANDWRITE_D1, 2000.0, 1.0),
            row(OGEE_NULL, NULL_LOADS[0], 1.0, 3.0),
            row(QSD_NULL, NULL_LOADS[0], 1.0, 2.0),
        ];
        let all = judge(&rows);
        assert_eq!(verdict(&all, "random write, IOPS").verdict, "holds");
        assert_eq!(verdict(&all, "random write, IOPS").measured.as_deref(), Some("9.00 x"));
        let cpu = verdict(&all, "random write, CPU");
        assert_eq!((cpu.measured.as_deref(), &*cpu.verdict), (Some("1/4.00"), "**misses by a factor of 2.00**"));
        assert_eq!(verdict(&all, "random write at depth 1, median").verdict, "aim reached");
        assert_eq!(verdict(&all, "random write at depth 1, IOPS").verdict, "not measured");
        let null = verdict(&all, "vhost-blk over nothing");
        assert_eq!((null.measured.as_deref(), &*null.verdict), (Some("1/2.00"), "**misses by a factor of 2.00**"));
    }

    #[test]
    fn nbd_is_judged_by_its_server_and_by_all_daemons() {
        let served = |system, load, iops, server: (&str, f64)| {
            let mut row = row(system, load, iops, 101.0);
            row.cpu_us_per_io_by_process.insert(server.0.to_owned(), server.1);
            row
        };
        let rows = [
            served(OGEE_NBD, NBD_LARGE[0], 900.0, (NBD_SERVER, 33.0)),
            served(OGEE_VHOST, NBD_LARGE[0], 1000.0, (VHOST_SERVER, 25.0)),
            served(OGEE_NBD_FILE, NBD_SMALL[1], 1.0, (NBD_SERVER, 8.0)),
            served(QEMU_NBD_DIRECT, NBD_SMALL[1], 1.0, (NBD_SERVER, 16.0)),
        ];
        let all = judge_nbd(&rows);
        let of = |what: &str| (verdict(&all, what).measured.as_deref(), &*verdict(&all, what).verdict);
        assert_eq!(of("ogee-nbd, IOPS (nbd-128k-randread"), (Some("1/1.11"), "holds"));
        assert_eq!(of("ogee-nbd, CPU per IO of the server (nbd-128k-randread"), (Some("1.32 x"), "**misses by a factor of 1.10**"));
        assert_eq!(of("ogee-nbd, CPU per IO of all daemons (nbd-128k-randread"), (Some("1.00 x"), "aim reached"));
        let file = "ogee-nbd-file, IOPS per CPU second of the server (nbd-4k-randwrite-d32) against qemu-nbd";
        assert_eq!(of(&format!("{file}-direct")), (Some("2.00 x"), "aim reached"));
        assert_eq!(of(&format!("{file}-file")), (None, "not measured"));
    }

    #[test]
    fn every_bar_says_which_way_is_better() {
        for bar in all().into_iter().chain(nbd()) {
            let stricter = if bar.better == Better::More { bar.aim >= bar.bar } else { bar.aim <= bar.bar };
            assert!(stricter, "{bar:?}");
        }
    }
}
