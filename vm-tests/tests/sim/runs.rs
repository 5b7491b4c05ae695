//! Many seeds: each in a process of its own, several at a time; canaries; the words of the command line.
//!
//! `one SEED [CANARY]` runs one world here; `--seeds N [--from M] [--jobs J] [--canary NAME]` runs many; without words: what CI runs.

use crate::faults::Faults;
use crate::world;
use anyhow::{Context, Result, bail, ensure};
use ogee_common::sim::Canary;
use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Seeds of a run in CI, and those within which each canary must be found.
const SEEDS: u64 = 200;
/// The canaries, by name.
const CANARIES: [(&str, Canary); 5] = [
    ("ack-before-flush", Canary::AckBeforeFlush),
    ("skip-fence", Canary::SkipFence),
    ("forget-row", Canary::ForgetRow),
    ("ignore-lease", Canary::IgnoreLease),
    ("early-hold", Canary::EarlyHold),
];

fn canary(name: &str) -> Result<Canary> {
    let found = CANARIES.iter().find(|(known, _)| *known == name);
    found.map(|(_, canary)| *canary).with_context(|| format!("no canary {name:?}; there are {:?}", CANARIES.map(|(n, _)| n)))
}

/// Reads the command line and does it.
///
/// # Errors
/// A violation; a canary that was not found.
pub(crate) fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.iter().any(|w| w == "--list") {
        println!("sim: test");
        return Ok(());
    }
    if words.first().is_some_and(|w| w == "one") {
        let seed = words.get(1).context("one: which seed?")?.parse().context("one: the seed is a number")?;
        return one(seed, words.get(2).map(|name| canary(name)).transpose()?);
    }
    let number = |name: &str, default: u64| -> Result<u64> {
        let at = words.iter().position(|w| w == name);
        let value = at.and_then(|i| words.get(i + 1));
        value.map_or(Ok(default), |v| v.parse().with_context(|| format!("{name}: {v:?} is no number")))
    };
    let jobs = number("--jobs", 2)?;
    let (from, seeds) = (number("--from", 1)?, number("--seeds", SEEDS)?);
    let chosen = words.iter().position(|w| w == "--canary").and_then(|i| words.get(i + 1));
    if let Some(name) = chosen {
        canary(name)?;
        return find(name, from, seeds, jobs).map(|seed| println!("canary {name}: found by seed {seed}"));
    }
    let traces = many(from, seeds, jobs)?;
    if words.iter().any(|w| w == "--seeds") {
        return Ok(());
    }
    let (seed, first) = traces.first_key_value().context("no seed ran")?;
    let again = start(*seed, None)?;
    ensure!(trace_of(&again.1) == Some(*first), "seed {seed} does not repeat itself");
    for (name, _) in CANARIES {
        println!("canary {name}: found by seed {}", find(name, 1, SEEDS, jobs)?);
    }
    Ok(())
}

/// One world, in this process.
fn one(seed: u64, canary: Option<Canary>) -> Result<()> {
    let filter = std::env::var("RUST_LOG").is_ok();
    if filter {
        tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).with_writer(std::io::stderr).init();
    }
    let memory = std::path::Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let root = tempfile::Builder::new().prefix("ogee-sim-").tempdir_in(parent).context("make a folder")?;
    let path = root.path().to_owned();
    let thread = std::thread::Builder::new().name("sim".to_owned()).stack_size(64 << 20).spawn(move || {
        let mut faults = Faults::default();
        let result = world::run(seed, canary, &path, &mut faults);
        (result, faults.log)
    })?;
    let Ok((result, log)) = thread.join() else { bail!("the simulation itself panicked") };
    match result {
        Ok(shown) => {
            println!("trace {:016x} operations {} cuts {} ms {} faults {:?}", shown.trace, shown.operations, shown.cuts, shown.steps, shown.faults);
            Ok(())
        }
        Err(error) => {
            println!("faults:\n  {}", log.join("\n  "));
            if std::env::var("OGEE_SIM_KEEP").is_ok() {
                println!("kept {}", root.keep().display());
            }
            Err(error)
        }
    }
}

/// Runs a seed in a process of its own: whether it held, and what was said.
fn start(seed: u64, canary: Option<&str>) -> Result<(bool, String)> {
    let program = std::env::current_exe().context("find this program")?;
    let mut command = Command::new(program);
    command.arg("one").arg(seed.to_string()).args(canary).stdin(Stdio::null()).env("RUST_BACKTRACE", "0");
    let done = command.output().context("start a simulation")?;
    let text = format!("{}{}", String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
    Ok((done.status.success(), text))
}

fn trace_of(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with("trace "))?;
    u64::from_str_radix(line.split(' ').nth(1)?, 16).ok()
}

/// Runs seeds until all are done or one of them ends the search.
fn each(from: u64, seeds: u64, jobs: u64, canary: Option<&str>, see: &(dyn Fn(u64, bool, &str) -> bool + Sync)) -> Result<()> {
    let next = AtomicU64::new(from);
    let work = || -> Result<()> {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= from + seeds {
                return Ok(());
            }
            let (held, text) = start(seed, canary)?;
            if !see(seed, held, &text) {
                next.store(from + seeds, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|w| w.join().unwrap_or_else(|_| bail!("a worker panicked")))
    })
}

/// Runs seeds that must hold; the traces by seed.
fn many(from: u64, seeds: u64, jobs: u64) -> Result<BTreeMap<u64, u64>> {
    let failed = Mutex::new(BTreeMap::new());
    let traces = Mutex::new(BTreeMap::new());
    let (operations, done) = (AtomicU64::new(0), AtomicU64::new(0));
    each(from, seeds, jobs, None, &|seed, held, text| {
        if let Some(trace) = trace_of(text).filter(|_| held) {
            traces.lock().unwrap_or_else(PoisonError::into_inner).insert(seed, trace);
            let count = text.split("operations ").nth(1).and_then(|t| t.split(' ').next()).and_then(|t| t.parse().ok());
            operations.fetch_add(count.unwrap_or(0), Ordering::Relaxed);
        } else {
            println!("seed {seed} failed; replay: make sim SEED={seed}\n{text}");
            failed.lock().unwrap_or_else(PoisonError::into_inner).insert(seed, ());
        }
        let n = done.fetch_add(1, Ordering::Relaxed) + 1;
        if n.is_multiple_of(50) {
            println!("{n} seeds, {} operations", operations.load(Ordering::Relaxed));
        }
        true
    })?;
    let failed: Vec<u64> = failed.into_inner().unwrap_or_else(PoisonError::into_inner).into_keys().collect();
    ensure!(failed.is_empty(), "{} of {seeds} seeds failed: {failed:?}", failed.len());
    println!("{seeds} seeds from {from}: no violation in {} operations", operations.into_inner());
    Ok(traces.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// The first seed that finds a planted bug.
fn find(name: &str, from: u64, seeds: u64, jobs: u64) -> Result<u64> {
    let found = Mutex::new(None);
    each(from, seeds, jobs, Some(name), &|seed, held, text| {
        if !held {
            println!("{}", text.lines().find(|l| l.starts_with("Error")).unwrap_or_default());
            *found.lock().unwrap_or_else(PoisonError::into_inner) = Some(seed);
        }
        held
    })?;
    let found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
    let seed = found.with_context(|| format!("canary {name} was not found by {seeds} seeds"))?;
    let (held, text) = start(seed, None)?;
    ensure!(held, "seed {seed} fails without the canary {name} as well\n{text}");
    Ok(seed)
}
