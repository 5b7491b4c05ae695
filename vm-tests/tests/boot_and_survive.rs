//! A guest boots from a clone of an imported image, through its own boot loader, and what it wrote survives its own reboot, the
//! death of every daemon under it, and in the end the death of everything.

use anyhow::{Result, ensure};
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::image::{DATA_MARKER, Image};
use ogee_vm_tests::vm::Vm;
use std::time::Duration;

/// After all daemons were killed under a guest: their restart, elections, and the client's retries.
const RECOVERY_LIMIT: Duration = Duration::from_secs(60);

#[test]
fn guest_writes_survive_reboots_and_the_death_of_every_daemon() -> Result<()> {
    let image = Image::golden()?;
    let mut cluster = Cluster::start("boot-and-survive", 3, 1)?;
    cluster.ok(&["image", "import", &image.qcow2.to_string_lossy(), "golden"])?;
    cluster.ok(&["snapshot", "create", "golden@released"])?;
    cluster.ok(&["clone", "golden@released", "vm1"])?;

    let backend = cluster.serve("vm1")?;
    let mut vm = Vm::boot("boot-and-survive-1", &backend.disk())?;
    assert!(vm.console().has_heard("SYSLINUX") && vm.console().has_heard(DATA_MARKER));
    let first = write_file(&mut vm, "first")?;
    vm.reboot()?;
    ensure!(sum(&mut vm, "first")? == first, "the file written before the guest's reboot is not the same after it");

    // Every daemon dies while the guest writes; the guest waits and notices no error.
    vm.spawn("dd if=/dev/urandom of=/mnt/flight bs=4k count=1500 oflag=direct conv=fsync; echo $? >/tmp/flight")?;
    vm.wait_until("test -s /mnt/flight", RECOVERY_LIMIT)?;
    cluster.kill_all()?;
    ensure!(vm.run("test -e /tmp/flight")?.code == 1, "the write was over before the daemons died: nothing was tested");
    cluster.revive()?;
    vm.wait_until("test -s /tmp/flight", RECOVERY_LIMIT)?;
    assert_eq!(vm.run_ok("cat /tmp/flight")?, "0", "the write under way when the daemons died failed");
    vm.run_ok("echo 3 >/proc/sys/vm/drop_caches")?;
    ensure!(sum(&mut vm, "first")? == first, "an old file changed when the daemons died");
    let flight = sum(&mut vm, "flight")?;
    let second = write_file(&mut vm, "second")?;
    assert_eq!(vm.disk_errors()?, "");
    vm.power_off()?;

    // Now everything dies, vhost-blk too.
    let contents = cluster.checksum("vm1")?;
    backend.kill();
    cluster.kill_all()?;
    cluster.revive()?;
    ensure!(cluster.checksum("vm1")? == contents, "the volume changed when everything was killed");
    let backend = cluster.serve("vm1")?;
    let mut vm = Vm::boot("boot-and-survive-2", &backend.disk())?;
    for (name, expected) in [("first", &first), ("flight", &flight), ("second", &second)] {
        ensure!(sum(&mut vm, name)? == *expected, "{name} changed when everything was killed");
    }
    assert_eq!(vm.disk_errors()?, "");
    vm.power_off()?;
    backend.stop()?;
    cluster.shut_down()
}

/// Writes 2 MiB of random bytes, durably, and gives their checksum.
fn write_file(vm: &mut Vm, name: &str) -> Result<String> {
    vm.run_ok(&format!("dd if=/dev/urandom of=/mnt/{name} bs=64k count=32 conv=fsync 2>&1 && sync"))?;
    sum(vm, name)
}

fn sum(vm: &mut Vm, name: &str) -> Result<String> {
    vm.run_ok(&format!("sha256sum </mnt/{name}"))
}
