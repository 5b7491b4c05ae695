//! The reader against images that `qemu-img` and `qemu-io` made, the writer against `qemu-img check`, both against each
//! other, and the reader against garbage.

use super::error::Feature;
use super::*;
use proptest::prelude::*;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

fn run(program: &str, args: &[&str]) {
    let done = Command::new(program).args(args).output().expect("QEMU's tools are installed");
    assert!(done.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr));
}

/// Repeatable bytes that do not compress well.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect()
}

/// A disk of `size` bytes: noise, text that compresses, zeros, and data in the last sector.
fn disk(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    bytes[..300_000].copy_from_slice(&noise(300_000, 7));
    for (i, b) in bytes[1 << 20..(1 << 20) + 700_001].iter_mut().enumerate() {
        *b = u8::try_from(i / 1000 % 7).expect("below 7");
    }
    let tail = size - 512;
    bytes[tail..].copy_from_slice(&noise(512, 9));
    bytes
}

/// Reads everything that `next_data` names, in pieces of an odd size, over zeros.
fn read_all(reader: &Reader) -> Vec<u8> {
    let size = usize::try_from(reader.virtual_bytes()).expect("a small image");
    let mut bytes = vec![0; size];
    let mut at = 0;
    while let Some(range) = reader.next_data(at, 999_936).expect("tables can be read") {
        assert!(range.start >= at && range.end > range.start, "{range:?} after {at}");
        let (start, end) = (usize::try_from(range.start).expect("fits"), usize::try_from(range.end).expect("fits"));
        for piece_start in (start..end).step_by(77_777) {
            let piece = piece_start..(piece_start + 77_777).min(end);
            reader.read_at(piece.start as u64, &mut bytes[piece]).expect("data can be read");
        }
        at = range.end;
    }
    bytes
}

fn convert(dir: &Path, raw: &[u8], options: &[&str]) -> std::path::PathBuf {
    let (source, image) = (dir.join("disk.raw"), dir.join("disk.qcow2"));
    std::fs::write(&source, raw).expect("written");
    let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
    args.extend(options);
    args.extend([source.to_str().expect("UTF-8"), image.to_str().expect("UTF-8")]);
    run("qemu-img", &args);
    image
}

fn open(path: &Path) -> Result<Reader, Qcow2Error> {
    Reader::open(File::open(path).expect("opened"))
}

#[test]
fn images_of_qemu_img_read_as_the_disk_they_were_made_from() {
    let variants: &[&[&str]] = &[
        &[],
        &["-o", "compat=0.10"],
        &["-c"],
        &["-c", "-o", "compat=0.10,cluster_size=4096"],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=2M"],
        &["-c", "-o", "cluster_size=2M"],
        &["-o", "lazy_refcounts=on,preallocation=metadata"],
        &["-S", "0", "-o", "refcount_bits=64"],
    ];
    for size in [8 << 20, (5 << 20) + 512 * 3] {
        let expected = disk(size);
        for options in variants {
            let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
            let reader = open(&convert(dir.path(), &expected, options)).expect("a good image");
            assert_eq!(reader.virtual_bytes(), size as u64);
            assert!(read_all(&reader) == expected, "content differs with {options:?} and {size} bytes");
        }
    }
}

#[test]
fn unallocated_clusters_are_not_offered() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let reader = open(&convert(dir.path(), &disk(64 << 20), &[])).expect("a good image");
    let first = reader.next_data(0, u64::MAX).expect("read").expect("data");
    assert_eq!(first, 0..5 * 65_536, "300,000 bytes of noise are five clusters");
    assert_eq!(reader.next_data(2 << 20, u64::MAX).expect("read"), Some((64 << 20) - 65_536..64 << 20));
    assert_eq!(reader.next_data(64 << 20, u64::MAX).expect("read"), None);
    // A sparse image of a huge disk is walked without reading what is not there.
    let huge = dir.path().join("huge.qcow2");
    run("qemu-img", &["create", "-f", "qcow2", huge.to_str().expect("UTF-8"), "60T"]);
    let reader = open(&huge).expect("a good image");
    assert_eq!(reader.next_data(0, u64::MAX).expect("read"), None);
}

#[test]
fn zero_clusters_mask_what_was_written_before() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let mut expected = disk(8 << 20);
    let image = convert(dir.path(), &expected, &[]);
    let name = image.to_str().expect("UTF-8");
    run("qemu-io", &["-f", "qcow2", "-c", "write -z 0 128k", "-c", "write -P 77 3M 192k", name]);
    expected[..128 << 10].fill(0);
    expected[3 << 20..(3 << 20) + (192 << 10)].fill(77);
    assert!(read_all(&open(&image).expect("a good image")) == expected);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let base = convert(dir.path(), &disk(4 << 20), &[]);
    let made = |name: &str, args: &[&str]| {
        let path = dir.path().join(name);
        let mut all = vec!["create", "-q", "-f", "qcow2"];
        all.extend(args);
        all.extend([path.to_str().expect("UTF-8"), "4M"]);
        run("qemu-img", &all);
        open(&path).map(|_| ()).expect_err("must be refused")
    };
    let base = base.to_str().expect("UTF-8");
    let error = made("child", &["-b", base, "-F", "qcow2"]);
    assert!(matches!(&error, Qcow2Error::BackingFile { name } if name == base), "{error}");
    let encrypted = ["--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"];
    assert!(matches!(made("luks", &encrypted), Qcow2Error::Encrypted(2)));
    let unsupported = |e| match e {
        Qcow2Error::Unsupported(feature) => feature,
        other => panic!("{other}"),
    };
    let data_file = format!("data_file={}", dir.path().join("data").display());
    assert_eq!(unsupported(made("external", &["-o", &data_file])), Feature::ExternalDataFile);
    assert_eq!(unsupported(made("subclusters", &["-o", "extended_l2=on"])), Feature::ExtendedL2);
    assert_eq!(unsupported(made("zstd", &["-o", "compression_type=zstd"])), Feature::Zstd);
}

#[test]
fn a_cut_off_image_is_an_error_and_not_zeros() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    for options in [&[][..], &["-c"]] {
        let image = convert(dir.path(), &disk(8 << 20), options);
        let whole = std::fs::read(&image).expect("read");
        for kept in [whole.len() * 3 / 4, whole.len() / 2, 70_000, 4096, 100, 3, 0] {
            std::fs::write(&image, &whole[..kept]).expect("written");
            let outcome = open(&image).and_then(|reader| {
                let mut buffer = vec![0; 8 << 20];
                reader.read_at(0, &mut buffer)
            });
            assert!(outcome.is_err(), "{kept} of {} bytes with {options:?}", whole.len());
        }
    }
}

/// The header that the writer makes for an empty 1 GiB disk, byte by byte; and the reader reads it.
#[test]
fn golden_header() {
    let mut file = tempfile::NamedTempFile::new_in("/var/tmp").expect("a file");
    Writer::new(file.as_file().try_clone().expect("a handle"), 1 << 30).finish().expect("written");
    file.flush().expect("flushed");
    let bytes = std::fs::read(file.path()).expect("read");
    let golden: [u8; 112] = [
        0x51, 0x46, 0x49, 0xfb, 0, 0, 0, 3, // magic, version
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // no backing file
        0, 0, 0, 16, // 64 KiB clusters
        0, 0, 0, 0, 0x40, 0, 0, 0, // 1 GiB
        0, 0, 0, 0, // not encrypted
        0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, // two L1 entries in cluster 1
        0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1, // the refcount table is cluster 2
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // no internal snapshots
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // no features
        0, 0, 0, 4, 0, 0, 0, 104, // 16-bit refcounts, header length
        0, 0, 0, 0, 0, 0, 0, 0, // no header extensions
    ];
    assert_eq!(&bytes[..112], &golden);
    assert_eq!(bytes.len(), 4 << 16, "header, L1 table, refcount table, refcount block");
    let expected =
        Header { version: 3, cluster_bits: 16, virtual_bytes: 1 << 30, l1_offset: 1 << 16, l1_entries: 2 };
    assert_eq!(Header::parse(&bytes).expect("a good header"), expected);
    run("qemu-img", &["check", "-f", "qcow2", file.path().to_str().expect("UTF-8")]);
}

#[test]
fn written_images_pass_check_and_compare() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a folder");
    // Data on both sides of the bound between two L2 tables (512 MiB), a gap of a whole table, and a ragged end.
    let size: u64 = (2 << 30) + 12_288;
    let pieces: Vec<(u64, Vec<u8>)> = vec![
        (0, noise(1 << 20, 1)),
        ((512 << 20) - (1 << 20), noise(2 << 20, 2)),
        (1700 << 20, [vec![0; 65_536], noise(65_536, 3), vec![0; 131_072], noise(65_536, 4)].concat()),
        (2 << 30, noise(12_288, 5)),
    ];
    let (raw, image) = (dir.path().join("a.raw"), dir.path().join("a.qcow2"));
    let plain = File::create(&raw).expect("created");
    plain.set_len(size).expect("grown");
    let mut writer = Writer::new(File::create(&image).expect("created"), size);
    for (offset, data) in &pieces {
        plain.write_all_at(data, *offset).expect("written");
        writer.put(*offset, data).expect("put");
    }
    assert!(writer.put(0, &[1; 65_536]).is_err(), "order is kept");
    assert!(writer.put(size, &[1; 512]).is_err(), "bounds are kept");
    writer.finish().expect("finished");
    let (raw, name) = (raw.to_str().expect("UTF-8"), image.to_str().expect("UTF-8"));
    run("qemu-img", &["check", "-f", "qcow2", name]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", raw, name]);
    let reader = open(&image).expect("a good image");
    for (offset, data) in &pieces {
        let mut back = vec![0xee; data.len()];
        reader.read_at(*offset, &mut back).expect("read");
        assert!(back == *data, "at {offset}");
    }
}

/// Runs the reader over everything an image offers; only that it returns is asked, and soon.
fn exercise(bytes: &[u8]) {
    let file = tempfile::tempfile_in("/var/tmp").expect("a file");
    file.write_all_at(bytes, 0).expect("written");
    let Ok(reader) = Reader::open(file) else { return };
    let mut at = 0;
    for _ in 0..20 {
        match reader.next_data(at, 1 << 20) {
            Ok(Some(range)) => {
                let len = usize::try_from(range.end - range.start).expect("bounded by 1 MiB").min(1 << 20);
                // An error is a fine answer.
                let _ = reader.read_at(range.start, &mut vec![0; len]);
                at = range.end;
            }
            Ok(None) | Err(_) => return,
        }
    }
}

fn small_image() -> Vec<u8> {
    let file = tempfile::NamedTempFile::new_in("/var/tmp").expect("a file");
    let mut writer = Writer::new(file.as_file().try_clone().expect("a handle"), 4 << 20);
    writer.put(0, &noise(1 << 20, 3)).expect("put");
    writer.finish().expect("finished");
    std::fs::read(file.path()).expect("read")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn garbage_headers_never_panic(version in 0u32..5, fields in proptest::collection::vec(any::<u8>(), 0..600)) {
        let bytes = [&MAGIC[..], &version.to_be_bytes(), &fields].concat();
        exercise(&bytes);
    }

    #[test]
    fn damaged_images_never_panic(
        changes in proptest::collection::vec((0usize..104, any::<u8>()), 0..3),
        table_changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..20),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = small_image();
        for (at, value) in changes {
            bytes[at] = value;
        }
        for (at, value) in table_changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        exercise(&bytes);
    }
}

#[test]
fn a_header_that_asks_for_a_huge_table_is_refused_before_room_is_made() {
    let mut bytes = small_image();
    // 64 TiB in 512-byte clusters needs an L1 table of 16 GiB.
    bytes[20..24].copy_from_slice(&9u32.to_be_bytes());
    bytes[24..32].copy_from_slice(&(64u64 << 40).to_be_bytes());
    bytes[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(matches!(Header::parse(&bytes), Err(Qcow2Error::OutOfRange { field: "l1_size", .. })));
    // A table that would fit the limit but is not in the file.
    let mut bytes = small_image();
    bytes[24..32].copy_from_slice(&(64u64 << 40).to_be_bytes());
    bytes[36..40].copy_from_slice(&(1u32 << 20).to_be_bytes());
    let file = tempfile::tempfile_in("/var/tmp").expect("a file");
    file.write_all_at(&bytes, 0).expect("written");
    assert!(matches!(Reader::open(file), Err(Qcow2Error::Truncated { what: "the L1 table", .. })));
}
