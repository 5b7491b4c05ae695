//! Puts one descriptor in the place of another that some other object owns.
//!
//! Called by the side that takes a connection over: the `vhost` crate keeps what was negotiated in private fields of its handler, and the handler keeps its socket
//! to itself. So the handler is made on a socket pair, led through the negotiation there, and then the front end's connection is put where the pair's socket was
//! (docs/adr/0015-upgrade-without-reconnection.md). Deliberately absent: anything else that is unsafe.
#![allow(unsafe_code)]

use rustix::io::{DupFlags, dup3};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// A descriptor number and the proof that it may be exchanged.
#[derive(Debug)]
pub(crate) struct Place(RawFd);

impl Place {
    /// The place of `socket`, whose owner is about to change.
    pub(crate) fn of(socket: &UnixStream) -> Self {
        Self(socket.as_raw_fd())
    }

    /// From now on the number is another descriptor of what `by` is. The caller still holds the object that owns the number and uses it on this thread only.
    ///
    /// # Errors
    /// Those of dup3(2); nothing was changed then.
    pub(crate) fn take(self, by: &UnixStream) -> io::Result<()> {
        // SAFETY: the number is open, because its owner (the handler that was made from the socket) lives; `ManuallyDrop` never closes it, so that it is closed
        // once, by its owner. The owner believes to have a UNIX stream socket and has one before and after. Nobody uses the number meanwhile: the handler has
        // not been given to its thread yet.
        let mut place = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(self.0) });
        dup3(by.as_fd(), &mut place, DupFlags::CLOEXEC).map_err(io::Error::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn the_owner_of_the_number_speaks_to_another_peer_and_closes_it_once() {
        let (mut owner, mut before) = UnixStream::pair().unwrap();
        let (by, mut after) = UnixStream::pair().unwrap();
        Place::of(&owner).take(&by).unwrap();
        drop(by);
        owner.write_all(b"x").unwrap();
        let mut byte = [0];
        after.read_exact(&mut byte).unwrap();
        assert_eq!(byte, *b"x");
        assert_eq!(before.read(&mut byte).unwrap(), 0, "the old peer sees the end");
        drop(owner);
        assert_eq!(after.read(&mut byte).unwrap(), 0);
    }
}
