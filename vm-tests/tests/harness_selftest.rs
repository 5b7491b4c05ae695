//! The harness and the golden image, checked without any of our daemons: the disk is a raw file, or that file behind
//! `qemu-storage-daemon`. When these pass and another test fails, the daemon under test is to blame.

use anyhow::{Context, Result, ensure};
use ogee_vm_tests::hammer::Hammer;
use ogee_vm_tests::image::{BOOT_MIB, DATA_MARKER, Image};
use ogee_vm_tests::process::is_alive;
use ogee_vm_tests::qemu::QemuDisk;
use ogee_vm_tests::vhost::VhostBackend;
use ogee_vm_tests::vm::{BOOT_LIMIT, Vm};
use ogee_vm_tests::places;
use std::os::unix::fs::FileExt;
use std::path::Path;

#[test]
fn a_guest_runs_commands_reboots_and_powers_off_on_a_vhost_user_disk() -> Result<()> {
    let scratch = places::scratch()?;
    let (file, socket) = (scratch.path().join("disk.raw"), scratch.path().join("disk.sock"));
    Image::golden()?.copy_raw(&file)?;
    let backend = VhostBackend::storage_daemon("selftest-qsd", &file, &socket)?;
    let mut vm = Vm::boot("selftest-vhost", &backend.disk())?;
    assert!(vm.console().has_heard(DATA_MARKER));
    assert!(vm.console().has_heard("SYSLINUX"), "the guest did not come through the boot loader");
    assert_eq!(vm.qmp()?.status()?, "running");

    // Exit codes, both output streams, quotes, and output that does not end its line.
    assert_eq!(vm.run("exit_code() { return 7; }; exit_code")?.code, 7);
    assert_eq!(vm.run_ok("printf 'a b'; echo \" c\" >&2")?, "a b c");
    vm.put_file("/tmp/script", "#!/bin/sh\necho \"it's $((6 * 7))\"\n")?;
    assert_eq!(vm.run_ok("sh /tmp/script")?, "it's 42");
    assert!(vm.run_ok("false").is_err());

    // A reboot that syncs first keeps the file, and it is on the disk, not in a cache.
    vm.run_ok("dd if=/dev/urandom of=/mnt/kept bs=64k count=32 2>&1 && sync")?;
    let sum = vm.run_ok("sha256sum </mnt/kept")?;
    vm.reboot()?;
    assert_eq!(vm.run_ok("sha256sum </mnt/kept")?, sum);
    assert_eq!(vm.disk_errors()?, "");
    vm.power_off()?;
    backend.stop()
}

#[test]
fn a_guest_waits_for_its_back_end_and_goes_on() -> Result<()> {
    let scratch = places::scratch()?;
    let (file, socket) = (scratch.path().join("disk.raw"), scratch.path().join("disk.sock"));
    Image::golden()?.copy_raw(&file)?;
    let backend = VhostBackend::storage_daemon("selftest-reconnect-1", &file, &socket)?;
    let mut vm = Vm::boot("selftest-reconnect", &backend.disk())?;
    let hammer = Hammer::start(&mut vm, "selftest")?;
    backend.kill();
    let before = hammer.rounds(&mut vm)?;
    // The new back end finds the old one's socket file.
    let backend = VhostBackend::storage_daemon("selftest-reconnect-2", &file, &socket)?;
    hammer.goes_on(&mut vm)?;
    ensure!(hammer.rounds(&mut vm)? > before, "no round after the restart");
    hammer.stop(&mut vm)?;
    hammer.verify(&mut vm)?;
    assert_eq!(vm.disk_errors()?, "");
    eprintln!("longest round with the back end's restart: {:?}", hammer.longest_round(&mut vm)?);

    // One wrong byte under the guest must not go unnoticed.
    spoil(&file, b" of selftest\n")?;
    let error = hammer.finish(&mut vm).expect_err("a spoiled disk was verified").to_string();
    ensure!(error.contains("does not hold what the guest wrote"), "{error}");
    vm.power_off()?;
    backend.stop()
}

#[test]
fn the_image_boots_from_a_plain_file_and_not_after_its_boot_area_is_wiped() -> Result<()> {
    let scratch = places::scratch()?;
    let file = scratch.path().join("disk.raw");
    let image = Image::golden()?;
    image.copy_raw(&file)?;
    let before = image.sha256()?;
    let mut vm = Vm::boot("selftest-raw", &QemuDisk::Raw(file))?;
    vm.run_ok(&format!("dd if=/dev/zero of=/dev/vda bs=1M count={BOOT_MIB} conv=fsync 2>&1"))?;
    vm.type_keys("reboot -f\n")?;
    vm.expect("No bootable device", BOOT_LIMIT)?;
    let pid = vm.pid();
    drop(vm);
    ensure!(!is_alive(pid), "QEMU outlived the guest that was dropped");
    assert_eq!(image.sha256()?, before, "the golden image was written to");
    Ok(())
}

/// Changes one byte of `file` in the last place where it contains `text`.
fn spoil(file: &Path, text: &[u8]) -> Result<()> {
    let contents = std::fs::read(file)?;
    let at = contents.windows(text.len()).rposition(|window| window == text).context("the text is not in the file")?;
    std::fs::File::options().write(true).open(file)?.write_all_at(b"!", u64::try_from(at)?)?;
    Ok(())
}
