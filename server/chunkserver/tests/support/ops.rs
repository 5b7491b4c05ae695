//! Single commands on one layer, for tests that look at one thing.

use super::replica::{Replica, status_of};
use super::world::COPYSET;
use bytes::Bytes;
use ogee_chunkserver::store::{ChunkKey, ReadChain, ReadError, ReadRange};
use ogee_common::checksum::fragment_crcs;
use ogee_common::id::{AttachEpoch, ChunkIndex, LayerId, Term, VolumeSeq};
use ogee_proto::data::{Command, LayerHead, OpenLayerHead, Status, WriteHead, ZeroHead};
use ogee_raft::api::{ApplyEntry, EntryKind, LogPos, StateMachine, StateMachineError};
use std::os::unix::fs::FileExt;

pub const LAYER: LayerId = LayerId(1);

pub fn at(seq: u64, offset: u32, len: u32) -> LayerHead {
    LayerHead {
        copyset: COPYSET,
        chunk: ChunkIndex(0),
        layer: LAYER,
        seq: VolumeSeq(seq),
        epoch: AttachEpoch(1),
        term: Term(1),
        offset,
        len,
    }
}

pub fn open() -> Command {
    Command::OpenLayer(OpenLayerHead {
        copyset: COPYSET,
        layer: LAYER,
        epoch: AttachEpoch(1),
        seq: VolumeSeq(1),
        term: Term(1),
        chain: vec![],
    })
}

pub fn write(seq: u64, offset: u32, data: Vec<u8>) -> Command {
    let len = u32::try_from(data.len()).expect("small");
    let crcs = fragment_crcs(offset, &data).collect();
    Command::Write(WriteHead { at: at(seq, offset, len), crcs }, data.into())
}

pub fn zero(seq: u64, offset: u32, len: u32) -> Command {
    Command::Zero(ZeroHead { at: at(seq, offset, len), masks: false })
}

pub fn entry(index: usize, command: &Command) -> ApplyEntry {
    let pos = LogPos { term: Term(1), index: index as u64 };
    ApplyEntry { pos, kind: EntryKind::Command(command.encode()) }
}

impl Replica {
    /// Applies one command as the next entry.
    pub async fn try_apply(&mut self, command: &Command) -> Result<Bytes, StateMachineError> {
        self.try_apply_bytes(command.encode()).await
    }

    /// Applies whatever lies in a log as the next entry.
    pub async fn try_apply_bytes(&mut self, command: Bytes) -> Result<Bytes, StateMachineError> {
        let pos = LogPos { term: Term(1), index: self.next_index() as u64 };
        let entry = ApplyEntry { pos, kind: EntryKind::Command(command) };
        self.parts().machine.apply(vec![entry]).await.map(|mut replies| replies.remove(0))
    }

    /// Applies one command, which must be admitted.
    pub async fn apply(&mut self, command: &Command) {
        let reply = self.try_apply(command).await.expect("apply");
        assert_eq!(status_of(&reply), Status::Ok);
    }

    pub async fn read_at(&self, seq: u64, offset: u32, len: u32) -> Result<Vec<u8>, ReadError> {
        let at = ChunkKey { layer: LAYER, chunk: ChunkIndex(0) };
        self.read(&ReadRange { at, seq: VolumeSeq(seq), chain: ReadChain::Known, offset, len }).await
    }

    /// Flips a bit of the data file of a version of the chunk.
    pub fn rot(&self, seq: u64, offset: u64) {
        let path = self.root().join(format!("chunks/00000007/00000000.0000000000000001.{seq:016x}"));
        let file = std::fs::OpenOptions::new().read(true).write(true).open(path).expect("data file");
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).expect("read");
        file.write_all_at(&[byte[0] ^ 4], offset).expect("write");
    }
}

pub fn is_corrupt(result: &Result<Vec<u8>, ReadError>, page: u32) -> bool {
    matches!(result, Err(ReadError::Corrupt { page: p, .. }) if *p == page)
}
