//! The common heartbeat of all groups between two processes.
//!
//! ```text
//! beat        count u32 | per line: group u64, target replica u64, term u64, committed index u64
//! its reply   count u32 | per refused line: its place u32
//! ```

use super::reader::{CodecError, Reader};
use bytes::{BufMut, Bytes, BytesMut};

/// Lines in one frame: 2 MiB.
pub(crate) const BEATS_MAX: usize = 1 << 16;
const LINE_BYTES: usize = 32;

/// What one leader says to one follower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Beat {
    pub(crate) group: u64,
    /// The follower's replica.
    pub(crate) target: u64,
    /// The leader's term.
    pub(crate) term: u64,
    /// An index up to which all is committed; 0 if nothing is known to be.
    pub(crate) committed: u64,
}

/// At most [`BEATS_MAX`] of `beats`.
pub(crate) fn encode_beats(beats: &[Beat]) -> Bytes {
    let beats = &beats[..beats.len().min(BEATS_MAX)];
    let mut out = BytesMut::with_capacity(4 + beats.len() * LINE_BYTES);
    out.put_u32_le(u32::try_from(beats.len()).unwrap_or(u32::MAX));
    for beat in beats {
        out.put_u64_le(beat.group);
        out.put_u64_le(beat.target);
        out.put_u64_le(beat.term);
        out.put_u64_le(beat.committed);
    }
    out.freeze()
}

pub(crate) fn decode_beats(bytes: &[u8]) -> Result<Vec<Beat>, CodecError> {
    let mut r = Reader(bytes);
    let count = r.u32("beats")? as usize;
    if count > BEATS_MAX {
        return Err(CodecError::OutOfRange("beats"));
    }
    if count * LINE_BYTES > r.0.len() {
        return Err(CodecError::Short("beats"));
    }
    let mut beats = Vec::with_capacity(count);
    for _ in 0..count {
        let (group, target) = (r.u64("group")?, r.u64("target replica")?);
        let (term, committed) = (r.counter("term")?, r.counter("committed")?);
        beats.push(Beat { group, target, term, committed });
    }
    r.finish()?;
    Ok(beats)
}

pub(crate) fn encode_beats_reply(refused: &[u32]) -> Bytes {
    let mut out = BytesMut::with_capacity(4 + refused.len() * 4);
    out.put_u32_le(u32::try_from(refused.len()).unwrap_or(u32::MAX));
    refused.iter().for_each(|place| out.put_u32_le(*place));
    out.freeze()
}

/// The places refused of `asked` lines, in ascending order.
pub(crate) fn decode_beats_reply(bytes: &[u8], asked: usize) -> Result<Vec<u32>, CodecError> {
    let mut r = Reader(bytes);
    let count = r.u32("refused")? as usize;
    if count > asked {
        return Err(CodecError::OutOfRange("refused"));
    }
    let mut refused: Vec<u32> = Vec::with_capacity(count);
    for _ in 0..count {
        let place = r.u32("refused line")?;
        if place as usize >= asked || refused.last().is_some_and(|last| *last >= place) {
            return Err(CodecError::OutOfRange("refused line"));
        }
        refused.push(place);
    }
    r.finish()?;
    Ok(refused)
}
