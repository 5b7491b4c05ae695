//! The header of a qcow2 image.
//!
//! | byte | size | field |
//! | --: | --: | --- |
//! | 0 | 4 | magic `QFI\xfb` |
//! | 4 | 4 | version, 2 or 3 |
//! | 8 | 8 + 4 | offset and length of the backing file's name |
//! | 20 | 4 | cluster bits |
//! | 24 | 8 | virtual size |
//! | 32 | 4 | encryption method |
//! | 36 | 4 + 8 | entries and offset of the L1 table |
//! | 48 | 8 + 4 | offset and clusters of the refcount table |
//! | 60 | 4 + 8 | snapshots and their offset |
//! | 72 | 8 × 3 | incompatible, compatible, autoclear features (version 3) |
//! | 96 | 4 + 4 | refcount order, header length (version 3) |
//! | 104 | 1 | compression type (version 3, when the header is longer than 104) |
//!
//! All big-endian. Parsing is pure: it takes the first bytes of the file and decides nothing by IO.

use super::error::{Feature, Qcow2Error};
use super::{CLUSTER_BITS_MAX, CLUSTER_BITS_MIN, L1_BYTES_MAX, be32, be64};
use ogee_common::limits::VOLUME_BYTES_MAX;

/// The first bytes of every qcow2 file.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Bytes of a version 2 header.
pub(super) const V2_BYTES: usize = 72;
/// Bytes of a version 3 header without optional fields.
pub(super) const V3_BYTES: usize = 104;
/// Longest name of a backing file, by the specification.
const BACKING_NAME_MAX: usize = 1023;

const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

/// What the reader needs of a header. Everything in it was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// `log2` of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Bytes of the disk; at most [`VOLUME_BYTES_MAX`].
    pub virtual_bytes: u64,
    /// Where the L1 table starts; a multiple of the cluster size, or 0 for an empty disk.
    pub l1_offset: u64,
    /// Entries of the L1 table that cover the disk; at most 4 Mi.
    pub l1_entries: u64,
}

impl Header {
    /// Parses the header in the first bytes of a file (give at least 4 KiB when the file has them).
    ///
    /// # Errors
    /// [`Qcow2Error`] with the first thing wrong; a feature that is not supported is named.
    pub fn parse(bytes: &[u8]) -> Result<Self, Qcow2Error> {
        if bytes.get(..4) != Some(MAGIC.as_slice()) {
            return Err(Qcow2Error::BadMagic);
        }
        let version = word(bytes, 4)?;
        match version {
            2 => {}
            3 => check_features(bytes)?,
            other => return Err(Qcow2Error::Version(other)),
        }
        check_backing(bytes)?;
        let crypt = word(bytes, 32)?;
        if crypt != 0 {
            return Err(Qcow2Error::Encrypted(crypt));
        }
        let cluster_bits = word(bytes, 20)?;
        in_range("cluster_bits", u64::from(cluster_bits), CLUSTER_BITS_MIN.into(), CLUSTER_BITS_MAX.into())?;
        let virtual_bytes = long(bytes, 24)?;
        in_range("size", virtual_bytes, 0, VOLUME_BYTES_MAX)?;
        let mut header = Self { version, cluster_bits, virtual_bytes, l1_offset: long(bytes, 40)?, l1_entries: 0 };
        header.l1_entries = virtual_bytes.div_ceil(header.l2_covers_bytes());
        let present = u64::from(word(bytes, 36)?);
        in_range("l1_size", present, header.l1_entries, L1_BYTES_MAX / 8)?;
        if header.l1_entries > 0 && (header.l1_offset == 0 || !header.l1_offset.is_multiple_of(header.cluster_bytes())) {
            return Err(Qcow2Error::OutOfRange { field: "l1_table_offset", value: header.l1_offset });
        }
        Ok(header)
    }

    /// Bytes of a cluster.
    #[must_use]
    pub const fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    #[must_use]
    pub const fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / 8
    }

    /// Bytes of the disk that one L2 table covers.
    #[must_use]
    pub const fn l2_covers_bytes(&self) -> u64 {
        self.cluster_bytes() * self.l2_entries()
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u32, Qcow2Error> {
    be32(bytes, at).ok_or(cut_short(bytes))
}

fn long(bytes: &[u8], at: usize) -> Result<u64, Qcow2Error> {
    be64(bytes, at).ok_or(cut_short(bytes))
}

const fn cut_short(bytes: &[u8]) -> Qcow2Error {
    Qcow2Error::Truncated { what: "the header", offset: 0, file_bytes: bytes.len() as u64 }
}

fn in_range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), Qcow2Error> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(Qcow2Error::OutOfRange { field, value }) }
}

/// Refuses what a version 3 image needs and this reader does not have. A dirty image only has stale refcounts, which
/// are not read here; a corrupt one may point anywhere, so it is refused.
fn check_features(bytes: &[u8]) -> Result<(), Qcow2Error> {
    let header_bytes = u64::from(word(bytes, 100)?);
    in_range("header_length", header_bytes, V3_BYTES as u64, 1 << CLUSTER_BITS_MAX)?;
    let bits = long(bytes, V2_BYTES)?;
    if bits & INCOMPATIBLE_CORRUPT != 0 {
        return Err(Qcow2Error::OutOfRange { field: "the corrupt bit of the header (try qemu-img check -r all)", value: 1 });
    }
    if bits & INCOMPATIBLE_DATA_FILE != 0 {
        return Err(Qcow2Error::Unsupported(Feature::ExternalDataFile));
    }
    if bits & INCOMPATIBLE_EXTENDED_L2 != 0 {
        return Err(Qcow2Error::Unsupported(Feature::ExtendedL2));
    }
    let unknown = bits & !(INCOMPATIBLE_DIRTY | INCOMPATIBLE_COMPRESSION);
    if unknown != 0 {
        return Err(Qcow2Error::Unsupported(Feature::Bits(unknown)));
    }
    if bits & INCOMPATIBLE_COMPRESSION != 0 {
        return match bytes.get(V3_BYTES) {
            Some(1) => Err(Qcow2Error::Unsupported(Feature::Zstd)),
            Some(n) => Err(Qcow2Error::Unsupported(Feature::Compression(*n))),
            None => Err(cut_short(bytes)),
        };
    }
    Ok(())
}

fn check_backing(bytes: &[u8]) -> Result<(), Qcow2Error> {
    let offset = long(bytes, 8)?;
    if offset == 0 {
        return Ok(());
    }
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let len = (word(bytes, 16)? as usize).min(BACKING_NAME_MAX);
    let name = start.checked_add(len).and_then(|end| bytes.get(start..end)).unwrap_or_default();
    Err(Qcow2Error::BackingFile { name: String::from_utf8_lossy(name).into_owned() })
}
