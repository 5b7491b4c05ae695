//! The kernel's NBD client: `/dev/nbdN` attached, given new sockets and detached through generic netlink.
//!
//! Called by the CLI's `nbd map`. Sources: `linux/nbd-netlink.h`, `linux/genetlink.h`, `drivers/block/nbd.c` of Linux 6.1.
//!
//! ```text
//!            CONNECT                     sockets die                       DISCONNECT, or dead for longer than allowed
//! detached ──────────> attached, live ──────────────> attached, IO waits ──────────────────────────────> detached
//!                            ^────── RECONFIGURE ───────────┘
//! ```
//!
//! What the kernel does that a caller must know: a request that was on a socket when that died is sent again when it is
//! [`Attach::resend_after`] old, not at once; a socket given by RECONFIGURE takes the place of a dead one, and is let go *without an error*
//! if none is dead ([`is_taken`] tells); the sockets stay the kernel's own when the caller ends.
//!
//! Invariants: nothing here is read from anybody but the kernel (netlink lets nobody but root send to us); answers to older questions
//! are skipped; every answer is bounded. Calls block: CONNECT and DISCONNECT as long as the kernel takes. Absent: the ioctl interface,
//! multicast messages.

mod message;

use message::{Attributes, Request, Response};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// `AF_NETLINK`, `NETLINK_GENERIC`.
const FAMILY_NETLINK: i32 = 16;
const PROTOCOL_GENERIC: i32 = 16;
/// The family that knows all others (`GENL_ID_CTRL`), its command GETFAMILY and its attributes.
const CONTROLLER: u16 = 16;
const GET_FAMILY: u8 = 3;
const CONTROLLER_VERSION: u8 = 1;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

const NBD_FAMILY: &str = "nbd";
const NBD_VERSION: u8 = 1;
const COMMAND_CONNECT: u8 = 1;
const COMMAND_DISCONNECT: u8 = 2;
const COMMAND_RECONFIGURE: u8 = 3;
const COMMAND_STATUS: u8 = 5;
const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const CLIENT_FLAGS: u16 = 6;
const SOCKETS: u16 = 7;
const DEAD_CONN_TIMEOUT: u16 = 8;
const DEVICE_LIST: u16 = 9;
const BACKEND_IDENTIFIER: u16 = 10;
const SOCK_ITEM: u16 = 1;
const SOCK_FD: u16 = 1;
const DEVICE_ITEM: u16 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_CONNECTED: u16 = 2;

/// Longest answer: STATUS has 20 bytes for a device.
const ANSWER_BYTES_MAX: usize = 1 << 18;
/// The answer is there when the question was taken; this is for a kernel that misbehaves.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Answers of one question, those to older ones included.
const ANSWERS_MAX: usize = 64;

const EPERM: i32 = 1;
const ENOENT: i32 = 2;
const EBUSY: i32 = 16;

/// Why the kernel did not do it.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The module `nbd` is not loaded, or this kernel has none.
    #[error("this kernel has no NBD client loaded")]
    NoModule,
    /// The caller lacks CAP_SYS_ADMIN.
    #[error("{verb}: only root may do that")]
    NotPermitted {
        /// What was tried.
        verb: &'static str,
    },
    /// The device is attached already.
    #[error("/dev/nbd{index} is in use")]
    InUse {
        /// The device's number.
        index: u32,
    },
    /// The kernel refused; its log (`dmesg`) says why.
    #[error("{verb}")]
    Refused {
        /// What was tried.
        verb: &'static str,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
    /// The netlink socket.
    #[error("{verb} netlink socket")]
    Socket {
        /// What was tried.
        verb: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// An answer that makes no sense.
    #[error("{verb}: the kernel's answer is malformed")]
    Malformed {
        /// What was tried.
        verb: &'static str,
    },
}

/// How a device is attached.
#[derive(Debug, Clone)]
pub struct Attach<'a> {
    /// The device's number; `None`: the first free one, made if there is none.
    pub index: Option<u32>,
    /// Size of the export.
    pub size_bytes: u64,
    /// Logical and physical block size: 512 to the page size, a power of two.
    pub block_bytes: u64,
    /// A request without an answer for so long costs its connection and is sent again on another one. Whole seconds, at least one.
    pub resend_after: Duration,
    /// IO waits so long for a new socket when all are dead; then it fails and the device is given up. Whole seconds.
    pub dead_limit: Duration,
    /// Transmission flags of the server.
    pub server_flags: u16,
    /// Who serves it: shown in `/sys/block/nbdN/backend`, and asked for when sockets are replaced (Linux 5.14).
    pub backend: &'a str,
}

/// The kernel's NBD client.
#[derive(Debug)]
pub struct KernelNbd {
    socket: Socket,
    family: u16,
    sequence: u32,
}

impl KernelNbd {
    /// Finds it.
    ///
    /// # Errors
    /// [`KernelError::NoModule`] if it is not there.
    pub fn open() -> Result<Self, KernelError> {
        let failed = |verb| move |source| KernelError::Socket { verb, source };
        let socket = Socket::new(Domain::from(FAMILY_NETLINK), Type::RAW, Some(Protocol::from(PROTOCOL_GENERIC)));
        let socket = socket.map_err(failed("open"))?;
        socket.set_read_timeout(Some(ANSWER_LIMIT)).map_err(failed("set up"))?;
        let mut kernel = Self { socket, family: CONTROLLER, sequence: 0 };
        let mut ask = Request::new(CONTROLLER, GET_FAMILY, CONTROLLER_VERSION);
        ask.string(FAMILY_NAME, NBD_FAMILY);
        let verb = "look for the NBD client";
        let answers = kernel.call(verb, ask).map_err(|error| match error {
            KernelError::Refused { source, .. } if source.raw_os_error() == Some(ENOENT) => KernelError::NoModule,
            other => other,
        })?;
        let id = answers.iter().find_map(|answer| Attributes(answer).find(FAMILY_ID)?.u16());
        kernel.family = id.ok_or(KernelError::Malformed { verb })?;
        Ok(kernel)
    }

    /// Attaches a device to sockets that are through with the handshake, and gives its number. The kernel keeps its own hold of them.
    ///
    /// # Errors
    /// [`KernelError::InUse`], [`KernelError::NotPermitted`], and what the kernel says of the arguments.
    pub fn connect(&mut self, attach: &Attach<'_>, sockets: &[BorrowedFd<'_>]) -> Result<u32, KernelError> {
        let verb = "attach NBD device";
        let answers = self.call(verb, connect_request(self.family, attach, sockets)).map_err(|error| match (&error, attach.index) {
            (KernelError::Refused { source, .. }, Some(index)) if source.raw_os_error() == Some(EBUSY) => {
                KernelError::InUse { index }
            }
            _ => error,
        })?;
        let index = answers.iter().find_map(|answer| Attributes(answer).find(INDEX)?.u32());
        index.ok_or(KernelError::Malformed { verb })
    }

    /// Gives an attached device a socket in place of a dead one, and the size that its server says. Whether the socket was taken: [`is_taken`].
    ///
    /// # Errors
    /// [`KernelError::Refused`] with EINVAL if the device is not attached, was given up, or belongs to another backend.
    pub fn reconnect(&mut self, index: u32, attach: &Attach<'_>, socket: BorrowedFd<'_>) -> Result<(), KernelError> {
        let request = reconnect_request(self.family, index, attach, socket);
        self.call("give NBD device a new connection", request).map(drop)
    }

    /// Detaches a device: what is in flight fails. That it is not attached is no error.
    ///
    /// # Errors
    /// [`KernelError::NotPermitted`], or there is no such device.
    pub fn disconnect(&mut self, index: u32) -> Result<(), KernelError> {
        let mut request = Request::new(self.family, COMMAND_DISCONNECT, NBD_VERSION);
        request.u32(INDEX, index);
        self.call("detach NBD device", request).map(drop)
    }

    /// Number of each device, and whether it is attached.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn status(&mut self) -> Result<Vec<(u32, bool)>, KernelError> {
        let verb = "list NBD devices";
        let answers = self.call(verb, Request::new(self.family, COMMAND_STATUS, NBD_VERSION))?;
        let listed: Option<Vec<_>> = answers.iter().map(|answer| device_list(answer)).collect();
        Ok(listed.ok_or(KernelError::Malformed { verb })?.concat())
    }

    /// One question and its answers.
    fn call(&mut self, verb: &'static str, request: Request) -> Result<Vec<Vec<u8>>, KernelError> {
        let failed = |verb| move |source| KernelError::Socket { verb, source };
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        // Without an address: to the kernel.
        self.socket.send(&request.finish(sequence)).map_err(failed("write to"))?;
        let (mut buffer, mut answers) = (vec![0; ANSWER_BYTES_MAX], vec![]);
        for _ in 0..ANSWERS_MAX {
            let len = (&self.socket).read(&mut buffer).map_err(failed("read from"))?;
            let responses = Response::decode_all(&buffer[..len]).ok_or(KernelError::Malformed { verb })?;
            for response in responses.into_iter().filter(|response| response.sequence == sequence) {
                match response.outcome {
                    Ok(Some(answer)) => answers.push(answer),
                    Ok(None) => return Ok(answers),
                    Err(EPERM) => return Err(KernelError::NotPermitted { verb }),
                    Err(errno) => {
                        return Err(KernelError::Refused { verb, source: io::Error::from_raw_os_error(errno) });
                    }
                }
            }
        }
        Err(KernelError::Malformed { verb })
    }
}

/// Whether the kernel took a socket over: it then has the time limit of the device for sending, and had none before. Once a socket was
/// taken this stays so, whatever becomes of it.
///
/// # Errors
/// The socket cannot be asked.
pub fn is_taken(socket: &UnixStream) -> io::Result<bool> {
    Ok(socket.write_timeout()?.is_some())
}

fn connect_request(family: u16, attach: &Attach<'_>, sockets: &[BorrowedFd<'_>]) -> Request {
    let mut request = Request::new(family, COMMAND_CONNECT, NBD_VERSION);
    if let Some(index) = attach.index {
        request.u32(INDEX, index);
    }
    request.u64(SIZE_BYTES, attach.size_bytes);
    request.u64(BLOCK_SIZE_BYTES, attach.block_bytes);
    request.u64(TIMEOUT, attach.resend_after.as_secs());
    request.u64(SERVER_FLAGS, u64::from(attach.server_flags));
    // Not detached by the last close, not removed when detached.
    request.u64(CLIENT_FLAGS, 0);
    request.u64(DEAD_CONN_TIMEOUT, attach.dead_limit.as_secs());
    request.string(BACKEND_IDENTIFIER, attach.backend);
    put_sockets(&mut request, sockets);
    request
}

fn reconnect_request(family: u16, index: u32, attach: &Attach<'_>, socket: BorrowedFd<'_>) -> Request {
    let mut request = Request::new(family, COMMAND_RECONFIGURE, NBD_VERSION);
    request.u32(INDEX, index);
    request.u64(SIZE_BYTES, attach.size_bytes);
    request.u64(BLOCK_SIZE_BYTES, attach.block_bytes);
    request.u64(TIMEOUT, attach.resend_after.as_secs());
    request.u64(DEAD_CONN_TIMEOUT, attach.dead_limit.as_secs());
    request.string(BACKEND_IDENTIFIER, attach.backend);
    put_sockets(&mut request, &[socket]);
    request
}

fn put_sockets(request: &mut Request, sockets: &[BorrowedFd<'_>]) {
    request.nest(SOCKETS, |list| {
        for socket in sockets {
            // A descriptor is never negative.
            let fd = socket.as_raw_fd().unsigned_abs();
            list.nest(SOCK_ITEM, |item| item.u32(SOCK_FD, fd));
        }
    });
}

/// Devices in an answer to STATUS; `None` if it is malformed.
fn device_list(answer: &[u8]) -> Option<Vec<(u32, bool)>> {
    let Some(list) = Attributes(answer).find(DEVICE_LIST) else { return Some(vec![]) };
    let mut devices = vec![];
    for item in list.nested() {
        let item = item?;
        if item.kind == DEVICE_ITEM {
            let connected = item.nested().find(DEVICE_CONNECTED)?.u8()?;
            devices.push((item.nested().find(DEVICE_INDEX)?.u32()?, connected != 0));
        }
    }
    Some(devices)
}

#[cfg(test)]
mod tests;
