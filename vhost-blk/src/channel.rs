//! The back end's own requests, out on the channel that the front end gave.
//!
//! Called by the connection's threads: the one that reads messages finds the channel, and one waits for the volume to be resized. Invariant: a front end
//! that does not read its channel delays nobody for longer than [`SEND_LIMIT`], and then has no channel any more.
//!
//! The `vhost` crate keeps the channel's descriptor to itself and has no call for CONFIG_CHANGE_MSG. So each message is
//! looked at before the crate takes it (MSG_PEEK), and the descriptor of SET_BACKEND_REQ_FD is copied.

use ogee_client::BlockDevice;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Notify, watch};
use vhost::vhost_user::message::{BackendReq, FrontendReq};

/// Header of a message: request, flags, bytes that follow, 4 bytes each in the order of the machine.
const HEADER_BYTES: usize = 12;
/// Flags of a message that wants no reply: version 1.
const FLAGS: u32 = 1;
/// A message to the front end is given up after this.
const SEND_LIMIT: Duration = Duration::from_secs(1);

/// The channel for our own requests, once the front end has given one.
#[derive(Debug, Default)]
pub(crate) struct Channel(Mutex<Option<UnixStream>>);

impl Channel {
    pub(crate) fn set(&self, stream: UnixStream) {
        if let Err(error) = stream.set_write_timeout(Some(SEND_LIMIT)) {
            tracing::warn!(target: "controlpath", %error, "no limit for messages to the front end");
        }
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
    }

    /// The channel once more, for a daemon that takes over.
    ///
    /// # Errors
    /// No file descriptor.
    pub(crate) fn duplicate(&self) -> io::Result<Option<UnixStream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(UnixStream::try_clone).transpose()
    }

    /// Tells the front end to read the configuration space again. Without a channel nothing is said: the guest sees the
    /// change when it reads by itself.
    pub(crate) fn config_changed(&self) {
        let mut message = [0; HEADER_BYTES];
        message[..4].copy_from_slice(&(BackendReq::CONFIG_CHANGE_MSG as u32).to_ne_bytes());
        message[4..8].copy_from_slice(&FLAGS.to_ne_bytes());
        let mut channel = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stream) = channel.as_mut() else { return };
        match stream.write_all(&message) {
            Ok(()) => tracing::info!(target: "controlpath", "front end told of the volume's new size"),
            Err(error) => {
                tracing::warn!(target: "controlpath", %error, "front end not told of the volume's new size");
                // Half a message may be out.
                *channel = None;
            }
        }
    }
}

/// Waits for a message and copies the descriptor that comes with SET_BACKEND_REQ_FD; the message stays where it is.
pub(crate) fn peek_channel(stream: &UnixStream) -> io::Result<Option<UnixStream>> {
    let mut header = [0; HEADER_BYTES];
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    loop {
        match recvmsg(stream, &mut [IoSliceMut::new(&mut header)], &mut RecvAncillaryBuffer::default(), flags) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let [a, b, c, d, ..] = header;
    if u32::from_ne_bytes([a, b, c, d]) != FrontendReq::SET_BACKEND_REQ_FD as u32 {
        return Ok(None);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(stream, &mut [IoSliceMut::new(&mut header)], &mut control, flags)?;
    let descriptors = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    // Whether it is a socket the crate checks; if not, the connection ends before anything is written to it.
    Ok(descriptors.flatten().next().map(UnixStream::from))
}

/// Waits for changes of the device's size in a thread of its own.
#[derive(Debug)]
pub(crate) struct ResizeWatch {
    runtime: Runtime,
    size: Mutex<watch::Receiver<u64>>,
    end: Notify,
}

impl ResizeWatch {
    /// A watch from now on.
    ///
    /// # Errors
    /// No runtime.
    pub(crate) fn new<D: BlockDevice>(device: &D) -> io::Result<Self> {
        let mut size = device.resized();
        size.mark_unchanged();
        Ok(Self { runtime: Builder::new_current_thread().build()?, size: Mutex::new(size), end: Notify::new() })
    }

    /// Calls `changed` after each change, until [`ResizeWatch::end`] or the device's end.
    pub(crate) fn run(&self, changed: impl Fn()) {
        let mut size = self.size.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.runtime.block_on(async {
            loop {
                tokio::select! {
                    biased;
                    () = self.end.notified() => return,
                    found = size.changed() => match found {
                        Ok(()) => changed(),
                        Err(_) => return,
                    },
                }
            }
        });
    }

    /// Ends the watch, now or when it starts.
    pub(crate) fn end(&self) {
        self.end.notify_one();
    }
}
