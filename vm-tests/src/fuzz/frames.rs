//! Hostile bytes on a data connection: as a stream of frames (with lengths and checksums mended now and then, so that the
//! deeper decoders are reached) and as bare heads and commands. Nothing may panic; what decodes must encode to itself.
use bytes::Bytes;
use ogee_proto::data::{
    Command, FrameReader, HelloHead, HelloReply, OpenLayerHead, Opcode, OutFrame, PageMapHead, PageMapReply, PasteHead, RaftHead, ReadHead, ReadReply,
    Redirect, StatusHead, StatusReply, ThinReply, WriteHead, ZeroHead,
};

fn heads(head: &[u8]) {
    let _ = HelloReply::decode(head);
    let _ = StatusHead::decode(head);
    let _ = StatusReply::decode(head);
    let _ = ReadReply::decode(head);
    let _ = Redirect::decode(head);
    let _ = RaftHead::decode(&Bytes::copy_from_slice(head));
    if let Ok(v) = HelloHead::decode(head) {
        assert_eq!(&v.encode()[..], head);
    }
    if let Ok(v) = WriteHead::decode(head) {
        assert_eq!(WriteHead::decode(&v.encode()), Ok(v));
    }
    if let Ok(v) = ReadHead::decode(head) {
        assert_eq!(ReadHead::decode(&v.encode()), Ok(v));
    }
    if let Ok(v) = ZeroHead::decode(head) {
        assert_eq!(ZeroHead::decode(&v.encode()), Ok(v));
    }
    if let Ok(v) = OpenLayerHead::decode(head) {
        assert_eq!(&v.encode()[..], head);
    }
    if let Ok(v) = PageMapHead::decode(head) {
        assert_eq!(&v.encode()[..], head);
    }
    if let Ok(v) = PasteHead::decode(head) {
        assert_eq!(&v.encode()[..], head);
    }
    if let Ok(v) = ThinReply::decode(head) {
        assert_eq!(&v.encode()[..], head);
    }
    if let Ok(v) = PageMapReply::decode(head) {
        assert_eq!(&v.encode()[..], head);
    }
    if let Ok(v) = Command::decode(&Bytes::copy_from_slice(head)) {
        assert_eq!(Command::decode(&v.encode()), Ok(v));
    }
}

fn frames(bytes: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let mut reader = FrameReader::new(bytes);
        while let Ok(Some(frame)) = reader.next().await {
            heads(frame.head());
        }
    });
}

/// The target.
pub(super) fn run(data: &[u8]) {
    heads(data);
    frames(data);
    // A well-formed frame around hostile content.
    if let Some((opcode, rest)) = data.split_first()
        && let Ok(opcode) = Opcode::parse(*opcode)
    {
        let (head, payload) = rest.split_at(rest.len() / 2);
        let frame = OutFrame::request(opcode, 7, head, Bytes::copy_from_slice(payload));
        let mut wire = frame.prefix.to_vec();
        frame.payload.iter().for_each(|p| wire.extend_from_slice(p));
        frames(&wire);
    }
}
