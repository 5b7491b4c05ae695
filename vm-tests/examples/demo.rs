//! `make demo`: the main job from beginning to end, one line per step with its time.
//!
//! An embedded cluster (one MDS, three chunkservers) is started; an image is imported and cloned; a real guest boots from the clone
//! through its own boot loader; it is snapshotted, destroys its disk, is rolled back and boots again; it goes on under verified load while a
//! chunkserver is killed. Everything is taken down at the end, also after a failure.

use anyhow::{Context, Result, ensure};
use ogee_common::clock;
use ogee_common::size::ByteLen;
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::hammer::Hammer;
use ogee_vm_tests::image::{BOOT_MIB, Image};
use ogee_vm_tests::vm::{BOOT_LIMIT, Vm};
use serde_json::Value;
use std::time::Duration;

/// Prints one line per step.
struct Steps(u32);

impl Steps {
    fn run<T>(&mut self, what: &str, step: impl FnOnce() -> Result<(T, String)>) -> Result<T> {
        self.0 += 1;
        let start = clock::now();
        let (value, remark) = step().with_context(|| format!("step {}: {what}", self.0))?;
        println!("{:2}. {what:<62} {:>9} {remark}", self.0, seconds(start.elapsed()));
        Ok(value)
    }
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

fn took_ms(answer: &Value) -> String {
    answer["elapsed_ms"].as_f64().map_or_else(String::new, |ms| format!("(at the MDS and back: {ms:.1} ms)"))
}

fn import_rate(answer: &Value) -> String {
    let bytes = |key: &str| answer[key].as_u64().map_or_else(|| "?".to_owned(), |b| ByteLen(b).to_string());
    format!("({} of data at {}/s)", bytes("written_bytes"), bytes("bytes_per_second"))
}

fn main() -> Result<()> {
    let mut steps = Steps(0);
    let image = steps.run("build a bootable image from Debian packages (cached)", || {
        let image = Image::golden()?;
        let bytes = std::fs::metadata(&image.raw)?.len();
        Ok((image, format!("({})", ByteLen(bytes))))
    })?;
    let mut cluster = steps.run("start an embedded cluster: 1 MDS, 3 chunkservers", || {
        Ok((Cluster::start("demo", 3, 1)?, String::new()))
    })?;
    steps.run("import the image (qcow2, holes are not written)", || {
        let file = image.qcow2.to_string_lossy();
        let answer = cluster.json(&["image", "import", &file, "golden", "--json"])?;
        Ok(((), import_rate(&answer)))
    })?;
    steps.run("clone it to a boot disk: no data is copied", || {
        let answer = cluster.json(&["clone", "golden", "vm1", "--json"])?;
        Ok(((), took_ms(&answer)))
    })?;
    let backend = steps.run("serve the clone on a vhost-user-blk socket", || Ok((cluster.serve("vm1")?, String::new())))?;
    let mut vm = steps.run("boot a guest to its first prompt", || {
        Ok((Vm::boot("demo-1", &backend.disk())?, "(SeaBIOS, SYSLINUX, Linux under QEMU)".to_owned()))
    })?;
    vm.run_ok("echo precious >/mnt/file && sync")?;
    steps.run("snapshot it while it runs", || {
        let answer = cluster.json(&["snapshot", "create", "vm1@good", "--json"])?;
        Ok(((), took_ms(&answer)))
    })?;
    steps.run("let the guest wipe its boot disk and reboot: it cannot", || {
        vm.run_ok(&format!("dd if=/dev/zero of=/dev/vda bs=1M count={BOOT_MIB} conv=fsync 2>&1"))?;
        vm.type_keys("reboot -f\n")?;
        vm.expect("No bootable device", BOOT_LIMIT)?;
        vm.quit()?;
        backend.stop()?;
        Ok(((), String::new()))
    })?;
    steps.run("roll back", || {
        let answer = cluster.json(&["rollback", "vm1@good", "--json"])?;
        Ok(((), took_ms(&answer)))
    })?;
    let backend = cluster.serve("vm1")?;
    let mut vm = steps.run("boot it again, with its file", || {
        let mut vm = Vm::boot("demo-2", &backend.disk())?;
        ensure!(vm.run_ok("cat /mnt/file")? == "precious", "the file is not what it was at the snapshot");
        Ok((vm, String::new()))
    })?;
    steps.run("kill -9 a chunkserver under verified writes of the guest", || {
        let hammer = Hammer::start(&mut vm, "demo")?;
        cluster.kill("cs-1")?;
        hammer.goes_on(&mut vm)?;
        let worst = hammer.finish(&mut vm)?;
        Ok(((), format!("(no error; longest write and read back {})", seconds(worst))))
    })?;
    steps.run("shut everything down", || {
        vm.power_off()?;
        backend.stop()?;
        cluster.shut_down()?;
        Ok(((), String::new()))
    })?;
    println!("done: a guest booted from a lazy clone on three replicas, lost its disk, got it back, and outlived a chunkserver");
    Ok(())
}
