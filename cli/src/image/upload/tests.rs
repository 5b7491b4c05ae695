//! Images of every kind to a device in memory: the content, and what was not read and not written.

use super::*;
use crate::image::source::ImageFormat;
use ogee_client::MemoryDevice;
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;

async fn copy(path: &Path, device_bytes: usize) -> (Copied, MemoryDevice) {
    let source = Arc::new(ImageSource::open(path, ImageFormat::Auto).expect("a good image"));
    let device = MemoryDevice::new(device_bytes);
    let copied = upload(&source, &device, &Progress::new("test", 0, true)).await.expect("copied");
    (copied, device)
}

async fn content(device: &MemoryDevice) -> Vec<u8> {
    let len = u32::try_from(device.info().size_bytes).expect("a small device");
    device.read(0, len).await.expect("read").to_vec()
}

#[tokio::test]
async fn holes_are_not_read_and_zeros_are_not_written() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let path = dir.path().join("a.raw");
    let file = File::create(&path).expect("created");
    file.set_len(40 << 20).expect("grown");
    file.write_all_at(&vec![7; 3 << 20], 8 << 20).expect("written");
    file.write_all_at(&vec![0; 2 << 20], 20 << 20).expect("zeros that take space");
    file.write_all_at(&[9; 10], (30 << 20) + 5000).expect("a few bytes");
    file.sync_all().expect("synced");
    let (copied, device) = copy(&path, 40 << 20).await;
    assert!(copied.read_bytes >= 5 << 20 && copied.read_bytes < 8 << 20, "{copied:?}");
    // The ten bytes lie in one file-system block, whose run of data is at most a cell.
    assert!(copied.written_bytes > 3 << 20 && copied.written_bytes <= (3 << 20) + (64 << 10), "{copied:?}");
    assert!(content(&device).await == std::fs::read(&path).expect("read"));
    assert_eq!(device.counters().flushes.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_ragged_end_is_filled_with_zeros() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let path = dir.path().join("a.raw");
    std::fs::write(&path, vec![5; (1 << 20) + 77]).expect("written");
    let (_, device) = copy(&path, (1 << 20) + 4096).await;
    let mut expected = vec![5; (1 << 20) + 77];
    expected.resize((1 << 20) + 4096, 0);
    assert!(content(&device).await == expected);
}

#[tokio::test]
async fn an_image_that_shrinks_is_an_error() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let path = dir.path().join("a.raw");
    std::fs::write(&path, vec![5; 4 << 20]).expect("written");
    let source = Arc::new(ImageSource::open(&path, ImageFormat::Raw).expect("opened"));
    let read = source.read(0, 4 << 20).expect("read");
    assert_eq!(read.len(), 4 << 20);
    File::options().write(true).open(&path).expect("opened").set_len(1 << 20).expect("cut");
    assert!(source.read(0, 4 << 20).is_err());
}

#[test]
fn a_device_too_small_is_an_error() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let path = dir.path().join("a.raw");
    std::fs::write(&path, vec![5; 2 << 20]).expect("written");
    let source = Arc::new(ImageSource::open(&path, ImageFormat::Raw).expect("opened"));
    let device = MemoryDevice::new(1 << 20);
    let outcome = runtime.block_on(upload(&source, &device, &Progress::new("test", 0, true)));
    assert_eq!(outcome.expect_err("must fail").kind(), crate::error::ErrorKind::Failure);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// Random stretches of data in a file with holes arrive as they are, as raw and as qcow2.
    #[test]
    fn random_images_arrive_unchanged(
        stretches in proptest::collection::vec((0u64..6_000_000, 1usize..300_000, any::<u8>()), 0..6),
        ragged in 1u64..4096,
    ) {
        let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
        let raw = dir.path().join("a.raw");
        let file = File::create(&raw).expect("created");
        file.set_len(6_300_000 / 512 * 512 + ragged / 512 * 512).expect("grown");
        for (at, len, byte) in stretches {
            file.write_all_at(&vec![byte; len], at).expect("written");
        }
        let qcow2 = dir.path().join("a.qcow2");
        let (from, to) = (raw.to_str().expect("UTF-8"), qcow2.to_str().expect("UTF-8"));
        let done = std::process::Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2", "-c", from, to]).status().expect("qemu-img runs");
        prop_assert!(done.success());
        let mut expected = std::fs::read(&raw).expect("read");
        expected.resize(7 << 20, 0);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        for path in [&raw, &qcow2] {
            let same = runtime.block_on(async { content(&copy(path, 7 << 20).await.1).await == expected });
            prop_assert!(same, "{}", path.display());
        }
    }
}
