//! Ways in which a client breaks the handshake.
//!
//! Returned by `handshake.rs`. Invariant: each ends the connection; what the protocol lets a server refuse is refused with
//! a reply instead. Absent: errors of sockets and of TLS (`connection.rs`).

use ogee_common::limits::{NBD_OPTION_BYTES_MAX, NBD_OPTIONS_MAX};

/// Why the connection must be closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Flags that the server did not offer.
    #[error("client flags {flags:#x} were not offered")]
    ClientFlags {
        /// As sent.
        flags: u32,
    },
    /// An option does not begin with its magic: the stream is out of step or not NBD.
    #[error("an option begins with {magic:#018x}, not with IHAVEOPT")]
    Magic {
        /// As sent.
        magic: u64,
    },
    /// Longer than `NBD_OPTION_BYTES_MAX`.
    #[error("option {option} has {len} bytes of data, at most {NBD_OPTION_BYTES_MAX} are taken")]
    OptionTooLong {
        /// The option.
        option: u32,
        /// As sent.
        len: u32,
    },
    /// More than `NBD_OPTIONS_MAX`.
    #[error("more than {NBD_OPTIONS_MAX} options")]
    TooManyOptions,
    /// EXPORT_NAME cannot be refused in another way.
    #[error("EXPORT_NAME asks for {name:?}, which is not exported")]
    UnknownExport {
        /// As sent, cut.
        name: String,
    },
    /// EXPORT_NAME may not follow EXTENDED_HEADERS.
    #[error("EXPORT_NAME after EXTENDED_HEADERS")]
    ExportNameAfterExtended,
    /// EXPORT_NAME before TLS, which is demanded, cannot be refused in another way.
    #[error("EXPORT_NAME without TLS, which is demanded here")]
    ExportNameWithoutTls,
    /// A client waits for the answer to STARTTLS. What follows it was sent by somebody who wants it to be taken as if it
    /// had come under TLS.
    #[error("{bytes} bytes in the clear behind STARTTLS")]
    ClearBehindStartTls {
        /// How many.
        bytes: usize,
    },
}
