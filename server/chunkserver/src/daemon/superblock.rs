//! The identity of a data directory: the file `superblock`, 64 bytes.
//!
//! | offset | bytes | field |
//! | --: | --: | --- |
//! | 0 | 8 | magic `OGEECS\0\1` |
//! | 8 | 4 | format version, 1 |
//! | 12 | 4 | chunkserver id; 0 until the MDS gave one |
//! | 16 | 16 | uuid, random, for life |
//! | 32 | 16 | cluster; zeros until known |
//! | 48 | 12 | zeros |
//! | 60 | 4 | CRC32C of bytes 0 to 59 |
//!
//! Invariants: the uuid is written before the MDS is asked for an id, so that a crash in between gets the same id
//! again; a directory with files but without a superblock is refused, so that a disk whose superblock was lost can only
//! come back empty and thereby as a new chunkserver (INV: a replica id is never reused).

use super::error::{DaemonError, DaemonErrorKind, Reason};
use ogee_common::checksum::crc32c;
use ogee_common::id::ChunkserverId;
use ogee_common::rng;
use ogee_disk::DataDir;
use std::path::Path;

/// File name in the data directory.
const FILE: &str = "superblock";
const MAGIC: [u8; 8] = *b"OGEECS\0\x01";
const VERSION: u32 = 1;
const BYTES: usize = 64;

/// The identity of a data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Superblock {
    /// Given by the MDS; 0 until then.
    pub(super) id: ChunkserverId,
    /// Drawn at the first start.
    pub(super) uuid: [u8; 16],
    /// The cluster; zeros until known.
    pub(super) cluster: [u8; 16],
}

/// For the fuzz target: any bytes are decoded or refused, and what decodes encodes to itself.
pub(crate) fn superblock_fuzz(data: &[u8]) {
    let mut sealed = data.get(..BYTES - 4).unwrap_or_default().to_vec();
    let crc = crc32c(&sealed);
    sealed.extend_from_slice(&crc.to_le_bytes());
    for bytes in [data, &sealed] {
        if let Ok(superblock) = Superblock::decode(bytes) {
            assert_eq!(superblock.encode()[..48], bytes[..48]);
        }
    }
}

impl Superblock {
    /// Whether the superblock is still where it was read.
    pub(super) fn is_in_place(dir: &DataDir) -> bool {
        dir.holds(FILE)
    }

    fn encode(&self) -> [u8; BYTES] {
        let mut out = [0u8; BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.id.0.to_le_bytes());
        out[16..32].copy_from_slice(&self.uuid);
        out[32..48].copy_from_slice(&self.cluster);
        let crc = crc32c(&out[..60]);
        out[60..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, Reason> {
        let bytes: &[u8; BYTES] = bytes.try_into().map_err(|_| Reason::DamagedSuperblock)?;
        let u32_at = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        if bytes[..8] != MAGIC || crc32c(&bytes[..60]) != u32_at(60) {
            return Err(Reason::DamagedSuperblock);
        }
        if u32_at(8) != VERSION {
            return Err(Reason::NewerSuperblock);
        }
        let mut v = Self { id: ChunkserverId(u32_at(12)), uuid: [0; 16], cluster: [0; 16] };
        v.uuid.copy_from_slice(&bytes[16..32]);
        v.cluster.copy_from_slice(&bytes[32..48]);
        Ok(v)
    }

    /// Reads the superblock, or makes one in an empty directory.
    ///
    /// # Errors
    /// [`DaemonErrorKind::DataDir`] when the directory is foreign or the superblock damaged.
    pub(super) fn load_or_create(dir: &DataDir, path: &Path) -> Result<Self, DaemonError> {
        let fail = |verb, source| DaemonError { kind: DaemonErrorKind::DataDir, verb, path: path.join(FILE), source };
        if let Some(bytes) = dir.read_small(FILE, BYTES as u64).map_err(|e| fail("read superblock", e.into()))? {
            return Self::decode(&bytes).map_err(|e| fail("read superblock", e.into()));
        }
        let names = dir.list("").map_err(|e| fail("list data directory of", e.into()))?;
        // A crash while the very first superblock was written leaves its temporary file and nothing else.
        if names.iter().any(|n| n != "superblock.new") {
            return Err(fail("use data directory without", Reason::NotEmpty.into()));
        }
        let mut uuid = [0; 16];
        uuid[..8].copy_from_slice(&rng::nonzero_u64().to_le_bytes());
        uuid[8..].copy_from_slice(&rng::nonzero_u64().to_le_bytes());
        let fresh = Self { id: ChunkserverId(0), uuid, cluster: [0; 16] };
        fresh.store(dir, path)?;
        Ok(fresh)
    }

    /// Writes the superblock durably.
    ///
    /// # Errors
    /// [`DaemonErrorKind::DataDir`].
    pub(super) fn store(&self, dir: &DataDir, path: &Path) -> Result<(), DaemonError> {
        dir.write_small(FILE, &self.encode()).map_err(|e| DaemonError {
            kind: DaemonErrorKind::DataDir,
            verb: "write superblock",
            path: path.join(FILE),
            source: e.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Superblock {
        Superblock { id: ChunkserverId(7), uuid: [0xAB; 16], cluster: [0xCD; 16] }
    }

    #[test]
    fn golden_bytes() {
        let hex: String = example().encode().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(
            &hex[..120],
            concat!(
                "4f47454543530001", "01000000", "07000000", "abababababababababababababababab",
                "cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd", "000000000000000000000000"
            )
        );
        assert_eq!(Superblock::decode(&example().encode()), Ok(example()));
    }

    #[test]
    fn every_flipped_byte_is_noticed() {
        for i in 0..BYTES {
            let mut bytes = example().encode();
            bytes[i] ^= 1;
            assert!(Superblock::decode(&bytes).is_err(), "byte {i}");
        }
        assert_eq!(Superblock::decode(&[0; 10]), Err(Reason::DamagedSuperblock));
    }

    #[test]
    fn a_directory_with_files_but_no_superblock_is_refused() {
        let tmp = tempfile::tempdir().expect("a temporary directory");
        std::fs::write(tmp.path().join("chunk"), b"x").expect("a file");
        let dir = DataDir::open(tmp.path()).expect("open");
        let error = Superblock::load_or_create(&dir, tmp.path()).expect_err("must be refused");
        assert_eq!(error.kind, DaemonErrorKind::DataDir);
    }

    #[test]
    fn the_uuid_survives_a_restart_before_registration() {
        let tmp = tempfile::tempdir().expect("a temporary directory");
        let first = {
            let dir = DataDir::open(tmp.path()).expect("open");
            Superblock::load_or_create(&dir, tmp.path()).expect("create")
        };
        let dir = DataDir::open(tmp.path()).expect("open again");
        assert_eq!(Superblock::load_or_create(&dir, tmp.path()).expect("load"), first);
    }
}
