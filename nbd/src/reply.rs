//! Replies: encoded into a queue of buffers that is sent with vectored writes.
//!
//! Called by `connection.rs`. Invariants: data is never copied, only queued; heads that follow each other lie in one
//! buffer; the last chunk of a request, and only that, has the flag DONE; a read that failed has no data (the encoder
//! gets outcomes, not progress). In structured framing a success without data is a simple reply, which is shorter and
//! allowed. Absent: when to send.

use crate::context::{ContextExtents, StatusExtent};
use crate::handshake::Framing;
use crate::request::Refusal;
use crate::wire::{
    EXTENDED_REPLY_MAGIC, Errno, REPLY_FLAG_DONE, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk,
};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use ogee_client::{ReadData, ReadPiece};
use std::collections::VecDeque;
use std::io::IoSlice;

/// Zeros that stand for a hole where the client wants bytes.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
/// Room for heads is made for this many bytes at once, and then cut up: an allocation for about a hundred replies.
const HEADS_BYTES: usize = 4096;
/// Room that any head finds at least, or makes.
const HEAD_BYTES_MAX: usize = 64;
/// Buffers given to one vectored write.
pub(crate) const SLICES_MAX: usize = 64;
/// Longest extent that fits a 32-bit descriptor and ends at a page.
const EXTENT_32_MAX: u64 = (u32::MAX - 4095) as u64;

/// The request that is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyTo {
    /// As the client sent it.
    pub cookie: u64,
    /// Offset of the request, as the client sent it.
    pub offset: u64,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Done; there is nothing to say.
    Done,
    /// What was read, from the request's offset on.
    Read {
        /// The data.
        data: ReadData,
        /// Whether it must go in one chunk.
        one_chunk: bool,
    },
    /// What the device holds, in each context that was agreed on; at least one.
    Extents(Vec<ContextExtents>),
    /// Refused or failed.
    Failed(Refusal),
}

/// The queue of replies of one connection.
#[derive(Debug)]
pub struct Replies {
    framing: Framing,
    /// Heads not yet in the queue.
    heads: BytesMut,
    queue: VecDeque<Bytes>,
    bytes: usize,
}

impl Replies {
    /// An empty queue.
    #[must_use]
    pub fn new(framing: Framing) -> Self {
        Self { framing, heads: BytesMut::new(), queue: VecDeque::new(), bytes: 0 }
    }

    /// Bytes not yet sent.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes + self.heads.len()
    }

    /// Queues the reply to a request.
    pub fn push(&mut self, to: ReplyTo, outcome: Outcome) {
        if self.heads.capacity() - self.heads.len() < HEAD_BYTES_MAX {
            self.heads.reserve(HEADS_BYTES);
        }
        match (self.framing, outcome) {
            (Framing::Simple, Outcome::Done) | (Framing::Structured, Outcome::Done) => self.simple(to, 0),
            (Framing::Extended, Outcome::Done) => self.chunk(to, chunk::NONE, REPLY_FLAG_DONE, 0),
            (Framing::Simple, Outcome::Read { data, .. }) => {
                self.simple(to, 0);
                self.data(data.pieces.into_iter());
            }
            (_, Outcome::Read { data, one_chunk }) => self.read(to, data, one_chunk),
            (Framing::Simple, Outcome::Extents(_)) => self.simple(to, Errno::Inval.number()),
            (_, Outcome::Extents(extents)) => self.extents(to, &extents),
            (Framing::Simple, Outcome::Failed(refusal)) => self.simple(to, refusal.errno.number()),
            (_, Outcome::Failed(refusal)) => {
                let len = u16::try_from(refusal.reason.len()).expect("reasons are short");
                self.chunk(to, chunk::ERROR, REPLY_FLAG_DONE, 6 + u64::from(len));
                self.heads.put_u32(refusal.errno.number());
                self.heads.put_u16(len);
                self.heads.put_slice(refusal.reason.as_bytes());
            }
        }
    }

    fn simple(&mut self, to: ReplyTo, errno: u32) {
        self.heads.put_u32(SIMPLE_REPLY_MAGIC);
        self.heads.put_u32(errno);
        self.heads.put_u64(to.cookie);
    }

    /// The head of a structured or extended chunk.
    fn chunk(&mut self, to: ReplyTo, kind: u16, flags: u16, len: u64) {
        let extended = self.framing == Framing::Extended;
        self.heads.put_u32(if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC });
        self.heads.put_u16(flags);
        self.heads.put_u16(kind);
        self.heads.put_u64(to.cookie);
        if extended {
            self.heads.put_u64(to.offset);
            self.heads.put_u64(len);
        } else {
            self.heads.put_u32(u32::try_from(len).expect("replies are bounded by NBD_PAYLOAD_BYTES_MAX"));
        }
    }

    /// One chunk for each run of data and each run of zeros, or one for all.
    fn read(&mut self, to: ReplyTo, data: ReadData, one_chunk: bool) {
        let is_hole = |piece: &ReadPiece| matches!(piece, ReadPiece::Zeros(_));
        let only_zeros = data.pieces.iter().all(is_hole);
        let mut at = to.offset;
        let mut left = data.len() as u64;
        let mut pieces = data.pieces.into_iter().filter(|piece| !piece.is_empty()).peekable();
        while let Some(first) = pieces.next() {
            let hole = is_hole(&first) && (only_zeros || !one_chunk);
            let mut run: Vec<ReadPiece> = vec![first];
            while let Some(next) = pieces.next_if(|next| one_chunk || is_hole(next) == hole) {
                run.push(next);
            }
            let len: u64 = run.iter().map(|piece| piece.len() as u64).sum();
            left -= len;
            let flags = if left == 0 { REPLY_FLAG_DONE } else { 0 };
            if hole {
                self.chunk(to, chunk::OFFSET_HOLE, flags, 12);
                self.heads.put_u64(at);
                self.heads.put_u32(u32::try_from(len).expect("reads are bounded by NBD_PAYLOAD_BYTES_MAX"));
            } else {
                self.chunk(to, chunk::OFFSET_DATA, flags, 8 + len);
                self.heads.put_u64(at);
                self.data(run.into_iter());
            }
            at += len;
        }
    }

    /// One chunk for each context.
    fn extents(&mut self, to: ReplyTo, contexts: &[ContextExtents]) {
        for (i, context) in contexts.iter().enumerate() {
            let flags = if i + 1 == contexts.len() { REPLY_FLAG_DONE } else { 0 };
            self.context(to, context, flags);
        }
    }

    fn context(&mut self, to: ReplyTo, ContextExtents { id, extents }: &ContextExtents, flags: u16) {
        if self.framing == Framing::Extended {
            self.chunk(to, chunk::BLOCK_STATUS_EXT, flags, 8 + 16 * extents.len() as u64);
            self.heads.put_u32(*id);
            self.heads.put_u32(u32::try_from(extents.len()).expect("extents are bounded"));
            for extent in extents {
                self.heads.put_u64(extent.len);
                self.heads.put_u64(u64::from(extent.flags));
            }
            return;
        }
        // Fewer extents than asked for are allowed: the client asks again from the end of the last.
        let whole = extents.iter().take_while(|extent| extent.len <= EXTENT_32_MAX).count();
        let cut = extents.get(whole).map(|extent| StatusExtent { len: EXTENT_32_MAX, ..*extent });
        let told = || extents[..whole].iter().copied().chain(cut);
        self.chunk(to, chunk::BLOCK_STATUS, flags, 4 + 8 * told().count() as u64);
        self.heads.put_u32(*id);
        for extent in told() {
            self.heads.put_u32(u32::try_from(extent.len).expect("it was cut"));
            self.heads.put_u32(extent.flags);
        }
    }

    fn data(&mut self, pieces: impl Iterator<Item = ReadPiece>) {
        self.seal();
        for piece in pieces {
            match piece {
                ReadPiece::Data(bytes) => self.enqueue(bytes),
                ReadPiece::Zeros(len) => {
                    let mut left = len as usize;
                    while left > 0 {
                        let part = left.min(ZEROS.len());
                        self.enqueue(Bytes::from_static(&ZEROS[..part]));
                        left -= part;
                    }
                }
            }
        }
    }

    fn enqueue(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.bytes += bytes.len();
            self.queue.push_back(bytes);
        }
    }

    fn seal(&mut self) {
        if !self.heads.is_empty() {
            let heads = self.heads.split().freeze();
            self.enqueue(heads);
        }
    }

    /// The first buffers, for a vectored write.
    pub fn slices(&mut self) -> smallvec::SmallVec<[IoSlice<'_>; SLICES_MAX]> {
        self.seal();
        self.queue.iter().take(SLICES_MAX).map(|bytes| IoSlice::new(bytes)).collect()
    }

    /// So many bytes were sent.
    pub fn sent(&mut self, bytes: usize) {
        let mut left = bytes;
        while let Some(first) = self.queue.front_mut().filter(|_| left > 0) {
            let part = left.min(first.len());
            first.advance(part);
            left -= part;
            self.bytes -= part;
            if first.is_empty() {
                self.queue.pop_front();
            }
        }
    }

    /// Forgets what was not sent: nobody is there to read it.
    pub fn clear(&mut self) {
        self.heads.clear();
        self.queue.clear();
        self.bytes = 0;
    }
}
