//! The data protocol: frames between clients and chunkservers, among chunkservers, and among MDS nodes (Raft only).
//!
//! A frame is `header (32 B) | head | payload`. The header carries lengths and checksums, the head the fields of the
//! operation, the payload raw data. Byte tables: `docs/protocol.md`; golden files: `proto/tests/golden`.

mod codec;
mod flatten;
mod frame;
mod heads;
mod page_map;
mod paste;
mod reply;
mod thin;

pub use codec::DecodeError;
pub use flatten::FlattenHead;
pub use frame::{
    Frame, FrameReader, HEADER_BYTES, Header, MAGIC, OutFrame, Opcode, PAGE_MAP_SINCE, PASTE_SINCE, PROTOCOL_MAX, PROTOCOL_MIN,
    VERSION,
};
pub use heads::{
    Ancestor, Command, DropVersionHead, HelloHead, HelloReply, LayerHead, OpenLayerHead, RaftHead, ReadHead, Role, SEALED_FOR_GOOD,
    SealHead, StatusHead, WriteHead, ZeroHead,
};
pub use page_map::{ChunkPages, PageMapHead, PageMapReply};
pub use paste::{PasteHead, PastePages};
pub use reply::{ReadReply, Redirect, Status, StatusReply};
pub use thin::ThinReply;
