//! A vhost-user-blk back end: serves a `BlockDevice` of the client SDK to a hypervisor over a UNIX socket.
//!
//! Called by the CLI's `vhost-blk` command. It knows virtio and vhost-user, but no chunk, copyset or Raft. Where to read:
//!
//! | file | what |
//! | --- | --- |
//! | `server.rs`, `stop.rs` | socket, front ends one after another, stop |
//! | `connection.rs`, `parking.rs` | one connection: messages in; where that stops for a hand-over |
//! | `channel.rs` | changes of the configuration out |
//! | `handler.rs` | what each message of the front end does |
//! | `backend.rs` | device, queues and threads of one front end; what happens to requests at a stop |
//! | `queue_phase.rs`, `queue_thread.rs` | life of one queue's loop (drawing) and of its thread |
//! | `queue_loop.rs` | one thread per queue: take chains, run them, answer |
//! | `handover.rs` and its folder, `handler/taken.rs` | a new daemon takes over without a reconnection (drawing) |
//! | `inflight.rs`, `resubmit.rs` | requests in flight outlive the daemon: their record, and running them again |
//! | `request.rs` | parser of descriptor chains (fuzzed) |
//! | `dirty_log.rs` | live migration: which pages of guest memory were written |
//! | `guest_buffer.rs` | the copies from and to guest memory |
//! | `execute.rs` | one request against the device |
//! | `config_space.rs` | features and configuration space |
//! | `stats.rs` | counters |
//! | `hypervisor.rs`, `libvirt.rs` | what QEMU and libvirt have to be told |
//!
//! Invariants across them: a guest's bytes never make the daemon panic, wait forever or allocate without bound; a failed
//! IO is a status for one request and never ends a queue; a request is answered after the device completed it, never
//! before; a request in flight at the death of the daemon is run by the next one, one that was answered is not.
//! Deliberately absent: post-copy migration, packed rings, legacy drivers.

mod backend;
mod channel;
mod config_space;
mod connection;
mod dirty_log;
mod execute;
mod guest_buffer;
mod handler;
mod handover;
mod hypervisor;
mod inflight;
mod libvirt;
mod parking;
mod queue_loop;
mod queue_phase;
mod queue_thread;
mod request;
mod resubmit;
mod server;
mod stats;
mod stop;

pub use guest_buffer::{ReplyArea, Segment, Segments};
pub use handover::state::EstateError;
pub use handover::taker::{Prepared, TakenOver, Upgrade};
pub use handover::wire::WireError;
pub use handover::{HandOverError, HandOverRefusal, HandOverTerms};
pub use hypervisor::{QemuOptions, QemuReconnect, qemu_args};
pub use libvirt::{LIBVIRT_MEMORY_BACKING, LibvirtDisk, LibvirtDomain, LibvirtError, VirtType};
pub use request::{ByteRange, ID_BYTES, Operation, Parsed, Refusal, Request, Status, parse};
pub use server::{
    NUM_QUEUES_DEFAULT, QUEUE_SIZE_DEFAULT, ServeEnd, ServeError, VhostBlkConfig, VhostBlkServer, serve,
};
pub use stop::StopHandle;
pub use ogee_proto::unix_socket::{SOCKET_PATH_BYTES_MAX, SocketError};
pub use stats::{KindCounts, RequestKind, VhostBlkStats};
