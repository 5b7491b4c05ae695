//! Version lookup: which version a page is read from. Pure; property-tested against an oracle.
//!
//! Reading page p of a layer at seq s: the newest version with a seq up to s that holds p (as data or as zero); else
//! the same in the parent `(layer', s')`, and so on along the chain; else zeros.

use super::key::{ChunkKey, VersionKey};
use super::pages::PageSet;
use super::row::{PageState, Row};
use ogee_common::id::{ChunkIndex, LayerId, VolumeSeq};
use ogee_proto::data::Ancestor;
use std::sync::Arc;

/// Where a page is read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageSource {
    /// No version holds it: zeros.
    Absent,
    /// A version says zeros.
    Zero,
    /// Data in the file of a version.
    Data {
        /// The version.
        version: VersionKey,
        /// CRC32C of the page.
        crc: u32,
        /// Whether it was written since the process started.
        touched: bool,
    },
    /// A version holds it, but its data is known to be wrong.
    Damaged {
        /// The version.
        version: VersionKey,
    },
}

impl PageSource {
    /// The version whose file holds the page, if any does.
    #[must_use]
    pub const fn version(&self) -> Option<VersionKey> {
        match self {
            Self::Data { version, .. } | Self::Damaged { version } => Some(*version),
            Self::Absent | Self::Zero => None,
        }
    }

    /// Whether the page reads as zeros.
    #[must_use]
    pub const fn is_zero(&self) -> bool {
        matches!(self, Self::Absent | Self::Zero)
    }
}

/// What is read.
#[derive(Debug, Clone)]
pub enum View {
    /// A layer as seen at a seq, through its chain.
    Layer {
        /// The chunk of the layer.
        at: ChunkKey,
        /// Newest seq that is seen.
        seq: VolumeSeq,
        /// Parents, nearest first.
        chain: Arc<[Ancestor]>,
    },
    /// One version alone.
    Version(VersionKey),
}

impl View {
    /// The (layer, newest seq) pairs to look through, in order, with the chunk they share.
    pub fn levels(&self) -> (ChunkIndex, impl Iterator<Item = (LayerId, VolumeSeq)>) {
        let (at, seq, chain): (_, _, &[Ancestor]) = match self {
            Self::Layer { at, seq, chain } => (*at, *seq, chain),
            Self::Version(v) => (v.at, v.seq, &[]),
        };
        let parents = chain.iter().map(|a| (a.layer, a.seq));
        (at.chunk, std::iter::once((at.layer, seq)).chain(parents))
    }
}

/// Takes from one version what it holds of the wanted pages; returns the pages to look for in the next. `out` is
/// indexed by page of the row.
pub fn resolve(wanted: PageSet, version: VersionKey, row: &Row, out: &mut [PageSource]) -> PageSet {
    let hits = wanted.intersection(row.held());
    for page in hits.iter() {
        out[page as usize] = match row.page(page) {
            PageState::Zero => PageSource::Zero,
            PageState::Data { crc, touched } => PageSource::Data { version, crc, touched },
            PageState::Damaged => PageSource::Damaged { version },
            PageState::Absent => PageSource::Absent,
        };
    }
    wanted.minus(hits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_common::limits::PAGES_PER_ROW;
    use proptest::prelude::*;

    #[derive(Debug, Clone, Copy)]
    enum Op {
        Data(u32, u32),
        Zero(u32),
        Damage(u32),
    }

    fn ops() -> impl Strategy<Value = Vec<Op>> {
        let page = 0u32..16;
        prop::collection::vec(
            prop_oneof![
                (page.clone(), 1u32..1000).prop_map(|(p, c)| Op::Data(p, c)),
                page.clone().prop_map(Op::Zero),
                page.prop_map(Op::Damage)
            ],
            0..12,
        )
    }

    proptest! {
        /// The oracle walks the versions of each page one by one.
        #[test]
        fn agrees_with_an_oracle(levels in prop::collection::vec(ops(), 0..6), wanted in prop::collection::btree_set(0u32..16, 0..16)) {
            let key = |i: usize| VersionKey::new(LayerId(1), ChunkIndex(0), VolumeSeq(100 - i as u64));
            let mut oracle = vec![vec![None; 16]; levels.len()];
            let mut rows = vec![];
            for (i, ops) in levels.iter().enumerate() {
                let mut row = Row::default();
                for op in ops {
                    match *op {
                        Op::Data(p, crc) => { row.set_data(p, crc); oracle[i][p as usize] = Some(PageSource::Data { version: key(i), crc, touched: true }); }
                        Op::Zero(p) => { row.set_zero(p); oracle[i][p as usize] = Some(PageSource::Zero); }
                        Op::Damage(p) => { row.set_damaged(p); oracle[i][p as usize] = Some(PageSource::Damaged { version: key(i) }); }
                    }
                }
                rows.push(row);
            }
            let mut out = vec![PageSource::Absent; PAGES_PER_ROW as usize];
            let mut left = PageSet::EMPTY;
            wanted.iter().for_each(|p| left.insert(*p));
            for (i, row) in rows.iter().enumerate() {
                left = resolve(left, key(i), row, &mut out);
            }
            for p in 0..16u32 {
                let expected = wanted.contains(&p).then(|| oracle.iter().find_map(|l| l[p as usize])).flatten();
                prop_assert_eq!(out[p as usize], expected.unwrap_or(PageSource::Absent));
                prop_assert_eq!(left.contains(p), wanted.contains(&p) && expected.is_none());
            }
        }
    }

    #[test]
    fn levels_go_from_the_layer_to_its_oldest_ancestor() {
        let chain: Arc<[Ancestor]> = Arc::new([
            Ancestor { layer: LayerId(2), seq: VolumeSeq(5) },
            Ancestor { layer: LayerId(1), seq: VolumeSeq(3) },
        ]);
        let at = ChunkKey { layer: LayerId(3), chunk: ChunkIndex(9) };
        let view = View::Layer { at, seq: VolumeSeq(8), chain };
        let (chunk, levels) = view.levels();
        assert_eq!(chunk, ChunkIndex(9));
        assert_eq!(levels.map(|(l, s)| (l.0, s.0)).collect::<Vec<_>>(), [(3, 8), (2, 5), (1, 3)]);
    }
}
