//! A rollback brings back a boot disk that the guest has destroyed, and takes away what was written after the snapshot.

use anyhow::{Result, ensure};
use ogee_common::clock;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::image::{BOOT_MIB, Image};
use ogee_vm_tests::vm::{BOOT_LIMIT, Vm};

#[test]
fn a_wiped_boot_disk_boots_again_after_a_rollback() -> Result<()> {
    let image = Image::golden()?;
    let mut cluster = Cluster::start("rollback", 3, 1)?;
    cluster.ok(&["image", "import", &image.raw.to_string_lossy(), "golden"])?;
    cluster.ok(&["clone", "golden", "vm1"])?;
    let backend = cluster.serve("vm1")?;
    let mut vm = Vm::boot("rollback-1", &backend.disk())?;
    vm.run_ok("echo precious >/mnt/before && sync")?;

    // The snapshot is taken of the live volume: exact, with everything the guest has synced.
    cluster.ok(&["snapshot", "create", "vm1@good"])?;
    let good = cluster.checksum("vm1@good")?;
    vm.run_ok("echo late >/mnt/after && sync")?;
    vm.run_ok(&format!("dd if=/dev/zero of=/dev/vda bs=1M count={BOOT_MIB} conv=fsync 2>&1"))?;
    vm.type_keys("reboot -f\n")?;
    vm.expect("No bootable device", BOOT_LIMIT)?;
    vm.quit()?;
    backend.stop()?;
    ensure!(cluster.checksum("vm1@good")? == good, "the snapshot changed when its volume was damaged");
    ensure!(cluster.checksum("vm1")? != good, "the damage did not reach the volume");

    let start = clock::now();
    cluster.ok(&["rollback", "vm1@good"])?;
    eprintln!("rollback took {:?} as a command", start.elapsed());
    ensure!(cluster.checksum("vm1")? == good, "the volume is not the snapshot after the rollback");

    let backend = cluster.serve("vm1")?;
    let mut vm = Vm::boot("rollback-2", &backend.disk())?;
    assert_eq!(vm.run_ok("cat /mnt/before")?, "precious");
    ensure!(vm.run("test -e /mnt/after")?.code == 1, "a file written after the snapshot is still there");
    assert_eq!(vm.disk_errors()?, "");
    vm.power_off()?;
    backend.stop()?;
    ensure!(cluster.checksum("vm1@good")? == good, "the snapshot changed when the volume was used after the rollback");
    cluster.shut_down()
}
