//! What a connection may say before TLS, and whether TLS can begin. Pure.
//!
//! ```text
//!   None       no TLS here: STARTTLS is refused, everything else is answered
//!   Offered  ──┐ STARTTLS
//!   Demanded ──┴────────> Begun    before it Demanded answers STARTTLS and ABORT alone; STARTTLS is refused now
//! ```
//!
//! Called by `handshake.rs` for each option. Source: proto.md, "TLS support" (NOTLS, OPTIONALTLS, FORCEDTLS). Absent:
//! SELECTIVETLS, where only some exports want TLS.

use crate::wire::{option, option_reply};

/// Whether a client finds TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsOffer {
    /// There is none.
    Absent,
    /// A client may begin it.
    Optional,
    /// A client must begin it before it learns anything.
    Demanded,
}

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protection {
    None,
    Offered,
    Demanded,
    Begun,
}

impl From<TlsOffer> for Protection {
    fn from(offer: TlsOffer) -> Self {
        match offer {
            TlsOffer::Absent => Self::None,
            TlsOffer::Optional => Self::Offered,
            TlsOffer::Demanded => Self::Demanded,
        }
    }
}

/// What to do with an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Answer it as it is.
    Answer,
    /// Reply with this error and message.
    Refuse(u32, &'static str),
    /// It has no reply that could refuse it.
    Close,
    /// Agree, and begin TLS.
    StartTls,
}

impl Protection {
    pub(crate) fn judge(self, code: u32, data: &[u8]) -> Verdict {
        match (code, self) {
            (option::STARTTLS, _) if !data.is_empty() => {
                Verdict::Refuse(option_reply::ERR_INVALID, "this option takes no data")
            }
            (option::STARTTLS, Self::None) => Verdict::Refuse(option_reply::ERR_UNSUP, "this server has no TLS"),
            (option::STARTTLS, Self::Begun) => Verdict::Refuse(option_reply::ERR_INVALID, "TLS has begun already"),
            (option::STARTTLS, Self::Offered | Self::Demanded) => Verdict::StartTls,
            (option::ABORT, Self::Demanded) => Verdict::Answer,
            (option::EXPORT_NAME, Self::Demanded) => Verdict::Close,
            (_, Self::Demanded) => Verdict::Refuse(option_reply::ERR_TLS_REQD, "this server wants TLS"),
            (_, Self::None | Self::Offered | Self::Begun) => Verdict::Answer,
        }
    }
}
