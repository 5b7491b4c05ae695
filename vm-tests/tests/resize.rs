//! A volume grows under a running guest, which is told and sees the new size, and can use the new space.

use anyhow::{Result, ensure};
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::image::Image;
use ogee_vm_tests::vm::Vm;
use std::time::Duration;

/// From `ogee volume resize` to the guest's new size; far more than the message takes.
const SEEN_LIMIT: Duration = Duration::from_secs(20);

#[test]
fn a_running_guest_sees_and_uses_the_new_size() -> Result<()> {
    let image = Image::golden()?;
    let mut cluster = Cluster::start("resize", 3, 1)?;
    cluster.ok(&["image", "import", &image.raw.to_string_lossy(), "golden"])?;
    cluster.ok(&["clone", "golden", "vm1"])?;
    let backend = cluster.serve("vm1")?;
    let mut vm = Vm::boot("resize", &backend.disk())?;
    for gib in [1_u64, 3] {
        let sectors = gib << 21;
        let before: u64 = vm.run_ok("cat /sys/block/vda/size")?.parse()?;
        ensure!(before < sectors, "the disk has {before} sectors already");
        cluster.ok(&["volume", "resize", "vm1", "--size", &format!("{gib}G")])?;
        vm.wait_until(&format!("test $(cat /sys/block/vda/size) = {sectors}"), SEEN_LIMIT)?;
        let last = sectors / 8 - 1;
        vm.run_ok(&format!("echo at {gib} GiB >/tmp/page; dd if=/tmp/page of=/dev/vda bs=4k seek={last} conv=sync,fsync 2>&1"))?;
        vm.run_ok("echo 3 >/proc/sys/vm/drop_caches")?;
        let back = vm.run_ok(&format!("dd if=/dev/vda bs=4k skip={last} count=1 2>/dev/null | head -n 1"))?;
        ensure!(back == format!("at {gib} GiB"), "the last page holds {back:?}");
    }
    assert_eq!(vm.disk_errors()?, "");
    vm.power_off()?;
    backend.stop()?;
    cluster.shut_down()
}
