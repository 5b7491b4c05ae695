//! Programs of this machine in a guest: a disk with them, the libraries they are linked to, and modules of the guest's kernel.
//!
//! ```text
//! /bin/ogee, ...   without debug information      /lib/*.so.*     what they are linked to, the loader as well
//! /modules/*.ko    of the guest's kernel          the rest        free, for what they write
//! ```
//!
//! Used with [`QemuDisk::Appliance`](crate::qemu::QemuDisk::Appliance): for what this machine's kernel cannot do. The guest mounts it with
//! [`Appliance::mount`]. Invariant: the disk belongs to one test.

use crate::places;
use crate::vm::Vm;
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the guest has it.
pub const MOUNT: &str = "/ogee";

/// A disk that was made.
#[derive(Debug)]
pub struct Appliance {
    /// A sparse raw file.
    pub disk: PathBuf,
}

impl Appliance {
    /// Makes the disk, `size_mib` large, in `folder`.
    ///
    /// # Errors
    /// A program or module is missing, or a tool fails.
    pub fn make(folder: &Path, programs: &[&Path], modules: &[&str], size_mib: u32) -> Result<Self> {
        let tree = folder.join("appliance.d");
        for name in ["bin", "lib", "modules"] {
            std::fs::create_dir_all(tree.join(name)).context("make the disk's folders")?;
        }
        let mut libraries = BTreeSet::new();
        for program in programs {
            let name = program.file_name().with_context(|| format!("{} has no name", program.display()))?;
            run(Command::new("strip").arg("-o").arg(tree.join("bin").join(name)).arg(program))?;
            libraries.extend(linked(&run(Command::new("ldd").arg(program))?));
        }
        for library in libraries {
            let name = library.file_name().with_context(|| format!("{} has no name", library.display()))?;
            std::fs::copy(&library, tree.join("lib").join(name)).with_context(|| format!("copy {}", library.display()))?;
        }
        for module in modules {
            copy_module(module, &tree.join("modules"))?;
        }
        let disk = folder.join("appliance.img");
        run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&disk).arg(format!("{size_mib}M")))?;
        Ok(Self { disk })
    }

    /// Mounts the disk in a guest and lets its shell find the programs.
    ///
    /// # Errors
    /// The guest has no second disk.
    pub fn mount(vm: &mut Vm) -> Result<()> {
        vm.run_ok(&format!("mkdir {MOUNT} && mount -t ext4 /dev/vdb {MOUNT} && ln -s {MOUNT}/lib /lib64 && mkdir -p /run /etc"))?;
        vm.run_ok(&format!("export PATH=/bin:{MOUNT}/bin LD_LIBRARY_PATH={MOUNT}/lib && ip link set lo up")).map(drop)
    }
}

/// The libraries in the output of ldd(1): `name => path (address)`, and the loader's path alone.
fn linked(said: &str) -> BTreeSet<PathBuf> {
    let path = |line: &str| line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from);
    said.lines().filter_map(path).collect()
}

/// Copies a module of the guest's kernel, unpacked.
fn copy_module(name: &str, to: &Path) -> Result<()> {
    let packages = places::cache().join("packages");
    let chosen = std::fs::read_to_string(packages.join("chosen")).context("the guest's kernel is not there: make the image first")?;
    let kernel = packages.join(chosen.lines().next().context("no kernel was chosen")?);
    let found = run(Command::new("find").arg(kernel.join("lib/modules")).args(["-name", &format!("{name}.ko*")]))?;
    let Some(file) = found.lines().next() else { bail!("the guest's kernel has no module {name}") };
    let to = to.join(format!("{name}.ko"));
    if file.ends_with(".xz") {
        let output = Command::new("xz").args(["-dc", file]).output().context("run xz")?;
        ensure!(output.status.success(), "unpack {file}");
        std::fs::write(&to, output.stdout).with_context(|| format!("write {}", to.display()))?;
    } else {
        std::fs::copy(file, &to).with_context(|| format!("copy {file}"))?;
    }
    Ok(())
}

fn run(command: &mut Command) -> Result<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = command.env("PATH", format!("{path}:/usr/sbin:/sbin")).output().with_context(|| format!("run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_in_what_ldd_says() {
        let said = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tlibnone.so => not found\n";
        let paths: Vec<PathBuf> = linked(said).into_iter().collect();
        assert_eq!(paths, [PathBuf::from("/lib/x86_64-linux-gnu/libc.so.6"), "/lib64/ld-linux-x86-64.so.2".into()]);
    }
}
