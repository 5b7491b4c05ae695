//! Both formats against `qemu-img`, and holes where there are zeros.

use super::*;
use crate::copy_out::copy_out;
use crate::output::Progress;
use ogee_client::{BlockDevice, MemoryDevice};
use std::os::unix::fs::MetadataExt;
use std::process::Command;

const SIZE: usize = (9 << 20) + 12_288;

/// Data in the middle, at the very end, and zeros that were written.
async fn device() -> MemoryDevice {
    let device = MemoryDevice::new(SIZE);
    let pattern: Vec<u8> = (0..200_000u32).map(|i| (i % 249) as u8 + 1).collect();
    let pattern = Bytes::from(pattern).slice(0..199_680);
    device.write(3 << 20, pattern.clone()).await.expect("written");
    device.write(SIZE as u64 - 4096, pattern.slice(0..4096)).await.expect("written");
    device.write(0, Bytes::from(vec![0; 8192])).await.expect("written");
    device
}

async fn export(format: ExportFormat, path: &Path) -> u64 {
    let device = device().await;
    let file = File::options().read(true).write(true).create_new(true).open(path).expect("created");
    let sink = ImageSink::new(file, path, SIZE as u64, format).expect("started");
    let sink = copy_out(&device, sink, &Progress::new("test", 0, true)).await.expect("copied");
    sink.finish().expect("finished")
}

fn qemu_img(args: &[&str]) {
    let done = Command::new("qemu-img").args(args).output().expect("qemu-img runs");
    assert!(done.status.success(), "qemu-img {args:?}: {done:?}");
}

#[tokio::test]
async fn both_formats_hold_the_device_and_are_sparse() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let expected = dir.path().join("expected");
    let bytes = device().await.read(0, u32::try_from(SIZE).expect("fits")).await.expect("read").to_vec();
    std::fs::write(&expected, &bytes).expect("written");
    let (raw, qcow2) = (dir.path().join("a.raw"), dir.path().join("a.qcow2"));

    let data_bytes = export(ExportFormat::Raw, &raw).await;
    assert_eq!(data_bytes, 49 * 4096 + 4096, "the runs of non-zero pages");
    assert_eq!(std::fs::read(&raw).expect("read"), bytes);
    let meta = std::fs::metadata(&raw).expect("stat");
    assert!(meta.blocks() * 512 < 1 << 20, "{} blocks for a mostly empty file", meta.blocks());

    export(ExportFormat::Qcow2, &qcow2).await;
    let (qcow2, expected) = (qcow2.to_str().expect("UTF-8"), expected.to_str().expect("UTF-8"));
    qemu_img(&["check", "-f", "qcow2", qcow2]);
    qemu_img(&["compare", "-f", "raw", "-F", "qcow2", expected, qcow2]);
    assert!(std::fs::metadata(qcow2).expect("stat").len() < 1 << 20);
}
