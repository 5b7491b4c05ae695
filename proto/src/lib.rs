//! Wire messages of Ogee: the binary data protocol ([`data`]), its connections ([`link`]) and the gRPC control plane
//! ([`mds`]); also the [`unix_socket`] of front ends. Used by the client SDK and the servers. Invariants: everything decoded from a socket is checked before it
//! is used, no length is trusted for an allocation before it was compared with a limit, and no decoder panics. Absent:
//! any decision about what to do with a message.

pub mod data;
pub mod link;
pub mod net;
mod qos;
pub mod unix_socket;

pub use qos::{limit_changes, volume_limits};

/// The gRPC messages, client and server of the MDS (`protos/mds.proto`).
#[allow(missing_docs, clippy::all, unreachable_pub, clippy::unwrap_used, clippy::too_many_lines)]
pub mod mds {
    tonic::include_proto!("ogee.mds.v1");
}

/// gRPC metadata key by which a non-leader MDS names the leader's address.
pub const LEADER_METADATA: &str = "ogee-leader";
/// gRPC metadata key that carries an [`MdsErrorKind`].
pub const ERROR_METADATA: &str = "ogee-error";

macro_rules! error_kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal),+ $(,)?) => {
        /// Why the MDS refused a call; what a program can act on. The status message is for people.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum MdsErrorKind { $($(#[$doc])* $name),+ }

        impl MdsErrorKind {
            /// The word used in metadata and in `--json` errors.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text),+ }
            }

            /// The kind named by `text`, if there is one.
            #[must_use]
            pub fn parse(text: &str) -> Option<Self> {
                match text { $($text => Some(Self::$name),)+ _ => None }
            }
        }
    };
}

error_kinds! {
    /// The named volume, snapshot, folder, pool or copyset does not exist.
    NotFound = "not-found",
    /// The name is taken.
    AlreadyExists = "already-exists",
    /// A field is out of range or malformed.
    InvalidArgument = "invalid-argument",
    /// The volume is attached by another client.
    Attached = "attached",
    /// The attach epoch is not the current one.
    Fenced = "fenced",
    /// Something still refers to the object (snapshots, clones, a folder's content).
    InUse = "in-use",
    /// The owner does not match.
    WrongOwner = "wrong-owner",
    /// Too few zones, chunkservers or bytes.
    NoSpace = "no-space",
    /// A limit of the system is reached (ancestry depth, path length).
    Limit = "limit",
    /// This node is not the leader, or there is none now; try the named one or again.
    NotLeader = "not-leader",
    /// The request belongs to another cluster, or a disk's identity does not match.
    WrongCluster = "wrong-cluster",
    /// The MDS could not carry it out now; nothing was changed, or the outcome is unknown and a retry is safe.
    Unavailable = "unavailable",
}
