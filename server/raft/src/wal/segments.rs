//! Segment files: their names, the identity of the log, and the preparation of the next segment. Blocking; called by
//! recovery and by the writer's housekeeping job.
//!
//! A freed segment keeps its name until it is reused, and the oldest is reused first, so the files always carry
//! consecutive numbers: a missing one is seen at the next start. Before a file is reused its new name is durable, so that no
//! batch is ever written into a file that a crash could give its old name back.

use super::error::{WalError, WalErrorKind};
use ogee_common::checksum::crc32c;
use ogee_common::rng;
use ogee_disk::{DataDir, DiskError, LogFile};
use std::sync::Arc;

/// File with the identity of the log.
pub(super) const IDENTITY_NAME: &str = "identity";
/// Name of a segment that is being created.
pub(super) const TEMP_NAME: &str = "creating.tmp";
const IDENTITY_MAGIC: &[u8; 4] = b"OGWI";
const IDENTITY_BYTES: usize = 24;

/// Name of a segment file.
pub(super) fn segment_name(number: u64) -> String {
    format!("segment-{number:016x}")
}

/// The number in the name of a segment file.
pub(super) fn segment_number(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("segment-")?;
    if digits.len() != 16 {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

/// Who the log is, and whether anything was ever written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    /// Random, in every batch.
    pub(super) log: u64,
    /// Set once the first batch is durable; from then on a log without a segment is damage, not a new log.
    pub(super) used: bool,
}

impl Identity {
    pub(super) fn create(dir: &DataDir, path: &str) -> Result<Self, WalError> {
        let identity = Self { log: rng::nonzero_u64(), used: false };
        identity.write(dir, path).map_err(|e| WalError::disk("create log", e))?;
        Ok(identity)
    }

    pub(super) fn write(self, dir: &DataDir, path: &str) -> Result<(), DiskError> {
        dir.write_small(path, &self.encode())
    }

    pub(super) fn encode(self) -> [u8; IDENTITY_BYTES] {
        let mut b = [0u8; IDENTITY_BYTES];
        b[..4].copy_from_slice(IDENTITY_MAGIC);
        b[4] = 1;
        b[5] = u8::from(self.used);
        b[8..16].copy_from_slice(&self.log.to_le_bytes());
        let crc = crc32c(&b[..20]);
        b[20..].copy_from_slice(&crc.to_le_bytes());
        b
    }

    pub(super) fn decode(b: &[u8]) -> Option<Self> {
        let b: &[u8; IDENTITY_BYTES] = b.try_into().ok()?;
        let crc = u32::from_le_bytes(b[20..].try_into().expect("four bytes"));
        if b[..4] != *IDENTITY_MAGIC || b[4] != 1 || b[5] > 1 || crc != crc32c(&b[..20]) {
            return None;
        }
        Some(Self { log: u64::from_le_bytes(b[8..16].try_into().expect("eight bytes")), used: b[5] == 1 })
    }

    pub(super) fn read(dir: &DataDir, path: &str) -> Result<Option<Self>, WalError> {
        let op = "read log identity";
        let Some(bytes) = dir.read_small(path, 4096).map_err(|e| WalError::disk(op, e))? else { return Ok(None) };
        Self::decode(&bytes).map(Some).ok_or(WalError::new(WalErrorKind::Corrupt, op))
    }
}

/// Where the segments live.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) dir: DataDir,
    pub(super) sub: String,
}

impl Place {
    pub(super) fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.sub)
    }

    /// Makes the file of segment `number`: the freed one if there is one of the right size, else a new one.
    /// A freed file of another size is removed; it is the oldest, so no gap arises.
    pub(super) fn prepare(&self, number: u64, bytes: u64, freed: Option<(u64, Arc<LogFile>)>) -> Result<Arc<LogFile>, DiskError> {
        let name = self.path(&segment_name(number));
        if let Some((old, file)) = freed {
            if file.bytes() == bytes {
                self.dir.rename(&self.path(&segment_name(old)), &name)?;
                return Ok(file);
            }
            self.remove(old)?;
        }
        let temp = self.path(TEMP_NAME);
        self.dir.unlink(&temp)?;
        LogFile::create_zeroed(&self.dir, &temp, bytes)?;
        self.dir.rename(&temp, &name)?;
        Ok(Arc::new(LogFile::open(&self.dir, &name)?))
    }

    /// Deletes a freed segment, the oldest.
    pub(super) fn remove(&self, number: u64) -> Result<(), DiskError> {
        let name = self.path(&segment_name(number));
        self.dir.unlink(&name)?;
        self.dir.sync_dir_of(&name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_identity_are_read_back() {
        assert_eq!(segment_name(0x1f), "segment-000000000000001f");
        assert_eq!(segment_number(&segment_name(u64::MAX)), Some(u64::MAX));
        assert_eq!(segment_number("segment-1"), None);
        assert_eq!(segment_number("creating.tmp"), None);
        let identity = Identity { log: 7, used: true };
        assert_eq!(Identity::decode(&identity.encode()), Some(identity));
        for i in 0..IDENTITY_BYTES {
            let mut b = identity.encode();
            b[i] ^= 1;
            assert_eq!(Identity::decode(&b), None, "byte {i}");
        }
    }
}
