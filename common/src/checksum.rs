//! CRC32C (Castagnoli, RFC 3720 appendix B.4): the one checksum of wire, log and chunk pages.

use crate::limits::PAGE_BYTES;
use crc_fast::{CrcAlgorithm, Digest, checksum};

/// CRC32C of 4,096 zero bytes.
pub const ZERO_PAGE_CRC: u32 = 0x98F9_4189;

/// CRC32C of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    low(checksum(CrcAlgorithm::Crc32Iscsi, bytes))
}

/// Continues a CRC32C: `crc32c_append(crc32c(a), b) == crc32c(a ++ b)`.
#[must_use]
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!crc));
    digest.update(bytes);
    low(digest.finalize())
}

/// A CRC of 32 bits, which the library gives in 64.
#[expect(clippy::cast_possible_truncation, reason = "the upper half is zero")]
const fn low(crc: u64) -> u32 {
    crc as u32
}

/// One CRC32C for each page that `bytes` touches when it lies at byte `offset` of a chunk: the CRC of the fragment
/// inside that page. For a page that is covered whole it is the CRC of the page.
pub fn fragment_crcs(offset: u32, bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    crate::geometry::page_fragments(offset, bytes.len()).map(|f| crc32c(&bytes[f.range]))
}

/// The page size as `usize`.
pub const PAGE: usize = PAGE_BYTES as usize;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_page_constant_is_right() {
        assert_eq!(crc32c(&[0; PAGE]), ZERO_PAGE_CRC);
    }

    /// Bit by bit, as RFC 3720 defines it.
    fn by_definition(bytes: &[u8]) -> u32 {
        let step = |crc: u32| if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 };
        !bytes.iter().fold(u32::MAX, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
    }

    #[test]
    fn every_length_whole_or_in_two_parts_is_as_defined() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
        let data: Vec<u8> = (0..9000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        for len in (0..1200).chain([4095, 4096, 4097, 8192, 9000]) {
            let (bytes, cut) = (&data[9000 - len..], len * 2 / 3);
            let crc = by_definition(bytes);
            assert_eq!((crc32c(bytes), crc32c_append(crc32c(&bytes[..cut]), &bytes[cut..])), (crc, crc), "{len}");
        }
    }

    #[test]
    fn fragments_follow_page_bounds() {
        let data: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
        let crcs: Vec<u32> = fragment_crcs(512, &data).collect();
        assert_eq!(crcs, vec![crc32c(&data[..3584]), crc32c(&data[3584..7680]), crc32c(&data[7680..])]);
    }
}
