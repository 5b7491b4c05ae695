//! What processes use, as the kernel counts it: CPU, memory, bytes written to disks. Linux, `/proc`; see proc(5).
//!
//! Invariants: a process that is gone at the end has no figures rather than wrong ones; CPU that is neither ours nor
//! idle is foreign. `write_bytes` counts pages when they become dirty and direct writes when they are submitted, so
//! what is still in the page cache at the end is counted already.

use std::fs;
use std::net::SocketAddr;

/// Clock ticks per second in `/proc`: USER_HZ, 100 for user space on every architecture that we run on.
const TICKS_PER_SECOND: u64 = 100;
const US_PER_TICK: u64 = 1_000_000 / TICKS_PER_SECOND;

/// A process under observation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    /// `mds-1`, `cs-2`, `bench`; those of chunkservers begin with `cs`.
    pub(crate) name: String,
    /// Its id.
    pub(crate) pid: u32,
    /// Where it shows its metrics.
    pub(crate) metrics: Option<SocketAddr>,
}

impl Process {
    /// Whether what it writes counts as written by the cluster.
    #[must_use]
    pub(crate) fn is_chunkserver(&self) -> bool {
        self.name.starts_with("cs")
    }

    /// Parses `NAME=PID` or `NAME=PID@ADDR`, for clap.
    ///
    /// # Errors
    /// A sentence that says what is understood.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let parsed = || {
            let (name, rest) = text.split_once('=')?;
            let (pid, metrics) = match rest.split_once('@') {
                Some((pid, addr)) => (pid, Some(addr.trim().parse().ok()?)),
                None => (rest, None),
            };
            let (name, pid) = (name.trim().to_owned(), pid.trim().parse().ok()?);
            (!name.is_empty()).then_some(Self { name, pid, metrics })
        };
        parsed().ok_or_else(|| "write NAME=PID or NAME=PID@METRICS, for example cs-1=4711@127.0.0.1:9100".to_owned())
    }
}

/// What a process used so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Usage {
    /// User and system time, microseconds; grows in steps of 10 ms.
    pub(crate) cpu_us: u64,
    /// Memory that is resident, bytes.
    pub(crate) rss_bytes: u64,
    /// Bytes that it caused to be written to disks; 0 if the kernel does not let us know.
    pub(crate) written_bytes: u64,
}

impl Usage {
    /// Of a process; `None` if it is gone.
    #[must_use]
    pub(crate) fn of(pid: u32) -> Option<Self> {
        let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).ok();
        let cpu_us = cpu_ticks(&read("stat")?)? * US_PER_TICK;
        let rss_bytes = field(&read("status")?, "VmRSS:")? * 1024;
        let written_bytes = read("io").and_then(|io| field(&io, "write_bytes:")).unwrap_or(0);
        Some(Self { cpu_us, rss_bytes, written_bytes })
    }
}

/// Ticks of user and system time in the text of `/proc/<pid>/stat`: fields 14 and 15.
fn cpu_ticks(stat: &str) -> Option<u64> {
    // The name in parentheses may hold spaces and parentheses itself.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

/// The number behind a word at the begin of a line.
fn field(text: &str, word: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(word))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What the whole machine used so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Machine {
    /// All but idle time of all CPUs, microseconds.
    pub(crate) busy_us: u64,
    /// All time of all CPUs, microseconds.
    pub(crate) total_us: u64,
}

impl Machine {
    /// Now; `None` without `/proc`.
    #[must_use]
    pub(crate) fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?)
    }

    /// From the text of `/proc/stat`.
    fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
        // user nice system idle iowait irq softirq steal; guest time is part of user time.
        let ticks: Vec<u64> = line.split_whitespace().take(8).map_while(|w| w.parse().ok()).collect();
        let (idle, iowait) = (*ticks.get(3)?, *ticks.get(4)?);
        let total: u64 = ticks.iter().sum();
        Some(Self { busy_us: (total - idle - iowait) * US_PER_TICK, total_us: total * US_PER_TICK })
    }
}

/// What all processes and the machine used so far.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    /// In the order of the processes.
    pub(crate) usage: Vec<Option<Usage>>,
    /// The machine.
    pub(crate) machine: Option<Machine>,
}

impl Sample {
    /// Takes a sample.
    #[must_use]
    pub(crate) fn take(processes: &[Process]) -> Self {
        Self { usage: processes.iter().map(|p| Usage::of(p.pid)).collect(), machine: Machine::now() }
    }
}

/// What was used between two samples.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Used {
    /// CPU by process, microseconds; `None` for one that was not there all the time.
    pub(crate) cpu_us: Vec<Option<u64>>,
    /// Bytes written to disks by process.
    pub(crate) written_bytes: Vec<Option<u64>>,
    /// Share of the machine's CPU that was used by processes not observed, 0 to 1.
    pub(crate) foreign_cpu: Option<f64>,
}

impl Used {
    /// The difference. Pure.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // a share
    pub(crate) fn between(first: &Sample, last: &Sample) -> Self {
        let difference = |of: fn(&Usage) -> u64| -> Vec<Option<u64>> {
            let pairs = first.usage.iter().zip(&last.usage);
            pairs.map(|(a, b)| of(b.as_ref()?).checked_sub(of(a.as_ref()?))).collect()
        };
        let cpu_us = difference(|u| u.cpu_us);
        let ours: u64 = cpu_us.iter().flatten().sum();
        let foreign_cpu = first.machine.zip(last.machine).and_then(|(a, b)| {
            let (busy, total) = (b.busy_us.saturating_sub(a.busy_us), b.total_us.saturating_sub(a.total_us));
            (total > 0).then(|| busy.saturating_sub(ours) as f64 / total as f64)
        });
        Self { cpu_us, written_bytes: difference(|u| u.written_bytes), foreign_cpu }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_read_behind_any_name() {
        let stat = "42 (a) b (c) R 1 42 42 0 -1 4194304 100 0 0 0 250 50 7 8 20 0 5 0 1000 1 2";
        assert_eq!(cpu_ticks(stat), Some(300));
        assert_eq!(cpu_ticks("42 (a) R 1 2"), None);
        assert_eq!(cpu_ticks(""), None);
    }

    #[test]
    fn numbers_are_found_by_their_word() {
        let io = "rchar: 5\nwchar: 6\nread_bytes: 7\nwrite_bytes: 4096\ncancelled_write_bytes: 1\n";
        assert_eq!(field(io, "write_bytes:"), Some(4096));
        assert_eq!(field("VmRSS:\t   12345 kB\n", "VmRSS:"), Some(12345));
        assert_eq!(field(io, "nothing:"), None);
    }

    #[test]
    fn the_machine_is_busy_unless_idle_or_waiting_for_disks() {
        let m = Machine::parse("cpu  100 5 50 800 40 3 2 0 77 0\ncpu0 1 2 3\n").expect("parsed");
        assert_eq!(m, Machine { busy_us: 160 * US_PER_TICK, total_us: 1000 * US_PER_TICK });
        assert_eq!(Machine::parse("intr 5\n"), None);
    }

    #[test]
    fn what_is_not_ours_is_foreign_and_the_dead_have_no_figures() {
        let usage = |cpu_us, written_bytes| Some(Usage { cpu_us, rss_bytes: 1, written_bytes });
        let sample = |usage, busy_us, total_us| Sample { usage, machine: Some(Machine { busy_us, total_us }) };
        let first = sample(vec![usage(100, 10), usage(5, 0)], 1000, 10_000);
        let last = sample(vec![usage(400, 4106), None], 1800, 11_000);
        let used = Used::between(&first, &last);
        assert_eq!(used.cpu_us, vec![Some(300), None]);
        assert_eq!(used.written_bytes, vec![Some(4096), None]);
        assert!((used.foreign_cpu.expect("known") - 0.5).abs() < 1e-9, "{used:?}");
    }

    #[test]
    fn this_process_uses_cpu_and_memory() {
        let me = std::process::id();
        let before = Usage::of(me).expect("alive");
        assert!(before.rss_bytes > 100_000, "{before:?}");
        let mut random = crate::bench::plan::SplitMix64(1);
        let mut sum = 0u64;
        while Usage::of(me).expect("alive").cpu_us < before.cpu_us + 20_000 {
            sum = sum.wrapping_add((0..100_000).fold(0, |a, _| a ^ random.next_u64()));
        }
        assert_ne!(sum, 0);
        assert_eq!(Usage::of(u32::MAX), None);
    }

    #[test]
    fn processes_are_named() {
        let process = |metrics| Process { name: "cs-1".to_owned(), pid: 42, metrics };
        assert_eq!(Process::parse("cs-1=42"), Ok(process(None)));
        assert_eq!(Process::parse("cs-1=42@127.0.0.1:1"), Ok(process(Some(([127, 0, 0, 1], 1).into()))));
        for bad in ["cs-1=x", "=4", "4", "a=4@x"] {
            assert!(Process::parse(bad).is_err(), "{bad}");
        }
    }
}
