//! A short torture of real processes: `vm-tests/src/torture` says what happens. `OGEE_SEED` chooses the scenario, `OGEE_TORTURE_SECONDS` the
//! length. It has a `main` of its own because clients and the administrator are this program too.

use anyhow::{Context, Result, ensure};
use ogee_vm_tests::torture::{Options, play, run};
use std::time::Duration;

fn variable(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}={text} is not a number")),
        Err(_) => Ok(default),
    }
}

fn main() -> Result<()> {
    if play()? {
        return Ok(());
    }
    if std::env::args().any(|word| word == "--list") {
        println!("torture: test");
        return Ok(());
    }
    let options = Options { seed: variable("OGEE_SEED", 1)?, length: Duration::from_secs(variable("OGEE_TORTURE_SECONDS", 45)?) };
    println!("torture with seed {} for {:?}", options.seed, options.length);
    let outcome = run(options)?;
    println!("{:?}\nfaults: {:?}\n{:?}", outcome.checked, outcome.faults, outcome.said);
    ensure!(outcome.checked.operations > 500, "the load did not get going");
    ensure!(outcome.checked.cuts > 0, "no snapshot was seen");
    ensure!(outcome.faults.values().sum::<u32>() > 5, "hardly any fault was injected");
    Ok(())
}
