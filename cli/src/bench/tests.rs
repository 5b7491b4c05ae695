//! The whole benchmark on devices in memory, good ones and ones that lie: what is planted must be found.

use super::*;
use bytes::Bytes;
use clap::Parser;
use ogee_client::{BlockDevice, DeviceInfo, IoError, IoErrorKind, MemoryDevice, ReadData, ReadPiece};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of the device.
const SIZE: u64 = 1 << 20;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: BenchArgs,
}

fn args(words: &[&str]) -> BenchArgs {
    let all = ["bench", "v", "--runtime", "1", "--ramp", "0"].iter().chain(words);
    Line::try_parse_from(all).expect("good arguments").args
}

async fn run<D: BlockDevice>(device: D, words: &[&str]) -> Report {
    let args = args(words);
    args.validate().expect("possible");
    let mut signals = StopSignals::listen().expect("signals");
    let source = SdkSource { name: "v".to_owned(), device };
    let bench = Bench::new(&args, vec![source], true).expect("it fits");
    bench.run(&[], 3, &mut signals).await.expect("ran")
}

/// What a device does wrong, from the IO of this number on. IO 0 is the filling of the whole device.
#[derive(Debug, Clone, Copy)]
enum Lie {
    /// Writes are acknowledged and forgotten.
    LoseWrites(u64),
    /// Reads have one wrong bit.
    FlipBits(u64),
    /// Writes land 4 KiB too far.
    Misplace(u64),
    /// One write fails, though it was done.
    FailOne(u64),
}

#[derive(Debug, Clone)]
struct Liar {
    device: MemoryDevice,
    ios: Arc<AtomicU64>,
    lie: Lie,
}

impl Liar {
    fn new(lie: Lie) -> Self {
        let size = usize::try_from(SIZE).expect("small");
        Self { device: MemoryDevice::new(size), ios: Arc::default(), lie }
    }
}

impl BlockDevice for Liar {
    fn info(&self) -> DeviceInfo {
        self.device.info()
    }

    fn for_thread(&self) -> Self {
        self.clone()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, IoError> {
        let number = self.ios.fetch_add(1, Ordering::Relaxed);
        let data = self.device.read(offset, len).await?;
        if !matches!(self.lie, Lie::FlipBits(from) if number >= from) {
            return Ok(data);
        }
        let mut bytes = data.to_vec();
        bytes[1000] ^= 4;
        Ok(ReadData { pieces: [ReadPiece::Data(bytes.into())].into_iter().collect() })
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), IoError> {
        let number = self.ios.fetch_add(1, Ordering::Relaxed);
        match self.lie {
            Lie::LoseWrites(from) if number >= from => Ok(()),
            Lie::Misplace(from) if number >= from => self.device.write((offset + 4096) % SIZE, data).await,
            Lie::FailOne(at) if at == number => {
                let len = data.len() as u64;
                self.device.write(offset, data).await?;
                Err(IoError { kind: IoErrorKind::TimedOut, verb: "write", offset, len, source: None })
            }
            _ => self.device.write(offset, data).await,
        }
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.device.flush().await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.device.discard(offset, len).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.device.write_zeroes(offset, len).await
    }

    fn resized(&self) -> tokio::sync::watch::Receiver<u64> {
        self.device.resized()
    }
}

#[tokio::test]
async fn a_good_device_has_no_errors_and_every_io_is_counted() {
    let device = MemoryDevice::new(1 << 20);
    let words = ["--rw", "randrw", "--rwmixread", "30", "--iodepth", "4", "--numjobs", "2", "--fsync", "8", "--verify"];
    let report = run(device.clone(), &words).await;
    assert_eq!((report.errors, report.first_error), (0, None));
    let (read, write) = (report.read.expect("reads"), report.write.expect("writes"));
    assert_eq!(report.all.ios, read.ios + write.ios);
    assert!((report.seconds - 1.0).abs() < 0.01 && report.verified_blocks.is_some_and(|n| n >= 256), "{}", report.seconds);
    let counters = device.counters();
    let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
    assert!(get(&counters.writes) >= write.ios && get(&counters.writes) < write.ios + 8 + 1);
    assert!(report.flush.is_some_and(|f| f.ios.abs_diff(get(&counters.flushes)) <= 8), "{:?}", report.flush);
    assert_eq!((report.flushes_per_1000, report.write_amplification), (None, None), "nobody told");
}

#[tokio::test]
async fn a_sequential_load_with_jobs_stays_in_its_working_set() {
    let device = MemoryDevice::new(1 << 20);
    let words = ["--rw", "write", "--bs", "8k", "--numjobs", "3", "--offset", "64k", "--size", "512k"];
    let report = run(device.clone(), &words).await;
    assert!(report.errors == 0 && report.all.ios > 0);
    let data = device.read(0, 1 << 20).await.expect("read").to_vec();
    let is_used = |range: std::ops::Range<usize>| data[range].iter().any(|b| *b != 0);
    assert!(!is_used(0..64 << 10) && !is_used(576 << 10..1 << 20), "outside");
    assert!((8..72).all(|block| is_used(block * 8192..(block + 1) * 8192)), "every block inside");
}

async fn first_error(lie: Lie, words: &[&str]) -> String {
    let report = run(Liar::new(lie), &[words, &["--prefill", "--verify"]].concat()).await;
    assert!(report.errors > 0, "{lie:?} was not found");
    report.first_error.expect("the first error")
}

#[tokio::test]
async fn forgotten_writes_are_found_when_the_volume_is_read_back() {
    let text = first_error(Lie::LoseWrites(1), &["--rw", "write"]).await;
    assert!(text.starts_with("v: byte 0 is of generation 1, but "), "{text}");
}

#[tokio::test]
async fn flipped_bits_are_found() {
    let text = first_error(Lie::FlipBits(1), &["--rw", "randrw"]).await;
    assert!(text.starts_with("v: byte ") && text.ends_with("is damaged"), "{text}");
}

#[tokio::test]
async fn writes_to_the_wrong_place_are_found() {
    let text = first_error(Lie::Misplace(1), &["--rw", "randwrite"]).await;
    assert!(text.contains("holds what was written to volume 0 at byte"), "{text}");
}

#[tokio::test]
async fn a_write_that_failed_and_was_done_all_the_same_is_one_error_and_no_wrong_data() {
    let report = run(Liar::new(Lie::FailOne(3)), &["--rw", "randwrite", "--prefill", "--verify"]).await;
    assert_eq!(report.errors, 1, "{:?}", report.first_error);
    assert!(report.first_error.is_some_and(|e| e.contains("TimedOut")));
}

#[test]
fn what_cannot_be_is_refused_with_its_reason() {
    for (words, word) in [
        (&["--bs", "1000"][..], "--bs"),
        (&["--bs", "128M"], "--bs"),
        (&["--offset", "100"], "--offset"),
        (&["--iodepth", "70000"], "in flight"),
        (&["--bs", "64M", "--iodepth", "1000"], "buffers"),
        (&["v"], "twice"),
        (&["--rw", "randtrim", "--verify"], "discarded"),
        (&["--verify"], "--prefill"),
    ] {
        let error = args(words).validate().expect_err(word);
        assert!(error.kind() == ErrorKind::Usage && error.chain().contains(word), "{}", error.chain());
    }
    let args = args(&["--size", "2M"]);
    let source = SdkSource { name: "v".to_owned(), device: MemoryDevice::new(1 << 20) };
    assert!(Bench::new(&args, vec![source], true).is_err(), "it does not fit");
}

#[test]
fn sequential_jobs_share_the_blocks_without_gaps() {
    let shares: Vec<Blocks> = (0..3).map(|job| share(10, job, 3)).collect();
    assert_eq!(shares.iter().map(|s| (s.first, s.count)).collect::<Vec<_>>(), vec![(0, 3), (3, 3), (6, 4)]);
}
