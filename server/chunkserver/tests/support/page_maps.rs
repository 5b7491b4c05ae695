//! Page maps against the oracle. It knows which pages a write or zero touched, and what every seq read when it was the
//! newest, also those of snapshots that were deleted since.

use super::replica::Replica;
use super::world::{CHUNKS, Image, REGIONS, World};
use ogee_chunkserver::store::{ChunkKey, View};
use ogee_common::id::{ChunkIndex, LayerId, VolumeSeq};
use ogee_proto::data::{Ancestor, PageMapReply};

/// Page of the chunk and its sectors in an image.
fn pages() -> impl Iterator<Item = (u32, std::ops::Range<usize>)> {
    REGIONS.iter().enumerate().flat_map(|(region, (from, _))| {
        (0..6u32).map(move |p| (from / 4096 + p, region * 48 + p as usize * 8..region * 48 + (p as usize + 1) * 8))
    })
}

fn differ(a: &Image, b: &Image, sectors: &std::ops::Range<usize>) -> bool {
    a[sectors.clone()] != b[sectors.clone()]
}

impl Replica {
    /// Asks for the maps of every view, each compared with one earlier seq and one moment of an ancestor.
    pub async fn check_page_maps(&self, world: &World) {
        for (layer, seq) in world.views() {
            let l = &world.layers[&layer];
            for chunk in 0..CHUNKS {
                let old = Some(l.old_ancestors()).filter(|old| !old.is_empty());
                for chain in [Some(l.ancestors()), old].into_iter().flatten() {
                    // Another one at each check.
                    let turn = (world.log.len() as u64).wrapping_mul(7) + layer * 3;
                    let earlier = Ancestor { layer: LayerId(layer), seq: VolumeSeq(1 + turn % seq) };
                    let above = chain.get(usize::try_from(turn).expect("small") % chain.len().max(1));
                    let above = above.map(|a| Ancestor { layer: a.layer, seq: VolumeSeq(1 + turn % a.seq.0) });
                    for since in [Some(earlier), above].into_iter().flatten() {
                        let at = ChunkKey { layer: LayerId(layer), chunk: ChunkIndex(chunk) };
                        let view = View::Layer { at, seq: VolumeSeq(seq), chain: chain.as_slice().into() };
                        let map = self.store().page_map_of(&view, Some(since)).await.expect("a map");
                        check_map(world, (layer, chunk, seq), since, &map);
                    }
                }
            }
        }
    }
}

fn check_map(world: &World, (layer, chunk, seq): (u64, u32, u64), since: Ancestor, map: &PageMapReply) {
    let what = format!("layer {layer} chunk {chunk} seq {seq} since {since:?}");
    let (now, then) = (world.view(layer, chunk, seq), world.view(since.layer.0, chunk, since.seq.0));
    let changed = map.changed.as_ref().expect("it was asked for");
    // A moment that was needed all the time: nothing else is said to have changed but what was written.
    let l = &world.layers[&layer];
    let is_lazy = world.lazy_bottom(layer).is_some();
    let exact = since.layer.0 == layer && l.needed.contains(&since.seq.0);
    for (page, sectors) in pages() {
        assert!(changed.contains(page) || !differ(&now, &then, &sectors), "{what}: page {page} differs and is not said to");
        let held = map.data.contains(page) || map.zero.contains(page);
        // What nobody pasted is in the backup only.
        let told = map.data.contains(page) || (is_lazy && !held);
        assert!(told || now[sectors].iter().all(|t| *t == 0), "{what}: page {page} has data");
        assert!(!held || is_lazy || world.ever_touched(layer, chunk, page), "{what}: page {page} was never written");
        let written = l.touched(chunk, since.seq.0 + 1..=seq).any(|p| p == page);
        assert!(!exact || !changed.contains(page) || written, "{what}: page {page} did not change");
    }
    assert!(!map.data.contains(1000), "{what}: page 1000 has no data");
}
