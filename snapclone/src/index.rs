//! The index of a backup: what it is a backup of, its leaves, and the Merkle root over its content.
//!
//! A leaf lists [`BACKUP_LEAF_BLOCKS`] blocks (40 bytes each: run, address) and is stored as a block itself. Invariant:
//! the root depends on the volume's size and content (and the repository's key) and on nothing else, so equal content
//! has equal roots wherever its blocks are. Pure.

use crate::error::RepoError;
use crate::layout::{Address, BlockRef, INDEXES, REMOVED, hex, parse_run, unhex};
use crate::seal::Sealer;
use ogee_client::Moment;
use ogee_common::id::{LayerId, VolumeSeq};
use ogee_common::limits::{BACKUP_BLOCK_BYTES_MAX, BACKUP_BLOCK_BYTES_MIN, BACKUP_LEAF_BLOCKS, VOLUME_BYTES_MAX};
use serde::{Deserialize, Serialize};

/// The format of indexes and of the repository.
pub(crate) const FORMAT: u32 = 1;
/// Bytes of a block's reference in a leaf.
pub(crate) const REF_BYTES: usize = 40;

/// A backup's identity: the number of the run that made it, 16 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackupId(pub u64);

impl std::fmt::Display for BackupId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Where an index is stored.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) struct IndexKey {
    /// The volume's identity: cluster and number.
    pub volume: String,
    /// Counts the backups of the volume; of two with the same one neither is newer.
    pub generation: u64,
    /// The run that made it.
    pub run: u64,
}

impl IndexKey {
    fn tail(&self) -> String {
        format!("{}/{:016x}-{:016x}", self.volume, self.generation, self.run)
    }

    /// Its name.
    pub(crate) fn key(&self) -> String {
        format!("{INDEXES}{}", self.tail())
    }

    /// The name of the mark that it is removed.
    pub(crate) fn removed_key(&self) -> String {
        format!("{REMOVED}{}", self.tail())
    }

    /// From the name of an index, or of a mark.
    pub(crate) fn parse(prefix: &str, key: &str) -> Option<Self> {
        let (volume, rest) = key.strip_prefix(prefix)?.split_once('/')?;
        let (generation, run) = rest.split_once('-')?;
        Some(Self { volume: volume.to_owned(), generation: parse_run(generation)?, run: parse_run(run)? })
    }
}

/// What a backup is of and where its content lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// Version of this format.
    pub(crate) format: u32,
    /// The run that made it, hexadecimal.
    pub id: String,
    /// Counts the backups of the volume.
    pub generation: u64,
    /// The cluster, hexadecimal.
    pub cluster: String,
    /// The volume's number in its cluster.
    pub volume_id: u64,
    /// The volume's path when the backup was made.
    pub volume: String,
    /// The snapshot's name.
    pub snapshot: String,
    /// When the snapshot was taken, milliseconds since 1970.
    pub snapshot_unix_ms: u64,
    /// The layer that the snapshot is of; 0, also in indexes of older programs: not known.
    #[serde(default)]
    pub layer: u64,
    /// The newest seq of the layer that it shows.
    #[serde(default)]
    pub seq: u64,
    /// When the backup was complete, milliseconds since 1970.
    pub made_unix_ms: u64,
    /// Size of the volume.
    pub size_bytes: u64,
    /// Bytes of a block; the last may be shorter.
    pub block_bytes: u32,
    /// Bytes of blocks that are not all zeros.
    pub data_bytes: u64,
    /// Content bytes that this backup added to the repository.
    pub new_bytes: u64,
    /// Bytes of objects that this backup added, compressed.
    pub stored_bytes: u64,
    /// Merkle root over the content, hexadecimal.
    pub root: String,
    /// The leaves: `run/address`, or nothing for one of zeros.
    pub(crate) leaves: Vec<String>,
}

impl Index {
    /// Number of blocks.
    pub(crate) fn blocks(&self) -> u64 {
        self.size_bytes.div_ceil(u64::from(self.block_bytes))
    }

    /// Bytes of block `i`.
    pub(crate) fn block_len(&self, i: u64) -> u32 {
        let left = self.size_bytes.saturating_sub(i * u64::from(self.block_bytes));
        u32::try_from(left).unwrap_or(u32::MAX).min(self.block_bytes)
    }

    /// Number of blocks of leaf `i`.
    pub(crate) fn leaf_len(&self, i: usize) -> usize {
        let before = u64::try_from(i * BACKUP_LEAF_BLOCKS).unwrap_or(u64::MAX);
        usize::try_from(self.blocks().saturating_sub(before)).unwrap_or(usize::MAX).min(BACKUP_LEAF_BLOCKS)
    }

    /// The leaves' places.
    pub(crate) fn leaf_refs(&self) -> impl Iterator<Item = Option<BlockRef>> + '_ {
        self.leaves.iter().map(|text| parse_ref(text))
    }

    /// The moment that it is a backup of, if that is known.
    #[must_use]
    pub fn moment(&self) -> Option<Moment> {
        (self.layer != 0).then_some(Moment { layer: LayerId(self.layer), seq: VolumeSeq(self.seq) })
    }

    /// The identity.
    #[must_use]
    pub fn backup_id(&self) -> BackupId {
        BackupId(parse_run(&self.id).unwrap_or_default())
    }

    /// Whether everything in it fits together. Whoever wrote it may not be a friend.
    fn is_sound(&self) -> bool {
        self.format == FORMAT
            && parse_run(&self.id).is_some()
            && self.block_bytes.is_power_of_two()
            && (BACKUP_BLOCK_BYTES_MIN..=BACKUP_BLOCK_BYTES_MAX).contains(&self.block_bytes)
            && self.size_bytes <= VOLUME_BYTES_MAX
            && self.leaves.len() as u64 == self.blocks().div_ceil(BACKUP_LEAF_BLOCKS as u64)
            && self.leaf_refs().all(|leaf| leaf.is_some())
            && unhex::<32>(&self.root).is_some()
    }
}

/// A place as text.
pub(crate) fn ref_text(place: BlockRef) -> String {
    if place.is_zeros() { String::new() } else { format!("{:016x}/{}", place.run, hex(&place.address)) }
}

fn parse_ref(text: &str) -> Option<BlockRef> {
    if text.is_empty() {
        return Some(BlockRef::ZEROS);
    }
    let (run, address) = text.split_once('/')?;
    Some(BlockRef { run: parse_run(run)?, address: unhex(address)? })
}

/// The object of an index, or (`None`) of the note that the run was given up and never publishes.
pub(crate) fn seal_index(sealer: &Sealer, key: &str, index: Option<&Index>) -> Vec<u8> {
    let json = serde_json::to_vec(&index).expect("an index is text and numbers");
    sealer.seal(key, &[&sealer.address(&[&json])[..], &json].concat())
}

/// Opens what [`seal_index`] made.
///
/// # Errors
/// [`crate::RepoErrorKind::Corrupt`].
pub(crate) fn open_index(sealer: &Sealer, key: &str, object: &[u8], max: usize) -> Result<Option<Index>, RepoError> {
    let content = sealer.open(key, object, max)?;
    let bad = |why| RepoError::corrupt(key, why);
    let (address, json) = content.split_at_checked(32).ok_or_else(|| bad("it is cut short"))?;
    if sealer.address(&[json])[..] != *address {
        return Err(bad("its checksum is wrong"));
    }
    let index: Option<Index> = serde_json::from_slice(json).map_err(|e| bad("it is no index").because(e))?;
    let is_sound = index.as_ref().is_none_or(|i| i.is_sound() && key.ends_with(&format!("-{}", i.id)));
    if is_sound { Ok(index) } else { Err(bad("it makes no sense, or is of a newer version")) }
}

/// The content of a leaf.
pub(crate) fn leaf_content(blocks: &[BlockRef]) -> Vec<u8> {
    let mut out = Vec::with_capacity(blocks.len() * REF_BYTES);
    for block in blocks {
        out.extend_from_slice(&block.run.to_le_bytes());
        out.extend_from_slice(&block.address);
    }
    out
}

/// The blocks of a leaf's content; `None` if it is not `len` references.
pub(crate) fn parse_leaf(content: &[u8], len: usize) -> Option<Vec<BlockRef>> {
    let parse = |bytes: &[u8]| {
        let (mut run, mut address) = ([0; 8], Address::default());
        run.copy_from_slice(&bytes[..8]);
        address.copy_from_slice(&bytes[8..]);
        let block = BlockRef { run: u64::from_le_bytes(run), address };
        (!block.is_zeros() || block == BlockRef::ZEROS).then_some(block)
    };
    if content.len() != len * REF_BYTES {
        return None;
    }
    content.chunks(REF_BYTES).map(parse).collect()
}

/// Collects the Merkle root, leaf by leaf in order.
#[derive(Debug)]
pub(crate) struct Merkle {
    sealer: Sealer,
    leaves: Vec<u8>,
}

impl Merkle {
    pub(crate) fn new(sealer: &Sealer) -> Self {
        Self { sealer: sealer.clone(), leaves: Vec::new() }
    }

    /// The next leaf.
    pub(crate) fn leaf(&mut self, blocks: &[BlockRef]) {
        let addresses: Vec<u8> = blocks.iter().flat_map(|b| b.address).collect();
        self.leaves.extend_from_slice(&self.sealer.address(&[b"leaf", &addresses]));
    }

    /// The root of a volume of so many bytes, as text.
    pub(crate) fn root(&self, size_bytes: u64) -> String {
        hex(&self.sealer.address(&[b"root", &size_bytes.to_le_bytes(), &self.leaves]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Index {
        let leaf = BlockRef { run: 7, address: [9; 32] };
        Index {
            format: FORMAT,
            id: "0000000000000005".to_owned(),
            generation: 1,
            cluster: "ab".repeat(16),
            volume_id: 3,
            volume: "vms/a".to_owned(),
            snapshot: "s".to_owned(),
            snapshot_unix_ms: 1,
            layer: 8,
            seq: 9,
            made_unix_ms: 2,
            size_bytes: 300 << 20,
            block_bytes: 256 << 10,
            data_bytes: 5,
            new_bytes: 4,
            stored_bytes: 3,
            root: "cd".repeat(32),
            leaves: vec![ref_text(leaf), String::new()],
        }
    }

    #[test]
    fn an_index_comes_back_and_nonsense_does_not() {
        let sealer = Sealer::default();
        let key = IndexKey { volume: "v".to_owned(), generation: 1, run: 5 };
        assert_eq!(IndexKey::parse(INDEXES, &key.key()), Some(key.clone()));
        assert_eq!(IndexKey::parse(REMOVED, &key.removed_key()), Some(key.clone()));
        let key = key.key();
        let object = seal_index(&sealer, &key, Some(&sample()));
        assert_eq!(open_index(&sealer, &key, &object, 1 << 20).expect("opens"), Some(sample()));
        let object = seal_index(&sealer, &key, None);
        assert_eq!(open_index(&sealer, &key, &object, 1 << 20).expect("opens"), None);
        let nonsense: [fn(&mut Index); 6] = [
            |i| i.format = 2,
            |i| i.block_bytes = 0,
            |i| i.size_bytes = u64::MAX,
            |i| i.leaves.push(String::new()),
            |i| i.leaves[0] = "0/1".to_owned(),
            |i| i.id = "0000000000000006".to_owned(),
        ];
        for change in nonsense {
            let mut index = sample();
            change(&mut index);
            let object = seal_index(&sealer, &key, Some(&index));
            assert!(open_index(&sealer, &key, &object, 1 << 20).is_err(), "{index:?}");
        }
    }

    proptest! {
        #[test]
        fn leaves_come_back(runs in proptest::collection::vec(0u64..3, 0..20)) {
            let block = |run: &u64| BlockRef { run: *run, address: [u8::from(*run != 0); 32] };
            let blocks: Vec<_> = runs.iter().map(block).collect();
            let content = leaf_content(&blocks);
            prop_assert_eq!(parse_leaf(&content, blocks.len()), Some(blocks.clone()));
            prop_assert_eq!(parse_leaf(&content, blocks.len() + 1), None);
        }
    }
}
