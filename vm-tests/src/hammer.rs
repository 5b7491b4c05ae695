//! Verified load in a guest: it writes blocks of unique contents, flushes, reads back and compares, all past its own cache, and measures
//! its longest round. The test strikes in between and asks whether the guest goes on.
//!
//! Invariant: a load that met an error or a difference never goes on; every question about it then fails with what it met.

use crate::vm::Vm;
use crate::deadline::wait_for;
use anyhow::{Context, Result, ensure};
use std::time::Duration;

/// How long the guest may pause at all. What a test allows is checked by itself, with [`Hammer::longest_round`].
const GO_ON_LIMIT: Duration = Duration::from_secs(180);
/// Rounds until a pause is certainly over and counted.
const ROUNDS: u64 = 4;

/// The load in one guest.
#[derive(Debug)]
pub struct Hammer(());

impl Hammer {
    /// Starts the load in `vm`, whose blocks contain `key`, and waits for its first rounds.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(vm: &mut Vm, key: &str) -> Result<Self> {
        vm.put_file("/tmp/hammer.sh", include_str!("../scripts/guest-hammer.sh"))?;
        vm.put_file("/tmp/check.sh", include_str!("../scripts/guest-check.sh"))?;
        vm.spawn(&format!("sh /tmp/hammer.sh {key}"))?;
        let hammer = Self(());
        hammer.goes_on(vm)?;
        Ok(hammer)
    }

    /// Waits until the load has completed some more rounds.
    ///
    /// # Errors
    /// When it met an error or a difference, or stands still for three minutes.
    pub fn goes_on(&self, vm: &mut Vm) -> Result<()> {
        self.goes_on_within(vm, GO_ON_LIMIT)
    }

    /// As [`Hammer::goes_on`], for a pause that may be longer.
    ///
    /// # Errors
    /// When it met an error or a difference, or stands still for `limit`.
    pub fn goes_on_within(&self, vm: &mut Vm, limit: Duration) -> Result<()> {
        let from = self.rounds(vm)?;
        wait_for("the guest's verified writes go on", limit, || Ok((self.rounds(vm)? >= from + ROUNDS).then_some(())))
    }

    /// Rounds completed.
    ///
    /// # Errors
    /// When the load met an error or a difference.
    pub fn rounds(&self, vm: &mut Vm) -> Result<u64> {
        Self::number(vm, "/tmp/round")
    }

    /// The longest round so far: one write with flush and the read back, including the guest's own work.
    ///
    /// # Errors
    /// When the load met an error or a difference.
    pub fn longest_round(&self, vm: &mut Vm) -> Result<Duration> {
        Ok(Duration::from_millis(Self::number(vm, "/tmp/worst")? * 10))
    }

    /// Ends the load, reads everything once more and checks that the guest's kernel saw no error; gives the longest round.
    ///
    /// # Errors
    /// When anything differs or went wrong.
    pub fn finish(self, vm: &mut Vm) -> Result<Duration> {
        self.stop(vm)?;
        self.verify(vm)?;
        let errors = vm.disk_errors()?;
        ensure!(errors.is_empty(), "the guest's kernel complains: {errors}");
        self.longest_round(vm)
    }

    /// Lets the load end after its present round.
    ///
    /// # Errors
    /// When it does not end.
    pub fn stop(&self, vm: &mut Vm) -> Result<()> {
        vm.run_ok("touch /tmp/stop")?;
        // A round may have to wait for a daemon that was killed in it.
        vm.wait_until("test -f /tmp/over", 3 * GO_ON_LIMIT)
    }

    /// Reads everything the stopped load has written, past the guest's cache.
    ///
    /// # Errors
    /// When anything differs.
    pub fn verify(&self, vm: &mut Vm) -> Result<()> {
        let differences = vm.run_ok("sh /tmp/check.sh")?;
        ensure!(differences.is_empty(), "the disk does not hold what the guest wrote: {differences}");
        Ok(())
    }

    fn number(vm: &mut Vm, path: &str) -> Result<u64> {
        let said = vm.run(&format!("cat /tmp/bad 2>/dev/null || cat {path} 2>/dev/null || echo 0"))?.output;
        said.trim().parse().with_context(|| format!("the guest's verified load met an error: {}", said.trim()))
    }
}
