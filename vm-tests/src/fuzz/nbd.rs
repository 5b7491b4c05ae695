//! The bytes of a hostile client: a handshake, then requests. The first byte chooses the state at the start, so that
//! requests are reached without a handshake by luck, and whether there is TLS.

use bytes::{Buf, BytesMut};
use ogee_nbd::{Agreement, Command, Contexts, ExportInfo, Framing, Handshake, Progress, RequestHead, TlsOffer, check};

const SIZE: u64 = 64 << 20;

fn exports() -> Vec<ExportInfo> {
    let export = |name: &str, read_only| ExportInfo {
        name: name.to_owned(),
        description: "d".to_owned(),
        size_bytes: SIZE,
        read_only,
        contexts: vec!["ogee:changed:a".to_owned()],
        sector_bytes: if read_only { 4096 } else { 512 },
    };
    vec![export("vm1", false), export("vm1@s", true)]
}

/// What a handshake comes to; `None` if it does not end in an agreement. With `waits` a client sends no more than what it is waited
/// for, so that it may begin TLS; what it sends afterwards counts as if it had come that way.
fn shake_hands(all: &mut BytesMut, offer: TlsOffer, waits: bool) -> Option<Agreement> {
    let exports = exports();
    let (mut handshake, mut out) = (Handshake::new(offer), BytesMut::new());
    let mut input = if waits { BytesMut::new() } else { all.split() };
    let mut is_clear = true;
    loop {
        let before = input.len();
        match handshake.advance(&exports, &mut input, &mut out) {
            Ok(Progress::Replied) => assert!(input.len() < before, "every answer takes something"),
            Ok(Progress::Transmission(agreed)) => {
                assert!(!is_clear || offer != TlsOffer::Demanded, "nothing is served in the clear");
                let rest = all.split();
                *all = input;
                all.unsplit(rest);
                return Some(agreed);
            }
            Ok(Progress::StartTls) => {
                assert!(is_clear && offer != TlsOffer::Absent && input.is_empty());
                is_clear = false;
            }
            Ok(Progress::NeedBytes(more)) => {
                assert!(more > 0);
                if all.len() < more {
                    return None;
                }
                input.unsplit(all.split_to(more));
            }
            Ok(Progress::Aborted) | Err(_) => return None,
        }
        // One option: at most a line for each export.
        assert!(out.len() < 4096);
        out.clear();
    }
}

fn requests(input: &mut BytesMut, agreed: &Agreement) {
    while let Ok(Some(head)) = RequestHead::decode(agreed.framing, input) {
        let total = RequestHead::bytes(agreed.framing) + head.payload_len;
        assert!(head.payload_len <= 32 << 20);
        match check(&head, agreed) {
            Ok(Command::Disconnect | Command::Flush) | Err(_) => {}
            Ok(command) => {
                assert!(head.len > 0 && head.offset + head.len <= SIZE);
                assert!((head.len | head.offset).is_multiple_of(agreed.sector_bytes.into()));
                let writes =
                    matches!(command, Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. });
                assert!(!writes || !agreed.read_only);
            }
        }
        if input.len() < total {
            return;
        }
        input.advance(total);
    }
}

/// The target.
pub(super) fn run(bytes: &[u8]) {
    let Some((choice, rest)) = bytes.split_first() else { return };
    let mut input = BytesMut::from(rest);
    let offer = [TlsOffer::Absent, TlsOffer::Optional, TlsOffer::Demanded][usize::from((choice >> 3) & 3) % 3];
    let framing = [Framing::Simple, Framing::Structured, Framing::Extended][usize::from(choice % 3)];
    let agreed = if choice & 0x80 == 0 {
        let Some(agreed) = shake_hands(&mut input, offer, choice & 4 != 0) else { return };
        agreed
    } else {
        let read_only = choice & 0x40 != 0;
        let contexts = if choice & 0x20 == 0 { Contexts::default() } else { Contexts::ALLOCATION.with(1) };
        let sector_bytes = if choice & 0x10 == 0 { 512 } else { 4096 };
        Agreement { export: 0, framing, contexts, size_bytes: SIZE, read_only, sector_bytes }
    };
    requests(&mut input, &agreed);
}
