//! What is written, so that what is read back tells where it comes from.
//!
//! Each sector of 512 bytes is a head and filling, both a pure function of (run, volume, byte of the volume,
//! generation):
//!
//! | bytes | what |
//! | --- | --- |
//! | 0..8 | `OGBENCH1` |
//! | 8..16 | run: a random number of this run |
//! | 16..24 | volume: its number in the run |
//! | 24..32 | byte of the volume |
//! | 32..40 | generation: 1 for the first write to the block, and so on |
//! | 40..512 | SplitMix64 of the above |
//!
//! All numbers are little-endian. Invariant: [`check`] accepts exactly what [`fill`] made, for one generation out of
//! those that may be there.

use super::plan::SplitMix64;
use std::ops::RangeInclusive;

/// Bytes of a sector: the smallest piece that a device may write or lose alone.
pub(crate) const SECTOR: usize = 512;
const MAGIC: u64 = u64::from_le_bytes(*b"OGBENCH1");
const HEAD_WORDS: usize = 5;

/// Where data belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Number of the run.
    pub(crate) run: u64,
    /// Number of the volume in the run.
    pub(crate) volume: u64,
    /// Byte of the volume.
    pub(crate) offset: u64,
}

impl Place {
    fn head(self, generation: u64) -> [u64; HEAD_WORDS] {
        [MAGIC, self.run, self.volume, self.offset, generation]
    }
}

/// Data that is not what it should be; `at` is the byte of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Mismatch {
    /// A sector of an earlier or later write.
    #[error("byte {at} is of generation {found}, but {oldest} was acknowledged")]
    Stale {
        /// Where.
        at: u64,
        /// What is there.
        found: u64,
        /// The oldest that may be there.
        oldest: u64,
    },
    /// A sector that was written elsewhere.
    #[error("byte {at} holds what was written to volume {volume} at byte {offset}")]
    Misplaced {
        /// Where.
        at: u64,
        /// Its volume in the run.
        volume: u64,
        /// Its byte.
        offset: u64,
    },
    /// A sector that this run did not write.
    #[error("byte {at} holds something that was not written in this run")]
    Foreign {
        /// Where.
        at: u64,
    },
    /// A byte of a sector is wrong, though its head is right.
    #[error("byte {at} is damaged")]
    Damaged {
        /// Where.
        at: u64,
    },
}

fn filling(head: &[u64; HEAD_WORDS]) -> SplitMix64 {
    let seed = head[1] ^ head[2].rotate_left(48) ^ head[3].rotate_left(24) ^ head[4].rotate_left(8);
    SplitMix64(seed)
}

/// Fills `data`, which lies at `place`; its length is a multiple of 512.
pub(crate) fn fill(data: &mut [u8], place: Place, generation: u64) {
    let mut at = place;
    for sector in data.chunks_exact_mut(SECTOR) {
        let head = at.head(generation);
        let mut random = filling(&head);
        let (words, _) = sector.as_chunks_mut::<8>();
        for (i, word) in words.iter_mut().enumerate() {
            *word = head.get(i).copied().unwrap_or_else(|| random.next_u64()).to_le_bytes();
        }
        at.offset += SECTOR as u64;
    }
}

/// Checks `data`, which was read at `place` and must be of one of the generations.
///
/// # Errors
/// The first thing that is wrong.
pub(crate) fn check(data: &[u8], place: Place, generations: &RangeInclusive<u64>) -> Result<(), Mismatch> {
    let mut at = place;
    for sector in data.chunks_exact(SECTOR) {
        check_sector(sector, at, generations)?;
        at.offset += SECTOR as u64;
    }
    Ok(())
}

fn check_sector(sector: &[u8], place: Place, generations: &RangeInclusive<u64>) -> Result<(), Mismatch> {
    let (words, _) = sector.as_chunks::<8>();
    let found: [u64; HEAD_WORDS] = std::array::from_fn(|i| u64::from_le_bytes(words[i]));
    let at = place.offset;
    let [magic, run, volume, offset, generation] = found;
    if (magic, run) != (MAGIC, place.run) {
        return Err(Mismatch::Foreign { at });
    }
    if (volume, offset) != (place.volume, place.offset) {
        return Err(Mismatch::Misplaced { at, volume, offset });
    }
    if !generations.contains(&generation) {
        return Err(Mismatch::Stale { at, found: generation, oldest: *generations.start() });
    }
    let mut random = filling(&found);
    for (i, word) in words.iter().enumerate().skip(HEAD_WORDS) {
        let wrong = u64::from_le_bytes(*word) ^ random.next_u64();
        if wrong != 0 {
            return Err(Mismatch::Damaged { at: at + (i * 8) as u64 + u64::from(wrong.trailing_zeros() / 8) });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place { run: 77, volume: 3, offset: 1 << 30 };

    fn block(place: Place, generation: u64) -> Vec<u8> {
        let mut data = vec![0xee; 4096];
        fill(&mut data, place, generation);
        data
    }

    #[test]
    fn what_was_filled_is_accepted_at_its_place_only() {
        assert_eq!(check(&block(PLACE, 5), PLACE, &(5..=5)), Ok(()));
        assert_eq!(check(&block(PLACE, 5), PLACE, &(4..=6)), Ok(()));
        let elsewhere = Place { offset: PLACE.offset + 4096, ..PLACE };
        let found = Mismatch::Misplaced { at: PLACE.offset, volume: 3, offset: elsewhere.offset };
        assert_eq!(check(&block(elsewhere, 5), PLACE, &(5..=5)), Err(found));
        let other = Place { volume: 4, ..PLACE };
        let found = Mismatch::Misplaced { at: PLACE.offset, volume: 4, offset: PLACE.offset };
        assert_eq!(check(&block(other, 5), PLACE, &(5..=5)), Err(found));
        let foreign = Err(Mismatch::Foreign { at: PLACE.offset });
        assert_eq!(check(&block(Place { run: 78, ..PLACE }, 5), PLACE, &(5..=5)), foreign);
        assert_eq!(check(&[0; 4096], PLACE, &(5..=5)), foreign);
    }

    #[test]
    fn every_flipped_byte_is_found() {
        let good = block(PLACE, 5);
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 0x10;
            let error = check(&bad, PLACE, &(5..=5)).expect_err("a flipped byte");
            if i % SECTOR >= HEAD_WORDS * 8 {
                assert_eq!(error, Mismatch::Damaged { at: PLACE.offset + i as u64 });
            }
        }
    }

    #[test]
    fn a_stale_block_and_a_stale_sector_are_found() {
        assert_eq!(
            check(&block(PLACE, 4), PLACE, &(5..=6)),
            Err(Mismatch::Stale { at: PLACE.offset, found: 4, oldest: 5 })
        );
        let mut torn = block(PLACE, 5);
        torn[3 * SECTOR..4 * SECTOR].copy_from_slice(&block(PLACE, 4)[3 * SECTOR..4 * SECTOR]);
        let at = PLACE.offset + 3 * SECTOR as u64;
        assert_eq!(check(&torn, PLACE, &(5..=5)), Err(Mismatch::Stale { at, found: 4, oldest: 5 }));
    }

    #[test]
    fn generations_differ_in_every_part() {
        let (a, b) = (block(PLACE, 1), block(PLACE, 2));
        let same = a.iter().zip(&b).skip(HEAD_WORDS * 8).take(SECTOR - HEAD_WORDS * 8).filter(|(a, b)| a == b).count();
        assert!(same < 20, "{same} of 472 bytes are equal by chance");
    }
}
