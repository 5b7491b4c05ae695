//! fio, the load generator of the systems that are not ours: how it is called and what it answers.
//!
//! Invariants: random IO may hit a block twice and is drawn anew in every run, as with `ogee bench`; a run in which fio saw an
//! error is never taken for a good one.

use crate::load::Load;
use crate::row::Run;
use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// What is measured with fio.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FioJob {
    /// The load.
    pub(crate) load: Load,
    /// How the IO is done: `--ioengine=..` and what belongs to it.
    pub(crate) engine: Vec<String>,
    /// Bytes of the working set.
    pub(crate) size: u64,
    /// Seconds before anything counts.
    pub(crate) ramp: u32,
    /// Seconds that count.
    pub(crate) runtime: u32,
    /// Number of the repetition, which draws the blocks.
    pub(crate) seed: u64,
}

impl FioJob {
    /// The arguments.
    #[must_use]
    pub(crate) fn arguments(&self) -> Vec<String> {
        let load = &self.load;
        let mut all = vec![
            format!("--name={}", load.name),
            format!("--rw={}", load.pattern.rw()),
            format!("--bs={}", load.block_bytes),
            format!("--iodepth={}", load.depth),
            format!("--size={}", self.size),
            format!("--ramp_time={}", self.ramp),
            format!("--runtime={}", self.runtime),
            format!("--randseed={}", self.seed),
        ];
        let always = ["--time_based", "--norandommap", "--lat_percentiles=1", "--clat_percentiles=0",
            "--percentile_list=50:99:99.9", "--output-format=json", "--group_reporting"];
        all.extend(always.map(str::to_owned));
        all.extend(self.engine.iter().cloned());
        all
    }
}

/// The arguments that write the whole working set once.
#[must_use]
pub(crate) fn fill_arguments(engine: &[String], size: u64) -> Vec<String> {
    let mut all = vec!["--name=fill".to_owned(), format!("--size={size}"), "--end_fsync=1".to_owned()];
    all.extend(["--rw=write", "--bs=1M", "--iodepth=16", "--output-format=json"].map(str::to_owned));
    all.extend(engine.iter().cloned());
    all
}

/// fio's answer, without CPU and disk use. With a sync after each write, an IO is the write and its sync: the mean is exact, the
/// percentiles and the maximum are the sums of the two, which is exact only if both are slow at the same time.
///
/// # Errors
/// It is not such an answer.
pub(crate) fn parse(text: &str, load: &Load) -> Result<Run> {
    // fio prints warnings before the document.
    let document = text.find('{').map_or(text, |at| &text[at..]);
    let answer: Value = serde_json::from_str(document).with_context(|| format!("fio answered {text:?}"))?;
    let job = answer.pointer("/jobs/0").context("fio's answer has no job")?;
    let side = &job[if load.pattern.writes() { "write" } else { "read" }];
    let figure = |value: &Value, key: &str| value[key].as_f64().with_context(|| format!("fio's answer has no {key}"));
    let iops = figure(side, "iops")?;
    ensure!(iops > 0.0, "fio did no IO: {text:?}");
    let sync = &job["sync"]["lat_ns"];
    let synced = sync["N"].as_u64().unwrap_or(0) > 0;
    let sum = |pick: &dyn Fn(&Value) -> Result<f64>| -> Result<f64> {
        let own = pick(&side["lat_ns"])?;
        Ok((if synced { own + pick(sync)? } else { own }) / 1000.0)
    };
    let percentile = |key: &'static str| move |v: &Value| figure(&v["percentile"], key);
    Ok(Run {
        iops,
        mean_us: sum(&|v| figure(v, "mean"))?,
        p50_us: sum(&percentile("50.000000"))?,
        p99_us: sum(&percentile("99.000000"))?,
        p999_us: sum(&percentile("99.900000"))?,
        max_us: sum(&|v| figure(v, "max"))?,
        errors: u64::from(job["error"].as_i64() != Some(0)),
        seconds: figure(side, "runtime")? / 1000.0,
        ..Run::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{RANDREAD_D32, RANDWRITE_D1, RANDWRITE_D32};

    /// fio 3.33, `--ioengine=psync --direct=1 --fdatasync=1`, on a busy machine.
    const FDATASYNC: &str = include_str!("fio-fdatasync.json");

    #[test]
    fn a_recorded_answer_is_read_with_its_syncs() {
        let run = parse(FDATASYNC, &RANDWRITE_D1).expect("read");
        assert!((run.iops - 290.20979).abs() < 1e-5);
        assert!((run.mean_us - (256.887_137_694 + 3_183.981_067_126)).abs() < 1e-6);
        assert!((run.p50_us - (101.888 + 3883.008)).abs() < 1e-9);
        assert!((run.p999_us - (4014.080 + 7897.088)).abs() < 1e-9);
        assert!((run.max_us - (4008.600 + 7895.069)).abs() < 1e-9);
        assert_eq!((run.errors, run.seconds), (0, 2.002));
    }

    #[test]
    fn warnings_are_skipped_and_failures_are_seen() {
        let run = parse(&format!("fio: this platform is odd\n{FDATASYNC}"), &RANDWRITE_D1).expect("read");
        assert_eq!(run.errors, 0);
        let failed = FDATASYNC.replace("\"error\": 0", "\"error\": 5");
        assert_eq!(parse(&failed, &RANDWRITE_D1).expect("read").errors, 1);
        assert!(parse(FDATASYNC, &RANDREAD_D32).is_err(), "it did no reads");
        assert!(parse("{}", &RANDWRITE_D1).is_err());
        assert!(parse("no such file", &RANDWRITE_D1).is_err());
    }

    #[test]
    fn arguments_name_the_load() {
        let engine = vec!["--ioengine=libaio".to_owned(), "--direct=1".to_owned()];
        let job = FioJob { load: RANDWRITE_D32, engine, size: 1 << 30, ramp: 1, runtime: 8, seed: 3 };
        let line = job.arguments().join(" ");
        for part in ["--rw=randwrite", "--bs=4096", "--iodepth=32", "--size=1073741824", "--randseed=3", "--direct=1"] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }
}
