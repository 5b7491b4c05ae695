//! Heads of requests. Each is `encode` into bytes and a total `decode`.
//!
//! Invariant: the head of a Write starts with its opcode and tells its own length, so that `head ++ payload` is a
//! self-describing [`Command`] that goes into the Raft log and to the followers byte for byte as the client sent it.

use super::codec::{DecodeError, Reader, put_count};
use super::flatten::FlattenHead;
use super::frame::Opcode;
use super::paste::PasteHead;
use bytes::{BufMut, Bytes, BytesMut};
use ogee_common::geometry::page_fragments;
use ogee_common::id::{AttachEpoch, ChunkIndex, ConnectionGeneration, CopysetId, LayerId, SessionId, Term, VolumeSeq};
use ogee_common::limits::{ANCESTRY_DEPTH_MAX, CHUNK_BYTES, REQUEST_BYTES_MAX, SECTOR_BYTES};

/// Who opens a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Role {
    /// An SDK session.
    Client = 0,
    /// A chunkserver, for Raft.
    Chunkserver = 1,
    /// An MDS node, for Raft.
    Mds = 2,
}

/// First frame of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelloHead {
    /// Lowest protocol version the asker speaks.
    pub version_min: u16,
    /// Highest protocol version the asker speaks.
    pub version_max: u16,
    /// Who asks.
    pub role: Role,
    /// Chunkserver id or MDS node number of the asker; 0 for a client.
    pub process: u32,
    /// The process the asker believes to talk to; 0 if it does not know. A wrong one is refused.
    pub target: u32,
    /// The SDK session; 0 for servers.
    pub session: SessionId,
    /// Counts the session's connections to this chunkserver.
    pub generation: ConnectionGeneration,
    /// The cluster's identity.
    pub cluster: [u8; 16],
}

impl HelloHead {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(48);
        b.put_u16_le(self.version_min);
        b.put_u16_le(self.version_max);
        b.put_u32_le(self.role as u32);
        b.put_u32_le(self.process);
        b.put_u32_le(self.target);
        b.put_u64_le(self.session.0);
        b.put_u64_le(self.generation.0);
        b.put_slice(&self.cluster);
        b.freeze()
    }

    /// Decodes the head.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let v = Self {
            version_min: r.u16("version_min")?,
            version_max: r.u16("version_max")?,
            role: match r.u32("role")? {
                0 => Role::Client,
                1 => Role::Chunkserver,
                2 => Role::Mds,
                _ => return Err(DecodeError::OutOfRange("role")),
            },
            process: r.u32("process")?,
            target: r.u32("target")?,
            session: SessionId(r.u64("session")?),
            generation: ConnectionGeneration(r.u64("generation")?),
            cluster: r.array("cluster")?,
        };
        r.finish()?;
        Ok(v)
    }
}

/// Answer to [`HelloHead`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelloReply {
    /// The version chosen.
    pub version: u16,
    /// The process that answers.
    pub process: u32,
}

impl HelloReply {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(6);
        b.put_u16_le(self.version);
        b.put_u32_le(self.process);
        b.freeze()
    }

    /// Decodes the head.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let v = Self { version: r.u16("version")?, process: r.u32("process")? };
        r.finish()?;
        Ok(v)
    }
}

/// A layer to read through to: pages with a seq up to `seq` of `layer`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ancestor {
    /// The layer.
    pub layer: LayerId,
    /// Newest seq that is seen.
    pub seq: VolumeSeq,
}

/// The fields that Write, Zero, Read and PageMap share: where, and by what right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerHead {
    /// The copyset the chunk lies in.
    pub copyset: CopysetId,
    /// The chunk of the layer.
    pub chunk: ChunkIndex,
    /// The layer.
    pub layer: LayerId,
    /// Write: the seq written with. Read: the newest seq seen.
    pub seq: VolumeSeq,
    /// The fence; 0 for a read-only attach.
    pub epoch: AttachEpoch,
    /// The Raft term of the leader the request is meant for; a leader of any other term refuses a write.
    pub term: Term,
    /// First byte in the chunk; a multiple of 512.
    pub offset: u32,
    /// Bytes; a multiple of 512.
    pub len: u32,
}

impl LayerHead {
    pub(super) const BYTES: usize = 52;

    pub(super) fn put(&self, opcode: Opcode, count: usize, b: &mut BytesMut) {
        b.put_u8(opcode as u8);
        b.put_u8(0);
        put_count(b, count);
        b.put_u32_le(self.copyset.0);
        b.put_u32_le(self.chunk.0);
        b.put_u64_le(self.layer.0);
        b.put_u64_le(self.seq.0);
        b.put_u64_le(self.epoch.0);
        b.put_u64_le(self.term.0);
        b.put_u32_le(self.offset);
        b.put_u32_le(self.len);
    }

    /// Returns the fields, the byte after the opcode, and the count of list items that follow.
    pub(super) fn take(opcode: Opcode, len_max: u32, r: &mut Reader<'_>) -> Result<(Self, u8, usize), DecodeError> {
        if r.u8("opcode")? != opcode as u8 {
            return Err(DecodeError::OutOfRange("opcode"));
        }
        let modifier = r.u8("modifier")?;
        let count = usize::from(r.u16("count")?);
        let v = Self {
            copyset: CopysetId(r.u32("copyset")?),
            chunk: ChunkIndex(r.u32("chunk")?),
            layer: LayerId(r.u64("layer")?),
            seq: VolumeSeq(r.u64("seq")?),
            epoch: AttachEpoch(r.u64("epoch")?),
            term: Term(r.u64("term")?),
            offset: r.u32("offset")?,
            len: r.u32("len")?,
        };
        let aligned = v.offset.is_multiple_of(SECTOR_BYTES) && v.len.is_multiple_of(SECTOR_BYTES);
        let end = v.offset.checked_add(v.len).ok_or(DecodeError::OutOfRange("len"))?;
        if !aligned || v.len == 0 || v.len > len_max || end > CHUNK_BYTES {
            return Err(DecodeError::OutOfRange("offset or len"));
        }
        if v.layer.0 == 0 || v.copyset.0 == 0 || v.seq.0 == 0 {
            return Err(DecodeError::OutOfRange("id 0"));
        }
        Ok((v, modifier, count))
    }
}

/// Write `len` bytes of payload. One CRC32C for each page that is touched: of the fragment inside that page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteHead {
    /// Where and by what right.
    pub at: LayerHead,
    /// Fragment checksums, in page order.
    pub crcs: Vec<u32>,
}

impl WriteHead {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(LayerHead::BYTES + self.crcs.len() * 4);
        self.at.put(Opcode::Write, self.crcs.len(), &mut b);
        self.crcs.iter().for_each(|c| b.put_u32_le(*c));
        b.freeze()
    }

    /// Decodes a head that fills `head`.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let v = Self::take(&mut r)?;
        r.finish()?;
        Ok(v)
    }

    fn take(r: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (at, modifier, count) = LayerHead::take(Opcode::Write, REQUEST_BYTES_MAX, r)?;
        // A later version may give it a meaning; in a log entry that must not be passed over.
        if modifier != 0 {
            return Err(DecodeError::OutOfRange("modifier"));
        }
        if count != page_fragments(at.offset, at.len as usize).count() {
            return Err(DecodeError::OutOfRange("checksum count"));
        }
        let crcs = (0..count).map(|_| r.u32("crc")).collect::<Result<_, _>>()?;
        Ok(Self { at, crcs })
    }

    /// Bytes of the encoded head.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        LayerHead::BYTES + self.crcs.len() * 4
    }
}

/// Make a range read as zeros; up to a whole chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZeroHead {
    /// Where and by what right.
    pub at: LayerHead,
    /// Record zero pages also where nothing lies below: a backup may (since [`super::PASTE_SINCE`]).
    pub masks: bool,
}

impl ZeroHead {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(LayerHead::BYTES);
        self.at.put(Opcode::Zero, 0, &mut b);
        b[1] = u8::from(self.masks);
        b.freeze()
    }

    /// Decodes the head.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let (at, modifier, _) = LayerHead::take(Opcode::Zero, CHUNK_BYTES, &mut r)?;
        r.finish()?;
        Ok(Self { at, masks: flag(modifier)? })
    }
}

fn flag(modifier: u8) -> Result<bool, DecodeError> {
    match modifier {
        0 | 1 => Ok(modifier == 1),
        _ => Err(DecodeError::OutOfRange("modifier")),
    }
}

pub(super) fn put_chain(chain: &[Ancestor], b: &mut BytesMut) {
    for a in chain {
        b.put_u64_le(a.layer.0);
        b.put_u64_le(a.seq.0);
    }
}

pub(super) fn take_chain(count: usize, r: &mut Reader<'_>) -> Result<Vec<Ancestor>, DecodeError> {
    if count > ANCESTRY_DEPTH_MAX {
        return Err(DecodeError::OutOfRange("ancestry depth"));
    }
    (0..count)
        .map(|_| Ok(Ancestor { layer: LayerId(r.u64("ancestor")?), seq: VolumeSeq(r.u64("ancestor seq")?) }))
        .collect()
}

/// Read a range. A write-attached client leaves `chain` empty: the copyset knows it from OpenLayer. A read-only one
/// (epoch 0) sends it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadHead {
    /// Where and by what right.
    pub at: LayerHead,
    /// Answer with a [`super::ThinReply`], which tells the pages that no version has from zeros (since [`super::PASTE_SINCE`]).
    pub tells_missing: bool,
    /// Parents to read through to, nearest first.
    pub chain: Vec<Ancestor>,
}

impl ReadHead {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(LayerHead::BYTES + self.chain.len() * 16);
        self.at.put(Opcode::Read, self.chain.len(), &mut b);
        b[1] = u8::from(self.tells_missing);
        put_chain(&self.chain, &mut b);
        b.freeze()
    }

    /// Decodes the head.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let (at, modifier, count) = LayerHead::take(Opcode::Read, REQUEST_BYTES_MAX, &mut r)?;
        let (tells_missing, chain) = (flag(modifier)?, take_chain(count, &mut r)?);
        r.finish()?;
        Ok(Self { at, tells_missing, chain })
    }
}

/// Raise the fence of a layer in a copyset to `epoch`, its minimum seq to `seq`, and teach it the ancestry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenLayerHead {
    /// The copyset.
    pub copyset: CopysetId,
    /// The layer.
    pub layer: LayerId,
    /// The fence to raise to; at least 1.
    pub epoch: AttachEpoch,
    /// The seq the client writes with; lower ones are refused from now on.
    pub seq: VolumeSeq,
    /// The Raft term of the leader the request is meant for.
    pub term: Term,
    /// Parents, nearest first.
    pub chain: Vec<Ancestor>,
}

impl OpenLayerHead {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(40 + self.chain.len() * 16);
        b.put_u8(Opcode::OpenLayer as u8);
        b.put_u8(0);
        put_count(&mut b, self.chain.len());
        b.put_u32_le(self.copyset.0);
        b.put_u64_le(self.layer.0);
        b.put_u64_le(self.epoch.0);
        b.put_u64_le(self.seq.0);
        b.put_u64_le(self.term.0);
        put_chain(&self.chain, &mut b);
        b.freeze()
    }

    /// Decodes the head.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        if r.u8("opcode")? != Opcode::OpenLayer as u8 || r.u8("modifier")? != 0 {
            return Err(DecodeError::OutOfRange("opcode"));
        }
        let count = usize::from(r.u16("count")?);
        let mut v = Self {
            copyset: CopysetId(r.u32("copyset")?),
            layer: LayerId(r.u64("layer")?),
            epoch: AttachEpoch(r.u64("epoch")?),
            seq: VolumeSeq(r.u64("seq")?),
            term: Term(r.u64("term")?),
            chain: Vec::new(),
        };
        if v.layer.0 == 0 || v.epoch.0 == 0 || v.seq.0 == 0 {
            return Err(DecodeError::OutOfRange("id 0"));
        }
        v.chain = take_chain(count, &mut r)?;
        r.finish()?;
        Ok(v)
    }
}

/// Ask who leads a copyset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusHead {
    /// The copyset.
    pub copyset: CopysetId,
}

impl StatusHead {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        Bytes::copy_from_slice(&self.copyset.0.to_le_bytes())
    }

    /// Decodes the head.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let v = Self { copyset: CopysetId(r.u32("copyset")?) };
        r.finish()?;
        Ok(v)
    }
}

/// The seq of a seal that ends a layer's time as head: every attach of it is fenced from then on. No write has it.
pub const SEALED_FOR_GOOD: VolumeSeq = VolumeSeq(u64::MAX);

/// Refuse writes to a layer with a seq below `seq`, in the Raft log only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealHead {
    /// The layer.
    pub layer: LayerId,
    /// Lowest seq that is still accepted. For DropLayer: 0.
    pub seq: VolumeSeq,
}

/// Merge versions of a layer in `(after, seq]` into the one in `(seq, next]`, in the Raft log only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DropVersionHead {
    /// The layer.
    pub layer: LayerId,
    /// The next older seq that is still needed; 0 if none.
    pub after: VolumeSeq,
    /// The seq that is no longer needed.
    pub seq: VolumeSeq,
    /// The next newer seq that is needed.
    pub next: VolumeSeq,
}

/// Every command that a chunkserver's Raft log can hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A client's write, with its data.
    Write(WriteHead, Bytes),
    /// A client's write-zeroes or discard.
    Zero(ZeroHead),
    /// A client's fence.
    OpenLayer(OpenLayerHead),
    /// The MDS's seal.
    Seal(SealHead),
    /// The MDS's order to delete a layer.
    DropLayer(LayerId),
    /// The MDS's order to merge versions.
    DropVersion(DropVersionHead),
    /// The leader's order to copy pages of a layer's ancestors into it.
    Flatten(FlattenHead),
    /// Pages of the backup that a layer stands on, with their data.
    Paste(PasteHead, Bytes),
}

impl Command {
    /// Encodes the command as it goes into the Raft log. A Write or Paste from a frame is not encoded again: the frame's body
    /// is already this.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::new();
        match self {
            Self::Write(head, data) => {
                b.put_slice(&head.encode());
                b.put_slice(data);
            }
            Self::Zero(head) => b.put_slice(&head.encode()),
            Self::OpenLayer(head) => b.put_slice(&head.encode()),
            Self::Seal(s) => put_u64s(&mut b, Opcode::Seal, &[s.layer.0, s.seq.0]),
            Self::DropLayer(layer) => put_u64s(&mut b, Opcode::DropLayer, &[layer.0]),
            Self::DropVersion(d) => {
                put_u64s(&mut b, Opcode::DropVersion, &[d.layer.0, d.after.0, d.seq.0, d.next.0]);
            }
            Self::Flatten(head) => b.put_slice(&head.encode()),
            Self::Paste(head, data) => {
                b.put_slice(&head.encode());
                b.put_slice(data);
            }
        }
        b.freeze()
    }

    /// Decodes a command; data of a Write or Paste is a slice of `bytes`, not a copy.
    ///
    /// # Errors
    /// [`DecodeError`]. The data's checksums are not checked here.
    pub fn decode(bytes: &Bytes) -> Result<Self, DecodeError> {
        let opcode = Opcode::parse(*bytes.first().ok_or(DecodeError::Short("opcode"))?)?;
        let mut r = Reader(bytes);
        let command = match opcode {
            Opcode::Write => {
                let head = WriteHead::take(&mut r)?;
                let data = bytes.slice(bytes.len() - r.0.len()..);
                return if data.len() == head.at.len as usize {
                    Ok(Self::Write(head, data))
                } else {
                    Err(DecodeError::OutOfRange("payload length"))
                };
            }
            Opcode::Paste => {
                let head = PasteHead::take(&mut r)?;
                let data = bytes.slice(bytes.len() - r.0.len()..);
                return if data.len() == head.pages.data_bytes() {
                    Ok(Self::Paste(head, data))
                } else {
                    Err(DecodeError::OutOfRange("payload length"))
                };
            }
            Opcode::Zero => return Ok(Self::Zero(ZeroHead::decode(bytes)?)),
            Opcode::OpenLayer => return Ok(Self::OpenLayer(OpenLayerHead::decode(bytes)?)),
            Opcode::Flatten => return Ok(Self::Flatten(FlattenHead::decode(bytes)?)),
            Opcode::Seal => {
                r.u8("opcode")?;
                Self::Seal(SealHead { layer: LayerId(r.u64("layer")?), seq: VolumeSeq(r.u64("seq")?) })
            }
            Opcode::DropLayer => {
                r.u8("opcode")?;
                Self::DropLayer(LayerId(r.u64("layer")?))
            }
            Opcode::DropVersion => {
                r.u8("opcode")?;
                Self::DropVersion(DropVersionHead {
                    layer: LayerId(r.u64("layer")?),
                    after: VolumeSeq(r.u64("after")?),
                    seq: VolumeSeq(r.u64("seq")?),
                    next: VolumeSeq(r.u64("next")?),
                })
            }
            other => return Err(DecodeError::Opcode(other as u8)),
        };
        r.finish()?;
        Ok(command)
    }
}

fn put_u64s(b: &mut BytesMut, opcode: Opcode, fields: &[u64]) {
    b.put_u8(opcode as u8);
    fields.iter().for_each(|f| b.put_u64_le(*f));
}

/// Head of every Raft frame: which group and replica, then the message, whose form belongs to the Raft layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RaftHead {
    /// The group: the copyset id, or 0 for the MDS.
    pub group: u64,
    /// The replica that shall receive it; another one refuses.
    pub target: u64,
    /// The message without entry payloads.
    pub message: Bytes,
}

impl RaftHead {
    /// Encodes the head.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        let mut b = BytesMut::with_capacity(16 + self.message.len());
        b.put_u64_le(self.group);
        b.put_u64_le(self.target);
        b.put_slice(&self.message);
        b.freeze()
    }

    /// Decodes the head; the message is a slice of `head`.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(head: &Bytes) -> Result<Self, DecodeError> {
        let mut r = Reader(head);
        let (group, target) = (r.u64("group")?, r.u64("target")?);
        Ok(Self { group, target, message: head.slice(16..) })
    }
}
