//! Feature bits and configuration space of the device (virtio 1.2, 5.2.3 and 5.2.4).
//!
//! Called by the back end for the front end's GET_FEATURES, GET_CONFIG and SET_CONFIG. Invariants: the bytes are built
//! from the device's size at the moment of the call; offset and length of a request are checked; the only writable field
//! is the write cache. Deliberately absent: SIZE_MAX (Linux complains about values below 4,096 and needs none), geometry,
//! secure erase, zones, lifetime. `VHOST_F_LOG_ALL` is offered for live migration; it is no feature of the guest's.
//!
//! | bytes | field | value |
//! | --- | --- | --- |
//! | 0..8 | capacity | sectors of 512 bytes |
//! | 8..12 | size_max | 0, not offered |
//! | 12..16 | seg_max | queue size - 2 (header and status) |
//! | 16..20 | geometry | 0, not offered |
//! | 20..24 | blk_size | 512 or 4,096: the device's logical sector |
//! | 24 | physical_block_exp | 3 or 0: a physical block has 4,096 bytes |
//! | 25 | alignment_offset | 0 |
//! | 26..28, 28..32 | min_io_size, opt_io_size | 8 or 1, and 0 logical blocks: 4 KiB, none |
//! | 32 | writeback | 1, or 0 after the guest asked for write-through |
//! | 34..36 | num_queues | |
//! | 36..40, 40..44, 44..48 | discard: sectors, ranges, alignment, in sectors of 512 bytes | [`VHOST_ZERO_SECTORS_MAX`], [`VHOST_ZERO_RANGES_MAX`], 8 |
//! | 48..52, 52..56, 56 | write-zeroes: sectors, ranges, may unmap | the same, 1 |
//! | 57..256 | padding | 0 |

use ogee_client::DeviceInfo;
use ogee_common::limits::{PAGE_BYTES, SECTOR_BYTES, VHOST_ZERO_RANGES_MAX, VHOST_ZERO_SECTORS_MAX};
use std::sync::atomic::{AtomicBool, Ordering};
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Bytes a front end may ask for: 256, the largest space of the vhost-user specification. The rest after our fields is 0.
const SPACE_BYTES: usize = 256;
/// Position of the write cache byte.
const WRITEBACK_AT: u32 = 32;
/// Sectors of 512 bytes of a page: space is given back in whole pages.
const PAGE_SECTORS: u32 = PAGE_BYTES / SECTOR_BYTES;
const _: () = assert!(PAGE_SECTORS.is_power_of_two());

/// Logical blocks per physical block, which is a page, and as a power of two.
fn physical_block(info: &DeviceInfo) -> (u16, u8) {
    let blocks = PAGE_BYTES / info.sector_bytes.clamp(SECTOR_BYTES, PAGE_BYTES);
    let exp = blocks.trailing_zeros();
    (u16::try_from(blocks).expect("at most 8"), u8::try_from(exp).expect("at most 3"))
}

/// The bit of `VIRTIO_F_VERSION_1`.
pub(crate) const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

/// The feature bits the device offers.
pub(crate) fn offered_features(info: &DeviceInfo) -> u64 {
    let always = [
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_BLK_F_SEG_MAX,
        VIRTIO_BLK_F_BLK_SIZE,
        VIRTIO_BLK_F_TOPOLOGY,
        VIRTIO_BLK_F_FLUSH,
        VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_BLK_F_MQ,
    ];
    let by_access: &[u32] =
        if info.read_only { &[VIRTIO_BLK_F_RO] } else { &[VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES] };
    let bits = always.iter().chain(by_access).fold(0, |bits, bit| bits | 1_u64 << bit);
    bits | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | VhostUserVirtioFeatures::LOG_ALL.bits()
}

/// Why a write to the configuration space is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("write {len} bytes at {offset} of the configuration space: only the write cache byte may be set")]
pub(crate) struct ConfigWriteError {
    offset: u32,
    len: usize,
}

/// The configuration space of one front end's device.
#[derive(Debug)]
pub(crate) struct ConfigSpace {
    num_queues: u16,
    seg_max: u32,
    /// Only remembered: a completed write is durable in either mode (the promise of `BlockDevice`), so that flushes may
    /// be left out in write-through mode.
    writeback: AtomicBool,
}

impl ConfigSpace {
    pub(crate) fn new(num_queues: u16, queue_size: u16) -> Self {
        let seg_max = u32::from(queue_size.saturating_sub(2)).max(1);
        Self { num_queues, seg_max, writeback: AtomicBool::new(true) }
    }

    /// `len` bytes from `offset` on; empty if that is outside of the space, which the front end takes as a refusal.
    pub(crate) fn read(&self, info: &DeviceInfo, offset: u32, len: u32) -> Vec<u8> {
        let range = usize::try_from(offset).ok().zip(offset.checked_add(len).and_then(|end| usize::try_from(end).ok()));
        let bytes = self.bytes(info);
        range.and_then(|(start, end)| bytes.get(start..end)).map(<[u8]>::to_vec).unwrap_or_default()
    }

    /// Sets the write cache byte; whatever is not 0 turns the cache on, so that a guest's odd value has a meaning.
    pub(crate) fn write(&self, offset: u32, data: &[u8]) -> Result<(), ConfigWriteError> {
        match (offset, data) {
            (WRITEBACK_AT, [mode]) => {
                self.writeback.store(*mode != 0, Ordering::Relaxed);
                Ok(())
            }
            _ => Err(ConfigWriteError { offset, len: data.len() }),
        }
    }

    /// Whether the write cache is on.
    pub(crate) fn has_writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// Sets the mode that another daemon had for this front end.
    pub(crate) fn adopt_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::Relaxed);
    }

    fn bytes(&self, info: &DeviceInfo) -> [u8; SPACE_BYTES] {
        let mut bytes = [0; SPACE_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &(info.size_bytes / u64::from(SECTOR_BYTES)).to_le_bytes());
        put(12, &self.seg_max.to_le_bytes());
        let (blocks, exp) = physical_block(info);
        put(20, &info.sector_bytes.to_le_bytes());
        put(24, &[exp]);
        put(26, &blocks.to_le_bytes());
        put(32, &[u8::from(self.writeback.load(Ordering::Relaxed))]);
        put(34, &self.num_queues.to_le_bytes());
        if !info.read_only {
            put(36, &VHOST_ZERO_SECTORS_MAX.to_le_bytes());
            put(40, &VHOST_ZERO_RANGES_MAX.to_le_bytes());
            put(44, &PAGE_SECTORS.to_le_bytes());
            put(48, &VHOST_ZERO_SECTORS_MAX.to_le_bytes());
            put(52, &VHOST_ZERO_RANGES_MAX.to_le_bytes());
            put(56, &[1]);
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(read_only: bool) -> DeviceInfo {
        DeviceInfo { size_bytes: 0x1_2345_6789 * 512, read_only, sector_bytes: 512, serial: String::new() }
    }

    #[test]
    fn both_lengths_that_front_ends_ask_for_are_answered() {
        let space = ConfigSpace::new(3, 128);
        for len in [57, 60, 256] {
            let bytes = space.read(&info(false), 0, len);
            assert_eq!(bytes.len(), len as usize);
            assert_eq!(bytes[0..8], 0x1_2345_6789_u64.to_le_bytes());
            assert_eq!(bytes[12..16], 126_u32.to_le_bytes());
            assert_eq!(bytes[20..24], 512_u32.to_le_bytes());
            assert_eq!(bytes[24], 3);
            assert_eq!(bytes[32], 1);
            assert_eq!(bytes[34..36], [3, 0]);
            assert_eq!(bytes[36..40], 0x0020_0000_u32.to_le_bytes());
            assert_eq!(bytes[56], 1);
        }
        assert_eq!(space.read(&info(false), 34, 2), [3, 0]);
    }

    #[test]
    fn large_sectors_are_said_and_the_capacity_stays_in_small_ones() {
        let space = ConfigSpace::new(1, 128);
        let bytes = space.read(&DeviceInfo { size_bytes: 1 << 30, sector_bytes: 4096, ..info(false) }, 0, 60);
        assert_eq!(bytes[0..8], (1_u64 << 21).to_le_bytes());
        assert_eq!((&bytes[20..24], bytes[24], &bytes[26..28]), (&4096_u32.to_le_bytes()[..], 0, &[1, 0][..]));
        assert_eq!((&bytes[36..40], &bytes[44..48]), (&0x0020_0000_u32.to_le_bytes()[..], &8_u32.to_le_bytes()[..]));
    }

    /// What a guest is told of discards and write-zeroes is what the parser takes, and nothing on a read-only device.
    #[test]
    fn limits_of_discards_and_write_zeroes_are_those_of_the_parser() {
        let space = ConfigSpace::new(1, 128);
        let word = |bytes: &[u8], at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
        let bytes = space.read(&info(false), 0, 60);
        for at in [36, 48] {
            assert_eq!(word(&bytes, at), Some(VHOST_ZERO_SECTORS_MAX));
            assert_eq!(word(&bytes, at + 4), Some(VHOST_ZERO_RANGES_MAX));
        }
        assert_eq!(space.read(&info(true), 36, 24), [0; 24]);
    }

    #[test]
    fn reads_outside_are_refused() {
        let space = ConfigSpace::new(1, 128);
        for (offset, len) in [(0, 257), (256, 1), (250, 7), (u32::MAX, 1), (1, u32::MAX)] {
            assert!(space.read(&info(false), offset, len).is_empty(), "{len} at {offset}");
        }
    }

    #[test]
    fn only_the_write_cache_can_be_written() {
        let space = ConfigSpace::new(1, 128);
        space.write(32, &[0]).unwrap();
        assert_eq!(space.read(&info(false), 32, 1), [0]);
        for on in [1, 2, 0xff] {
            space.write(32, &[0]).unwrap();
            space.write(32, &[on]).unwrap();
            assert_eq!(space.read(&info(false), 32, 1), [1]);
        }
        for (offset, data) in [(32, &[0_u8, 0][..]), (0, &[0]), (33, &[1]), (32, &[]), (u32::MAX, &[1])] {
            assert_eq!(space.write(offset, data), Err(ConfigWriteError { offset, len: data.len() }));
        }
    }

    #[test]
    fn read_only_is_offered_instead_of_discard() {
        let writable = offered_features(&info(false));
        let read_only = offered_features(&info(true));
        assert_eq!(writable & 1 << VIRTIO_BLK_F_RO, 0);
        assert_ne!(read_only & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(read_only & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
        assert_ne!(writable & VERSION_1, 0);
    }
}
