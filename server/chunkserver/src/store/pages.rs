//! [`PageSet`]: a bitmap over the 256 pages of one metadata row. Pure; used by rows, lookups and the fetch of rows.
//!
//! Invariant: page numbers are relative to the row, 0 to 255; a number outside is a bug of the caller and panics.

use ogee_common::limits::PAGES_PER_ROW;
use std::ops::Range;

const WORDS: usize = PAGES_PER_ROW as usize / 64;

/// A set of pages of one row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PageSet([u64; WORDS]);

impl PageSet {
    /// No page.
    pub const EMPTY: Self = Self([0; WORDS]);
    /// Bytes of the encoded set.
    pub const BYTES: usize = WORDS * 8;

    /// The pages of a range.
    #[must_use]
    pub fn range(pages: Range<u32>) -> Self {
        let mut set = Self::EMPTY;
        for p in pages {
            set.insert(p);
        }
        set
    }

    /// Whether it holds a page.
    #[must_use]
    pub fn contains(&self, page: u32) -> bool {
        self.0[page as usize / 64] >> (page % 64) & 1 == 1
    }

    /// Adds a page.
    pub fn insert(&mut self, page: u32) {
        self.0[page as usize / 64] |= 1 << (page % 64);
    }

    /// Removes a page.
    pub fn remove(&mut self, page: u32) {
        self.0[page as usize / 64] &= !(1 << (page % 64));
    }

    fn zip(self, other: Self, f: impl Fn(u64, u64) -> u64) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }

    /// Pages of either.
    #[must_use]
    pub fn union(self, other: Self) -> Self {
        self.zip(other, |a, b| a | b)
    }

    /// Pages of both.
    #[must_use]
    pub fn intersection(self, other: Self) -> Self {
        self.zip(other, |a, b| a & b)
    }

    /// Pages of this one that the other lacks.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        self.zip(other, |a, b| a & !b)
    }

    /// Whether it holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0 == [0; WORDS]
    }

    /// Number of pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// The pages in order.
    pub fn iter(self) -> impl Iterator<Item = u32> {
        (0..PAGES_PER_ROW).filter(move |p| self.contains(*p))
    }

    /// The pages as maximal runs, in order.
    pub fn runs(self) -> impl Iterator<Item = Range<u32>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = (at..PAGES_PER_ROW).find(|p| self.contains(*p))?;
            let end = (start..PAGES_PER_ROW).find(|p| !self.contains(*p)).unwrap_or(PAGES_PER_ROW);
            at = end;
            Some(start..end)
        })
    }

    /// Four little-endian words; bit 0 of the first is page 0.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        for (to, word) in out.chunks_exact_mut(8).zip(self.0) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        out
    }

    /// Inverse of [`PageSet::encode`].
    #[must_use]
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Self {
        let mut words = [0; WORDS];
        for (word, from) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = from.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b));
        }
        Self(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn agrees_with_a_set(a in prop::collection::btree_set(0u32..256, 0..40), b in prop::collection::btree_set(0u32..256, 0..40)) {
            let set = |s: &BTreeSet<u32>| { let mut out = PageSet::EMPTY; s.iter().for_each(|p| out.insert(*p)); out };
            let (x, y) = (set(&a), set(&b));
            prop_assert_eq!(x.union(y).iter().collect::<BTreeSet<_>>(), &a | &b);
            prop_assert_eq!(x.intersection(y).iter().collect::<BTreeSet<_>>(), &a & &b);
            prop_assert_eq!(x.minus(y).iter().collect::<BTreeSet<_>>(), &a - &b);
            prop_assert_eq!(x.len(), a.len());
            prop_assert_eq!(x.is_empty(), a.is_empty());
            prop_assert_eq!(x.runs().flatten().collect::<BTreeSet<_>>(), a.clone());
            let runs: Vec<_> = x.runs().collect();
            prop_assert!(runs.windows(2).all(|w| w[0].end < w[1].start), "runs are maximal");
            prop_assert_eq!(PageSet::decode(&x.encode()), x);
        }
    }

    #[test]
    fn ranges() {
        assert_eq!(PageSet::range(0..256).len(), 256);
        assert_eq!(PageSet::range(63..65).runs().collect::<Vec<_>>(), vec![63..65]);
    }
}
