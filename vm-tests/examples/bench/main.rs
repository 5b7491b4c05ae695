//! `make bench`: Ogee beside Ceph RBD, beside a local file and beside the raw disk, from one run on one machine.
//!
//! | file | what |
//! | --- | --- |
//! | `load.rs`, `system.rs` | what is measured, and on what |
//! | `raw.rs`, `ogee.rs`, `ceph.rs`, `vhost.rs`, `nbd.rs` | the systems |
//! | `generator.rs`, `fio.rs` | load generators and their answers |
//! | `usage.rs`, `quiet.rs` | CPU, memory and disk use from the kernel |
//! | `row.rs`, `bars.rs` | medians; the bars and whether they hold |
//! | `markdown.rs`, `nbd_part.rs`, `plots.rs`, `machine.rs` | `BENCHMARKS.md`, `docs/bench`, what it ran on |
//!
//! `--only nbd` measures all that compares `ogee nbd serve` with `ogee vhost-blk` and qemu-nbd (the loads have the word in their names) and
//! leaves the rest of `BENCHMARKS.md` as it is.
//!
//! Invariants: one group of systems is up at a time; the groups take turns, A B C, A B C; a run with failed IO or much foreign CPU
//! is repeated, and if it stays so the row says it; nothing is left behind but `target/bench.json`, the plots and `BENCHMARKS.md`.

mod bars;
mod ceph;
mod fio;
mod generator;
mod load;
mod machine;
mod markdown;
mod nbd;
mod nbd_part;
mod ogee;
mod plots;
mod quiet;
mod raw;
mod row;
mod system;
mod usage;
mod vhost;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use generator::{Settings, realtime_is_permitted};
use machine::Environment;
use ogee_common::clock;
use ogee_vm_tests::{cluster, places};
use row::{FOREIGN_MAX, Head, Row, Run};
use std::path::{Path, PathBuf};
use std::time::Duration;
use system::{Group, Point};

/// How often a disturbed run is made at most.
const TRIES: u32 = 3;
/// After this time `--quick` repeats nothing any more, so that it ends in time on a busy machine as well.
const QUICK_REPEATS: Duration = Duration::from_secs(60);

/// What to do.
#[derive(Debug, Parser)]
#[command(name = "bench", about = "Measures Ogee beside its peers; writes target/bench.json, BENCHMARKS.md and docs/bench/")]
struct Arguments {
    /// Ogee and the raw disk alone, with short runs, in less than five minutes
    #[arg(long)]
    quick: bool,
    /// Interleaved repetitions [default: 5, with --quick 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    reps: Option<u32>,
    /// Seconds of one run [default: 8, with --quick 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: Option<u32>,
    /// Working set in MiB [default: 2048, with --quick 1024]
    #[arg(long, value_parser = clap::value_parser!(u64).range(64..))]
    size_mib: Option<u64>,
    /// Only systems and loads with one of these words in SYSTEM/LOAD; comma-separated
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Keep the rows of the last run that this one does not measure; each row has its date
    #[arg(long)]
    keep: bool,
    /// Leave the priority of processes alone
    #[arg(long)]
    no_realtime: bool,
    /// Only write BENCHMARKS.md and the plots anew from target/bench.json
    #[arg(long)]
    report_only: bool,
}

/// The runs of one point.
struct Series {
    point: Point,
    runs: Vec<Run>,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn rows_file() -> PathBuf {
    root().join("target/bench.json")
}

fn environment_file() -> PathBuf {
    root().join("target/bench-environment.json")
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if arguments.report_only {
        let environment = serde_json::from_str(&std::fs::read_to_string(environment_file())?)?;
        let rows = read_rows()?;
        return report(&environment, &rows, &rows);
    }
    // Removed, with all data, when it is dropped or this process dies.
    let scratch = places::scratch()?;
    let settings = Settings {
        size: arguments.size_mib.unwrap_or(if arguments.quick { 1024 } else { 2048 }) << 20,
        ramp: 1,
        runtime: arguments.seconds.unwrap_or(if arguments.quick { 3 } else { 8 }),
        realtime: !arguments.no_realtime && realtime_is_permitted(),
        ogee: cluster::binary()?,
        folder: scratch.path().to_owned(),
    };
    let repetitions = arguments.reps.unwrap_or(if arguments.quick { 3 } else { 5 });
    let environment = Environment::of(&settings, repetitions);
    for (name, value) in &environment.facts {
        println!("{name}: {value}");
    }
    let earlier = if arguments.keep { read_rows().unwrap_or_default() } else { vec![] };
    let save = |now: Vec<Row>| -> Result<Vec<Row>> {
        let rows = row::merge(earlier.clone(), now);
        std::fs::create_dir_all(root().join("target"))?;
        std::fs::write(rows_file(), serde_json::to_string_pretty(&rows)?)?;
        std::fs::write(environment_file(), serde_json::to_string_pretty(&environment)?)?;
        Ok(rows)
    };
    let mut plan = plan(&arguments);
    ensure!(!plan.is_empty(), "nothing to measure; --only has words of SYSTEM/LOAD, as in ogee/4k-randwrite-d32");
    let mut rows = vec![];
    let start = clock::now();
    for repetition in 1..=repetitions {
        for entry in plan.iter_mut().filter(|entry| entry.failure.is_none()) {
            println!("[{:>4} s] repetition {repetition} of {repetitions}: {}", start.elapsed().as_secs(), entry.group.what());
            let tries = if arguments.quick && start.elapsed() > QUICK_REPEATS { 1 } else { TRIES };
            if let Err(error) = entry.take_turn(&settings, repetition.into(), tries) {
                eprintln!("{}: left out from here on: {error:#}", entry.group.what());
                entry.failure = Some(error);
            }
        }
        // Saved each time, so that an interrupted run leaves what it has.
        rows = save(plan.iter().flat_map(Entry::rows).collect())?;
    }
    report(&environment, &rows, &plan.iter().flat_map(Entry::rows).collect::<Vec<_>>())?;
    match plan.into_iter().find_map(|entry| entry.failure) {
        None => Ok(()),
        Some(error) => Err(error.context("not everything was measured")),
    }
}

fn read_rows() -> Result<Vec<Row>> {
    let path = rows_file();
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("read {}", path.display()))
}

/// Writes those parts anew of which `now` has a row; the others stay as they are, with what they say of their run.
fn report(environment: &Environment, rows: &[Row], now: &[Row]) -> Result<()> {
    let (of_nbd, others): (Vec<Row>, Vec<Row>) = rows.iter().cloned().partition(nbd_part::has);
    let path = root().join("BENCHMARKS.md");
    let mut text = std::fs::read_to_string(&path).ok();
    if now.iter().any(|row| !nbd_part::has(row)) {
        plots::write(&root().join("docs/bench"), &others)?;
        text = Some(markdown::file(text.as_deref(), markdown::MAIN, &markdown::generated(environment, &others)));
    }
    if now.iter().any(nbd_part::has) {
        text = Some(markdown::file(text.as_deref(), markdown::NBD, &nbd_part::generated(environment, &of_nbd)));
    }
    std::fs::write(&path, text.unwrap_or_default()).with_context(|| format!("write {}", path.display()))?;
    for verdict in bars::judge(rows).iter().chain(&bars::judge_nbd(rows)).filter(|v| v.measured.is_some()) {
        let measured = verdict.measured.as_deref().unwrap_or("-");
        println!("{:<90} bar {:>9}  {measured:>9}  {}", verdict.what, verdict.bar, verdict.verdict);
    }
    println!("written: target/bench.json, BENCHMARKS.md, docs/bench/");
    Ok(())
}

/// All groups that this run measures.
fn groups(quick: bool) -> Vec<Box<dyn Group>> {
    let mut all: Vec<Box<dyn Group>> = vec![Box::new(raw::Raw), Box::new(ogee::Ogee::default())];
    if !quick {
        all.push(Box::new(ceph::Ceph::default()));
        for kind in [vhost::Kind::QsdFile, vhost::Kind::OgeeNull, vhost::Kind::QsdNull] {
            all.push(Box::new(vhost::Vhost::new(kind)));
        }
        for kind in [nbd::Kind::Ogee, nbd::Kind::QemuCached, nbd::Kind::QemuDirect] {
            all.push(Box::new(nbd::Nbd::new(kind)));
        }
    }
    all
}

/// Whether a point is among those that were asked for.
fn is_wanted(point: &Point, quick: bool, only: &[String]) -> bool {
    let name = point.name();
    let named = only.is_empty() || only.iter().any(|word| name.contains(word.as_str()));
    named && !(quick && [ogee::OGEE_VHOST, ogee::OGEE_NBD].contains(&point.system))
}

/// A group and what was measured of it.
struct Entry {
    group: Box<dyn Group>,
    series: Vec<Series>,
    /// Why it is left out from now on.
    failure: Option<anyhow::Error>,
}

fn plan(arguments: &Arguments) -> Vec<Entry> {
    let entry = |group: Box<dyn Group>| {
        let wanted = |point: &Point| is_wanted(point, arguments.quick, &arguments.only);
        let points = group.points().into_iter().filter(wanted);
        let series: Vec<Series> = points.map(|point| Series { point, runs: vec![] }).collect();
        (!series.is_empty()).then_some(Entry { group, series, failure: None })
    };
    groups(arguments.quick).into_iter().filter_map(entry).collect()
}

impl Entry {
    /// Brings the group up, runs each of its loads once, and brings it down.
    fn take_turn(&mut self, settings: &Settings, seed: u64, tries: u32) -> Result<()> {
        let done = self.measure(settings, seed, tries);
        // Also after a failure: nothing may run beside the next group.
        let stopped = self.group.stop().with_context(|| format!("stop {}", self.group.what()));
        done.and(stopped)
    }

    fn measure(&mut self, settings: &Settings, seed: u64, tries: u32) -> Result<()> {
        self.group.start(settings).with_context(|| format!("start {}", self.group.what()))?;
        for one in &mut self.series {
            let run = undisturbed(&mut *self.group, settings, &one.point, (seed, tries))?;
            println!("    {:<32} {}", one.point.name(), summary(&run));
            one.runs.push(run);
        }
        Ok(())
    }

    /// The rows of what was measured so far.
    fn rows(&self) -> Vec<Row> {
        let date = machine::date();
        let measured = self.series.iter().filter(|one| !one.runs.is_empty());
        let row = |one: &Series| row::row(&Head { system: one.point.system.to_owned(), load: one.point.load }, &one.runs, &date);
        measured.map(row).collect()
    }
}

/// The first run without failed IO and much foreign CPU, or the best of several.
fn undisturbed(group: &mut dyn Group, settings: &Settings, point: &Point, (seed, tries): (u64, u32)) -> Result<Run> {
    let mut best: Option<Run> = None;
    for attempt in 0..tries {
        let run = group.run(settings, point, seed).with_context(|| format!("run {}", point.name()))?;
        let is_good = run.errors == 0 && run.foreign_cpu <= FOREIGN_MAX;
        let badness = |run: &Run| (run.errors > 0, run.foreign_cpu);
        if best.as_ref().is_none_or(|best| badness(&run) < badness(best)) {
            best = Some(run);
        }
        if is_good {
            break;
        }
        if attempt + 1 < tries {
            println!("    {}: disturbed, once more", point.name());
        }
    }
    best.context("no run was made")
}

fn summary(run: &Run) -> String {
    let cpu = run.cpu_total().map_or_else(|| "-".to_owned(), |us| format!("{us:.1}"));
    format!(
        "{:>10} IOPS  p50 {:>9.1}  p99 {:>9.1}  p99.9 {:>9.1} us  CPU {cpu:>8} us/IO  foreign {:>3.0} %{}",
        markdown::thousands(run.iops),
        run.p50_us,
        run.p99_us,
        run.p999_us,
        run.foreign_cpu * 100.0,
        if run.errors > 0 { "  FAILED IO" } else { "" },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use load::{RANDWRITE_D1, RANDWRITE_D32};
    use std::collections::VecDeque;

    struct Scripted(VecDeque<Run>);

    impl Group for Scripted {
        fn what(&self) -> &'static str {
            "a script"
        }
        fn points(&self) -> Vec<Point> {
            vec![]
        }
        fn start(&mut self, _: &Settings) -> Result<()> {
            Ok(())
        }
        fn run(&mut self, _: &Settings, _: &Point, _: u64) -> Result<Run> {
            self.0.pop_front().context("more runs than expected")
        }
        fn stop(&mut self) -> Result<()> {
            Ok(())
        }
    }

    fn best_of(runs: &[(f64, u64, f64)]) -> (f64, usize) {
        let run = |&(iops, errors, foreign_cpu): &(f64, u64, f64)| Run { iops, errors, foreign_cpu, ..Run::default() };
        let mut group = Scripted(runs.iter().map(run).collect());
        let here = PathBuf::from("/");
        let settings = Settings { size: 0, ramp: 0, runtime: 1, realtime: false, ogee: here.clone(), folder: here };
        let point = Point { system: "s", load: RANDWRITE_D32 };
        let best = undisturbed(&mut group, &settings, &point, (1, TRIES)).expect("a run");
        (best.iops, group.0.len())
    }

    #[test]
    fn a_disturbed_run_is_repeated_and_the_least_disturbed_kept() {
        assert_eq!(best_of(&[(1.0, 0, 0.1), (2.0, 0, 0.0)]), (1.0, 1), "the first was good");
        assert_eq!(best_of(&[(1.0, 0, 0.5), (2.0, 0, 0.2)]), (2.0, 0));
        assert_eq!(best_of(&[(1.0, 0, 0.5), (2.0, 0, 0.4), (3.0, 0, 0.6), (4.0, 0, 0.0)]), (2.0, 1));
        assert_eq!(best_of(&[(1.0, 3, 0.0), (2.0, 0, 0.6), (3.0, 1, 0.0)]), (2.0, 0));
    }

    #[test]
    fn words_choose_points() {
        let (point, other) = (Point { system: "ogee", load: RANDWRITE_D1 }, Point { system: "ogee-vhost", load: RANDWRITE_D1 });
        assert!(is_wanted(&point, true, &[]) && !is_wanted(&other, true, &[]) && is_wanted(&other, false, &[]));
        assert!(is_wanted(&point, false, &["randwrite-d1".to_owned()]) && !is_wanted(&point, false, &["ceph".to_owned()]));
        assert!(is_wanted(&point, false, &["ogee/".to_owned()]) && !is_wanted(&other, false, &["ogee/".to_owned()]));
    }

    #[test]
    fn one_word_chooses_all_that_is_compared_with_nbd_and_nothing_else() {
        let only = ["nbd".to_owned()];
        let all: Vec<Point> = groups(false).iter().flat_map(|group| group.points()).collect();
        let chosen: Vec<Point> = all.into_iter().filter(|point| is_wanted(point, false, &only)).collect();
        assert!(chosen.iter().all(|point| nbd_part::has(&Row { load: point.load.name.to_owned(), ..Row::default() })));
        let named = |system| chosen.iter().filter(|point| point.system == system).count();
        assert_eq!((named(ogee::OGEE_VHOST), named(ogee::OGEE_NBD), named(nbd::OGEE_NBD_FILE)), (2, 4, 2));
        assert_eq!((named(nbd::QEMU_NBD_FILE), named(nbd::QEMU_NBD_DIRECT), chosen.len()), (2, 2, 12));
    }
}
