//! Names of the objects of a repository. Pure. The table is in `docs/backup-format.md`.
//!
//! Invariant: a name that a run made is never made by another run, so that whoever was about to delete it (and slept)
//! can never delete anything newer.

use ring::digest::SHA256_OUTPUT_LEN;

/// The repository's description.
pub(crate) const REPOSITORY: &str = "repository.json";
/// Prefix of the blocks; then run and address.
pub(crate) const BLOCKS: &str = "blocks/";
/// Prefix of the indexes; then volume, generation and run.
pub(crate) const INDEXES: &str = "index/";
/// Prefix of marks of removed indexes; then as the index.
pub(crate) const REMOVED: &str = "removed/";
/// Prefix of the records of removals that have begun, and of what was decided about them; then run of the backup and number.
pub(crate) const REMOVALS: &str = "removals/";
/// What the name of a decision ends in.
const DECISION: &str = "-decision";
/// Prefix of the records of open runs.
pub(crate) const RUNS: &str = "runs/";

/// Prefix of boot profiles; then the run of the backup.
pub(crate) const PROFILES: &str = "profiles/";

/// A content address: SHA-256, or HMAC-SHA-256 in an encrypted repository.
pub(crate) type Address = [u8; SHA256_OUTPUT_LEN];

/// Where a block is stored: the run that wrote it and its content address. All zeros: no block, the range is zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct BlockRef {
    /// The run, never 0 for a block.
    pub run: u64,
    /// The content.
    pub address: Address,
}

impl BlockRef {
    /// A range of zeros.
    pub(crate) const ZEROS: Self = Self { run: 0, address: [0; SHA256_OUTPUT_LEN] };

    /// Whether it stands for zeros.
    pub(crate) fn is_zeros(&self) -> bool {
        self.run == 0
    }

    /// Its name.
    pub(crate) fn key(&self) -> String {
        format!("{}{}", run_blocks(self.run), hex(&self.address))
    }

    /// From its name.
    pub(crate) fn parse(key: &str) -> Option<Self> {
        let (run, address) = key.strip_prefix(BLOCKS)?.split_once('/')?;
        let found = Self { run: parse_run(run)?, address: unhex(address)? };
        (!found.is_zeros()).then_some(found)
    }
}

/// A removal of a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RemovalKey {
    /// The backup.
    pub run: u64,
    /// Random, of this removal only.
    pub number: u64,
}

impl RemovalKey {
    /// Prefix of the names of a backup's removals.
    pub(crate) fn of(run: u64) -> String {
        format!("{REMOVALS}{run:016x}/")
    }

    /// The name of its record.
    pub(crate) fn record(&self) -> String {
        format!("{}{:016x}", Self::of(self.run), self.number)
    }

    /// The name of what was decided about it.
    pub(crate) fn decision(&self) -> String {
        format!("{}{DECISION}", self.record())
    }

    /// From the name of its record, or of the decision: then the second is `false`.
    pub(crate) fn parse(key: &str) -> Option<(Self, bool)> {
        let (record, is_record) = key.strip_suffix(DECISION).map_or((key, true), |record| (record, false));
        let (run, number) = record.strip_prefix(REMOVALS)?.split_once('/')?;
        Some((Self { run: parse_run(run)?, number: parse_run(number)? }, is_record))
    }

    /// From the name of its record.
    pub(crate) fn parse_record(key: &str) -> Option<Self> {
        Self::parse(key).filter(|(_, is_record)| *is_record).map(|(key, _)| key)
    }
}

/// Prefix of a run's blocks.
pub(crate) fn run_blocks(run: u64) -> String {
    format!("{BLOCKS}{run:016x}/")
}

/// The boot profile of a backup.
pub(crate) fn profile_key(run: u64) -> String {
    format!("{PROFILES}{run:016x}")
}

/// The record of an open run.
pub(crate) fn run_record(run: u64) -> String {
    format!("{RUNS}{run:016x}")
}

/// The run of a record's name.
pub(crate) fn parse_run_record(key: &str) -> Option<u64> {
    parse_run(key.strip_prefix(RUNS)?)
}

/// 16 lower-case hexadecimal digits, not 0.
pub(crate) fn parse_run(text: &str) -> Option<u64> {
    let is_digit = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    let run = u64::from_str_radix(text, 16).ok()?;
    (text.len() == 16 && text.bytes().all(is_digit) && run != 0).then_some(run)
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The bytes of exactly as many lower-case hexadecimal digits as fit.
pub(crate) fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    let text = text.as_bytes();
    if text.len() != N * 2 {
        return None;
    }
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(text.chunks(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back() {
        let block = BlockRef { run: 0xab, address: [0x5a; 32] };
        assert_eq!(block.key(), format!("blocks/00000000000000ab/{}", "5a".repeat(32)));
        assert_eq!(BlockRef::parse(&block.key()), Some(block));
        assert_eq!(parse_run_record(&run_record(7)), Some(7));
        for bad in ["", "blocks/", "blocks/1/5a", "blocks/0000000000000000/", "blocks/00000000000000AB/5a"] {
            assert_eq!(BlockRef::parse(bad), None, "{bad}");
        }
        assert_eq!(parse_run("+000000000000001"), None);
        let removal = RemovalKey { run: 7, number: 9 };
        assert_eq!(removal.record(), "removals/0000000000000007/0000000000000009");
        assert_eq!(RemovalKey::parse(&removal.record()), Some((removal, true)));
        assert_eq!(RemovalKey::parse(&removal.decision()), Some((removal, false)));
        assert_eq!(RemovalKey::parse_record(&removal.decision()), None);
        assert_eq!(RemovalKey::parse("removals/0000000000000007/9"), None);
    }
}
