//! Runs a load generator to its end and counts what it and the system under test used meanwhile.
//!
//! Invariants: the counters are read just before the generator starts and just after it has ended, for every system alike; what it
//! used is divided by all IOs, those of the ramp included, which are taken to be as many per second as the measured ones.

use crate::load::Load;
use crate::row::{CLIENT, DiskCount, Run, TOTAL};
use crate::usage::{Moment, Process, Used, rss_bytes};
use anyhow::{Context, Result, ensure};
use ogee_vm_tests::process::tied;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What holds for all runs.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Bytes of the working set.
    pub(crate) size: u64,
    /// Seconds before anything counts.
    pub(crate) ramp: u32,
    /// Seconds that count.
    pub(crate) runtime: u32,
    /// Whether measured processes run at real-time priority.
    pub(crate) realtime: bool,
    /// The `ogee` command.
    pub(crate) ogee: PathBuf,
    /// Where all data of all systems lies.
    pub(crate) folder: PathBuf,
}

/// The priority of measured processes, as `chrt` wants it.
const REALTIME: [&str; 2] = ["-r", "1"];

/// Whether this user may have real-time priority.
#[must_use]
pub(crate) fn realtime_is_permitted() -> bool {
    let tried = Command::new("chrt").args(REALTIME).arg("true").stderr(Stdio::null()).status();
    tried.is_ok_and(|status| status.success())
}

/// What one load is run against.
pub(crate) struct Subject<'a> {
    /// The processes of the system.
    pub(crate) processes: &'a [Process],
    /// Copies that the system writes of every byte to the disk; 0: it writes nothing.
    pub(crate) replicas: u32,
}

impl Settings {
    /// Gives running processes real-time priority, if that is wanted.
    ///
    /// # Errors
    /// One of them is gone.
    pub(crate) fn raise(&self, processes: &[Process]) -> Result<()> {
        for process in processes.iter().filter(|_| self.realtime) {
            // -a: all of its threads; those it starts later have it from them.
            let status = Command::new("chrt").args(["-a", "-p", "-r", "1"]).arg(process.pid.to_string()).status();
            ensure!(status.context("run chrt")?.success(), "real-time priority for {} refused", process.name);
        }
        Ok(())
    }

    fn command(&self, program: &Path) -> Command {
        if !self.realtime {
            return tied(program);
        }
        let mut command = tied("chrt");
        command.args(REALTIME).arg(program);
        command
    }

    /// Runs a generator; gives what it printed and what was used.
    ///
    /// # Errors
    /// It, or a process of the system, ended with an error.
    fn run(&self, program: &Path, configure: impl FnOnce(&mut Command), subject: &Subject<'_>) -> Result<(String, Used)> {
        let mut command = self.command(program);
        configure(&mut command);
        // What earlier loads left in the page cache is not this one's, and what this one leaves there is.
        self.sync()?;
        let before = Moment::now(subject.processes, &self.folder)?;
        let output = command.stdin(Stdio::null()).output().with_context(|| format!("run {}", program.display()))?;
        let mut after = Moment::now(subject.processes, &self.folder)?;
        self.sync()?;
        after.count_disk_again(&self.folder);
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr);
        // Failed IO is in the report; without a report there was no run.
        ensure!(stdout.contains('{'), "{} ended with {}: {stderr}{stdout}", program.display(), output.status);
        if !output.status.success() {
            eprintln!("    {} ended with {}: {}", program.display(), output.status, stderr.trim());
        }
        Ok((stdout, Used::between(&before, &after)))
    }

    /// Has everything written that the page cache holds for the file system of the data.
    fn sync(&self) -> Result<()> {
        let status = Command::new("sync").arg("-f").arg(&self.folder).status().context("run sync")?;
        ensure!(status.success(), "sync ended with {status}");
        Ok(())
    }

    /// Runs fio.
    ///
    /// # Errors
    /// It cannot be run or answers nothing that can be read.
    pub(crate) fn fio(&self, job: &crate::fio::FioJob, subject: &Subject<'_>, env: &[(&str, String)]) -> Result<Run> {
        let configure = |command: &mut Command| {
            command.args(job.arguments()).envs(env.iter().cloned());
        };
        let (answer, used) = self.run(Path::new("fio"), configure, subject)?;
        let run = crate::fio::parse(&answer, &job.load)?;
        Ok(self.complete(run, &job.load, &used, subject))
    }

    /// Runs `ogee bench` on what `target` names: a volume, or a socket.
    ///
    /// # Errors
    /// It cannot be run or answers nothing that can be read.
    pub(crate) fn ogee_bench(&self, load: &Load, seed: u64, target: &[String], subject: &Subject<'_>) -> Result<Run> {
        let has_socket = target.iter().any(|word| SOCKETS.contains(&word.as_str()));
        let configure = |command: &mut Command| {
            command.args(["bench", "--json", "--rw", load.pattern.rw()]).args(target);
            let numbers = [("--bs", u64::from(load.block_bytes)), ("--iodepth", load.depth.into()),
                ("--numjobs", load.jobs.into()), ("--size", self.size), ("--ramp", self.ramp.into()),
                ("--runtime", self.runtime.into()), ("--seed", seed)];
            for (name, value) in numbers {
                command.args([name, &value.to_string()]);
            }
            let pids: Vec<String> = subject.processes.iter().map(|p| format!("{}={}", p.name, p.pid)).collect();
            if has_socket && !pids.is_empty() {
                command.args(["--pids", &pids.join(",")]);
            }
        };
        let (answer, used) = self.run(&self.ogee, configure, subject)?;
        let mut run = parse_ogee(&answer)?;
        if has_socket {
            // Behind a socket it knows neither replicas nor daemons.
            run.flushes_per_1000 = None;
        }
        let own_count = run.cpu_total();
        let run = self.complete(run, load, &used, subject);
        if let (Some(own), Some(total)) = (own_count, run.cpu_total())
            && (own - total).abs() > 0.15 * total
        {
            eprintln!("    CPU per IO: {total:.1} us by our count, {own:.1} us by that of ogee bench");
        }
        Ok(run)
    }

    /// Puts what was used into a run.
    #[allow(clippy::cast_precision_loss)] // figures for people
    fn complete(&self, mut run: Run, load: &Load, used: &Used, subject: &Subject<'_>) -> Run {
        let ios = (run.iops * (run.seconds + f64::from(self.ramp))).max(1.0);
        run.cpu_us_per_io = used.processes_us.iter().map(|(name, us)| (name.clone(), *us as f64 / ios)).collect();
        run.cpu_us_per_io.insert(CLIENT.to_owned(), used.client_us as f64 / ios);
        run.cpu_us_per_io.insert(TOTAL.to_owned(), (used.client_us + used.daemons_us()) as f64 / ios);
        run.foreign_cpu = used.foreign;
        run.rss_bytes = rss_bytes(subject.processes).filter(|bytes| *bytes > 0);
        if load.pattern.writes() && subject.replicas > 0 {
            let copies = ios * f64::from(subject.replicas);
            run.disk = used.disk.map(|disk| DiskCount {
                flushes_per_1000: disk.flushes as f64 * 1000.0 / copies,
                write_amplification: disk.written_bytes as f64 / (copies * f64::from(load.block_bytes)),
            });
            run.flushes_per_1000 = run.flushes_per_1000.or(run.disk.map(|d| d.flushes_per_1000));
            // The kernel's count by process is too high: a small write to a large folio counts as all of the folio.
            run.write_amplification = run.disk.map(|d| d.write_amplification);
        }
        run
    }
}

/// Options of `ogee bench` that name a socket in place of a volume.
const SOCKETS: [&str; 2] = ["--vhost-socket", "--nbd-socket"];
/// What flushes and bytes were for, as `ogee bench` knows it from the daemons; passed on as it is.
const PARTS: [&str; 2] = ["flushes_per_1000_of", "write_amplification_of"];

/// The answer of `ogee bench --json`.
fn parse_ogee(text: &str) -> Result<Run> {
    let answer: Value = serde_json::from_str(text.trim()).with_context(|| format!("ogee bench answered {text:?}"))?;
    let figure = |key: &str| answer[key].as_f64().with_context(|| format!("ogee bench's answer has no {key}: {text}"));
    let total = answer["cpu_us_per_io"][TOTAL].as_f64();
    let part = |key: &&str| {
        let value = answer.get(*key).filter(|value| !value.is_null())?;
        Some(((*key).to_owned(), value.clone()))
    };
    Ok(Run {
        iops: figure("iops")?,
        mean_us: figure("mean_us")?,
        p50_us: figure("p50_us")?,
        p99_us: figure("p99_us")?,
        p999_us: figure("p999_us")?,
        max_us: figure("max_us")?,
        errors: answer["errors"].as_u64().context("ogee bench's answer has no errors")?,
        seconds: figure("seconds")?,
        cpu_us_per_io: total.map(|us| (TOTAL.to_owned(), us)).into_iter().collect(),
        flushes_per_1000: answer["flushes_per_1000"].as_f64(),
        parts: PARTS.iter().filter_map(part).collect(),
        ..Run::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::RANDWRITE_D32;
    use crate::usage::Disk;

    const ANSWER: &str = r#"{"system":"ogee","load":"randwrite","block_bytes":4096,"depth":32,"jobs":1,"volumes":1,"ios":80000,
        "iops":10000.0,"mean_us":3000.0,"p50_us":2900.0,"p99_us":9000.0,"p999_us":12000.0,"max_us":20000.0,
        "cpu_us_per_io":{"bench":10.0,"total":110.0},"flushes_per_1000":90.0,"flushes_per_1000_of":{"log":80.0},
        "write_amplification_of":null,"write_amplification":48.0,"errors":0,"seconds":8.0}"#;

    fn settings() -> Settings {
        let (ogee, folder) = (PathBuf::from("ogee"), PathBuf::from("/"));
        Settings { size: 1 << 30, ramp: 2, runtime: 8, realtime: false, ogee, folder }
    }

    #[test]
    fn an_answer_of_ogee_bench_is_read_and_a_wrong_one_is_named() {
        let run = parse_ogee(ANSWER).expect("read");
        assert_eq!((run.iops, run.p999_us, run.cpu_total()), (10_000.0, 12_000.0, Some(110.0)));
        assert_eq!(run.flushes_per_1000, Some(90.0));
        assert_eq!(run.parts.keys().collect::<Vec<_>>(), ["flushes_per_1000_of"]);
        assert!(parse_ogee("{}").expect_err("no figures").to_string().contains("iops"));
        assert!(parse_ogee("ready").is_err());
    }

    #[test]
    fn use_is_divided_by_all_ios_and_replicas() {
        let used = Used {
            processes_us: [("cs-1".to_owned(), 8_000_000), ("cs-2".to_owned(), 1_000_000)].into(),
            client_us: 1_000_000,
            foreign: 0.1,
            disk: Some(Disk { flushes: 30_000, written_bytes: 100_000 * 4096 * 6 }),
        };
        let subject = Subject { processes: &[], replicas: 3 };
        let run = settings().complete(parse_ogee(ANSWER).expect("read"), &RANDWRITE_D32, &used, &subject);
        assert_eq!(run.cpu_total(), Some(100.0), "10,000 a second for 10 seconds");
        assert_eq!(run.cpu_us_per_io.get("cs-1"), Some(&80.0));
        assert_eq!(run.disk, Some(DiskCount { flushes_per_1000: 100.0, write_amplification: 2.0 }));
        assert_eq!((run.flushes_per_1000, run.write_amplification), (Some(90.0), Some(2.0)), "flushes by the daemons, bytes by the disk");
        assert_eq!((run.foreign_cpu, run.rss_bytes), (0.1, None));
    }
}
