//! The client's side of the handshake, for connections that the kernel then uses: fixed newstyle, GO, simple replies.
//!
//! Called by the CLI's `nbd map`, with a server of this host. Source: as `wire.rs`. The kernel's client knows neither structured replies
//! nor metadata contexts, so they are not asked for. Invariants: every wait has a limit, and no limit is left on the socket that is
//! handed out (the kernel would take it for its own); what the server says is bounded and never trusted. Absent: TLS, TCP, the
//! transmission phase.

use crate::wire::{
    Fields, INIT_MAGIC, OPTION_MAGIC, OPTION_REPLY_MAGIC, handshake_flag, info, option, option_reply,
};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of the head of a reply to an option: magic, option, type, length.
const REPLY_HEAD_BYTES: usize = 20;
/// Longest reply that is taken: an error's text may have 4,096 bytes.
const REPLY_BYTES_MAX: usize = 8192;
/// Replies to GO before its acknowledgement; a server has a handful.
const REPLIES_MAX: usize = 64;

/// What a server said of the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    /// Its size.
    pub size_bytes: u64,
    /// What it can do (`wire::transmission_flag`).
    pub flags: u16,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket.
    #[error("{verb} {path}")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The server's socket.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The other side is not an NBD server as we know it.
    #[error("{path}: what listens there does not speak NBD: {what}")]
    Protocol {
        /// The server's socket.
        path: PathBuf,
        /// What was wrong.
        what: &'static str,
    },
    /// It has no such export, or does not give it.
    #[error("{path}: the server refuses export {export:?} (reply {reply:#x})")]
    Refused {
        /// The server's socket.
        path: PathBuf,
        /// The name.
        export: String,
        /// The type of its reply.
        reply: u32,
    },
}

/// What went wrong in the exchange itself.
#[derive(Debug)]
enum Failure {
    Io(io::Error),
    Protocol(&'static str),
    Refused(u32),
}

impl From<io::Error> for Failure {
    fn from(source: io::Error) -> Self {
        Self::Io(source)
    }
}

/// Connects and negotiates, up to the first request. The socket comes back without time limits, in blocking mode.
///
/// # Errors
/// See [`ClientError`]; also when the server is silent for `limit`.
pub fn connect(path: &Path, export: &str, limit: Duration) -> Result<(UnixStream, Negotiated), ClientError> {
    let failed = |verb| move |source| ClientError::Io { verb, path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).map_err(failed("connect to"))?;
    set_limit(&stream, Some(limit)).map_err(failed("set up connection to"))?;
    let negotiated = negotiate(&mut stream, export).map_err(|failure| match failure {
        Failure::Io(source) => failed("negotiate with")(source),
        Failure::Protocol(what) => ClientError::Protocol { path: path.to_owned(), what },
        Failure::Refused(reply) => ClientError::Refused { path: path.to_owned(), export: export.to_owned(), reply },
    })?;
    set_limit(&stream, None).map_err(failed("set up connection to"))?;
    Ok((stream, negotiated))
}

fn set_limit(stream: &UnixStream, limit: Option<Duration>) -> io::Result<()> {
    stream.set_read_timeout(limit)?;
    stream.set_write_timeout(limit)
}

fn negotiate(stream: &mut (impl Read + Write), export: &str) -> Result<Negotiated, Failure> {
    let greeting = receive::<18>(stream)?;
    let mut fields = Fields(&greeting);
    if fields.u64() != Some(INIT_MAGIC) || fields.u64() != Some(OPTION_MAGIC) {
        return Err(Failure::Protocol("no greeting"));
    }
    let offered = fields.u16().unwrap_or_default();
    if offered & handshake_flag::FIXED_NEWSTYLE == 0 {
        return Err(Failure::Protocol("no fixed newstyle handshake"));
    }
    let flags = offered & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    stream.write_all(&[&u32::from(flags).to_be_bytes()[..], &go(export)?].concat())?;
    let mut negotiated = None;
    for _ in 0..REPLIES_MAX {
        let (reply, data) = receive_reply(stream)?;
        match reply {
            option_reply::ACK => return negotiated.ok_or(Failure::Protocol("no size of the export")),
            option_reply::INFO => negotiated = export_info(&data).or(negotiated),
            error if error >> 31 == 1 => return Err(Failure::Refused(error)),
            _ => {}
        }
    }
    Err(Failure::Protocol("replies without end"))
}

/// The option GO, with no wish for more information.
fn go(export: &str) -> Result<Vec<u8>, Failure> {
    let name_len = u32::try_from(export.len()).map_err(|_| Failure::Protocol("a name of 4 GiB"))?;
    let parts: [&[u8]; 6] = [
        &OPTION_MAGIC.to_be_bytes(),
        &option::GO.to_be_bytes(),
        &(name_len + 6).to_be_bytes(),
        &name_len.to_be_bytes(),
        export.as_bytes(),
        &0_u16.to_be_bytes(),
    ];
    Ok(parts.concat())
}

/// Type and data of a reply to GO.
fn receive_reply(stream: &mut impl Read) -> Result<(u32, Vec<u8>), Failure> {
    let head = receive::<REPLY_HEAD_BYTES>(stream)?;
    let mut fields = Fields(&head);
    let is_ours = fields.u64() == Some(OPTION_REPLY_MAGIC) && fields.u32() == Some(option::GO);
    let (reply, len) = (fields.u32().unwrap_or_default(), fields.u32().unwrap_or_default());
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if !is_ours || len > REPLY_BYTES_MAX {
        return Err(Failure::Protocol("not a reply to GO"));
    }
    let mut data = vec![0; len];
    stream.read_exact(&mut data)?;
    Ok((reply, data))
}

/// Size and flags, if that is what the information is about.
fn export_info(data: &[u8]) -> Option<Negotiated> {
    let mut fields = Fields(data);
    if fields.u16()? != info::EXPORT {
        return None;
    }
    Some(Negotiated { size_bytes: fields.u64()?, flags: fields.u16()? })
}

fn receive<const N: usize>(stream: &mut impl Read) -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that has written everything beforehand.
    struct Script {
        says: io::Cursor<Vec<u8>>,
        heard: Vec<u8>,
    }

    impl Read for Script {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.says.read(buffer)
        }
    }

    impl Write for Script {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.heard.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn reply(kind: u32, data: &[u8]) -> Vec<u8> {
        let len = u32::try_from(data.len()).expect("short").to_be_bytes();
        [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &7_u32.to_be_bytes(), &kind.to_be_bytes(), &len, data].concat()
    }

    fn talk(parts: &[&[u8]]) -> (Result<Negotiated, Failure>, Vec<u8>) {
        let mut script = Script { says: io::Cursor::new(parts.concat()), heard: vec![] };
        let result = negotiate(&mut script, "vm1");
        (result, script.heard)
    }

    const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";
    const EXPORT: &[u8] = &[0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0x0d, 0x6d];

    #[test]
    fn the_transcript_is_golden() {
        let block_sizes = reply(3, &[0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0]);
        let (result, heard) = talk(&[GREETING, &block_sizes, &reply(3, EXPORT), &reply(1, &[])]);
        assert_eq!(result.expect("agreed"), Negotiated { size_bytes: 1 << 30, flags: 0x0d6d });
        assert_eq!(heard, b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x09\0\0\0\x03vm1\0\0");
    }

    #[test]
    fn a_refusal_and_every_kind_of_nonsense_is_an_error() {
        let (refused, _) = talk(&[GREETING, &reply((1 << 31) + 6, b"no such export")]);
        assert!(matches!(refused, Err(Failure::Refused(0x8000_0006))), "{refused:?}");
        let endless: Vec<u8> = reply(3, EXPORT).repeat(REPLIES_MAX);
        let huge = [&reply(3, EXPORT)[..16], &[0xff; 4]].concat();
        let wrong_option = [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &[0; 12]].concat();
        for says in [
            &b"SSH-2.0-OpenSSH_9.2p1 Debian"[..],
            b"NBDMAGICIHAVEOPT\0\0",
            &[GREETING, &reply(1, &[])].concat(),
            &[GREETING, &endless].concat(),
            &[GREETING, &huge].concat(),
            &[GREETING, &wrong_option].concat(),
        ] {
            assert!(matches!(talk(&[says]).0, Err(Failure::Protocol(_))), "{says:?}");
        }
        assert!(matches!(talk(&[GREETING]).0, Err(Failure::Io(_))), "cut short");
    }
}
