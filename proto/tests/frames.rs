//! Golden bytes of every frame, round trips, and hostile bytes.
//!
//! A golden file is the whole frame as it goes over the wire, in hex. `OGEE_BLESS=1` writes them anew: a change of one
//! is a change of the protocol and needs a new version.

use bytes::Bytes;
use ogee_common::checksum::fragment_crcs;
use ogee_common::id::{AttachEpoch, ChunkIndex, ConnectionGeneration, CopysetId, LayerId, SessionId, Term, VolumeSeq};
use ogee_proto::data::{
    Ancestor, ChunkPages, Command, DropVersionHead, FlattenHead, Frame, FrameReader, HEADER_BYTES, Header, HelloHead, HelloReply, LayerHead,
    Opcode, OpenLayerHead, OutFrame, PageMapHead, PageMapReply, PasteHead, PastePages, RaftHead, ReadHead, ReadReply, Redirect, Role, SealHead,
    Status, StatusHead, StatusReply, ThinReply, WriteHead, ZeroHead,
};
use proptest::prelude::*;
use std::path::PathBuf;

fn at(offset: u32, len: u32) -> LayerHead {
    LayerHead {
        copyset: CopysetId(0x0102_0304),
        chunk: ChunkIndex(5),
        layer: LayerId(0x1112_1314_1516_1718),
        seq: VolumeSeq(7),
        epoch: AttachEpoch(9),
        term: Term(11),
        offset,
        len,
    }
}

fn chain() -> Vec<Ancestor> {
    vec![Ancestor { layer: LayerId(3), seq: VolumeSeq(2) }, Ancestor { layer: LayerId(1), seq: VolumeSeq(8) }]
}

fn hello() -> HelloHead {
    HelloHead {
        version_min: 1,
        version_max: 1,
        role: Role::Chunkserver,
        process: 2,
        target: 3,
        session: SessionId(0xA1A2_A3A4_A5A6_A7A8),
        generation: ConnectionGeneration(4),
        cluster: *b"0123456789abcdef",
    }
}

fn raft() -> RaftHead {
    RaftHead { group: 6, target: 42, message: Bytes::from_static(b"opaque") }
}

fn page_map(since: Option<Ancestor>) -> PageMapHead {
    PageMapHead { at: at(0, 16 << 20), since, chain: chain() }
}

fn page_map_reply() -> PageMapReply {
    let set = |row, byte: u8| {
        let mut pages = ChunkPages::none();
        pages.set_row(row, &std::array::from_fn(|i| byte.wrapping_mul(u8::try_from(i).expect("32 bytes"))));
        pages
    };
    PageMapReply { data: set(0, 5), zero: set(15, 3), changed: None }
}

/// Page 3 of its row is data, page 4 zeros, and page 5 is not wanted.
fn paste() -> (Bytes, PastePages) {
    let content = [[0xA5; 4096], [0; 4096], [7; 4096]].concat();
    let (pages, data) = PastePages::of(2, 3, &content, |page| page != 5);
    (data, pages)
}

fn wire(frame: &OutFrame) -> Vec<u8> {
    let mut all = frame.prefix.to_vec();
    frame.payload.iter().for_each(|p| all.extend_from_slice(p));
    all
}

/// Every frame of the protocol by name.
fn all_frames() -> Vec<(&'static str, OutFrame)> {
    let data = Bytes::from_static(&[0x5A; 1024]);
    let write = WriteHead { at: at(3584, 1024), crcs: fragment_crcs(3584, &data).collect() };
    let open = OpenLayerHead {
        copyset: CopysetId(6),
        layer: LayerId(12),
        epoch: AttachEpoch(2),
        seq: VolumeSeq(3),
        term: Term(4),
        chain: chain(),
    };
    let none = Bytes::new;
    let mut frames = vec![
        ("hello", OutFrame::request(Opcode::Hello, 1, &hello().encode(), none())),
        ("hello_reply", OutFrame::reply(Opcode::Hello, Status::Ok, 1, &HelloReply { version: 1, process: 3 }.encode(), none())),
        ("write", OutFrame::request(Opcode::Write, 2, &write.encode(), data.clone())),
        ("zero", OutFrame::request(Opcode::Zero, 3, &ZeroHead { at: at(0, 16 << 20), masks: false }.encode(), none())),
        ("read", OutFrame::request(Opcode::Read, 4, &ReadHead { at: at(512, 4096), tells_missing: false, chain: chain() }.encode(), none())),
        ("read_reply", OutFrame::reply(Opcode::Read, Status::Ok, 4, &ReadReply { crcs: vec![1, 2] }.encode(), data)),
        ("read_reply_zero", OutFrame::reply(Opcode::Read, Status::Ok, 4, &ReadReply { crcs: vec![] }.encode(), none())),
        ("open_layer", OutFrame::request(Opcode::OpenLayer, 5, &open.encode(), none())),
        ("status", OutFrame::request(Opcode::Status, 6, &StatusHead { copyset: CopysetId(6) }.encode(), none())),
        (
            "status_reply",
            OutFrame::reply(
                Opcode::Status,
                Status::Ok,
                6,
                &StatusReply { at: Redirect { leader: 2, term: Term(9) }, applied: 77 }.encode(),
                none(),
            ),
        ),
        (
            "not_leader",
            OutFrame::reply(Opcode::Write, Status::NotLeader, 7, &Redirect { leader: 2, term: Term(9) }.encode(), none()),
        ),
    ];
    for (name, opcode) in [
        ("raft_append", Opcode::RaftAppend),
        ("raft_vote", Opcode::RaftVote),
        ("raft_pre_vote", Opcode::RaftPreVote),
        ("raft_snapshot", Opcode::RaftSnapshot),
        ("raft_transfer", Opcode::RaftTransfer),
        ("fetch_pages", Opcode::FetchPages),
    ] {
        frames.push((name, OutFrame::request(opcode, 8, &raft().encode(), Bytes::from_static(b"payload"))));
    }
    let since = Some(Ancestor { layer: LayerId(3), seq: VolumeSeq(1) });
    let changed = PageMapReply { changed: Some(ChunkPages::all()), ..page_map_reply() };
    for (name, frame) in [
        ("page_map", OutFrame::request(Opcode::PageMap, 10, &page_map(None).encode(), none())),
        ("page_map_since", OutFrame::request(Opcode::PageMap, 10, &page_map(since).encode(), none())),
        ("page_map_reply", OutFrame::reply(Opcode::PageMap, Status::Ok, 10, &page_map_reply().encode(), none())),
        ("page_map_reply_changed", OutFrame::reply(Opcode::PageMap, Status::Ok, 10, &changed.encode(), none())),
    ] {
        frames.push((name, frame));
    }
    let (pasted, pages) = paste();
    let head = PasteHead { copyset: CopysetId(6), layer: LayerId(12), chunk: ChunkIndex(7), pages };
    let thin = ThinReply { read: ReadReply { crcs: vec![1, 2] }, missing: vec![false, true] };
    let (missing, masks) = (ReadHead { at: at(512, 4096), tells_missing: true, chain: vec![] }, ZeroHead { at: at(0, 4096), masks: true });
    for (name, frame) in [
        ("paste", OutFrame::request(Opcode::Paste, 11, &head.encode(), pasted)),
        ("read_missing", OutFrame::request(Opcode::Read, 12, &missing.encode(), none())),
        ("read_missing_reply", OutFrame::reply(Opcode::Read, Status::Ok, 12, &thin.encode(), none())),
        ("zero_masks", OutFrame::request(Opcode::Zero, 13, &masks.encode(), none())),
    ] {
        frames.push((name, frame));
    }
    // No group before it: a line for each of several.
    frames.push(("raft_beat", OutFrame::request(Opcode::RaftBeat, 9, &[0; 4], none())));
    frames
}

fn all_commands() -> Vec<(&'static str, Command)> {
    let data = Bytes::from_static(&[0x5A; 512]);
    let write = WriteHead { at: at(0, 512), crcs: fragment_crcs(0, &data).collect() };
    let layer = LayerId(12);
    let (pasted, pages) = paste();
    vec![
        ("command_paste", Command::Paste(PasteHead { copyset: CopysetId(6), layer, chunk: ChunkIndex(7), pages }, pasted)),
        ("command_write", Command::Write(write, data)),
        ("command_seal", Command::Seal(SealHead { layer, seq: VolumeSeq(5) })),
        ("command_drop_layer", Command::DropLayer(layer)),
        (
            "command_drop_version",
            Command::DropVersion(DropVersionHead { layer, after: VolumeSeq(1), seq: VolumeSeq(2), next: VolumeSeq(3) }),
        ),
        (
            "command_flatten",
            Command::Flatten(FlattenHead {
                layer,
                chunk: ChunkIndex(7),
                row: 15,
                pages: std::array::from_fn(|i| u8::try_from(i).expect("32 bytes") * 3),
                chain: vec![Ancestor { layer: LayerId(11), seq: VolumeSeq(4) }, Ancestor { layer: LayerId(10), seq: VolumeSeq(9) }],
            }),
        ),
    ]
}

fn check_golden(name: &str, bytes: &[u8]) {
    use std::fmt::Write as _;
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.hex"));
    let mut text = String::new();
    for line in bytes.chunks(32) {
        line.iter().for_each(|b| write!(text, "{b:02x}").expect("a string takes everything"));
        text.push('\n');
    }
    if std::env::var_os("OGEE_BLESS").is_some() {
        std::fs::write(&path, &text).expect("write the golden file");
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(text, golden, "{name} changed on the wire");
}

#[test]
fn golden_frames() {
    for (name, frame) in all_frames() {
        check_golden(name, &wire(&frame));
    }
    for (name, command) in all_commands() {
        check_golden(name, &command.encode());
    }
}

#[test]
fn every_opcode_has_a_golden_file() {
    let mut covered: Vec<u8> = all_frames().iter().map(|(_, f)| f.prefix[3] & 0x7f).collect();
    covered.extend(all_commands().iter().map(|(_, c)| c.encode()[0]));
    for opcode in Opcode::ALL {
        assert!(covered.contains(&(*opcode as u8)), "{opcode:?} has no golden file");
    }
}

#[test]
fn commands_round_trip() {
    for (name, command) in all_commands() {
        assert_eq!(Command::decode(&command.encode()), Ok(command), "{name}");
    }
}

#[test]
fn page_maps_round_trip_and_nonsense_is_refused() {
    let since = Some(Ancestor { layer: LayerId(3), seq: VolumeSeq(0) });
    for head in [page_map(None), page_map(since)] {
        assert_eq!(PageMapHead::decode(&head.encode()), Ok(head));
    }
    for part in [at(0, 4096), at(4096, (16 << 20) - 4096)] {
        assert!(PageMapHead::decode(&PageMapHead { at: part, ..page_map(None) }.encode()).is_err(), "always a whole chunk");
    }
    for changed in [None, Some(ChunkPages::all())] {
        let reply = PageMapReply { changed, ..page_map_reply() };
        assert_eq!(PageMapReply::decode(&reply.encode()), Ok(reply));
    }
    let both = PageMapReply { zero: ChunkPages::all(), ..PageMapReply::unknown() };
    assert!(PageMapReply::decode(&both.encode()).is_err(), "a page is not data and zero");
    let pages = page_map_reply().data;
    let set: Vec<u32> = (0..4096).filter(|p| pages.contains(*p)).take(4).collect();
    assert_eq!(set, [8, 10, 17, 19], "page 8 is bit 0 of byte 1, which is 5");
}

#[test]
fn pastes_round_trip_and_nonsense_is_refused() {
    let (data, pages) = paste();
    assert!(pages.matches(&data) && !pages.matches(&data[..4095]) && !pages.is_empty());
    assert_eq!((pages.data[0], pages.zero[0], pages.crcs.len()), (1 << 3, 1 << 4, 1));
    let head = PasteHead { copyset: CopysetId(6), layer: LayerId(12), chunk: ChunkIndex(7), pages };
    assert_eq!(PasteHead::decode(&head.encode()), Ok(head.clone()));
    let wrong: [fn(&mut PasteHead); 5] = [
        |h| h.pages.row = 16,
        |h| h.layer = LayerId(0),
        |h| h.copyset = CopysetId(0),
        |h| h.pages.zero[0] |= 1 << 3,
        |h| h.pages.data[9] = 1,
    ];
    for change in wrong {
        let mut other = head.clone();
        change(&mut other);
        assert!(PasteHead::decode(&other.encode()).is_err(), "{other:?}");
    }
    let short = Command::Paste(head.clone(), data.slice(..4095)).encode();
    assert!(Command::decode(&short).is_err(), "as many pages as it says");
    let body = Bytes::from(wire(&OutFrame::request(Opcode::Paste, 1, &head.encode(), data.clone()))).slice(HEADER_BYTES..);
    assert_eq!(Command::decode(&body), Ok(Command::Paste(head, data)), "the frame's body is the command");
}

#[test]
fn thin_replies_round_trip_and_nonsense_is_refused() {
    for missing in [vec![], vec![true; 8], (0..257).map(|page| page % 3 == 0).collect()] {
        let reply = ThinReply { read: ReadReply { crcs: vec![9; missing.len()] }, missing };
        assert_eq!(ThinReply::decode(&reply.encode()), Ok(reply));
    }
    assert!(ThinReply::decode(&[1, 0, 2, 0, 0]).is_err(), "a page behind the last one");
    assert!(ThinReply::decode(&[2, 1, 0]).is_err(), "more pages than a request touches");
}

#[test]
fn a_write_frames_body_is_its_command() {
    let data = Bytes::from_static(&[1; 4096]);
    let head = WriteHead { at: at(4096, 4096), crcs: fragment_crcs(4096, &data).collect() };
    let frame = OutFrame::request(Opcode::Write, 1, &head.encode(), data.clone());
    let body = Bytes::from(wire(&frame)).slice(HEADER_BYTES..);
    assert_eq!(body.len(), head.encoded_len() + data.len());
    assert_eq!(Command::decode(&body), Ok(Command::Write(head, data)));
}

#[test]
fn statuses_round_trip() {
    for status in Status::ALL {
        assert_eq!(Status::parse(status.code()), *status);
    }
    assert_eq!(Status::parse(999), Status::Unknown);
}

async fn read_all(bytes: Vec<u8>) -> Vec<Frame> {
    let mut reader = FrameReader::new(&bytes[..]);
    let mut frames = vec![];
    while let Ok(Some(frame)) = reader.next().await {
        frames.push(frame);
    }
    frames
}

#[tokio::test]
async fn a_stream_of_frames_is_cut_where_it_was_joined() {
    let sent = all_frames();
    let stream: Vec<u8> = sent.iter().flat_map(|(_, f)| wire(f)).collect();
    let got = read_all(stream).await;
    assert_eq!(got.len(), sent.len());
    for (frame, (name, out)) in got.iter().zip(&sent) {
        let payload: Vec<u8> = out.payload.iter().flat_map(|p| p.to_vec()).collect();
        assert_eq!(frame.payload(), payload, "{name}");
        assert_eq!(frame.head(), &out.prefix[HEADER_BYTES..], "{name}");
    }
}

#[tokio::test]
async fn a_flipped_bit_outside_the_payload_is_noticed() {
    for (name, out) in all_frames() {
        let good = wire(&out);
        for i in 0..out.prefix.len() {
            let mut bad = good.clone();
            bad[i] ^= 0x10;
            assert!(read_all(bad).await.is_empty(), "{name}, byte {i}");
        }
    }
}

#[test]
fn lengths_beyond_the_limit_are_refused_before_allocation() {
    let mut header = Header {
        opcode: Opcode::Write,
        is_reply: false,
        status: 0,
        flags: 0,
        request: 0,
        head_len: u32::MAX,
        payload_len: u32::MAX,
        head_crc: 0,
    };
    assert!(Header::decode(&header.encode()).is_err());
    header.head_len = 0;
    assert!(Header::decode(&header.encode()).is_err());
}

proptest! {
    #[test]
    fn decoders_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let shared = Bytes::from(bytes.clone());
        let _ = Command::decode(&shared);
        let _ = RaftHead::decode(&shared);
        let _ = HelloHead::decode(&bytes);
        let _ = HelloReply::decode(&bytes);
        let _ = WriteHead::decode(&bytes);
        let _ = ZeroHead::decode(&bytes);
        let _ = ReadHead::decode(&bytes);
        let _ = OpenLayerHead::decode(&bytes);
        let _ = StatusHead::decode(&bytes);
        let _ = StatusReply::decode(&bytes);
        let _ = ReadReply::decode(&bytes);
        let _ = Redirect::decode(&bytes);
        let _ = PageMapHead::decode(&bytes);
        let _ = PageMapReply::decode(&bytes);
        let _ = PasteHead::decode(&bytes);
        let _ = ThinReply::decode(&bytes);
    }

    #[test]
    fn heads_round_trip(page in 0u32..4096, sector in 0u32..8, sectors in 1u32..16, depth in 0usize..5) {
        let offset = (page * 4096 + sector * 512).min((16 << 20) - sectors * 512);
        let place = at(offset, sectors * 512);
        let chain: Vec<Ancestor> = chain().into_iter().cycle().take(depth).collect();
        let data = vec![7u8; (sectors * 512) as usize];
        let write = WriteHead { at: place, crcs: fragment_crcs(offset, &data).collect() };
        prop_assert_eq!(WriteHead::decode(&write.encode()), Ok(write));
        for flag in [false, true] {
            let read = ReadHead { at: place, tells_missing: flag, chain: chain.clone() };
            prop_assert_eq!(ReadHead::decode(&read.encode()), Ok(read));
            let zero = ZeroHead { at: place, masks: flag };
            prop_assert_eq!(ZeroHead::decode(&zero.encode()), Ok(zero));
        }
    }
}
