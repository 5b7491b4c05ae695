//! [`CurveId`]: what a UUID of Curve's API means here. Pure.
//!
//! ```text
//!   bits  127 ........ 80  79 .. 76  75 .. 64  63 62  61 ................ 0
//!         volume's number  8         what      10     snapshot's number or 0        (RFC 9562, version 8: ours to define)
//! ```
//! Invariants: the same object has the same UUID in all instances and for ever, because its numbers are never given again; a UUID says by itself what it
//! is of, so that nothing has to be kept. Two clusters use the same UUIDs: a client of both tells them apart by the address it asks.

use std::fmt;

const SNAPSHOT: u16 = 0x051;
const CLONE: u16 = 0xc10;
const RECOVER: u16 = 0x4ec;
const RECOVER_LAZY: u16 = 0x4ed;
const VOLUME_BITS: u32 = 48;
const NUMBER_BITS: u32 = 62;

/// What a UUID is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CurveId {
    /// A snapshot of a volume.
    Snapshot {
        /// The volume.
        volume: u64,
        /// The snapshot.
        snapshot: u64,
    },
    /// The task that made a clone: this volume.
    Clone {
        /// The volume.
        volume: u64,
    },
    /// The task that rolled a volume back.
    Recover {
        /// The volume.
        volume: u64,
        /// The snapshot it went back to.
        snapshot: u64,
        /// Whether the client wants to flatten it by itself.
        lazy: bool,
    },
}

impl CurveId {
    /// Reads a UUID; `None`: it is of nothing here.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let has_dashes = text.len() == 36 && text.bytes().enumerate().all(|(i, b)| (b == b'-') == matches!(i, 8 | 13 | 18 | 23));
        if !has_dashes || !text.bytes().all(|b| b == b'-' || b.is_ascii_hexdigit()) {
            return None;
        }
        let bits = u128::from_str_radix(&text.replace('-', ""), 16).ok()?;
        let volume = u64::try_from(bits >> 80).ok()?;
        let number = u64::try_from(bits & ((1 << NUMBER_BITS) - 1)).ok()?;
        let what = u16::try_from((bits >> 64) & 0xfff).ok()?;
        if (bits >> 76) & 0xf != 8 || (bits >> NUMBER_BITS) & 0b11 != 0b10 || volume == 0 {
            return None;
        }
        match what {
            SNAPSHOT if number > 0 => Some(Self::Snapshot { volume, snapshot: number }),
            CLONE if number == 0 => Some(Self::Clone { volume }),
            RECOVER | RECOVER_LAZY if number > 0 => Some(Self::Recover { volume, snapshot: number, lazy: what == RECOVER_LAZY }),
            _ => None,
        }
    }
}

impl fmt::Display for CurveId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (volume, what, number) = match *self {
            Self::Snapshot { volume, snapshot } => (volume, SNAPSHOT, snapshot),
            Self::Clone { volume } => (volume, CLONE, 0),
            Self::Recover { volume, snapshot, lazy } => (volume, if lazy { RECOVER_LAZY } else { RECOVER }, snapshot),
        };
        // Numbers count up from 1: they never come near these widths.
        debug_assert!(volume >> VOLUME_BITS == 0 && number >> NUMBER_BITS == 0);
        let bits = (u128::from(volume) << 80) | (8 << 76) | (u128::from(what) << 64) | (0b10 << NUMBER_BITS) | u128::from(number);
        let hex = format!("{bits:032x}");
        write!(f, "{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn uuids_are_these_for_ever() {
        let snapshot = CurveId::Snapshot { volume: 0x12, snapshot: 0x34 };
        assert_eq!(snapshot.to_string(), "00000000-0012-8051-8000-000000000034");
        assert_eq!(CurveId::Clone { volume: 7 }.to_string(), "00000000-0007-8c10-8000-000000000000");
        let recover = CurveId::Recover { volume: 7, snapshot: 9, lazy: true };
        assert_eq!(recover.to_string(), "00000000-0007-84ed-8000-000000000009");
        assert_eq!(CurveId::parse("00000000-0012-8051-8000-000000000034"), Some(snapshot));
    }

    #[test]
    fn other_texts_mean_nothing() {
        for text in [
            "", "/vm1", "0000000000128051800000000000003400000", "00000000-0012-8051-8000-00000000003g", "00000000-0012-4051-8000-000000000034",
            "00000000-0012-8051-c000-000000000034", "00000000-0000-8051-8000-000000000034", "00000000-0012-8051-8000-000000000000",
            "00000000-0012-8c10-8000-000000000001", "00000000-0012-8fff-8000-000000000001", "+0000000-0012-8051-8000-000000000034",
        ] {
            assert_eq!(CurveId::parse(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn ids_come_back(volume in 1u64..1 << 48, snapshot in 1u64..1 << 62, lazy: bool) {
            for id in [CurveId::Snapshot { volume, snapshot }, CurveId::Clone { volume }, CurveId::Recover { volume, snapshot, lazy }] {
                prop_assert_eq!(CurveId::parse(&id.to_string()), Some(id));
            }
        }

        #[test]
        fn nothing_panics(text in "[0-9a-f-]{0,40}|.{0,40}") {
            let _ = CurveId::parse(&text);
        }
    }
}
