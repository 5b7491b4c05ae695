//! A small deterministic random sequence for placement.
//!
//! The leader draws one seed from [`ogee_common::rng`] and runs the planners with it; the plan, not the seed, goes into
//! the Raft log, so that replicas of different builds agree. Invariant: the same seed gives the same sequence. The
//! generator is splitmix64 (Steele, Lea, Flood, OOPSLA 2014); it is not for secrets.

/// A deterministic sequence of numbers.
#[derive(Debug, Clone)]
pub(crate) struct Seeded(u64);

impl Seeded {
    /// A sequence that starts at `seed`.
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub(crate) const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is at least 1.
    pub(crate) fn below(&mut self, bound: u128) -> u128 {
        // 128 random bits make the bias of the remainder smaller than anything placement can show.
        let wide = (u128::from(self.next()) << 64) | u128::from(self.next());
        wide % bound
    }

    /// Shuffles in place (Fisher and Yates).
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = usize::try_from(self.below(i as u128 + 1)).expect("below a length");
            items.swap(i, j);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Seeded;

    #[test]
    fn the_sequence_is_fixed_by_its_seed() {
        // Reference values of splitmix64 with seed 0.
        let mut s = Seeded::new(0);
        assert_eq!([s.next(), s.next()], [0xE220_A839_7B1D_CDAF, 0x6E78_9E6A_A1B9_65F4]);
    }

    #[test]
    fn a_shuffle_keeps_every_item() {
        let mut items: Vec<u32> = (0..100).collect();
        Seeded::new(7).shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }
}
