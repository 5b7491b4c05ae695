//! The golden image that guests boot from, made once by `scripts/mkimage.sh` and kept in the cache. Nobody writes to it: a test
//! imports it into a cluster or copies it.

use crate::places;
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the guest's init prints before its shell starts (see `scripts/guest-init`); the uptime in seconds follows.
pub const READY_MARKER: &str = "OGEE-GUEST-READY uptime=";
/// What the data partition's only file contains; the guest shows it at its start.
pub const DATA_MARKER: &str = "OGEE-GUEST-DATA-OK";
/// What the guest prints, before it powers off, when it was started with [`PROBE_ARGUMENT`].
pub const PROBE_MARKER: &str = "OGEE-PROBE-OK";
/// Kernel argument that lets the guest's init only print [`PROBE_MARKER`].
pub const PROBE_ARGUMENT: &str = "ogee.probe";
/// Mebibytes at the start of the disk that hold the MBR and the boot partition. Zeroing them makes the disk unbootable.
pub const BOOT_MIB: u32 = 21;

/// The golden image's files.
#[derive(Debug, Clone)]
pub struct Image {
    /// The disk as a raw file, 48 MiB.
    pub raw: PathBuf,
    /// The same disk as qcow2.
    pub qcow2: PathBuf,
    /// The kernel on it, alone.
    pub kernel: PathBuf,
    /// The initial RAM disk on it, alone.
    pub initrd: PathBuf,
}

impl Image {
    /// The golden image, made when it is missing or its recipe has changed (a few seconds, and a download of 27 MB the first time).
    ///
    /// # Errors
    /// When the script fails; its own message is in the error.
    pub fn golden() -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/mkimage.sh");
        let folder = places::cache().join("image");
        let output = Command::new(&script).arg(&folder).output().with_context(|| format!("run {}", script.display()))?;
        if !output.status.success() {
            bail!("{} failed: {}", script.display(), String::from_utf8_lossy(&output.stderr).trim());
        }
        let file = |name: &str| folder.join(name);
        Ok(Self { raw: file("golden.raw"), qcow2: file("golden.qcow2"), kernel: file("vmlinuz"), initrd: file("initrd") })
    }

    /// Copies the raw disk, sparse, to `to`.
    ///
    /// # Errors
    /// When the copy fails.
    pub fn copy_raw(&self, to: &Path) -> Result<()> {
        let status = Command::new("cp").arg("--sparse=always").arg(&self.raw).arg(to).status().context("run cp")?;
        ensure!(status.success(), "copy {} to {}: {status}", self.raw.display(), to.display());
        Ok(())
    }

    /// SHA-256 of the raw disk, in hexadecimal digits.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn sha256(&self) -> Result<String> {
        sha256(&self.raw)
    }
}

/// SHA-256 of a file, in hexadecimal digits.
///
/// # Errors
/// When it cannot be read.
pub fn sha256(path: &Path) -> Result<String> {
    let output = Command::new("sha256sum").arg("--").arg(path).output().context("run sha256sum")?;
    let line = String::from_utf8_lossy(&output.stdout);
    let sum = line.split_whitespace().next().filter(|sum| sum.len() == 64 && output.status.success());
    Ok(sum.with_context(|| format!("sha256sum of {}: {}", path.display(), String::from_utf8_lossy(&output.stderr)))?.to_owned())
}
