//! qcow2 images, as QEMU's `docs/interop/qcow2.txt` defines them: a reader for import and a writer for export.
//!
//! Invariants: an image is hostile input. Every offset and length of it is compared with a limit and with the file's
//! length before it is used or allocated for; a bad image gives an error, never a panic and never wrong data. The
//! reader returns exactly the bytes that `qemu-img convert` would, and the writer's files pass `qemu-img check`.
//! Deliberately absent: backing files, encryption, external data files, subclusters, zstd (each refused by name), and
//! changing an existing image.

mod error;
mod header;
mod reader;
mod table_cache;
mod writer;

#[cfg(test)]
mod tests;

pub use error::Qcow2Error;
pub use header::{Header, MAGIC};
pub use reader::Reader;
pub use writer::Writer;

/// Bytes of the largest L1 table that is read: 32 MiB, the limit of QEMU itself (`QCOW_MAX_L1_SIZE`).
const L1_BYTES_MAX: u64 = 32 << 20;
/// `log2` of the smallest cluster, 512 B.
const CLUSTER_BITS_MIN: u32 = 9;
/// `log2` of the largest cluster, 2 MiB.
const CLUSTER_BITS_MAX: u32 = 21;
/// Bits 9 to 55 of a table entry: the host offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63 of a table entry: the refcount is exactly one.
const FLAG_COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
const FLAG_COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry: the cluster reads as zeros (version 3).
const FLAG_ZERO: u64 = 1;

/// The big-endian 32-bit number at byte `at`, if it is there.
fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes)
}

/// The big-endian 64-bit number at byte `at`, if it is there.
fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at.checked_add(8)?).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes)
}
