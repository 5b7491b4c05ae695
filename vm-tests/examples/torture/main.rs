//! Torture of real processes: `cargo run --release --example torture -- --minutes 20 --seed 1`. What happens is in
//! `vm-tests/src/torture`. Needs root, and the `ogee` binary in the same build folder (`OGEE_BIN` names another).

use anyhow::Result;
use clap::Parser;
use ogee_vm_tests::torture::{Options, check_folder, play, run};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// Tortures a cluster of real processes and checks everything that clients saw.
#[derive(Debug, Parser)]
struct Args {
    /// First seed; each further run takes the next
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Minutes of faults in one run
    #[arg(long, default_value_t = 20.0)]
    minutes: f64,
    /// Seconds of faults in one run, instead of minutes
    #[arg(long)]
    seconds: Option<u64>,
    /// Runs
    #[arg(long, default_value_t = 1)]
    runs: u64,
    /// Only check the histories of a folder that an earlier run kept
    #[arg(long)]
    check: Option<PathBuf>,
}

fn main() -> Result<()> {
    if play()? {
        return Ok(());
    }
    let args = Args::parse();
    if let Some(folder) = args.check {
        println!("{:?}", check_folder(&folder)?);
        return Ok(());
    }
    let length = args.seconds.map_or(Duration::from_secs_f64(args.minutes * 60.0), Duration::from_secs);
    let (mut failed, mut operations, mut faults) = (0, 0, BTreeMap::<&str, u32>::new());
    for seed in args.seed..args.seed + args.runs {
        println!("seed {seed}, {length:?}");
        match run(Options { seed, length }) {
            Ok(outcome) => {
                println!("seed {seed}: {:?}\n  faults {:?}\n  {}", outcome.checked, outcome.faults, outcome.said.join("; "));
                operations += outcome.checked.operations;
                outcome.faults.into_iter().for_each(|(kind, count)| *faults.entry(kind).or_default() += count);
            }
            Err(error) => {
                failed += 1;
                println!("FAILED {error:#}");
            }
        }
    }
    println!("{} runs, {failed} failed, {operations} operations checked, faults {faults:?}", args.runs);
    anyhow::ensure!(failed == 0, "{failed} of {} runs failed", args.runs);
    Ok(())
}
