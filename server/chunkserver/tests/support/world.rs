//! The world: clients, an MDS and their volumes, as the log entries they make; and the oracle.
//!
//! The oracle keeps, for each chunk of a layer and each seq it was written with, the whole image of the tested regions, one
//! token per sector. It knows nothing of pages, versions or rows.

use super::Rng;
use bytes::Bytes;
use ogee_common::checksum::fragment_crcs;
use ogee_common::id::{AttachEpoch, ChunkIndex, CopysetId, LayerId, Term, VolumeSeq};
use ogee_common::limits::CHUNK_BYTES;
use ogee_proto::data::{
    Ancestor, Command, DropVersionHead, FlattenHead, LayerHead, OpenLayerHead, PasteHead, PastePages, SealHead, Status, WriteHead,
    ZeroHead,
};
use ogee_raft::api::{ApplyEntry, EntryKind, LogPos};
use std::collections::{BTreeMap, BTreeSet};

pub const COPYSET: CopysetId = CopysetId(7);
const SECTOR: u32 = 512;
/// Tested byte ranges of a chunk: its start, a row bound, its end.
pub const REGIONS: [(u32, u32); 3] =
    [(0, 6 * 4096), (253 * 4096, 259 * 4096), (CHUNK_BYTES - 6 * 4096, CHUNK_BYTES)];
/// Sectors of all regions.
pub const SECTORS: usize = 3 * 6 * 8;
/// Chunks used.
pub const CHUNKS: u32 = 2;

/// One token per sector of the regions; 0 reads as zeros.
pub type Image = [u32; SECTORS];

/// Index of a sector of the image, if the byte offset lies in a region.
fn sector_index(offset: u32) -> Option<usize> {
    let region = REGIONS.iter().position(|(from, to)| (*from..*to).contains(&offset))?;
    Some(region * 48 + ((offset - REGIONS[region].0) / SECTOR) as usize)
}

/// The bytes of a sector with a token.
pub fn sector_bytes(token: u32) -> [u8; 512] {
    let mut out = [0; 512];
    if token != 0 {
        out.chunks_exact_mut(4).enumerate().for_each(|(i, b)| {
            let salt = u32::try_from(i).expect("small").wrapping_mul(0x0101_0001);
            b.copy_from_slice(&(token ^ salt).to_le_bytes());
        });
        out[511] |= 1; // never all zero
    }
    out
}

/// What the backup holds of a chunk: some pages of it are zeros.
fn backup_image(chunk: u32) -> Image {
    std::array::from_fn(|i| {
        let sector = u32::try_from(i).expect("small");
        if (sector / 8 + chunk).is_multiple_of(3) { 0 } else { 0xB000_0000 | chunk << 16 | sector }
    })
}

/// What the backup holds of a page of a chunk; zeros outside the regions.
pub fn backup_page(chunk: u32, page: u32) -> Vec<u8> {
    let image = backup_image(chunk);
    let sectors = (0..8).map(|s| sector_index(page * 4096 + s * SECTOR).map_or([0; 512], |i| sector_bytes(image[i])));
    sectors.collect::<Vec<_>>().concat()
}

#[derive(Debug, Clone, Default)]
pub struct Layer {
    pub epoch: u64,
    pub seq: u64,
    pub min_seq: u64,
    pub chain: Vec<(u64, u64)>,
    /// The chain before the layer was flattened: reading on with it must be right.
    pub old_chain: Vec<(u64, u64)>,
    pub gone: bool,
    pub opened: bool,
    /// It stands on a backup.
    pub lazy: bool,
    /// Snapshots that are still needed.
    pub needed: BTreeSet<u64>,
    images: BTreeMap<u32, BTreeMap<u64, Image>>,
    /// Pages of the regions that a write or zero with a seq touched, per chunk.
    touched: BTreeMap<u32, BTreeMap<u64, BTreeSet<u32>>>,
}

/// Something to do, and what must come back.
#[derive(Debug, Clone)]
pub struct Step {
    pub entry: ApplyEntry,
    pub status: Status,
}

#[derive(Debug, Clone)]
pub struct World {
    pub layers: BTreeMap<u64, Layer>,
    pub log: Vec<Step>,
    term: u64,
    token: u32,
}

impl Default for World {
    fn default() -> Self {
        let mut world = Self { layers: BTreeMap::new(), log: vec![], term: 1, token: 0 };
        world.append(EntryKind::Membership(Bytes::from_static(b"members")), Status::Ok);
        world.new_layer(vec![]);
        world.new_layer(vec![]);
        world
    }
}

impl World {
    /// A world in which the first two layers stand on a backup, and so do their children.
    pub fn lazy() -> Self {
        let mut world = Self::default();
        world.layers.values_mut().for_each(|layer| layer.lazy = true);
        world
    }

    /// The layer at the bottom of an ancestry, if that stands on a backup.
    pub fn lazy_bottom(&self, id: u64) -> Option<u64> {
        let bottom = self.layers[&id].chain.last().map_or(id, |(layer, _)| *layer);
        self.layers[&bottom].lazy.then_some(bottom)
    }

    fn append(&mut self, kind: EntryKind, status: Status) {
        let index = self.log.len() as u64;
        self.log.push(Step { entry: ApplyEntry { pos: LogPos { term: Term(self.term), index }, kind }, status });
    }

    fn command(&mut self, command: &Command, status: Status) {
        self.append(EntryKind::Command(command.encode()), status);
    }

    fn new_layer(&mut self, chain: Vec<(u64, u64)>) -> u64 {
        let id = self.layers.len() as u64 + 1;
        self.layers.insert(id, Layer { seq: 1, chain, ..Layer::default() });
        self.open(id);
        id
    }

    fn open(&mut self, id: u64) {
        let term = self.term;
        let layer = self.layers.get_mut(&id).expect("a layer");
        layer.epoch += 1;
        layer.opened = true;
        layer.min_seq = layer.min_seq.max(layer.seq);
        let head = OpenLayerHead {
            copyset: COPYSET,
            layer: LayerId(id),
            epoch: AttachEpoch(layer.epoch),
            seq: VolumeSeq(layer.seq),
            term: Term(term),
            chain: layer.ancestors(),
        };
        let status = if layer.gone { Status::LayerGone } else { Status::Ok };
        self.command(&Command::OpenLayer(head), status);
    }

    /// What a view reads; independent of the store's structure.
    pub fn view(&self, layer: u64, chunk: u32, seq: u64) -> Image {
        let l = &self.layers[&layer];
        let own = l.images.get(&chunk).and_then(|i| i.range(..=seq).next_back());
        match (own, l.chain.first()) {
            (Some((_, image)), _) => *image,
            (None, Some((parent, at))) => self.view(*parent, chunk, *at),
            (None, None) if l.lazy => backup_image(chunk),
            (None, None) => [0; SECTORS],
        }
    }

    /// Whether a page was ever written or zeroed in a layer or in what it stood on.
    pub fn ever_touched(&self, layer: u64, chunk: u32, page: u32) -> bool {
        let l = &self.layers[&layer];
        let mut parents = l.chain.iter().chain(&l.old_chain).map(|(parent, _)| *parent);
        l.touched(chunk, 0..=u64::MAX).any(|p| p == page) || parents.any(|parent| self.ever_touched(parent, chunk, page))
    }

    fn live(&self) -> Vec<u64> {
        self.layers.iter().filter(|(_, l)| !l.gone).map(|(id, _)| *id).collect()
    }

    fn head(&self, id: u64, chunk: u32, offset: u32, len: u32) -> LayerHead {
        let l = &self.layers[&id];
        LayerHead {
            copyset: COPYSET,
            chunk: ChunkIndex(chunk),
            layer: LayerId(id),
            seq: VolumeSeq(l.seq),
            epoch: AttachEpoch(l.epoch),
            term: Term(self.term),
            offset,
            len,
        }
    }

    /// Makes the request stale in some way, sometimes, and says what must come of it.
    fn spoil(&self, at: &mut LayerHead, rng: &mut Rng) -> Status {
        let l = &self.layers[&at.layer.0];
        match rng.below(12) {
            0 if at.epoch.0 > 1 => {
                at.epoch.0 -= 1;
                Status::Fenced
            }
            1 => {
                at.epoch.0 += 1;
                Status::LayerNotOpen
            }
            2 => {
                at.term.0 += 1;
                Status::NotLeader
            }
            3 if l.min_seq > 1 => {
                at.seq.0 = l.min_seq - 1;
                Status::StaleSeq
            }
            _ => Status::Ok,
        }
    }

    fn range(rng: &mut Rng) -> (u32, u32) {
        let (from, to) = rng.pick(&REGIONS);
        if rng.chance(3) {
            // Whole pages.
            let first = rng.below32(6);
            let count = 1 + rng.below32(6 - first);
            return (from + first * 4096, count * 4096);
        }
        let sectors = (to - from) / SECTOR;
        let first = rng.below32(sectors);
        let max = (sectors - first).min(if rng.chance(2) { 7 } else { 48 });
        (from + first * SECTOR, (1 + rng.below32(max)) * SECTOR)
    }

    fn change(&mut self, at: &LayerHead, mut token: impl FnMut(u32) -> u32) {
        let (id, chunk, seq) = (at.layer.0, at.chunk.0, at.seq.0);
        let mut image = self.view(id, chunk, seq);
        let mut offset = at.offset;
        while offset < at.offset + at.len {
            if let Some(i) = sector_index(offset) {
                image[i] = token(offset);
            }
            offset += SECTOR;
        }
        let layer = self.layers.get_mut(&id).expect("a layer");
        layer.min_seq = layer.min_seq.max(seq);
        layer.images.entry(chunk).or_default().insert(seq, image);
        let pages = (at.offset / 4096..(at.offset + at.len).div_ceil(4096)).filter(|p| sector_index(p * 4096).is_some());
        layer.touched.entry(chunk).or_default().entry(seq).or_default().extend(pages);
    }

    fn write(&mut self, id: u64, rng: &mut Rng) {
        let (offset, len) = Self::range(rng);
        let mut at = self.head(id, rng.below32(CHUNKS), offset, len);
        let status = self.spoil(&mut at, rng);
        let mut data = vec![];
        let mut tokens = vec![];
        for _ in 0..len / SECTOR {
            self.token += 1;
            // Sometimes a sector of zeros is written as data.
            let token = if rng.chance(10) { 0 } else { self.token };
            tokens.push(token);
            data.extend_from_slice(&sector_bytes(token));
        }
        let crcs = fragment_crcs(offset, &data).collect();
        self.make_present(&at);
        self.command(&Command::Write(WriteHead { at, crcs }, data.into()), status);
        if status == Status::Ok {
            self.change(&at, |o| tokens[((o - offset) / SECTOR) as usize]);
        }
    }

    fn zero(&mut self, id: u64, rng: &mut Rng) {
        let (offset, len) = if rng.chance(6) { (0, CHUNK_BYTES) } else { Self::range(rng) };
        let mut at = self.head(id, rng.below32(CHUNKS), offset, len);
        let status = self.spoil(&mut at, rng);
        self.make_present(&at);
        self.command(&Command::Zero(ZeroHead { at, masks: self.lazy_bottom(id).is_some() }), status);
        if status == Status::Ok {
            self.change(&at, |_| 0);
        }
    }

    /// What a client does before it writes or zeroes a part of a page that may be missing.
    fn make_present(&mut self, at: &LayerHead) {
        let Some(bottom) = self.lazy_bottom(at.layer.0) else { return };
        let end = at.offset + at.len;
        let partial = [(at.offset, at.offset / 4096), (end, (end - 1) / 4096)].into_iter().filter(|(bound, _)| bound % 4096 != 0);
        let pages: BTreeSet<u32> = partial.map(|(_, page)| page).collect();
        pages.into_iter().for_each(|page| self.paste_pages(bottom, at.chunk.0, page..page + 1, |_| true));
    }

    /// Pastes pages of one row.
    fn paste_pages(&mut self, bottom: u64, chunk: u32, pages: std::ops::Range<u32>, wanted: impl Fn(u32) -> bool) {
        let content: Vec<u8> = pages.clone().flat_map(|page| backup_page(chunk, page)).collect();
        let row = u8::try_from(pages.start / 256).expect("few rows");
        let (pages, data) = PastePages::of(row, pages.start % 256, &content, wanted);
        let head = PasteHead { copyset: COPYSET, layer: LayerId(bottom), chunk: ChunkIndex(chunk), pages };
        let status = if self.layers[&bottom].gone { Status::LayerGone } else { Status::Ok };
        self.command(&Command::Paste(head, data), status);
    }

    /// A hydrator, or a client that has read something, pastes some pages of a row.
    fn paste(&mut self, id: u64, rng: &mut Rng) {
        let Some(bottom) = self.lazy_bottom(id) else { return };
        let (from, to) = rng.pick(&[(0, 6), (253, 256), (256, 259), (4090, 4096)]);
        let mask = rng.below32(64);
        self.paste_pages(bottom, rng.below32(CHUNKS), from..to, |page| mask >> (page % 6) & 1 == 1);
    }

    fn snapshot(&mut self, id: u64) -> u64 {
        let layer = self.layers.get_mut(&id).expect("a layer");
        let taken = layer.seq;
        layer.needed.insert(taken);
        layer.seq += 1;
        taken
    }

    fn seal(&mut self, id: u64) {
        let layer = self.layers.get_mut(&id).expect("a layer");
        layer.min_seq = layer.min_seq.max(layer.seq);
        let head = SealHead { layer: LayerId(id), seq: VolumeSeq(layer.seq) };
        self.command(&Command::Seal(head), Status::Ok);
    }

    fn clone_volume(&mut self, id: u64) {
        if self.layers.len() >= 8 {
            return;
        }
        let seq = self.snapshot(id);
        let mut chain = vec![(id, seq)];
        chain.extend_from_slice(&self.layers[&id].chain);
        for (parent, seq) in &chain {
            let parent = self.layers.get_mut(parent).expect("a parent");
            parent.min_seq = parent.min_seq.max(seq + 1);
        }
        self.new_layer(chain);
    }

    fn is_parent(&self, id: u64, seq: Option<u64>) -> bool {
        let uses = |(l, s): &(u64, u64)| *l == id && seq.is_none_or(|seq| *s == seq);
        self.layers.values().any(|l| !l.gone && l.chain.iter().any(uses))
    }

    fn drop_version(&mut self, id: u64, rng: &mut Rng) {
        let layer = &self.layers[&id];
        let free: Vec<u64> = layer.needed.iter().copied().filter(|s| !self.is_parent(id, Some(*s))).collect();
        if free.is_empty() {
            return;
        }
        let seq = rng.pick(&free);
        // Now and then one order covers several snapshots.
        let mut dropped = vec![seq];
        dropped.extend(layer.needed.range(..seq).rev().take_while(|s| free.contains(s) && rng.chance(2)));
        let lowest = *dropped.last().expect("at least one");
        let after = layer.needed.range(..lowest).next_back().copied().unwrap_or(0);
        let next = layer.needed.range(seq + 1..).next().copied().unwrap_or(layer.seq);
        let needed = &mut self.layers.get_mut(&id).expect("a layer").needed;
        dropped.iter().for_each(|s| assert!(needed.remove(s)));
        let head = DropVersionHead {
            layer: LayerId(id),
            after: VolumeSeq(after),
            seq: VolumeSeq(seq),
            next: VolumeSeq(next),
        };
        // The MDS orders it only after the seq was sealed, so that no write below it is under way.
        self.seal(id);
        self.command(&Command::DropVersion(head), Status::Ok);
    }

    /// One entry of a flatten: some pages of a row, as a leader that died half-way left them, or all.
    fn flatten_row(&mut self, id: u64, (chunk, row): (u32, u8), rng: &mut Rng, all: bool) {
        let pages = if all { [0xFF; 32] } else { std::array::from_fn(|_| rng.below32(256).to_le_bytes()[0]) };
        let chain = self.layers[&id].ancestors();
        for a in &chain {
            let parent = self.layers.get_mut(&a.layer.0).expect("a parent");
            parent.min_seq = parent.min_seq.max(a.seq.0 + 1);
        }
        let head = FlattenHead { layer: LayerId(id), chunk: ChunkIndex(chunk), row, pages, chain };
        self.command(&Command::Flatten(head), if self.layers[&id].gone { Status::LayerGone } else { Status::Ok });
    }

    /// Copies what ancestors show: something of it, or everything, and then the layer has no parent any more.
    fn flatten(&mut self, id: u64, rng: &mut Rng) {
        // The MDS refuses it while the backup is needed: what nobody has pasted would be lost.
        if self.layers[&id].chain.is_empty() || self.lazy_bottom(id).is_some() {
            return;
        }
        let whole = rng.chance(2);
        for chunk in 0..CHUNKS {
            for row in [0, 1, 15] {
                if whole || rng.chance(2) {
                    self.flatten_row(id, (chunk, row), rng, whole);
                    // Guests go on meanwhile.
                    match rng.below(4) {
                        0 => self.write(id, rng),
                        1 => self.zero(id, rng),
                        2 if rng.chance(3) => drop(self.snapshot(id)),
                        _ => {}
                    }
                }
            }
        }
        if !whole {
            return;
        }
        let base: Vec<Image> = (0..CHUNKS).map(|chunk| self.above(id, chunk)).collect();
        let layer = self.layers.get_mut(&id).expect("a layer");
        for (chunk, image) in (0..).zip(base) {
            layer.images.entry(chunk).or_default().insert(0, image);
        }
        layer.old_chain = std::mem::take(&mut layer.chain);
        // Its children see it as before and stand on nothing below it.
        for child in self.layers.values_mut() {
            if let Some(at) = child.chain.iter().position(|(l, _)| *l == id) {
                if child.old_chain.is_empty() {
                    child.old_chain = child.chain.clone();
                }
                child.chain.truncate(at + 1);
            }
        }
    }

    /// What the ancestors of a layer show.
    fn above(&self, id: u64, chunk: u32) -> Image {
        self.layers[&id].chain.first().map_or([0; SECTORS], |(parent, at)| self.view(*parent, chunk, *at))
    }

    /// A leader that was deposed long ago had one more entry of a flatten in its queue.
    fn late_flatten(&mut self, id: u64, rng: &mut Rng) {
        let layer = &self.layers[&id];
        if !layer.chain.is_empty() || layer.old_chain.is_empty() {
            return;
        }
        let chain: Vec<Ancestor> = layer.old_chain.iter().map(|(l, s)| ancestor(*l, *s)).collect();
        for a in &chain {
            let parent = self.layers.get_mut(&a.layer.0).expect("a parent");
            if !parent.gone {
                parent.min_seq = parent.min_seq.max(a.seq.0 + 1);
            }
        }
        let (chunk, row) = (ChunkIndex(rng.below32(CHUNKS)), rng.pick(&[0, 1, 15]));
        let head = FlattenHead { layer: LayerId(id), chunk, row, pages: [0xFF; 32], chain };
        self.command(&Command::Flatten(head), Status::Ok);
    }

    fn drop_layer(&mut self, id: u64) {
        if self.is_parent(id, None) || self.live().len() <= 1 {
            return;
        }
        self.layers.get_mut(&id).expect("a layer").gone = true;
        self.command(&Command::DropLayer(LayerId(id)), Status::Ok);
        // A late client hears about it.
        let at = self.head(id, 0, 0, 4096);
        self.command(&Command::Zero(ZeroHead { at, masks: false }), Status::LayerGone);
        let chain = vec![ancestor(id + 1000, 1)];
        let head = FlattenHead { layer: LayerId(id), chunk: ChunkIndex(0), row: 0, pages: [0xFF; 32], chain };
        self.command(&Command::Flatten(head), Status::LayerGone);
        self.paste_pages(id, 0, 0..2, |_| true);
        self.open(id);
    }

    /// Adds the entries of one random event.
    pub fn event(&mut self, rng: &mut Rng) {
        let live = self.live();
        let id = rng.pick(&live);
        match rng.below(50) {
            0..=17 => self.write(id, rng),
            18..=24 => self.zero(id, rng),
            25..=27 => {
                self.snapshot(id);
            }
            28..=30 => self.clone_volume(id),
            31..=34 => self.drop_version(id, rng),
            35 => self.drop_layer(id),
            36 => self.open(id),
            37 => self.append(EntryKind::Blank, Status::Ok),
            38 => self.seal(id),
            40..=43 => self.flatten(id, rng),
            44..=45 => self.late_flatten(id, rng),
            46..=49 => self.paste(id, rng),
            _ => {
                self.term += 1;
                self.append(EntryKind::Blank, Status::Ok);
            }
        }
    }

    /// Every view that must read right: (layer, seq).
    pub fn views(&self) -> Vec<(u64, u64)> {
        let mut out = vec![];
        for (id, layer) in self.layers.iter().filter(|(_, l)| !l.gone) {
            out.extend(layer.needed.iter().map(|s| (*id, *s)));
            out.push((*id, layer.seq));
        }
        out
    }
}

fn ancestor(layer: u64, seq: u64) -> Ancestor {
    Ancestor { layer: LayerId(layer), seq: VolumeSeq(seq) }
}

impl Layer {
    /// Pages of the regions that writes and zeros with these seqs touched.
    pub fn touched(&self, chunk: u32, seqs: std::ops::RangeInclusive<u64>) -> impl Iterator<Item = u32> {
        let of_chunk = self.touched.get(&chunk).into_iter();
        let with_seq = move |(seq, _): &(&u64, &BTreeSet<u32>)| seqs.contains(seq);
        of_chunk.flatten().filter(with_seq).flat_map(|(_, pages)| pages.iter().copied())
    }

    pub fn ancestors(&self) -> Vec<Ancestor> {
        self.chain.iter().map(|(l, s)| ancestor(*l, *s)).collect()
    }

    /// The ancestry that a client which attached before a flatten still has.
    pub fn old_ancestors(&self) -> Vec<Ancestor> {
        self.old_chain.iter().map(|(l, s)| ancestor(*l, *s)).collect()
    }
}
