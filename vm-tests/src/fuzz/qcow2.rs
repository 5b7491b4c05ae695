//! Hostile disk images. The bytes are an image as they come, and behind a header that lets them through to the tables.

use ogee_cli::qcow2::{Header, Reader};
use std::io::{Seek, SeekFrom, Write};

/// Bytes that are read of a disk, and ranges that are asked for.
const READ_BYTES: u64 = 1 << 16;
const RANGES: usize = 16;

/// The target.
pub(super) fn run(data: &[u8]) {
    let _ = Header::parse(data);
    read(data);
    // A version 2 image of 1 MiB with clusters of 512 bytes, its tables the fuzzer's bytes from byte 512 on.
    let mut image = vec![0u8; 512];
    image[..4].copy_from_slice(b"QFI\xfb");
    image[7] = 2;
    image[23] = 9;
    image[24..32].copy_from_slice(&(1u64 << 20).to_be_bytes());
    image[36..40].copy_from_slice(&32u32.to_be_bytes());
    image[40..48].copy_from_slice(&512u64.to_be_bytes());
    image.extend_from_slice(data);
    image.resize(image.len().max(2048), 0);
    read(&image);
}

fn read(image: &[u8]) {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(image).and_then(|()| file.seek(SeekFrom::Start(0))).expect("write a temporary file");
    let Ok(reader) = Reader::open(file) else { return };
    let size = reader.virtual_bytes();
    let mut at = 0;
    for _ in 0..RANGES {
        let Ok(Some(range)) = reader.next_data(at, READ_BYTES) else { break };
        assert!(range.start >= at && range.start < range.end && range.end <= size, "a range inside the disk");
        let mut buffer = vec![0u8; usize::try_from(range.end - range.start).expect("at most 64 KiB")];
        let _ = reader.read_at(range.start, &mut buffer);
        at = range.end;
    }
}
