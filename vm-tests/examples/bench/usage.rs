//! CPU, memory and disk use of processes, from the kernel's own counts.
//!
//! Invariants: CPU is counted over the whole life of a load, so the generator's own start is in it for every system alike;
//! what the kernel's own threads did (journal, write-back) is neither ours nor foreign.

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Kernel ticks are hundredths of a second to programs on Linux (`USER_HZ`).
const US_PER_TICK: u64 = 10_000;
/// `PF_KTHREAD` in the flags of a process (linux/sched.h).
const KERNEL_THREAD: u64 = 0x0020_0000;
const SECTOR: u64 = 512;

/// What `/proc/PID/stat` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    is_kernel: bool,
    own_us: u64,
    /// Of children that ended and were waited for.
    children_us: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The name may contain anything, so begin behind its bracket (proc(5)); field 3 is then the first.
        let fields: Vec<&str> = text.rsplit_once(") ")?.1.split(' ').collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        let us = |a, b| Some((number(a)? + number(b)?) * US_PER_TICK);
        Some(Self { is_kernel: number(9)? & KERNEL_THREAD != 0, own_us: us(14, 15)?, children_us: us(16, 17)? })
    }

    fn of(pid: u32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }
}

/// CPU the machine had and used, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Machine {
    busy_us: u64,
    total_us: u64,
}

impl Machine {
    fn parse(text: &str) -> Option<Self> {
        let line = text.lines().find(|line| line.starts_with("cpu "))?;
        let ticks: Vec<u64> = line.split_whitespace().skip(1).take(8).map(str::parse).collect::<Result<_, _>>().ok()?;
        // user nice system idle iowait irq softirq steal
        let [user, nice, system, idle, iowait, irq, softirq, steal] = ticks.try_into().ok()?;
        let busy = user + nice + system + irq + softirq + steal;
        Some(Self { busy_us: busy * US_PER_TICK, total_us: (busy + idle + iowait) * US_PER_TICK })
    }
}

/// What the disk did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Disk {
    /// Cache flushes.
    pub(crate) flushes: u64,
    /// Bytes written.
    pub(crate) written_bytes: u64,
}

impl Disk {
    /// The counters of a block device (Documentation/block/stat.rst).
    fn parse(text: &str) -> Option<Self> {
        let fields: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        Some(Self { flushes: *fields.get(15)?, written_bytes: fields.get(6)? * SECTOR })
    }

    /// The disk under `path`, if it is on one.
    fn under(path: &Path) -> Option<Self> {
        let device = fs::metadata(path).ok()?.dev();
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        let block = format!("/sys/dev/block/{major}:{minor}");
        // A partition does not count flushes, its disk does.
        let disk = if Path::new(&block).join("partition").exists() { format!("{block}/../stat") } else { format!("{block}/stat") };
        Self::parse(&fs::read_to_string(disk).ok()?)
    }
}

/// A process of the system under test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    /// For the report.
    pub(crate) name: String,
    /// Its id.
    pub(crate) pid: u32,
}

/// Counters at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Moment {
    processes: Vec<(String, u64)>,
    me: Stat,
    kernel_us: u64,
    machine: Machine,
    disk: Option<Disk>,
}

impl Moment {
    /// Reads the counters of these processes, of the machine, and of the disk under `folder`.
    ///
    /// # Errors
    /// One of the processes is gone.
    pub(crate) fn now(processes: &[Process], folder: &Path) -> Result<Self> {
        let cpu = |p: &Process| {
            let stat = Stat::of(p.pid).with_context(|| format!("{} (process {}) is gone", p.name, p.pid))?;
            Ok((p.name.clone(), stat.own_us))
        };
        Ok(Self {
            processes: processes.iter().map(cpu).collect::<Result<_>>()?,
            me: Stat::of(std::process::id()).context("read our own CPU time")?,
            kernel_us: kernel_threads_us(),
            machine: Machine::parse(&fs::read_to_string("/proc/stat")?).context("read /proc/stat")?,
            disk: Disk::under(folder),
        })
    }

    /// Reads the disk's counters once more, after what was in the page cache has reached it.
    pub(crate) fn count_disk_again(&mut self, folder: &Path) {
        self.disk = Disk::under(folder);
    }
}

fn kernel_threads_us() -> u64 {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(Stat::of).filter(|stat| stat.is_kernel).map(|stat| stat.own_us).sum()
}

/// What was used between two moments.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Used {
    /// CPU of each process, microseconds.
    pub(crate) processes_us: BTreeMap<String, u64>,
    /// CPU of the children that ended in between: the load generator.
    pub(crate) client_us: u64,
    /// Share of the machine's CPU that others took, 0 to 1.
    pub(crate) foreign: f64,
    /// What the disk did.
    pub(crate) disk: Option<Disk>,
}

impl Used {
    /// From one moment to a later one. Processes of the same name are added up.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // a share
    pub(crate) fn between(first: &Moment, last: &Moment) -> Self {
        let mut processes_us = BTreeMap::new();
        for ((name, before), (_, after)) in first.processes.iter().zip(&last.processes) {
            *processes_us.entry(name.clone()).or_insert(0) += after.saturating_sub(*before);
        }
        let client_us = last.me.children_us.saturating_sub(first.me.children_us);
        let own_us = last.me.own_us.saturating_sub(first.me.own_us);
        let ours = processes_us.values().sum::<u64>() + client_us + own_us;
        let kernel = last.kernel_us.saturating_sub(first.kernel_us);
        let busy = last.machine.busy_us.saturating_sub(first.machine.busy_us);
        let total = last.machine.total_us.saturating_sub(first.machine.total_us);
        let disk = first.disk.zip(last.disk).map(|(a, b)| Disk {
            flushes: b.flushes.saturating_sub(a.flushes),
            written_bytes: b.written_bytes.saturating_sub(a.written_bytes),
        });
        let foreign = busy.saturating_sub(ours + kernel) as f64 / total.max(1) as f64;
        Self { processes_us, client_us, foreign, disk }
    }

    /// CPU of the processes, without the client, microseconds.
    #[must_use]
    pub(crate) fn daemons_us(&self) -> u64 {
        self.processes_us.values().sum()
    }
}

/// Resident memory of all of them, if all live.
#[must_use]
pub(crate) fn rss_bytes(processes: &[Process]) -> Option<u64> {
    let one = |p: &Process| {
        let status = fs::read_to_string(format!("/proc/{}/status", p.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    };
    processes.iter().map(one).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_behind_any_name() {
        let text = "42 (a) b (c) S 1 42 42 0 -1 4194304 100 0 0 0 250 50 7 8 20 0 5 0 1000 1 2";
        assert_eq!(Stat::parse(text), Some(Stat { is_kernel: false, own_us: 3_000_000, children_us: 150_000 }));
        let kernel = "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 1 2 0 0 20 0 1 0 5 0 0";
        assert!(Stat::parse(kernel).expect("parsed").is_kernel);
        assert_eq!(Stat::parse("42 (a) R 1 2"), None);
    }

    #[test]
    fn idle_time_and_waiting_for_disks_are_not_busy() {
        let machine = Machine::parse("cpu  100 5 50 800 40 3 2 10 77 0\ncpu0 1 2 3\n").expect("parsed");
        assert_eq!(machine, Machine { busy_us: 1_700_000, total_us: 10_100_000 });
        assert_eq!(Machine::parse("intr 5\n"), None);
    }

    #[test]
    fn a_disk_counts_flushes_and_sectors() {
        let text = " 100 1 2 3 200 5 16 7 0 9 10 11 12 13 14 42 16\n";
        assert_eq!(Disk::parse(text), Some(Disk { flushes: 42, written_bytes: 8192 }));
        assert_eq!(Disk::parse("1 2 3"), None);
    }

    #[test]
    fn what_neither_we_nor_the_kernel_used_is_foreign() {
        let moment = |daemon, children_us, kernel_us, busy_us, total_us, flushes| Moment {
            processes: vec![("osd".to_owned(), daemon), ("osd".to_owned(), daemon)],
            me: Stat { is_kernel: false, own_us: 0, children_us },
            kernel_us,
            machine: Machine { busy_us, total_us },
            disk: Some(Disk { flushes, written_bytes: 0 }),
        };
        let used = Used::between(&moment(10, 0, 0, 0, 0, 5), &moment(110, 300, 100, 1000, 2000, 9));
        assert_eq!((used.daemons_us(), used.client_us), (200, 300));
        assert!((used.foreign - 0.2).abs() < 1e-9, "{used:?}");
        assert_eq!(used.disk.expect("known").flushes, 4);
    }

    #[test]
    fn this_process_and_its_children_are_seen() {
        let me = Process { name: "me".to_owned(), pid: std::process::id() };
        let before = Moment::now(std::slice::from_ref(&me), Path::new("/")).expect("alive");
        let burn = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done";
        assert!(std::process::Command::new("sh").args(["-c", burn]).status().expect("a shell").success());
        let after = Moment::now(std::slice::from_ref(&me), Path::new("/")).expect("alive");
        assert!(Used::between(&before, &after).client_us > 0);
        assert!(rss_bytes(&[me]).expect("alive") > 100_000);
        let gone = Process { name: "gone".to_owned(), pid: u32::MAX };
        assert!(Moment::now(&[gone], Path::new("/")).is_err());
    }
}
