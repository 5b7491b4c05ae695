//! [`LayerTable`]: the layers a copyset knows and the rules by which it refuses requests. Pure: the state machine calls
//! it in log order, so every replica decides alike.
//!
//! ```text
//!             OpenLayer, Seal, or being an ancestor            DropLayer
//!   unknown ───────────────────────────────────────> known ───────────────> gone (for ever: ids are never reused)
//!      └───────────────────────────── DropLayer ─────────────────────────────^
//! ```
//!
//! Invariants: fence and minimum seq never fall. A layer's versions with a seq below its minimum never change again
//! except by merging, which keeps what every needed seq reads. Opening a layer with ancestor `(P, s)` raises P's
//! minimum seq above s: from then on what the child reads through to is immutable *in this copyset*, whatever a late
//! writer of P does, and replaying the child's partial-page writes reads the same bytes again.

use super::error::ChunkStoreError;
use super::record::{FORMAT, Fields, seal};
use ogee_common::id::{AttachEpoch, LayerId, Term, VolumeSeq};
use ogee_common::limits::ANCESTRY_DEPTH_MAX;
use ogee_common::sim::{self, Canary};
use ogee_proto::data::{Ancestor, LayerHead, OpenLayerHead, Redirect, SEALED_FOR_GOOD, SealHead, Status};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// What a copyset knows of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerInfo {
    /// Lowest attach epoch that may write; 0 when nobody has opened it here.
    pub fence: AttachEpoch,
    /// Lowest seq that may write.
    pub min_seq: VolumeSeq,
    /// Parents to read through to, nearest first.
    pub chain: Arc<[Ancestor]>,
    /// Deleted; only the tombstone is left.
    pub gone: bool,
}

impl Default for LayerInfo {
    fn default() -> Self {
        Self { fence: AttachEpoch(0), min_seq: VolumeSeq(0), chain: Arc::new([]), gone: false }
    }
}

/// Why a request is refused; the status and head of the reply follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The request was meant for the leader of another term.
    #[error("the entry's term is {0}, the request names another")]
    NotLeader(Term),
    /// The epoch is below the fence.
    #[error("fenced")]
    Fenced,
    /// The layer is not open with this epoch.
    #[error("layer not open")]
    LayerNotOpen,
    /// The seq is below the minimum, which is told.
    #[error("stale seq, the minimum is {0}")]
    StaleSeq(VolumeSeq),
    /// The layer was deleted.
    #[error("layer gone")]
    LayerGone,
    /// The request makes no sense.
    #[error("bad request")]
    BadRequest,
}

impl Refusal {
    /// The status of the reply.
    #[must_use]
    pub const fn status(self) -> Status {
        match self {
            Self::NotLeader(_) => Status::NotLeader,
            Self::Fenced => Status::Fenced,
            Self::LayerNotOpen => Status::LayerNotOpen,
            Self::StaleSeq(_) => Status::StaleSeq,
            Self::LayerGone => Status::LayerGone,
            Self::BadRequest => Status::BadRequest,
        }
    }

    /// Status (u16, little-endian) and head of the reply.
    #[must_use]
    pub fn reply(self) -> Vec<u8> {
        let mut out = self.status().code().to_le_bytes().to_vec();
        match self {
            Self::NotLeader(term) => out.extend_from_slice(&Redirect { leader: 0, term }.encode()),
            Self::StaleSeq(min) => out.extend_from_slice(&min.0.to_le_bytes()),
            _ => {}
        }
        out
    }
}

/// The layers of a copyset.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayerTable {
    layers: BTreeMap<LayerId, LayerInfo>,
    /// Changed since the last checkpoint.
    dirty: BTreeSet<LayerId>,
}

impl LayerTable {
    /// What is known of a layer.
    #[must_use]
    pub fn get(&self, layer: LayerId) -> Option<&LayerInfo> {
        self.layers.get(&layer)
    }

    /// Every layer, in order.
    pub fn iter(&self) -> impl Iterator<Item = (LayerId, &LayerInfo)> {
        self.layers.iter().map(|(id, info)| (*id, info))
    }

    /// Number of layers and tombstones.
    #[must_use]
    pub fn len(&self) -> usize {
        self.layers.len()
    }

    /// Whether no layer is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.layers.is_empty()
    }

    /// Puts a layer that was loaded or fetched.
    pub fn restore(&mut self, layer: LayerId, info: LayerInfo) {
        self.layers.insert(layer, info);
    }

    /// Layers changed since the last [`LayerTable::clean`].
    #[must_use]
    pub const fn dirty(&self) -> &BTreeSet<LayerId> {
        &self.dirty
    }

    /// A checkpoint holds everything.
    pub fn clean(&mut self) {
        self.dirty.clear();
    }

    fn change(&mut self, layer: LayerId) -> &mut LayerInfo {
        self.dirty.insert(layer);
        self.layers.entry(layer).or_default()
    }

    fn is_gone(&self, layer: LayerId) -> bool {
        self.layers.get(&layer).is_some_and(|l| l.gone)
    }

    fn check_epoch(&self, layer: LayerId, epoch: AttachEpoch) -> Result<&LayerInfo, Refusal> {
        let Some(info) = self.layers.get(&layer) else {
            return Err(Refusal::LayerNotOpen);
        };
        if info.gone {
            Err(Refusal::LayerGone)
        } else if epoch < info.fence && !sim::planted(Canary::SkipFence) {
            Err(Refusal::Fenced)
        } else if epoch > info.fence {
            Err(Refusal::LayerNotOpen)
        } else {
            Ok(info)
        }
    }

    /// Whether a Write or Zero in an entry of `term` may be applied; raises the minimum seq to the request's.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn admit_write(&mut self, at: &LayerHead, term: Term) -> Result<(), Refusal> {
        if at.epoch.0 == 0 {
            return Err(Refusal::BadRequest);
        }
        if at.term != term {
            return Err(Refusal::NotLeader(term));
        }
        let min_seq = self.check_epoch(at.layer, at.epoch)?.min_seq;
        if at.seq < min_seq {
            return Err(Refusal::StaleSeq(min_seq));
        }
        if at.seq > min_seq {
            self.change(at.layer).min_seq = at.seq;
        }
        Ok(())
    }

    /// Whether a read may be answered. A read-only one (epoch 0) may name a layer that nobody opened here.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn admit_read(&self, at: &LayerHead) -> Result<(), Refusal> {
        match at.epoch.0 {
            0 if self.is_gone(at.layer) => Err(Refusal::LayerGone),
            0 => Ok(()),
            _ => self.check_epoch(at.layer, at.epoch).map(|_| ()),
        }
    }

    /// Raises the fence.
    ///
    /// # Errors
    /// The refusal to answer with.
    pub fn open(&mut self, head: &OpenLayerHead, term: Term) -> Result<(), Refusal> {
        if head.term != term {
            return Err(Refusal::NotLeader(term));
        }
        if self.is_gone(head.layer) {
            return Err(Refusal::LayerGone);
        }
        if self.layers.get(&head.layer).is_some_and(|l| head.epoch < l.fence) {
            return Err(Refusal::Fenced);
        }
        let info = self.change(head.layer);
        info.fence = head.epoch;
        info.min_seq = info.min_seq.max(head.seq);
        info.chain = head.chain.clone().into();
        self.protect(&head.chain);
        Ok(())
    }

    /// Whether pages of the ancestors may be copied into a layer; makes what the layer sees of them immutable.
    ///
    /// # Errors
    /// [`Refusal::LayerGone`].
    pub fn flatten(&mut self, layer: LayerId, chain: &[Ancestor]) -> Result<(), Refusal> {
        if self.is_gone(layer) {
            return Err(Refusal::LayerGone);
        }
        self.protect(chain);
        Ok(())
    }

    /// Whether pages of a backup may be pasted into a layer, whoever has it open.
    ///
    /// # Errors
    /// [`Refusal::LayerGone`].
    pub fn admit_paste(&self, layer: LayerId) -> Result<(), Refusal> {
        if self.is_gone(layer) { Err(Refusal::LayerGone) } else { Ok(()) }
    }

    /// Raises the minimum seqs of ancestors above what is seen of them.
    fn protect(&mut self, chain: &[Ancestor]) {
        for ancestor in chain {
            let above = VolumeSeq(ancestor.seq.0.saturating_add(1));
            let known = self.layers.get(&ancestor.layer);
            if known.is_none_or(|l| !l.gone && l.min_seq < above) {
                self.change(ancestor.layer).min_seq = above;
            }
        }
    }

    /// Refuses lower seqs from now on. With [`SEALED_FOR_GOOD`] every attach, with whatever epoch: the volume has left
    /// this layer behind (a rollback took it from its client), and only snapshots are read from it.
    ///
    /// # Errors
    /// [`Refusal::LayerGone`].
    pub fn seal(&mut self, head: &SealHead) -> Result<(), Refusal> {
        if self.is_gone(head.layer) {
            return Err(Refusal::LayerGone);
        }
        if head.seq == SEALED_FOR_GOOD {
            self.change(head.layer).fence = AttachEpoch(u64::MAX);
        } else if self.layers.get(&head.layer).is_none_or(|l| l.min_seq < head.seq) {
            self.change(head.layer).min_seq = head.seq;
        }
        Ok(())
    }

    /// Leaves a tombstone.
    pub fn drop_layer(&mut self, layer: LayerId) {
        let info = self.change(layer);
        info.gone = true;
        info.chain = Arc::new([]);
    }
}

impl LayerInfo {
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        let depth = u16::try_from(self.chain.len()).expect("a chain is bounded by ANCESTRY_DEPTH_MAX");
        out.push(u8::from(self.gone));
        out.extend_from_slice(&depth.to_le_bytes());
        out.extend_from_slice(&self.fence.0.to_le_bytes());
        out.extend_from_slice(&self.min_seq.0.to_le_bytes());
        for a in self.chain.iter() {
            out.extend_from_slice(&a.layer.0.to_le_bytes());
            out.extend_from_slice(&a.seq.0.to_le_bytes());
        }
    }

    pub(crate) fn take(fields: &mut Fields<'_>) -> Result<Self, ChunkStoreError> {
        let gone = fields.u8()? == 1;
        let depth = usize::from(fields.u16()?);
        let (fence, min_seq) = (AttachEpoch(fields.u64()?), VolumeSeq(fields.u64()?));
        if depth > ANCESTRY_DEPTH_MAX {
            return Err(fields.error());
        }
        let chain = (0..depth)
            .map(|_| Ok(Ancestor { layer: LayerId(fields.u64()?), seq: VolumeSeq(fields.u64()?) }))
            .collect::<Result<Vec<_>, ChunkStoreError>>()?;
        Ok(Self { fence, min_seq, chain: chain.into(), gone })
    }

    /// Encodes the record as it is stored under `key`.
    #[must_use]
    pub fn encode(&self, key: &[u8]) -> Vec<u8> {
        let mut body = vec![FORMAT];
        self.put(&mut body);
        seal(key, body)
    }

    /// Decodes a stored record.
    ///
    /// # Errors
    /// [`ChunkStoreError::Record`] when it is damaged.
    pub fn decode(key: &[u8], record: &[u8]) -> Result<Self, ChunkStoreError> {
        let mut fields = Fields::open("layer record", key, record)?;
        let info = Self::take(&mut fields)?;
        fields.finish()?;
        Ok(info)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_common::id::{ChunkIndex, CopysetId};

    fn at(epoch: u64, seq: u64, term: u64) -> LayerHead {
        LayerHead {
            copyset: CopysetId(1),
            chunk: ChunkIndex(0),
            layer: LayerId(7),
            seq: VolumeSeq(seq),
            epoch: AttachEpoch(epoch),
            term: Term(term),
            offset: 0,
            len: 4096,
        }
    }

    fn open(epoch: u64, seq: u64, chain: &[(u64, u64)]) -> OpenLayerHead {
        let chain = chain.iter().map(|(l, s)| Ancestor { layer: LayerId(*l), seq: VolumeSeq(*s) }).collect();
        OpenLayerHead {
            copyset: CopysetId(1),
            layer: LayerId(7),
            epoch: AttachEpoch(epoch),
            seq: VolumeSeq(seq),
            term: Term(1),
            chain,
        }
    }

    #[test]
    fn a_layer_sealed_for_good_fences_every_attach_and_is_still_read() {
        let (mut t, term) = (LayerTable::default(), Term(1));
        t.open(&open(5, 2, &[]), term).expect("opened");
        t.admit_write(&at(5, 2, 1), term).expect("admitted");
        let good = SealHead { layer: LayerId(7), seq: SEALED_FOR_GOOD };
        for _ in 0..2 {
            t.seal(&good).expect("sealed, also twice");
            assert_eq!(t.admit_write(&at(5, 2, 1), term), Err(Refusal::Fenced));
            assert_eq!(t.admit_read(&at(5, 2, 1)), Err(Refusal::Fenced));
            assert_eq!(t.open(&open(9, 9, &[]), term), Err(Refusal::Fenced));
            assert_eq!(t.admit_read(&at(0, 1, 0)), Ok(()), "a snapshot of it");
        }
        let child = OpenLayerHead { layer: LayerId(8), ..open(6, 3, &[(7, 1)]) };
        t.open(&child, term).expect("a child of it");
        // A copyset that never heard of the layer refuses it as well.
        let mut empty = LayerTable::default();
        empty.seal(&good).expect("sealed");
        assert_eq!(empty.open(&open(5, 2, &[]), term), Err(Refusal::Fenced));
    }

    #[test]
    fn every_refusal() {
        let mut t = LayerTable::default();
        let term = Term(1);
        assert_eq!(t.admit_write(&at(1, 1, 1), term), Err(Refusal::LayerNotOpen));
        t.open(&open(5, 2, &[]), term).expect("open");
        assert_eq!(t.admit_write(&at(0, 9, 1), term), Err(Refusal::BadRequest));
        assert_eq!(t.admit_write(&at(5, 2, 2), term), Err(Refusal::NotLeader(term)));
        assert_eq!(t.admit_write(&at(4, 2, 1), term), Err(Refusal::Fenced));
        assert_eq!(t.admit_write(&at(6, 2, 1), term), Err(Refusal::LayerNotOpen));
        assert_eq!(t.admit_write(&at(5, 1, 1), term), Err(Refusal::StaleSeq(VolumeSeq(2))));
        assert_eq!(t.admit_write(&at(5, 2, 1), term), Ok(()));
        assert_eq!(t.admit_write(&at(5, 4, 1), term), Ok(()));
        assert_eq!(t.admit_write(&at(5, 3, 1), term), Err(Refusal::StaleSeq(VolumeSeq(4))), "a write raises the minimum");
        assert_eq!(t.open(&open(4, 9, &[]), term), Err(Refusal::Fenced));
        assert_eq!(t.get(LayerId(7)).expect("known").min_seq, VolumeSeq(4), "a refused open changes nothing");
        assert_eq!(t.open(&open(6, 9, &[]), Term(2)), Err(Refusal::NotLeader(Term(2))));
        t.drop_layer(LayerId(7));
        assert_eq!(t.admit_write(&at(5, 9, 1), term), Err(Refusal::LayerGone));
        assert_eq!(t.admit_read(&at(0, 9, 1)), Err(Refusal::LayerGone));
        assert_eq!(t.open(&open(9, 9, &[]), term), Err(Refusal::LayerGone));
        assert_eq!(t.seal(&SealHead { layer: LayerId(7), seq: VolumeSeq(1) }), Err(Refusal::LayerGone));
        assert_eq!(t.admit_paste(LayerId(7)), Err(Refusal::LayerGone));
        assert_eq!(t.admit_paste(LayerId(8)), Ok(()), "nobody has opened it here");
    }

    #[test]
    fn opening_a_child_seals_its_ancestors() {
        let mut t = LayerTable::default();
        t.open(&open(1, 1, &[(3, 8), (2, 4)]), Term(1)).expect("open");
        assert_eq!(t.get(LayerId(3)).expect("ancestor").min_seq, VolumeSeq(9));
        assert_eq!(t.get(LayerId(2)).expect("ancestor").min_seq, VolumeSeq(5));
        assert_eq!(t.get(LayerId(2)).expect("ancestor").fence, AttachEpoch(0));
        assert_eq!(t.dirty().len(), 3);
    }

    #[test]
    fn reads_are_fenced_too() {
        let mut t = LayerTable::default();
        assert_eq!(t.admit_read(&at(0, 1, 0)), Ok(()));
        assert_eq!(t.admit_read(&at(1, 1, 0)), Err(Refusal::LayerNotOpen));
        t.open(&open(2, 1, &[]), Term(1)).expect("open");
        assert_eq!(t.admit_read(&at(1, 1, 0)), Err(Refusal::Fenced));
        assert_eq!(t.admit_read(&at(2, 1, 0)), Ok(()));
    }

    #[test]
    fn replies_are_pinned() {
        assert_eq!(Refusal::Fenced.reply(), [3, 0]);
        assert_eq!(Refusal::StaleSeq(VolumeSeq(258)).reply(), [4, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Refusal::NotLeader(Term(5)).reply(), [1, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    }
}
