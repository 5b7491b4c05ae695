//! How keys of rows are encoded: integers big-endian, so that rows lie in the order of their ids; a name takes the rest
//! of the key. Invariants: encoding keeps order and is reversed exactly; a key of the wrong length is refused, never cut.

use ogee_common::id::{
    AttachEpoch, ChunkserverId, CopysetId, DirectoryId, LayerId, PoolId, ReplicaId, SegmentIndex, ServiceTaskId, SnapshotGroupId,
    VolumeId, VolumeSeq, VolumeSnapshotId,
};

/// A part of a key.
pub(crate) trait KeyPart: Sized {
    /// Appends the part.
    fn put(&self, out: &mut Vec<u8>);

    /// Takes the part off the front; `None` when it is malformed.
    fn take(input: &mut &[u8]) -> Option<Self>;

    /// The part as a whole key.
    fn to_key(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(24);
        self.put(&mut out);
        out
    }

    /// Reads a whole key; `None` when it is malformed or longer.
    fn from_key(mut key: &[u8]) -> Option<Self> {
        let part = Self::take(&mut key)?;
        key.is_empty().then_some(part)
    }
}

macro_rules! integers {
    ($($int:ty),+) => {$(
        impl KeyPart for $int {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_be_bytes());
            }

            fn take(input: &mut &[u8]) -> Option<Self> {
                let (head, rest) = input.split_first_chunk()?;
                *input = rest;
                Some(Self::from_be_bytes(*head))
            }
        }
    )+};
}

macro_rules! ids {
    ($($id:ident),+) => {$(
        impl KeyPart for $id {
            fn put(&self, out: &mut Vec<u8>) {
                self.0.put(out);
            }

            fn take(input: &mut &[u8]) -> Option<Self> {
                KeyPart::take(input).map($id)
            }
        }
    )+};
}

integers!(u8, u32, u64);
ids!(
    AttachEpoch,
    ChunkserverId,
    CopysetId,
    DirectoryId,
    LayerId,
    PoolId,
    ReplicaId,
    SegmentIndex,
    ServiceTaskId,
    SnapshotGroupId,
    VolumeId,
    VolumeSeq,
    VolumeSnapshotId
);

impl KeyPart for () {
    fn put(&self, _out: &mut Vec<u8>) {}

    fn take(_input: &mut &[u8]) -> Option<Self> {
        Some(())
    }
}

impl KeyPart for [u8; 16] {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self);
    }

    fn take(input: &mut &[u8]) -> Option<Self> {
        let (head, rest) = input.split_first_chunk()?;
        *input = rest;
        Some(*head)
    }
}

/// The rest of a key; only as its last part.
impl KeyPart for String {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.as_bytes());
    }

    fn take(input: &mut &[u8]) -> Option<Self> {
        let text = str::from_utf8(std::mem::take(input)).ok()?;
        Some(text.to_owned())
    }
}

impl<A: KeyPart, B: KeyPart> KeyPart for (A, B) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }

    fn take(input: &mut &[u8]) -> Option<Self> {
        Some((A::take(input)?, B::take(input)?))
    }
}

impl<A: KeyPart, B: KeyPart, C: KeyPart> KeyPart for (A, B, C) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
        self.2.put(out);
    }

    fn take(input: &mut &[u8]) -> Option<Self> {
        Some((A::take(input)?, B::take(input)?, C::take(input)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_round_trip_in_order(a: u64, b: u32, c: u64, d: u32, name in "[a-z]{0,9}") {
            let (x, y) = ((LayerId(a), SegmentIndex(b)), (LayerId(c), SegmentIndex(d)));
            prop_assert_eq!(x.cmp(&y), x.to_key().cmp(&y.to_key()));
            prop_assert_eq!(KeyPart::from_key(&x.to_key()), Some(x));
            let entry = (DirectoryId(a), name);
            prop_assert_eq!(<(DirectoryId, String)>::from_key(&entry.to_key()), Some(entry));
        }
    }

    #[test]
    fn malformed_keys_are_refused() {
        assert_eq!(u64::from_key(&[0; 7]), None);
        assert_eq!(u64::from_key(&[0; 9]), None);
        assert_eq!(<(u8, String)>::from_key(&[1, 0xFF]), None);
        assert_eq!(<()>::from_key(&[1]), None);
        assert_eq!(<[u8; 16]>::from_key(&[0; 15]), None);
    }
}
