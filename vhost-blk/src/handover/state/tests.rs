//! The layout of an estate byte by byte, and what is refused.

use super::*;
use proptest::prelude::*;

fn listener() -> UnixListener {
    // Any descriptor will do here.
    UnixListener::from(OwnedFd::from(tempfile::tempfile().unwrap()))
}

fn memory(size: u64, offset: u64) -> SharedMemory {
    SharedMemory { size, offset, file: tempfile::tempfile().unwrap() }
}

fn estate() -> Estate {
    let queue = QueueState {
        size: 128,
        next_avail: 0xfffe,
        descriptors: 0x1000,
        available: 0x2000,
        used: 0x3000,
        used_in_log: Some(0x3000),
        ready: true,
        enabled: true,
        kick: Some(tempfile::tempfile().unwrap()),
        call: Some(tempfile::tempfile().unwrap()),
        err: None,
    };
    let state = FrontEndState {
        features: 1 << 32,
        protocol_features: 0x1_0203,
        size_bytes: 1 << 30,
        owned: true,
        writeback: false,
        arrival: KnownArrival::Used,
        regions: vec![RegionState { guest: 0, user: 0x7000_0000_0000, memory: memory(1 << 20, 4096) }],
        inflight: Some(InflightState { memory: memory(4096, 0), num_queues: 2, queue_size: 128 }),
        log: Some(memory(8, 0)),
        channel: Some(UnixStream::pair().unwrap().0),
        queues: vec![queue],
    };
    let front_end = Some((UnixStream::pair().unwrap().0, state));
    Estate { listener: listener(), upgrades: listener(), claim: Some(tempfile::tempfile().unwrap()), front_end }
}

fn decoded(bytes: &[u8], files: usize) -> Result<Estate, EstateError> {
    Estate::decode(bytes, (0..files).map(|_| OwnedFd::from(tempfile::tempfile().unwrap())).collect())
}

#[test]
fn an_estate_without_a_front_end_is_two_bytes() {
    let poor = Estate { listener: listener(), upgrades: listener(), claim: None, front_end: None };
    let encoded = poor.encode();
    assert_eq!((&encoded.bytes[..], encoded.files.len()), (&[0, 0][..], 2));
    assert!(decoded(&[0, 0], 2).unwrap().front_end.is_none());
}

#[test]
fn the_layout_is_as_documented() {
    let estate = estate();
    let encoded = estate.encode();
    let mut golden = vec![1, 1];
    for value in [1_u64 << 32, 0x1_0203, 1 << 30] {
        golden.extend(value.to_le_bytes());
    }
    golden.extend([1, 0, 2, 1, 0]);
    for value in [0_u64, 0x7000_0000_0000, 1 << 20, 4096] {
        golden.extend(value.to_le_bytes());
    }
    golden.extend([&[1][..], &4096_u64.to_le_bytes(), &0_u64.to_le_bytes(), &[2, 0, 128, 0]].concat());
    golden.extend([&[1][..], &8_u64.to_le_bytes(), &0_u64.to_le_bytes()].concat());
    golden.extend([1, 1, 0, 128, 0, 0xfe, 0xff]);
    for value in [0x1000_u64, 0x2000, 0x3000] {
        golden.extend(value.to_le_bytes());
    }
    golden.extend([&[1][..], &0x3000_u64.to_le_bytes(), &[1, 1, 1, 1, 0]].concat());
    assert_eq!(encoded.bytes, golden);
    // Two listeners, claim, connection, region, in-flight memory, log, channel, kick, call.
    assert_eq!(encoded.files.len(), 10);
    let again = decoded(&golden, 10).unwrap();
    assert_eq!(again.encode().bytes, golden);
}

#[test]
fn what_is_cut_short_or_too_long_is_refused() {
    let bytes = estate().encode().bytes;
    for len in 0..bytes.len() {
        assert_eq!(decoded(&bytes[..len], 10).unwrap_err(), EstateError::Short, "{len} bytes");
    }
    for files in 0..10 {
        assert_eq!(decoded(&bytes, files).unwrap_err(), EstateError::NoDescriptor, "{files} descriptors");
    }
    assert_eq!(decoded(&bytes, 11).unwrap_err(), EstateError::Trailing);
    assert_eq!(decoded(&[bytes, vec![0]].concat(), 10).unwrap_err(), EstateError::Trailing);
}

proptest! {
    /// Nothing that another process says makes this one panic.
    #[test]
    fn any_bytes_are_an_estate_or_refused(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let mut bytes = estate().encode().bytes;
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Ok(estate) = decoded(&bytes, 10) {
            prop_assert_eq!(estate.encode().bytes, bytes);
        }
    }
}
