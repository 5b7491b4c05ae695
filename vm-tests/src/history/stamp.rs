//! What a written sector holds: its layer, its sector, the write's operation, and words that follow from those three.
//!
//! Used by the recorder on both ways. Invariant: every eight bytes depend on layer, sector and operation, so a sector with bytes of two
//! writes, of another sector or of another layer never decodes as one that was written there: the words are the checksum, and a
//! stronger one, since the whole sector can be computed from its first 24 bytes.

use super::Value;

/// Bytes of a sector.
pub const SECTOR_BYTES: usize = 512;
/// Bytes of the part that names layer, operation and sector.
const HEAD: usize = 24;

/// The finaliser of splitmix64 (Steele, Lea, Flood 2014): one changed bit changes half of the result.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Fills a sector as write `op` of `layer` does.
pub fn fill(layer: u64, op: u64, sector: u64, out: &mut [u8]) {
    let seed = mix(layer ^ mix(op ^ mix(sector.wrapping_add(1))));
    let head = [layer, op, sector];
    for (i, word) in out.chunks_exact_mut(8).enumerate() {
        let value = head.get(i).copied().unwrap_or_else(|| mix(seed ^ i as u64));
        word.copy_from_slice(&value.to_le_bytes());
    }
}

/// What the bytes found in `sector` are.
#[must_use]
pub fn decode(sector: u64, bytes: &[u8]) -> Value {
    if bytes.iter().all(|byte| *byte == 0) {
        return Value::Zero;
    }
    let word = |i: usize| bytes.get(i * 8..i * 8 + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
    let (layer, op, stamped) = (word(0), word(1), word(2));
    let mut expected = [0u8; SECTOR_BYTES];
    fill(layer, op, stamped, &mut expected);
    if bytes.len() < HEAD || bytes != expected {
        Value::Torn { op }
    } else if stamped == sector {
        Value::Write { layer, op }
    } else {
        Value::Elsewhere { layer, op, sector: stamped }
    }
}
