//! An NBD server: `BlockDevice`s of the client SDK as exports, over UNIX sockets and TCP.
//!
//! Called by the CLI's `nbd serve`, and for `/dev/nbdN` by its `nbd map`. It knows NBD, but no chunk, copyset or Raft. Where to read:
//!
//! | file | what |
//! | --- | --- |
//! | `server.rs`, `listen.rs`, `stream.rs` | threads, sockets, stop |
//! | `connection.rs` | one connection: handshake, transmission, close |
//! | `handshake.rs`, `option.rs` | the handshake without IO (drawing; fuzzed) |
//! | `context.rs` | metadata contexts: allocation, changes since snapshots |
//! | `protection.rs` | what may be said before TLS (drawing) |
//! | `transmission.rs` | requests in, work in flight, replies out |
//! | `request.rs` | requests decoded and checked (fuzzed) |
//! | `execute.rs` | one request against the device |
//! | `reply.rs` | replies encoded, sent without copies |
//! | `stats.rs` | what was done, counted |
//! | `wire.rs` | the protocol's numbers |
//! | `client.rs` | a client's handshake, for connections that the kernel uses |
//! | `kernel/` | `/dev/nbdN` through netlink |
//!
//! Invariants across them: a client's bytes never make the server panic, wait for ever or allocate without bound; an
//! error of one connection ends that connection, an error of one request that request; a write is answered after it is
//! durable and visible to every connection, so FLUSH, FUA and CAN_MULTI_CONN hold; nothing that came in the clear is taken
//! as if it had come under TLS. Deliberately absent: the old style handshake, ranges that are not in whole
//! logical sectors.

pub mod client;
mod connection;
mod context;
mod execute;
mod handshake;
mod handshake_error;
pub mod kernel;
mod listen;
mod option;
mod protection;
mod reply;
mod request;
mod server;
mod stats;
mod stream;
mod transmission;
pub mod wire;

pub use context::{ContextExtents, Contexts, StatusExtent};
pub use handshake::{Agreement, ExportInfo, Framing, Handshake, Progress};
pub use handshake_error::HandshakeError;
pub use listen::{ListenError, ListenOn};
pub use protection::TlsOffer;
pub use reply::{Outcome, Replies, ReplyTo};
pub use request::{Command, Refusal, RequestError, RequestHead, check};
pub use server::{Export, NbdConfig, NbdServer, NbdTls, ServeError, TlsMode};
pub use stats::{CommandFigures, CommandKind, NbdFigures, NbdStats, Stage};
