//! Which QEMU, which accelerator, and the command line of a guest.
//!
//! `OGEE_QEMU` names another binary (7.2 and 10.0 are tested); `OGEE_KVM=1` or `0` overrides the choice of the accelerator.
//! Whether KVM works is found out by booting the guest's kernel with it: there are machines whose `/dev/kvm` opens and creates
//! virtual machines but cannot run an ordinary kernel. The answer is kept in the cache for this QEMU, kernel and host boot.

use crate::console::Console;
use crate::image::{Image, PROBE_ARGUMENT, PROBE_MARKER};
use crate::{places, process};
use anyhow::{Context, Result};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

/// Guest memory. Small, because a vhost-user daemon maps all of it and two guests run beside a whole cluster.
pub const MEMORY_MIB: u32 = 256;
/// Guest CPUs, and queues of its disk.
pub const CPUS: u32 = 2;
/// How long the probe of KVM may take: a guest under real KVM needs a second; one that hangs must not hold up the tests.
const KVM_PROBE_LIMIT: Duration = Duration::from_secs(20);

/// What a guest's disk is.
#[derive(Debug, Clone)]
pub enum QemuDisk {
    /// Served by a daemon on this vhost-user socket. QEMU waits for the daemon, also when it goes away later.
    VhostUser {
        /// The daemon's socket.
        socket: PathBuf,
    },
    /// A raw file, written in place, to check an image without any daemon.
    Raw(PathBuf),
    /// As [`QemuDisk::Raw`], with a second disk that has programs on it, and memory to run them.
    Appliance {
        /// The disk it boots from.
        system: PathBuf,
        /// The other one.
        data: PathBuf,
        /// Guest memory.
        memory_mib: u32,
    },
}

impl QemuDisk {
    const fn memory_mib(&self) -> u32 {
        match self {
            Self::Appliance { memory_mib, .. } => *memory_mib,
            Self::VhostUser { .. } | Self::Raw(_) => MEMORY_MIB,
        }
    }
}

/// How guest code is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// By the processor.
    Kvm,
    /// By QEMU's translator; works everywhere.
    Tcg,
}

/// A QEMU binary and what is known of it.
#[derive(Debug, Clone)]
pub struct Qemu {
    /// The binary: a path, or a name to be looked up.
    pub binary: PathBuf,
    /// Major and minor version.
    pub version: (u32, u32),
    /// How to run guests with it.
    pub accelerator: Accelerator,
}

impl Qemu {
    /// The QEMU to use; asked once per process.
    ///
    /// # Errors
    /// When there is none or it does not say its version.
    pub fn find() -> Result<&'static Self> {
        static FOUND: OnceLock<Result<Qemu>> = OnceLock::new();
        FOUND.get_or_init(Self::probe).as_ref().map_err(|error| anyhow::anyhow!("{error:#}"))
    }

    fn probe() -> Result<Self> {
        let binary = std::env::var_os("OGEE_QEMU").map_or_else(|| PathBuf::from("qemu-system-x86_64"), PathBuf::from);
        let output = Command::new(&binary)
            .arg("--version")
            .output()
            .with_context(|| format!("run {} (install it with .ci/install-deps.sh, or set OGEE_QEMU)", binary.display()))?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = parse_version(&said).with_context(|| format!("{} --version said {said:?}", binary.display()))?;
        let mut qemu = Self { binary, version, accelerator: Accelerator::Tcg };
        qemu.accelerator = qemu.choose_accelerator(said.lines().next().unwrap_or_default())?;
        Ok(qemu)
    }

    fn choose_accelerator(&self, version_line: &str) -> Result<Accelerator> {
        match std::env::var("OGEE_KVM").as_deref() {
            Ok("1") => return Ok(Accelerator::Kvm),
            Ok("0") => return Ok(Accelerator::Tcg),
            _ => {}
        }
        if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Accelerator::Tcg);
        }
        let asked = format!("{version_line} | {}", std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim());
        let memo = places::cache().join("kvm-probe");
        if let Ok(known) = std::fs::read_to_string(&memo)
            && let Some(answer) = known.strip_prefix(&format!("{asked}\n"))
        {
            return Ok(if answer == "kvm" { Accelerator::Kvm } else { Accelerator::Tcg });
        }
        let works = self.kvm_boots()?;
        // Only a saved question: without the memo the next process probes again.
        drop(std::fs::write(&memo, format!("{asked}\n{}", if works { "kvm" } else { "tcg" })));
        Ok(if works { Accelerator::Kvm } else { Accelerator::Tcg })
    }

    /// Whether the guest's kernel gets as far as its init under KVM.
    fn kvm_boots(&self) -> Result<bool> {
        let image = Image::golden()?;
        let scratch = places::scratch()?;
        let mut child = process::tied(&self.binary)
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-M", "q35", "-m", "256", "-serial", "stdio"])
            .args(["-accel", "kvm", "-cpu", "host", "-append"])
            .arg(format!("console=ttyS0 quiet panic=-1 {PROBE_ARGUMENT}"))
            .arg("-kernel")
            .arg(&image.kernel)
            .arg("-initrd")
            .arg(&image.initrd)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("start QEMU to try KVM")?;
        let stdout = child.stdout.take().context("QEMU's output is a pipe")?;
        let works = Console::collect("KVM probe", stdout, &scratch.path().join("log"))
            .and_then(|mut console| console.expect(PROBE_MARKER, KVM_PROBE_LIMIT))
            .is_ok();
        process::kill_now(&mut child);
        Ok(works)
    }

    /// The arguments for a guest with `disk` that talks on standard input and output and is controlled through the socket `qmp`.
    #[must_use]
    pub fn arguments(&self, disk: &QemuDisk, qmp: &std::path::Path) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = Vec::new();
        let mut add = |list: &[&str]| arguments.extend(list.iter().map(OsString::from));
        add(&["-nodefaults", "-display", "none", "-serial", "stdio"]);
        match self.accelerator {
            Accelerator::Kvm => add(&["-accel", "kvm", "-cpu", "host"]),
            Accelerator::Tcg => add(&["-accel", "tcg,thread=multi", "-cpu", "qemu64"]),
        }
        let memory_mib = disk.memory_mib();
        add(&["-smp", &CPUS.to_string(), "-m", &memory_mib.to_string()]);
        // graphics=off lets SeaBIOS and the boot loader speak on the serial line. The daemon maps the guest's memory: a shared memfd.
        add(&["-M", "q35,graphics=off,memory-backend=mem"]);
        add(&["-object", &format!("memory-backend-memfd,id=mem,size={memory_mib}M,share=on")]);
        add(&["-qmp", &format!("unix:{},server=on,wait=off", escaped(qmp))]);
        match disk {
            QemuDisk::VhostUser { socket } => {
                add(&["-chardev", &format!("socket,id=disk,path={},{}", escaped(socket), self.reconnect())]);
                add(&["-device", &format!("vhost-user-blk-pci,chardev=disk,num-queues={CPUS},bootindex=0")]);
            }
            QemuDisk::Raw(path) => raw_disk(&mut add, "disk", path, 0),
            QemuDisk::Appliance { system, data, .. } => {
                raw_disk(&mut add, "disk", system, 0);
                raw_disk(&mut add, "data", data, 1);
            }
        }
        arguments
    }

    /// The option that makes QEMU connect again to a daemon that went away: milliseconds since 9.2, seconds before.
    fn reconnect(&self) -> &'static str {
        if self.version >= (9, 2) { "reconnect-ms=200" } else { "reconnect=1" }
    }
}

/// A disk from a raw file, whose node and device have names that begin with `name`.
fn raw_disk(add: &mut impl FnMut(&[&str]), name: &str, path: &std::path::Path, boot_index: u32) {
    add(&["-blockdev", &format!("driver=file,node-name={name}-file,filename={}", escaped(path))]);
    add(&["-blockdev", &format!("driver=raw,node-name={name},file={name}-file")]);
    add(&["-device", &format!("virtio-blk-pci,drive={name},bootindex={boot_index}")]);
}

/// A path inside a QEMU option, where a comma is written twice.
fn escaped(path: &std::path::Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn parse_version(said: &str) -> Option<(u32, u32)> {
    let number = said.split("version ").nth(1)?;
    let mut parts = number.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn line(version: (u32, u32), disk: &QemuDisk) -> String {
        let qemu = Qemu { binary: "q".into(), version, accelerator: Accelerator::Tcg };
        let words: Vec<String> = qemu.arguments(disk, Path::new("/s/qmp")).iter().map(|a| a.to_string_lossy().into_owned()).collect();
        words.join(" ")
    }

    #[test]
    fn versions_are_read_and_choose_the_reconnect_option() {
        assert_eq!(parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\n"), Some((10, 0)));
        assert_eq!(parse_version("QEMU emulator version 7.2.22"), Some((7, 2)));
        assert_eq!(parse_version("nonsense"), None);
        let disk = QemuDisk::VhostUser { socket: "/s/a,b".into() };
        assert!(line((10, 0), &disk).contains("socket,id=disk,path=/s/a,,b,reconnect-ms=200"));
        assert!(line((7, 2), &disk).contains("path=/s/a,,b,reconnect=1 "));
        assert!(line((7, 2), &disk).contains("memory-backend-memfd,id=mem,size=256M,share=on"));
        assert!(line((10, 0), &QemuDisk::Raw("/s/disk".into())).contains("filename=/s/disk"));
        let appliance = QemuDisk::Appliance { system: "/s/a".into(), data: "/s/b".into(), memory_mib: 1024 };
        let appliance = line((10, 0), &appliance);
        assert!(appliance.contains("-m 1024") && appliance.contains("id=mem,size=1024M"), "{appliance}");
        assert!(appliance.contains("filename=/s/a") && appliance.contains("drive=data,bootindex=1"), "{appliance}");
    }
}
