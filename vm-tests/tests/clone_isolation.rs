//! Two guests that run at the same time from clones of one image do not see each other's writes, and the image stays as it was.

use anyhow::{Result, ensure};
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::image::{Image, sha256};
use ogee_vm_tests::vm::Vm;

#[test]
fn two_clones_and_their_image_are_independent() -> Result<()> {
    let image = Image::golden()?;
    let mut cluster = Cluster::start("clone-isolation", 3, 1)?;
    cluster.ok(&["image", "import", &image.raw.to_string_lossy(), "golden"])?;
    let original = image.sha256()?;
    ensure!(cluster.checksum("golden")? == original, "the imported volume is not the image");
    cluster.ok(&["snapshot", "create", "golden@released"])?;
    for clone in ["red", "blue"] {
        cluster.ok(&["clone", "golden@released", clone])?;
        ensure!(cluster.checksum(clone)? == original, "the fresh clone {clone} is not the image");
    }

    let (red_backend, blue_backend) = (cluster.serve("red")?, cluster.serve("blue")?);
    let mut red = Vm::start("clone-isolation-red", &red_backend.disk())?;
    let mut blue = Vm::start("clone-isolation-blue", &blue_backend.disk())?;
    red.wait_ready()?;
    blue.wait_ready()?;

    // The same places of both disks: a raw sector range in the boot partition's free end, and the same file name.
    for (vm, word) in [(&mut red, "red"), (&mut blue, "blue")] {
        vm.run_ok(&format!("yes {word} | head -c 65536 | dd of=/dev/vda bs=64k seek=320 iflag=fullblock conv=fsync,notrunc 2>&1"))?;
        vm.run_ok(&format!("echo {word} >/mnt/colour && sync && echo 3 >/proc/sys/vm/drop_caches"))?;
    }
    for (vm, word) in [(&mut red, "red"), (&mut blue, "blue")] {
        let written = vm.run_ok(&format!("yes {word} | head -c 65536 | sha256sum"))?;
        ensure!(vm.run_ok("dd if=/dev/vda bs=64k skip=320 count=1 2>/dev/null | sha256sum")? == written, "{word} does not read its own words");
        assert_eq!(vm.run_ok("cat /mnt/colour")?, word);
        assert_eq!(vm.disk_errors()?, "");
    }
    red.power_off()?;
    blue.power_off()?;
    red_backend.stop()?;
    blue_backend.stop()?;

    ensure!(cluster.checksum("golden")? == original, "the image's volume changed");
    ensure!(cluster.checksum("golden@released")? == original, "the image's snapshot changed");
    ensure!(cluster.checksum("red")? != cluster.checksum("blue")?, "the clones have the same contents");
    let exported = cluster.folder().join("exported.raw");
    cluster.ok(&["export", "golden@released", &exported.to_string_lossy(), "--format", "raw"])?;
    ensure!(sha256(&exported)? == original, "the exported image is not the image");
    cluster.shut_down()
}
