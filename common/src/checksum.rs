//! CRC32C (Castagnoli, RFC 3720 appendix B.4): the one checksum of wire, log and chunk pages.

use crate::limits::PAGE_BYTES;

/// CRC32C of 4,096 zero bytes.
pub const ZERO_PAGE_CRC: u32 = 0x98F9_4189;

/// CRC32C of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// Continues a CRC32C: `crc32c_append(crc32c(a), b) == crc32c(a ++ b)`.
#[must_use]
pub fn crc32c_append(crc: u32, bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc, bytes)
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

    #[test]
    fn fragments_follow_page_bounds() {
        let data: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
        let crcs: Vec<u32> = fragment_crcs(512, &data).collect();
        assert_eq!(crcs, vec![crc32c(&data[..3584]), crc32c(&data[3584..7680]), crc32c(&data[7680..])]);
    }
}
