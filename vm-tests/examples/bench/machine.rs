//! What was measured on and with: for the head of the report.

use crate::generator::Settings;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Command;

/// Lines of `name: value`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Environment {
    /// In order.
    pub(crate) facts: Vec<(String, String)>,
}

/// The first line that a program prints; empty if it cannot be run.
fn first_line(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// Today and now, as in `2026-11-22 19:05 UTC`.
#[must_use]
pub(crate) fn date() -> String {
    first_line("date", &["-u", "+%Y-%m-%d %H:%M UTC"])
}

fn value_of(file: &str, key: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_default();
    line.split_once(':').map_or("", |(_, value)| value).trim().to_owned()
}

/// The disk under a folder: device, file system, scheduler and cache, as the kernel calls them.
fn disk(folder: &Path) -> String {
    let folder = folder.display().to_string();
    let source = first_line("findmnt", &["-n", "-o", "SOURCE,FSTYPE,OPTIONS", "-T", &folder]);
    let device = source.split_whitespace().next().unwrap_or_default().trim_start_matches("/dev/").to_owned();
    let queue = |name: &str| {
        let path = format!("/sys/class/block/{device}/queue/{name}");
        std::fs::read_to_string(path).map_or_else(|_| "?".to_owned(), |text| text.trim().to_owned())
    };
    let (scheduler, cache, rotational) = (queue("scheduler"), queue("write_cache"), queue("rotational"));
    format!("{source}; scheduler {scheduler}; cache: {cache}; calls itself rotational: {rotational}")
}

impl Environment {
    /// Of this machine, for a run with these settings.
    #[must_use]
    pub(crate) fn of(settings: &Settings, repetitions: u32) -> Self {
        let mut facts = vec![];
        let mut fact = |name: &str, value: String| facts.push((name.to_owned(), value));
        let cpus = std::thread::available_parallelism().map_or(0, usize::from);
        fact("date", date());
        fact("CPU", format!("{} x {}", cpus, value_of("/proc/cpuinfo", "model name")));
        fact("memory", value_of("/proc/meminfo", "MemTotal"));
        fact("kernel", first_line("uname", &["-sr"]));
        fact("virtual machine", first_line("systemd-detect-virt", &["--vm"]));
        fact("disk", disk(&settings.folder));
        fact("Ogee", format!("{}, commit {}", first_line(&settings.ogee.display().to_string(), &["--version"]),
            first_line("git", &["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty"])));
        fact("Ceph", first_line("ceph", &["--version"]));
        fact("qemu-storage-daemon", first_line("qemu-storage-daemon", &["--version"]));
        fact("qemu-nbd", first_line("qemu-nbd", &["--version"]));
        fact("fio", first_line("fio", &["--version"]));
        fact("working set", format!("{} MiB on every system", settings.size >> 20));
        fact("one run", format!("{} s after {} s of ramp; {repetitions} interleaved repetitions", settings.runtime, settings.ramp));
        let priority = if settings.realtime { "SCHED_RR 1" } else { "as every other process" };
        fact("priority of measured processes", priority.to_owned());
        Self { facts: facts.into_iter().filter(|(_, value)| !value.is_empty()).collect() }
    }
}
