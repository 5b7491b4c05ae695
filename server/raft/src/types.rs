//! The one openraft configuration, shared by the MDS and the chunkservers. Used by every module of this crate.
//!
//! Commands and replies are opaque bytes, so the log, the network and openraft never look into them; cloning one is
//! cloning a reference. Invariants: a node id is a replica id and is never reused; one leader per term (standard Raft),
//! so a log id is `(term, index)` and nothing else. Deliberately absent: addresses. A [`PeerNode`] names a process and
//! an address book says where it listens.

use bytes::Bytes;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// An encoded command of a state machine.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Command(pub Bytes);

/// What applying a command answered.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Reply(pub Bytes);

/// Where a replica lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct PeerNode {
    /// The chunkserver id, or the number of an MDS node. 0 is unknown.
    pub process: u32,
}

impl fmt::Display for PeerNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.process)
    }
}

openraft::declare_raft_types!(
    /// The types openraft is instantiated with.
    pub TypeConfig:
        D = Command,
        R = Reply,
        NodeId = u64,
        Node = PeerNode,
        Term = u64,
        LeaderId = openraft::impls::leader_id_std::LeaderId<Self::Term, Self::NodeId>,
);

/// A log id: `(term, index)`.
pub type LogId = openraft::type_config::alias::LogIdOf<TypeConfig>;
/// A vote as openraft keeps it.
pub type Vote = openraft::type_config::alias::VoteOf<TypeConfig>;
/// A log entry as openraft keeps it.
pub type Entry = openraft::type_config::alias::EntryOf<TypeConfig>;
/// A membership of a group.
pub type Membership = openraft::Membership<u64, PeerNode>;
/// A membership and the log id of the entry that set it.
pub type StoredMembership = openraft::type_config::alias::StoredMembershipOf<TypeConfig>;

macro_rules! opaque_bytes {
    ($name:ident, $word:literal) => {
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($word, "({} bytes)"), self.0.len())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(self, f)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_bytes(&self.0)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_byte_buf(BytesVisitor).map(Self)
            }
        }
    };
}

opaque_bytes!(Command, "command");
opaque_bytes!(Reply, "reply");

struct BytesVisitor;

impl Visitor<'_> for BytesVisitor {
    type Value = Bytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("bytes")
    }

    fn visit_bytes<E: de::Error>(self, v: &[u8]) -> Result<Bytes, E> {
        Ok(Bytes::copy_from_slice(v))
    }

    fn visit_byte_buf<E: de::Error>(self, v: Vec<u8>) -> Result<Bytes, E> {
        Ok(Bytes::from(v))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_print_their_length_only_and_survive_serde() {
        let command = Command(Bytes::from_static(b"secret"));
        assert_eq!(format!("{command} {command:?}"), "command(6 bytes) command(6 bytes)");
        let bytes = postcard::to_allocvec(&command).expect("encode");
        assert_eq!(postcard::from_bytes::<Command>(&bytes).expect("decode"), command);
    }
}
