//! What `/sys` and `/proc` say of an NBD device: attached or not, by whom it is served, who uses it.
//!
//! Sources: sysfs-block, `drivers/block/nbd.c` (`pid`, `backend`), proc(5). Invariant: only reading. A use that begins after the look is
//! not seen; who detaches a device also opens it exclusively, which a mount or a swap area does not share.

use crate::error::CliError;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The two trees.
#[derive(Debug, Clone)]
pub(crate) struct System {
    sys: PathBuf,
    proc: PathBuf,
}

impl Default for System {
    fn default() -> Self {
        Self { sys: "/sys".into(), proc: "/proc".into() }
    }
}

impl System {
    fn block(&self, index: u32) -> PathBuf {
        self.sys.join("block").join(format!("nbd{index}"))
    }

    /// Whether the device is attached to something.
    #[must_use]
    pub(crate) fn is_attached(&self, index: u32) -> bool {
        self.block(index).join("pid").exists()
    }

    /// Who serves it, as said when it was attached; Linux 5.14 and newer know.
    fn backend(&self, index: u32) -> Option<String> {
        let text = std::fs::read_to_string(self.block(index).join("backend")).ok()?;
        Some(text.trim_end().to_owned())
    }

    /// Whether the device is attached to this backend, as far as the kernel tells.
    #[must_use]
    pub(crate) fn is_attached_to(&self, index: u32, backend: &str) -> bool {
        self.is_attached(index) && self.backend(index).is_none_or(|found| found == backend)
    }

    /// The device that is attached to this backend.
    #[must_use]
    pub(crate) fn find(&self, backend: &str) -> Option<u32> {
        let entries = std::fs::read_dir(self.sys.join("block")).ok()?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut indices = names.filter_map(|name| name.strip_prefix("nbd")?.parse().ok());
        indices.find(|index| self.is_attached(*index) && self.backend(*index).as_deref() == Some(backend))
    }

    /// Names and numbers (`major:minor`) of the device and its partitions.
    fn parts(&self, index: u32) -> Vec<(String, String)> {
        let (block, name) = (self.block(index), format!("nbd{index}"));
        let number = |dir: &Path| std::fs::read_to_string(dir.join("dev")).unwrap_or_default().trim().to_owned();
        let mut parts = vec![(name.clone(), number(&block))];
        for entry in std::fs::read_dir(&block).into_iter().flatten().flatten() {
            let part = entry.file_name().to_string_lossy().into_owned();
            if part.starts_with(&format!("{name}p")) {
                let number = number(&entry.path());
                parts.push((part, number));
            }
        }
        parts
    }

    /// Who uses the device or one of its partitions, for people: a mount, another device on it, swap, or a process that has it open.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub(crate) fn user(&self, index: u32) -> Result<Option<String>, CliError> {
        let parts = self.parts(index);
        let numbers: BTreeSet<&str> = parts.iter().map(|(_, number)| number.as_str()).collect();
        let mounts = self.proc.join("self/mountinfo");
        let text = std::fs::read_to_string(&mounts).map_err(|e| CliError::file("read", &mounts, e))?;
        for line in text.lines() {
            let mut fields = line.split(' ');
            if fields.nth(2).is_some_and(|number| numbers.contains(number)) {
                return Ok(Some(format!("mounted on {}", fields.nth(1).unwrap_or("?"))));
            }
        }
        for (part, _) in &parts {
            let holders = if part == &parts[0].0 { self.block(index) } else { self.block(index).join(part) }.join("holders");
            if let Some(holder) = std::fs::read_dir(holders).into_iter().flatten().flatten().next() {
                return Ok(Some(format!("used by {}", holder.file_name().to_string_lossy())));
            }
        }
        let paths: BTreeSet<PathBuf> = parts.iter().map(|(part, _)| Path::new("/dev").join(part)).collect();
        let swaps = std::fs::read_to_string(self.proc.join("swaps")).unwrap_or_default();
        if swaps.lines().any(|line| line.split(' ').next().is_some_and(|path| paths.contains(Path::new(path)))) {
            return Ok(Some("used for swap".to_owned()));
        }
        Ok(self.opened_by(&paths))
    }

    /// A process that has one of these open.
    fn opened_by(&self, paths: &BTreeSet<PathBuf>) -> Option<String> {
        for process in std::fs::read_dir(&self.proc).into_iter().flatten().flatten() {
            let name = process.file_name().to_string_lossy().into_owned();
            if !name.bytes().all(|b| b.is_ascii_digit()) {
                continue;
            }
            // Processes end while we look, and then have no files.
            let files = std::fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten();
            let mut targets = files.filter_map(|file| std::fs::read_link(file.path()).ok());
            if targets.any(|target| paths.contains(&target)) {
                let command = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                return Some(format!("opened by process {name} ({})", command.trim()));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn tree() -> (System, tempfile::TempDir) {
        let dir = tempfile::tempdir().expect("a folder");
        let system = System { sys: dir.path().join("sys"), proc: dir.path().join("proc") };
        for (name, number) in [("nbd0", "43:0"), ("nbd0/nbd0p1", "43:1"), ("nbd1", "43:32"), ("nbd10", "43:320")] {
            let block = system.sys.join("block").join(name);
            fs::create_dir_all(block.join("holders")).expect("made");
            fs::write(block.join("dev"), format!("{number}\n")).expect("written");
        }
        fs::create_dir_all(system.proc.join("self")).expect("made");
        let mounts = "22 1 0:21 / /proc rw - proc proc rw\n23 1 8:1 / / rw - ext4 /dev/sda1 rw\n";
        fs::write(system.proc.join("self/mountinfo"), mounts).expect("written");
        (system, dir)
    }

    #[test]
    fn a_device_is_found_by_its_backend() {
        let (system, _dir) = tree();
        assert!(!system.is_attached(1) && system.find("ogee:a").is_none());
        for (index, backend) in [(1, "ogee:a"), (10, "ogee:b")] {
            fs::write(system.block(index).join("pid"), "1\n").expect("written");
            fs::write(system.block(index).join("backend"), format!("{backend}\n")).expect("written");
        }
        assert_eq!((system.find("ogee:a"), system.find("ogee:b"), system.find("ogee:")), (Some(1), Some(10), None));
        assert!(system.is_attached_to(1, "ogee:a") && !system.is_attached_to(1, "ogee:b") && !system.is_attached_to(0, "ogee:a"));
        fs::remove_file(system.block(1).join("backend")).expect("removed");
        assert!(system.is_attached_to(1, "ogee:a"), "an old kernel does not tell");
    }

    #[test]
    fn every_kind_of_use_is_seen() {
        let (system, _dir) = tree();
        let used = || system.user(0).expect("looked").unwrap_or_default();
        assert_eq!(used(), "");
        let process = system.proc.join("77");
        fs::create_dir_all(process.join("fd")).expect("made");
        fs::write(process.join("comm"), "dd\n").expect("written");
        std::os::unix::fs::symlink("/dev/nbd10", process.join("fd/3")).expect("a link");
        assert_eq!(used(), "", "another device");
        std::os::unix::fs::symlink("/dev/nbd0p1", process.join("fd/4")).expect("a link");
        assert_eq!(used(), "opened by process 77 (dd)");
        fs::write(system.proc.join("swaps"), "Filename Type\n/dev/nbd0 partition 1 0 -2\n").expect("written");
        assert_eq!(used(), "used for swap");
        fs::create_dir(system.block(0).join("nbd0p1/holders/dm-3")).expect("made");
        assert_eq!(used(), "used by dm-3");
        fs::write(system.proc.join("self/mountinfo"), "40 1 43:1 / /mnt/a rw - ext4 /dev/nbd0p1 rw\n").expect("written");
        assert_eq!(used(), "mounted on /mnt/a");
        assert_eq!(system.user(1).expect("looked"), None);
    }
}
