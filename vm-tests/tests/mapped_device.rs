//! `ogee nbd map` in a guest, because this machine's kernel has no NBD client: Debian's kernel with its module `nbd`, a whole cluster in
//! the guest, and a file system on `/dev/nbdN` under verified load while server and keeper are killed.

#![allow(clippy::unwrap_used, missing_docs, reason = "test code")]

use anyhow::{Context, Result, ensure};
use ogee_vm_tests::appliance::{Appliance, MOUNT};
use ogee_vm_tests::cluster::binary;
use ogee_vm_tests::hammer::Hammer;
use ogee_vm_tests::image::Image;
use ogee_vm_tests::places;
use ogee_vm_tests::qemu::QemuDisk;
use ogee_vm_tests::vm::Vm;
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// Everything is translated, and a whole cluster runs in the guest.
const PATIENCE: Duration = Duration::from_secs(300);
/// Each may cost [`RESEND`].
const KILLS: u32 = 2;
/// When the kernel sends a request again: longer than any takes here, as a shorter time would keep a slow guest from getting anywhere.
const RESEND: &str = "--timeout 30";
/// For the cluster's caches, logs and processes.
const MEMORY_MIB: u32 = 1536;
const DISK_MIB: u32 = 6144;

struct Guest(Vm);

impl Guest {
    /// Runs `ogee`, which must succeed, and gives what it printed.
    fn ogee(&mut self, arguments: &str) -> Result<String> {
        let done = self.0.run_within(&format!("ogee {arguments}"), PATIENCE)?;
        ensure!(done.code == 0, "ogee {arguments} ended with {}: {}", done.code, done.output);
        Ok(done.output.trim().to_owned())
    }

    /// Runs `ogee`, which must say just this.
    fn says(&mut self, arguments: &str, expected: &str) -> Result<()> {
        let said = self.ogee(arguments)?;
        ensure!(said == expected, "ogee {arguments} said {said:?}");
        Ok(())
    }

    /// Runs `ogee`, which must refuse with this exit code and one line, and gives that.
    fn refused(&mut self, arguments: &str, code: i32) -> Result<String> {
        let done = self.0.run_within(&format!("ogee {arguments}"), PATIENCE)?;
        ensure!(done.code == code && done.output.trim().lines().count() == 1, "ogee {arguments}: {done:?}");
        Ok(done.output)
    }

    fn unmount(&mut self) -> Result<()> {
        let done = self.0.run_within("umount /mnt", PATIENCE)?;
        ensure!(done.code == 0, "{done:?}");
        Ok(())
    }

    /// The one mapping, as `ls --json` tells it.
    fn mapping(&mut self) -> Result<Value> {
        let listed: Value = serde_json::from_str(&self.ogee("nbd ls --json")?)?;
        ensure!(listed.as_array().is_some_and(|list| list.len() == 1), "one mapping: {listed}");
        Ok(listed[0].clone())
    }

    /// Waits until the mapping is whole, with another server than `before`.
    fn until_mapped(&mut self, before: Option<u64>) -> Result<Value> {
        ogee_vm_tests::deadline::wait_for("all connections are there", PATIENCE, || {
            let now = self.mapping()?;
            let is_whole = now["state"] == "mapped" && now["live_connections"] == now["connections"];
            Ok((is_whole && now["server_pid"].as_u64() != before).then_some(now))
        })
    }
}

fn boot(folder: &Path) -> Result<Guest> {
    let image = Image::golden()?;
    let system = folder.join("system.img");
    image.copy_raw(&system)?;
    let appliance = Appliance::make(folder, &[&binary()?, Path::new("/sbin/mkfs.ext4")], &["nbd"], DISK_MIB)?;
    let disk = QemuDisk::Appliance { system, data: appliance.disk, memory_mib: MEMORY_MIB };
    let mut vm = Vm::boot("nbd-map", &disk)?;
    Appliance::mount(&mut vm)?;
    vm.run_ok(&format!("export OGEE_DIR={MOUNT}/cluster && umount /mnt && dmesg -n 1"))?;
    Ok(Guest(vm))
}

#[test]
fn a_mapped_volume_outlives_its_server_and_its_keeper_and_is_mapped_again_from_the_table() -> Result<()> {
    let scratch = places::scratch()?;
    let mut guest = boot(scratch.path())?;
    let said = guest.refused("nbd map disk --mds 127.0.0.1:1", 1)?;
    ensure!(said.contains("modprobe nbd"), "{said}");
    guest.0.run_ok(&format!("insmod {MOUNT}/modules/nbd.ko"))?;
    guest.ogee("dev up --timeout 280")?;
    guest.refused("nbd map nosuch", 3)?;
    guest.ogee("volume create disk --size 64M")?;

    guest.says(&format!("nbd map disk {RESEND}"), "/dev/nbd0")?;
    guest.says("nbd map disk", "/dev/nbd0").context("mapped already: it stays")?;
    let first = guest.mapping()?;
    ensure!(first["state"] == "mapped" && first["live_connections"] == 4 && first["size_bytes"] == 64 << 20, "{first}");
    let seen = guest.0.run_ok("cat /sys/block/nbd0/size /sys/block/nbd0/backend")?;
    ensure!(seen == "131072\nogee:disk", "{seen}");
    let made = guest.0.run_within("mkfs.ext4 -q /dev/nbd0 && mount -t ext4 /dev/nbd0 /mnt", PATIENCE)?;
    ensure!(made.code == 0, "{made:?}");
    let said = guest.refused("nbd unmap disk", 4)?;
    ensure!(said.contains("mounted on /mnt"), "{said}");

    let hammer = under_kills(&mut guest)?;
    hammer.stop(&mut guest.0)?;
    hammer.verify(&mut guest.0)?;
    guest.unmount()?;
    guest.ogee("nbd unmap /dev/nbd0")?;
    guest.says("nbd ls --json", "[]")?;
    guest.0.run_ok("test ! -e /sys/block/nbd0/pid")?;
    guest.refused("nbd unmap /dev/nbd0", 3)?;

    guest.0.put_file("/tmp/nbdtab", "# mapped at boot\ndisk /dev/nbd5 connections=2\n")?;
    let all: Value = serde_json::from_str(&guest.ogee("nbd map --all --table /tmp/nbdtab --json")?)?;
    ensure!(all[0]["device"] == "/dev/nbd5" && all[0]["was_mapped"] == false, "{all}");
    guest.0.run_ok("mount -t ext4 /dev/nbd5 /mnt")?;
    hammer.verify(&mut guest.0).context("after unmap and map")?;
    guest.unmount()?;
    guest.ogee("nbd unmap --all")?;
    // Not that a task waited long: it has to.
    let errors = guest.0.run("dmesg | grep -iE 'I/O error|EXT4-fs (error|warning)'")?.output;
    ensure!(errors.trim().is_empty(), "the guest's kernel complains: {errors}");
    guest.ogee("dev down")?;
    guest.0.quit()
}

/// Load on the mounted device over kills of the server, one of the keeper, and a restart of the server by SIGTERM.
fn under_kills(guest: &mut Guest) -> Result<Hammer> {
    let hammer = Hammer::start(&mut guest.0, "nbd-map")?;
    guest.0.put_file("/tmp/flood.sh", include_str!("../scripts/guest-flood.sh"))?;
    guest.0.spawn("sh /tmp/flood.sh 1")?;
    guest.0.wait_until("test -f /tmp/flood.0", PATIENCE)?;
    for kill in 0..=KILLS {
        let before = guest.mapping()?["server_pid"].as_u64().context("a server runs")?;
        let signal = if kill == KILLS { "TERM" } else { "KILL" };
        guest.0.run_ok(&format!("kill -{signal} {before}"))?;
        guest.until_mapped(Some(before)).with_context(|| format!("after kill {kill}"))?;
        hammer.goes_on_within(&mut guest.0, PATIENCE).with_context(|| format!("after kill {kill}"))?;
    }
    let keeper = guest.mapping()?["keeper_pid"].as_u64().context("a keeper runs")?;
    guest.0.run_ok(&format!("kill -KILL {keeper}"))?;
    hammer.goes_on_within(&mut guest.0, PATIENCE).context("without a keeper")?;
    let left = guest.mapping()?;
    ensure!(left["state"] == "unattended", "{left}");
    guest.says(&format!("nbd map disk {RESEND}"), "/dev/nbd0").context("the same device")?;
    guest.until_mapped(None)?;
    hammer.goes_on_within(&mut guest.0, PATIENCE).context("with a new keeper")?;
    guest.0.run_ok("touch /tmp/flood.stop")?;
    guest.0.wait_until("test -f /tmp/flood.over.0", PATIENCE)?;
    let bad = guest.0.run("cat /tmp/flood.bad")?;
    ensure!(bad.code != 0, "{}", bad.output);
    let (rounds, longest) = (guest.0.run_ok("cat /tmp/flood.0")?, hammer.longest_round(&mut guest.0)?);
    eprintln!("{KILLS} kills of the server, one of the keeper: longest round {longest:?}, rounds of the other writers {rounds:?}");
    Ok(hammer)
}
