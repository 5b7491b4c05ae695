//! Messages between two daemons at a hand-over: frames on a UNIX stream socket, with descriptors behind those that have some.
//!
//! | bytes | field | |
//! | --- | --- | --- |
//! | 0..4 | magic | `OGUP` |
//! | 4..6 | version | [`VERSION`] |
//! | 6..8 | kind | [`Kind`] |
//! | 8..12 | length | bytes of the body that follows |
//! | 12..16 | descriptors | that follow the body: a byte 0 for each [`BATCH`] of them, sent with it (SCM_RIGHTS); the last batch may be smaller |
//!
//! Numbers are little-endian. Magic, version, this header, `Hello` and `Refused` stay as they are in every version, so that a refusal is understood; everything
//! else is only read from a frame of the own version. Invariants: nothing is allocated or received beyond the limits below; a peer that stops in the middle is
//! given up after a limit for each read; a descriptor that was received and is not wanted is closed.

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg,
    sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The protocol that this build speaks, and no other.
pub(crate) const VERSION: u16 = 1;
const MAGIC: [u8; 4] = *b"OGUP";
const HEADER_BYTES: usize = 16;
/// Bytes of a body: 509 regions of 32 bytes and 64 queues of 46, and some.
const BODY_BYTES_MAX: usize = 64 << 10;
/// Descriptors of a frame: 509 regions, 3 for each of 64 queues, and seven more. Below the usual limit of 1,024 for a process.
const FILES_MAX: usize = 720;
/// Descriptors sent at once; the kernel takes at most 253 (`SCM_MAX_FD`).
const BATCH: usize = 64;

/// What a frame is. See the drawing in `handover.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// New: what it is going to serve. Body: queues (2), entries (2), then the subject in UTF-8.
    Hello,
    /// Old: it goes on. Body: why (2).
    Refused,
    /// Old: get ready. Body: client (8), queues in use (2).
    Welcome,
    /// New: stop your rings.
    Ready,
    /// Old: they are stopped. Body and descriptors: `state.rs`.
    Estate,
    /// New: it can go on with that.
    Accepted,
    /// Old: it has ended all IO for good.
    Go,
}

impl Kind {
    const ALL: [Self; 7] =
        [Self::Hello, Self::Refused, Self::Welcome, Self::Ready, Self::Estate, Self::Accepted, Self::Go];

    const fn code(self) -> u16 {
        match self {
            Self::Hello => 1,
            Self::Refused => 2,
            Self::Welcome => 3,
            Self::Ready => 4,
            Self::Estate => 5,
            Self::Accepted => 6,
            Self::Go => 7,
        }
    }
}

/// A received frame.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) version: u16,
    /// `None`: none that this build knows.
    pub(crate) kind: Option<Kind>,
    pub(crate) body: Vec<u8>,
    pub(crate) files: Vec<OwnedFd>,
}

/// Why a frame was not sent or received.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The other process ended, or closed its socket.
    #[error("the other daemon has ended")]
    Ended,
    /// It did not say the next thing in time.
    #[error("the other daemon did not answer within {limit:?}")]
    TimedOut {
        /// What was waited for it.
        limit: Duration,
    },
    /// It is no daemon of this kind.
    #[error("the other process speaks another protocol")]
    Foreign,
    /// More than a frame may have.
    #[error("a message of {bytes} bytes and {files} descriptors: too large")]
    TooLarge {
        /// Of the body.
        bytes: usize,
        /// Descriptors.
        files: usize,
    },
    /// Descriptors did not arrive: the limit of open files of one of the processes is too low.
    #[error("descriptors were lost on the way; is the limit of open files too low?")]
    FilesLost,
    /// A system call.
    #[error("{verb} the other daemon")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Sends a frame; gives up when the other side does not read it within `limit`.
pub(crate) fn send(
    stream: &UnixStream,
    kind: Kind,
    (body, files): (&[u8], &[BorrowedFd<'_>]),
    limit: Duration,
) -> Result<(), WireError> {
    let too_large = WireError::TooLarge { bytes: body.len(), files: files.len() };
    let (len, count) = match (u32::try_from(body.len()), u32::try_from(files.len())) {
        (Ok(len), Ok(count)) if body.len() <= BODY_BYTES_MAX && files.len() <= FILES_MAX => (len, count),
        _ => return Err(too_large),
    };
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&kind.code().to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(body);
    let failed = |source| failed("write to", limit, source);
    stream.set_write_timeout(Some(limit)).map_err(failed)?;
    let mut writer = stream;
    writer.write_all(&bytes).map_err(failed)?;
    for batch in files.chunks(BATCH) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(batch)) {
            return Err(too_large);
        }
        loop {
            match sendmsg(stream, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(failed(error.into())),
            }
        }
    }
    Ok(())
}

/// Receives a frame, of whatever version; each read waits at most for `limit`.
pub(crate) fn receive(stream: &UnixStream, limit: Duration) -> Result<Frame, WireError> {
    let failed = |source| failed("read from", limit, source);
    stream.set_read_timeout(Some(limit)).map_err(failed)?;
    let mut reader = stream;
    let mut header = [0; HEADER_BYTES];
    reader.read_exact(&mut header).map_err(failed)?;
    let [m0, m1, m2, m3, v0, v1, k0, k1, l0, l1, l2, l3, f0, f1, f2, f3] = header;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(WireError::Foreign);
    }
    let size = |bytes| usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX);
    let (bytes, count) = (size([l0, l1, l2, l3]), size([f0, f1, f2, f3]));
    if bytes > BODY_BYTES_MAX || count > FILES_MAX {
        return Err(WireError::TooLarge { bytes, files: count });
    }
    let mut body = vec![0; bytes];
    reader.read_exact(&mut body).map_err(failed)?;
    let mut files = Vec::with_capacity(count);
    while files.len() < count {
        let expected = (count - files.len()).min(BATCH);
        let before = files.len();
        receive_batch(stream, &mut files).map_err(failed)?;
        if files.len() - before != expected {
            return Err(WireError::FilesLost);
        }
    }
    let code = u16::from_le_bytes([k0, k1]);
    let kind = Kind::ALL.into_iter().find(|kind| kind.code() == code);
    Ok(Frame { version: u16::from_le_bytes([v0, v1]), kind, body, files })
}

fn receive_batch(stream: &UnixStream, files: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let received = loop {
        match recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            files.extend(descriptors);
        }
    }
    Ok(())
}

fn failed(verb: &'static str, limit: Duration, source: io::Error) -> WireError {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
    match source.kind() {
        WouldBlock | TimedOut => WireError::TimedOut { limit },
        UnexpectedEof | BrokenPipe | ConnectionReset => WireError::Ended,
        _ => WireError::Io { verb, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn the_header_is_as_documented() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        send(&ours, Kind::Welcome, (&[7, 8], &[]), LIMIT).unwrap();
        let mut bytes = [0; 18];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes, *b"OGUP\x01\x00\x03\x00\x02\x00\x00\x00\x00\x00\x00\x00\x07\x08");
    }

    #[test]
    fn more_descriptors_than_one_message_takes_arrive_in_order() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..BATCH + 3).map(|_| tempfile::tempfile().unwrap()).collect();
        for (number, file) in files.iter().enumerate() {
            file.write_all_at(&[u8::try_from(number).unwrap()], 0).unwrap();
        }
        let borrowed: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        send(&ours, Kind::Estate, (b"body", &borrowed), LIMIT).unwrap();
        send(&ours, Kind::Go, (&[], &[]), LIMIT).unwrap();
        let frame = receive(&theirs, LIMIT).unwrap();
        assert_eq!((frame.version, frame.kind, &frame.body[..]), (VERSION, Some(Kind::Estate), &b"body"[..]));
        let number = |file: OwnedFd| {
            let mut byte = [0];
            File::from(file).read_exact_at(&mut byte, 0).unwrap();
            usize::from(byte[0])
        };
        assert_eq!(frame.files.into_iter().map(number).collect::<Vec<_>>(), (0..BATCH + 3).collect::<Vec<_>>());
        assert_eq!(receive(&theirs, LIMIT).unwrap().kind, Some(Kind::Go));
        drop(ours);
        assert!(matches!(receive(&theirs, LIMIT), Err(WireError::Ended)));
    }

    #[test]
    fn what_is_no_frame_is_refused_without_being_waited_for() {
        let said = |bytes: &[u8], limit| {
            let (mut ours, theirs) = UnixStream::pair().unwrap();
            ours.write_all(bytes).unwrap();
            receive(&theirs, limit).map(|frame| (frame.version, frame.kind))
        };
        assert!(matches!(said(b"GET / HTTP/1.1\r\n", LIMIT), Err(WireError::Foreign)));
        let header = |len: u32, files: u32| {
            [&b"OGUP\x02\x00\x63\x00"[..], &len.to_le_bytes(), &files.to_le_bytes()].concat()
        };
        assert_eq!(said(&header(0, 0), LIMIT).unwrap(), (2, None), "another version, told to the caller");
        assert!(matches!(said(&header(1 << 20, 0), LIMIT), Err(WireError::TooLarge { .. })));
        assert!(matches!(said(&header(0, 721), LIMIT), Err(WireError::TooLarge { .. })));
        assert!(matches!(said(&header(4, 0)[..10], Duration::from_millis(20)), Err(WireError::TimedOut { .. })));
        let without = [header(0, 1), vec![0]].concat();
        assert!(matches!(said(&without, LIMIT), Err(WireError::FilesLost)));
    }
}
