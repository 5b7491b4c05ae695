//! The hand-over of a running daemon's work to a new one, without a reconnection of the front end: an upgrade that the guest does not see.
//!
//! The old daemon listens on a second socket beside its own, `PATH.sock.upgrade` (mode 0600; only its own user and root are let in). The new one makes everything
//! ready first, which takes as long as it takes, and then the rings stand still for a moment:
//!
//! ```text
//!  new                                                   old
//!   │ Hello: what it is going to serve                    │ serves
//!   ├────────────────────────────────────────────────────►│
//!   │                         Welcome: client, queues     │ (or Refused: another version, device or shape; another upgrade)
//!   │◄────────────────────────────────────────────────────┤
//!   │ reaches the cluster, starts threads, connects       │ serves
//!   │ Ready                                               │
//!   ├────────────────────────────────────────────────────►│ parks its protocol thread, stops its rings
//!   │         Estate: sockets, descriptors, ring states   │ (or Refused: not now)
//!   │◄────────────────────────────────────────────────────┤ stands still
//!   │ maps memory, checks everything                      │
//!   │ Accepted                                            │
//!   ├────────────────────────────────────────────────────►│ drops what is in flight, sends no IO any more
//!   │                         Go                          │
//!   │◄────────────────────────────────────────────────────┤ ends, exit code 0
//!   │ attaches (higher epoch), starts the rings           ╵
//! ```
//!
//! Invariants:
//! - Two processes never write the guest's memory or the volume: before `Accepted` the new one does neither, and after it the old one never again.
//! - Until `Accepted` has come the old daemon can go on as if nothing had been, and does so if the new one dies, refuses or is late: its requests in flight go on at
//!   the device all the time, only their answers are kept back while it stands still (`queue_phase.rs`).
//! - After that it has given up, whatever becomes of the new one. Then the front end's reconnection is the way out, as after any death of a daemon.
//! - What is in flight at that moment is in the front end's in-flight memory, and is run again by the new daemon under its own, higher attach epoch, as after a kill:
//!   an old copy that is still on its way is fenced (docs/adr/0011-in-flight-requests.md). Where there is no in-flight memory the old daemon answers everything
//!   first, or refuses.
//! - At most one upgrade at a time. A message that is not understood is refused, and the old daemon goes on.
//!
//! Design and failures: docs/adr/0015-upgrade-without-reconnection.md. Deliberately absent: how the volume is attached (the caller's), and processes.

pub(crate) mod doorman;
mod exchange;
pub(crate) mod giver;
pub(crate) mod state;
pub(crate) mod taker;
pub(crate) mod wire;

use ogee_proto::unix_socket::SocketError;
use rustix::process::geteuid;
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// What a daemon says and gives to the one that takes over from it, besides sockets and rings.
#[derive(Debug)]
pub struct HandOverTerms {
    /// What is served, in words that are the same for every daemon that serves it in the same way: another one may not take over.
    pub subject: String,
    /// The id of the client that has the volume attached; told before the rings stop. 0: there is none.
    pub client: u64,
    /// The volume's number, which stays when it is renamed; told likewise. 0: there is none.
    pub volume: u64,
    /// The file whose lock is the claim on the socket; the lock goes along with the descriptor.
    pub claim: Option<File>,
}

/// Why the running daemon goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandOverRefusal {
    /// It speaks another version of the protocol.
    Version,
    /// Another daemon is taking over.
    Busy,
    /// It serves something else, or in another way.
    OtherSubject,
    /// It has another number of queues or ring entries.
    OtherShape,
    /// A message of the front end was not answered in time.
    FrontEndBusy,
    /// Requests in flight did not end, and the front end keeps no memory for them.
    InFlight,
    /// It failed at something of its own; its log says at what.
    Failed,
    /// It is just attaching the volume for a guest that has arrived.
    Attaching,
    /// A reason that this build does not know.
    Unknown(u16),
}

impl HandOverRefusal {
    const fn code(self) -> u16 {
        match self {
            Self::Version => 1,
            Self::Busy => 2,
            Self::OtherSubject => 3,
            Self::OtherShape => 4,
            Self::FrontEndBusy => 5,
            Self::InFlight => 6,
            Self::Failed => 7,
            Self::Attaching => 8,
            Self::Unknown(code) => code,
        }
    }

    fn of(code: u16) -> Self {
        let known = [
            Self::Version, Self::Busy, Self::OtherSubject, Self::OtherShape, Self::FrontEndBusy, Self::InFlight, Self::Failed,
            Self::Attaching,
        ];
        known.into_iter().find(|refusal| refusal.code() == code).unwrap_or(Self::Unknown(code))
    }

    const fn words(self) -> &'static str {
        match self {
            Self::Version => "it speaks another version of the hand-over protocol",
            Self::Busy => "another daemon is taking over",
            Self::OtherSubject => "it serves something else, or with other options",
            Self::OtherShape => "it has another number of queues",
            Self::FrontEndBusy => "the hypervisor waits for an answer of it",
            Self::InFlight => "requests in flight do not end, and the hypervisor keeps no in-flight memory",
            Self::Failed => "it failed; see its log",
            Self::Attaching => "it is attaching the volume for a guest that has just arrived",
            Self::Unknown(_) => "it gives a reason that this version does not know",
        }
    }
}

impl std::fmt::Display for HandOverRefusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.words())
    }
}

/// Why a daemon did not take over. The running one goes on, unless [`HandOverError::NoGo`].
#[derive(Debug, thiserror::Error)]
pub enum HandOverError {
    /// It said so.
    #[error("the running daemon goes on: {0}")]
    Refused(HandOverRefusal),
    /// It speaks another version of the protocol.
    #[error("the running daemon speaks version {theirs} of the hand-over protocol, this one {}", wire::VERSION)]
    Version {
        /// Its version.
        theirs: u16,
    },
    /// The socket is another user's.
    #[error("the daemon at {path} is that of another user ({uid})")]
    OtherUser {
        /// The socket.
        path: PathBuf,
        /// Whose it is.
        uid: u32,
    },
    /// The socket of the hand-over.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// What is to be served.
    #[error(transparent)]
    Serve(#[from] crate::server::ServeError),
    /// A message was not sent or received.
    #[error("speak with the running daemon")]
    Wire(#[source] wire::WireError),
    /// The caller has stopped this one, which had not taken anything.
    #[error("stopped; the running daemon goes on")]
    Stopped,
    /// It said something that does not belong there.
    #[error("the running daemon said something out of place")]
    OutOfPlace,
    /// What it handed over is malformed.
    #[error(transparent)]
    Estate(#[from] state::EstateError),
    /// This daemon cannot go on with what the front end has negotiated.
    #[error("go on with the hypervisor's connection")]
    FrontEnd(#[source] vhost::vhost_user::Error),
    /// Its rings stand, and it did not say that it has ended its IO: it may have, so it must not be waited for.
    #[error("the running daemon did not let go; whether it goes on is unknown")]
    NoGo(#[source] wire::WireError),
    /// A system call of this process.
    #[error("{verb}")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

fn io_error(verb: &'static str) -> impl FnOnce(io::Error) -> HandOverError {
    move |source| HandOverError::Io { verb, source }
}

/// The socket of the hand-over beside a daemon's socket.
pub(crate) fn socket_beside(socket: &Path) -> PathBuf {
    let mut name = socket.as_os_str().to_owned();
    name.push(".upgrade");
    PathBuf::from(name)
}

/// The user of the other side, if it is neither ours nor root.
fn stranger(stream: &UnixStream) -> io::Result<Option<u32>> {
    let uid = rustix::net::sockopt::socket_peercred(stream)?.uid;
    Ok(Some(uid).filter(|uid| *uid != geteuid() && !uid.is_root()).map(rustix::process::Uid::as_raw))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_survive_the_wire() {
        for code in 0..20 {
            let refusal = HandOverRefusal::of(code);
            assert_eq!(refusal.code(), code);
            assert_eq!(matches!(refusal, HandOverRefusal::Unknown(_)), !(1..=8).contains(&code));
            assert!(!refusal.to_string().is_empty());
        }
    }

    #[test]
    fn this_user_is_no_stranger() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(stranger(&ours).unwrap(), None);
        assert_eq!(socket_beside(Path::new("/run/vm1.sock")), Path::new("/run/vm1.sock.upgrade"));
    }
}
