//! `ogee bench`: puts load on volumes and says what came of it.
//!
//! | file | what |
//! | --- | --- |
//! | `args.rs` | the arguments |
//! | `target.rs`, `sdk_target.rs` | what is loaded; a volume through the SDK |
//! | `vhost_target.rs` | a vhost-user-blk device, without a virtual machine |
//! | `nbd_target.rs` | an NBD export |
//! | `plan.rs` | which IO comes next |
//! | `job.rs`, `phase.rs` | the load loop; its threads |
//! | `pattern.rs`, `ledger.rs`, `verifier.rs` | `--verify`: what is written, what may be there, what was found |
//! | `tally.rs` | counts and latencies |
//! | `procs.rs`, `scrape.rs` | CPU, memory and disk bytes of processes; flushes and bytes from `/metrics` |
//! | `live.rs` | the line on the terminal |
//! | `report.rs` | table and JSON |
//!
//! Invariants: what is measured lies between two samples that are taken while the load runs; the report is printed even
//! if IO failed, and the exit code says so; volumes are given back at the end.

mod args;
mod job;
mod ledger;
mod live;
mod nbd_target;
mod pattern;
mod phase;
mod plan;
mod procs;
mod report;
mod scrape;
mod sdk_target;
mod tally;
mod target;
mod verifier;
mod vhost_target;

pub(crate) use args::{BenchArgs, EXAMPLES};

use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use crate::open::{close_volume, open_volume};
use crate::sdk_error::call_failed;
use crate::signals::StopSignals;
use job::{JobSpec, Region};
use nbd_target::NbdSource;
use ogee_client::{Cluster, OpenMode, Volume};
use ogee_common::name::VolumeRef;
use ogee_common::rng;
use ogee_common::size::ByteLen;
use ogee_proto::mds as m;
use phase::{Outcome, Phase, Timing};
use plan::{Blocks, Order, Plan, Verb};
use procs::Process;
use report::{ByProcess, Report};
use scrape::{Amplification, Flushes, Observation};
use sdk_target::SdkSource;
use std::path::Path;
use std::sync::Arc;
use target::Source;
use verifier::Verifier;
use vhost_target::{VhostOptions, VhostSource};

/// IOs in flight of each volume while it is filled or read back.
const SWEEP_DEPTH: usize = 16;
/// Bytes of an IO while a volume is filled or read back, unless a block is larger.
const SWEEP_BYTES: u64 = 1 << 20;

/// Carries out `ogee bench`.
///
/// # Errors
/// Wrong arguments, a volume that cannot be opened; after the report also IO that failed and data that was wrong.
pub(crate) async fn run(context: &Context, args: BenchArgs) -> Result<(), CliError> {
    args.validate()?;
    let mut signals = StopSignals::listen()?;
    if let Some(socket) = &args.vhost_socket {
        return measure_vhost(context, &args, socket, &mut signals).await;
    }
    if let Some(socket) = &args.nbd_socket {
        return measure_nbd(context, &args, socket, &mut signals).await;
    }
    let cluster = context.cluster(Some(args.io_timeout()))?;
    let mut volumes = Vec::with_capacity(args.volumes.len());
    let mut done = Ok(());
    for name in &args.volumes {
        let mode = if args.is_read_only() { OpenMode::ReadOnly } else { OpenMode::ReadWrite { steal: false } };
        match open_volume(&cluster, name, mode).await {
            Ok(volume) => volumes.push(volume),
            Err(error) => {
                done = Err(error);
                break;
            }
        }
    }
    if done.is_ok() {
        done = measure(context, &args, &cluster, &volumes, &mut signals).await;
    }
    for volume in &volumes {
        done = done.and(close_volume(volume).await);
    }
    done
}

async fn measure(
    context: &Context, args: &BenchArgs, cluster: &Cluster, volumes: &[Volume], signals: &mut StopSignals,
) -> Result<(), CliError> {
    let processes = processes(context, args)?;
    let replicas = replicas(cluster, &args.volumes[0]).await?;
    let sources: Vec<_> =
        args.volumes.iter().zip(volumes).map(|(n, v)| SdkSource { name: n.to_string(), device: v.clone() }).collect();
    let bench = Bench::new(args, sources, context.out.is_json())?;
    let report = bench.run(&processes, replicas, signals).await?;
    show(context, report)
}

/// The same on a device that somebody serves at a socket.
async fn measure_vhost(
    context: &Context, args: &BenchArgs, socket: &Path, signals: &mut StopSignals,
) -> Result<(), CliError> {
    let processes = processes(context, args)?;
    let sweeps = args.prefill || args.verify;
    let depth = if sweeps { SWEEP_DEPTH.max(args.iodepth as usize) } else { args.iodepth as usize };
    let io_bytes = if sweeps { SWEEP_BYTES.max(args.bs) } else { args.bs };
    let source = VhostSource::connect(&VhostOptions {
        socket: socket.to_owned(),
        num_queues: args.num_queues(),
        depth: u16::try_from(depth).unwrap_or(u16::MAX),
        io_bytes_max: usize::try_from(io_bytes).expect("an IO is bounded by IO_BYTES_MAX"),
    })?;
    let bench = Bench::new(args, vec![source], context.out.is_json())?;
    let mut report = bench.run(&processes, 1, signals).await?;
    (report.system, report.volumes) = ("vhost-user-blk", 1);
    show(context, report)
}

/// The same on an NBD export at a socket.
async fn measure_nbd(context: &Context, args: &BenchArgs, socket: &Path, signals: &mut StopSignals) -> Result<(), CliError> {
    let processes = processes(context, args)?;
    let io_bytes = usize::try_from(args.bs).expect("an IO is bounded by IO_BYTES_MAX");
    let source = NbdSource::connect(socket, &args.nbd_export, io_bytes)?;
    let bench = Bench::new(args, vec![source], context.out.is_json())?;
    let mut report = bench.run(&processes, 1, signals).await?;
    (report.system, report.volumes) = ("nbd", 1);
    show(context, report)
}

/// Prints the report; IO that failed and data that was wrong make the exit code.
fn show(context: &Context, report: Report) -> Result<(), CliError> {
    context.out.result(&report, Report::text)?;
    match report.errors {
        0 => Ok(()),
        n => {
            let first = report.first_error.unwrap_or_default();
            Err(CliError::new(ErrorKind::Failure, format!("{n} errors; the first: {first}")))
        }
    }
}

/// Whose CPU is counted: this process, those named, and those of a dev cluster.
fn processes(context: &Context, args: &BenchArgs) -> Result<Vec<Process>, CliError> {
    let mut all = vec![Process { name: "bench".to_owned(), pid: std::process::id(), metrics: None }];
    all.extend(args.pids.iter().cloned());
    if let Some(dir) = context.dev_cluster() {
        for daemon in crate::dev::processes(&dir)? {
            if !all.iter().any(|p| p.pid == daemon.pid) {
                all.push(Process { name: daemon.name, pid: daemon.pid, metrics: daemon.metrics });
            }
        }
    }
    Ok(all)
}

/// Replicas of the volume's pool.
async fn replicas(cluster: &Cluster, volume: &VolumeRef) -> Result<u32, CliError> {
    let failed = |e| call_failed(&format!("find the pool of {volume}"), &e);
    let request = m::StatVolumeRequest { path: volume.path.to_string() };
    let volume = cluster.mds().stat_volume(request).await.map_err(failed)?;
    let pools = cluster.mds().list_pools().await.map_err(failed)?;
    let pool = pools.pools.iter().find(|p| p.id == volume.pool);
    Ok(pool.map_or(ogee_common::limits::REPLICAS_DEFAULT, |p| p.replicas))
}

/// A benchmark of any kind of device.
pub(crate) struct Bench<'a, S> {
    args: &'a BenchArgs,
    sources: Vec<S>,
    regions: Vec<Region>,
    verifiers: Vec<Option<Arc<Verifier>>>,
    quiet: bool,
}

impl<'a, S: Source> Bench<'a, S> {
    /// For these devices.
    ///
    /// # Errors
    /// The working set does not fit a device ([`ErrorKind::Usage`]).
    pub(crate) fn new(args: &'a BenchArgs, sources: Vec<S>, quiet: bool) -> Result<Self, CliError> {
        let regions: Vec<Region> = sources.iter().map(|s| region(args, s)).collect::<Result<_, _>>()?;
        let run = rng::nonzero_u64();
        let verifier = |(volume, region): (u64, &Region)| {
            let blocks = usize::try_from(region.blocks).unwrap_or(usize::MAX);
            args.verify.then(|| Arc::new(Verifier::new(run, volume, blocks)))
        };
        let verifiers = (0u64..).zip(&regions).map(verifier).collect();
        Ok(Self { args, sources, regions, verifiers, quiet })
    }

    /// Fills, loads, reads back, and reports.
    ///
    /// # Errors
    /// A device cannot be opened, or somebody interrupted.
    #[allow(clippy::cast_precision_loss)] // figures for people
    pub(crate) async fn run(
        &self, processes: &[Process], replicas: u32, signals: &mut StopSignals,
    ) -> Result<Report, CliError> {
        let nothing = || std::future::ready(());
        let look = || Observation::take(processes);
        let timing = Timing { ramp: self.args.ramp(), runtime: self.args.runtime() };
        let filled = match self.args.prefill {
            true => Some(self.phase("prefill", Timing::SWEEP, signals).run(self.sweep(Verb::Write), nothing).await?),
            false => None,
        };
        let load = self.phase(self.args.rw.as_str(), timing, signals).run(self.load(), look).await?;
        let read_back = match self.args.verify {
            true => Some(self.phase("read back", Timing::SWEEP, signals).run(self.sweep(Verb::Read), nothing).await?),
            false => None,
        };
        let mut report = self.report(&load, processes, replicas);
        for sweep in [filled, read_back].into_iter().flatten() {
            report.errors += sweep.tally.errors;
            report.first_error = report.first_error.or(sweep.tally.first_error);
        }
        for (source, verifier) in self.sources.iter().zip(&self.verifiers) {
            let Some((checked, wrong, first)) = verifier.as_ref().map(|v| v.found()) else { continue };
            *report.verified_blocks.get_or_insert(0) += checked;
            report.errors += wrong;
            let first = first.map(|mismatch| format!("{}: {mismatch}", source.name()));
            report.first_error = report.first_error.or(first);
        }
        Ok(report)
    }

    fn phase<'s>(&self, what: &'static str, timing: Timing, signals: &'s mut StopSignals) -> Phase<'s> {
        Phase { what, quiet: self.quiet, threads: self.args.threads.into(), timing, signals }
    }

    /// The jobs of the load.
    fn load(&self) -> Vec<JobSpec<S>> {
        let (args, mix) = (self.args, self.args.mix());
        let mut jobs = Vec::new();
        for (i, source) in self.sources.iter().enumerate() {
            for job in 0..u64::from(args.numjobs) {
                let region = self.regions[i];
                let blocks = match mix.order {
                    Order::Random => region.all(),
                    Order::Sequential => share(region.blocks, job, args.numjobs.into()),
                };
                let seed = args.seed ^ (i as u64).rotate_left(32) ^ job.rotate_left(48);
                jobs.push(JobSpec {
                    source: source.clone(),
                    plan: Plan::load(mix, blocks, seed),
                    region,
                    depth: args.iodepth as usize,
                    stride: 1,
                    seed,
                    verifier: self.verifiers[i].clone(),
                });
            }
        }
        jobs
    }

    /// One job for each volume that writes or reads every block once.
    fn sweep(&self, verb: Verb) -> Vec<JobSpec<S>> {
        let job = |(i, source): (usize, &S)| {
            let region = self.regions[i];
            let stride = (SWEEP_BYTES / region.block_bytes as u64).max(1);
            JobSpec {
                source: source.clone(),
                plan: Plan::sweep(verb, region.all(), stride),
                region,
                depth: SWEEP_DEPTH,
                stride,
                seed: self.args.seed ^ i as u64,
                verifier: self.verifiers[i].clone(),
            }
        };
        self.sources.iter().enumerate().map(job).collect()
    }

    #[allow(clippy::cast_precision_loss)] // figures for people
    fn report(&self, load: &Outcome<Observation>, processes: &[Process], replicas: u32) -> Report {
        let all = load.tally.all().row(load.seconds);
        let mut report = Report::new(self.args, all, load.seconds);
        let row = |verb| load.tally.row(verb, load.seconds);
        (report.read, report.write) = (row(Verb::Read), row(Verb::Write));
        (report.discard, report.flush) = (row(Verb::Discard), row(Verb::Flush));
        (report.errors, report.first_error) = (load.tally.errors, load.tally.first_error.clone());
        if let Some((first, last)) = &load.observed {
            let by = ByProcess::between(processes, &first.sample, &last.sample, all.ios);
            let writes = report.write.map_or(0, |w| w.ios) * u64::from(replicas);
            let bytes = writes * self.args.bs;
            if let Some(did) = Observation::between(processes, first, last) {
                report.flushes_per_1000_of = Flushes::of(&did, writes);
                report.flushes_per_1000 = report.flushes_per_1000_of.map(|f| f.sum());
                report.write_amplification_of = Amplification::of(&did, bytes);
            }
            report.write_amplification = report.write_amplification_of.map(|a| a.sum());
            report.set_processes(by);
        }
        report
    }
}

/// Where a device is used.
fn region(args: &BenchArgs, source: &impl Source) -> Result<Region, CliError> {
    let size = source.size_bytes();
    let room = size.saturating_sub(args.offset);
    let used = args.size.unwrap_or(room);
    let blocks = used / args.bs;
    if used > room || blocks < u64::from(args.numjobs) {
        let (name, size, offset) = (source.name(), ByteLen(size), ByteLen(args.offset));
        let text = format!("{name} has {size}; {} from {offset} on do not fit or hold no block for each job", ByteLen(used));
        return Err(CliError::new(ErrorKind::Usage, text));
    }
    let block_bytes = usize::try_from(args.bs).expect("an IO is bounded by IO_BYTES_MAX");
    Ok(Region { offset: args.offset, block_bytes, blocks })
}

/// The part of the blocks that one of several sequential jobs has.
fn share(blocks: u64, job: u64, jobs: u64) -> Blocks {
    let (from, to) = (blocks * job / jobs, blocks * (job + 1) / jobs);
    Blocks { first: from, count: to - from }
}

#[cfg(test)]
mod tests;
