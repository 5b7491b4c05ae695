//! The fixed newstyle handshake as a state machine without IO: bytes in, bytes out.
//!
//! ```text
//!            client flags             EXPORT_NAME, GO of a known export
//!   Flags ─────────────────> Options ───────────────────────────────────> Transmission
//!     │                       │    ^│
//!     │ unknown flags         │    ├┘ any other option: replied to, refused ones too
//!     v                       │    └── STARTTLS: StartTls; then Options again, under TLS, from the beginning
//!   error <───────────────────┤ bad magic, too long, too many, unknown name in EXPORT_NAME, bytes behind STARTTLS
//!                             └──> Aborted (ABORT)
//! ```
//!
//! Called by `connection.rs` (and by the fuzz target). Invariants: total, whatever the input; one call takes at most one
//! option, so that the caller sends its reply before it looks at the next; nothing is taken from the input before an
//! option is complete; a refused option changes nothing but, for SET_META_CONTEXT, the choice (proto.md wants that);
//! nothing that was agreed on or sent in the clear counts under TLS (what may be said before it: `protection.rs`).
//! Absent: TLS itself, the old style.

use crate::context::{self, Contexts};
use crate::handshake_error::HandshakeError;
use crate::option;
use crate::protection::{Protection, TlsOffer, Verdict};
use crate::wire::{
    self, Fields, INIT_MAGIC, OPTION_HEAD_BYTES, OPTION_MAGIC, OPTION_REPLY_MAGIC, handshake_flag, option_reply,
};
use bytes::{Buf, BufMut, BytesMut};
use ogee_common::limits::{NBD_OPTION_BYTES_MAX, NBD_OPTIONS_MAX, NBD_STRING_BYTES_MAX};

/// What a client may know of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name by which clients ask for it; at most `NBD_STRING_BYTES_MAX`.
    pub name: String,
    /// A line for people.
    pub description: String,
    /// Size in bytes, a multiple of 512.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Names of its contexts for changes, at most `NBD_CHANGED_CONTEXTS_MAX`.
    pub contexts: Vec<String>,
    /// Bytes that offsets and lengths are multiples of: 512 or 4,096.
    pub sector_bytes: u32,
}

/// Form of requests and replies after the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// 32-bit requests, simple replies.
    Simple,
    /// 32-bit requests, structured replies where they say more.
    Structured,
    /// 64-bit requests, extended replies.
    Extended,
}

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreement {
    /// Index of the export.
    pub export: usize,
    /// Form of requests and replies.
    pub framing: Framing,
    /// What was chosen for this export.
    pub contexts: Contexts,
    /// The size that the client was told, bytes.
    pub size_bytes: u64,
    /// Whether the client was told that it may not write.
    pub read_only: bool,
    /// Bytes that offsets and lengths are multiples of.
    pub sector_bytes: u32,
}

/// What came of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing can be done before there are so many more bytes.
    NeedBytes(usize),
    /// Something was done: send the output and call again.
    Replied,
    /// Send the output, which tells the client to begin TLS; what comes under TLS is the next input. Nothing is left of
    /// the input in the clear.
    StartTls,
    /// Send the output; what is left of the input are requests.
    Transmission(Agreement),
    /// Send the output and close: the client wants to end.
    Aborted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Flags,
    Options,
}

/// The server's side of one handshake.
#[derive(Debug, Clone)]
pub struct Handshake {
    state: State,
    no_zeroes: bool,
    framing: Framing,
    /// The export for which contexts were chosen, and which.
    chosen: Option<(usize, Contexts)>,
    options: u32,
    protection: Protection,
    /// Whether something was refused because it came in the clear.
    refused_in_clear: bool,
}

impl Handshake {
    /// Before the client's first byte.
    #[must_use]
    pub fn new(tls: TlsOffer) -> Self {
        Self {
            state: State::Flags,
            no_zeroes: false,
            framing: Framing::Simple,
            chosen: None,
            options: 0,
            protection: tls.into(),
            refused_in_clear: false,
        }
    }

    /// Whether the client asked for what it gets under TLS alone, and has not begun TLS since.
    #[must_use]
    pub const fn lacks_tls(&self) -> bool {
        self.refused_in_clear && matches!(self.protection, Protection::Demanded)
    }

    /// The server speaks first.
    pub fn greet(out: &mut BytesMut) {
        out.put_u64(INIT_MAGIC);
        out.put_u64(OPTION_MAGIC);
        out.put_u16(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    }

    /// Takes at most one message from the input and appends the answer to `out`.
    ///
    /// # Errors
    /// [`HandshakeError`]: close the connection, after sending nothing more.
    pub fn advance(
        &mut self,
        exports: &[ExportInfo],
        input: &mut BytesMut,
        out: &mut BytesMut,
    ) -> Result<Progress, HandshakeError> {
        match self.state {
            State::Flags => self.client_flags(input),
            State::Options => self.option(exports, input, out),
        }
    }

    fn client_flags(&mut self, input: &mut BytesMut) -> Result<Progress, HandshakeError> {
        let Some(flags) = Fields(input).u32() else { return Ok(Progress::NeedBytes(4 - input.len())) };
        let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
        if flags & !known != 0 {
            return Err(HandshakeError::ClientFlags { flags });
        }
        input.advance(4);
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        self.state = State::Options;
        Ok(Progress::Replied)
    }

    fn option(
        &mut self,
        exports: &[ExportInfo],
        input: &mut BytesMut,
        out: &mut BytesMut,
    ) -> Result<Progress, HandshakeError> {
        let mut head = Fields(input);
        let (Some(magic), Some(code), Some(len)) = (head.u64(), head.u32(), head.u32()) else {
            return Ok(Progress::NeedBytes(OPTION_HEAD_BYTES - input.len()));
        };
        if magic != OPTION_MAGIC {
            return Err(HandshakeError::Magic { magic });
        }
        if len > NBD_OPTION_BYTES_MAX {
            return Err(HandshakeError::OptionTooLong { option: code, len });
        }
        let total = OPTION_HEAD_BYTES + len as usize;
        if input.len() < total {
            return Ok(Progress::NeedBytes(total - input.len()));
        }
        self.options += 1;
        if self.options > NBD_OPTIONS_MAX {
            return Err(HandshakeError::TooManyOptions);
        }
        let message = input.split_to(total);
        let data = &message[OPTION_HEAD_BYTES..];
        match self.protection.judge(code, data) {
            Verdict::Answer => self.answer(exports, code, data, out),
            Verdict::Refuse(kind, message) => {
                self.refused_in_clear |= kind == option_reply::ERR_TLS_REQD;
                Replies { option: code, out }.error(kind, message);
                Ok(Progress::Replied)
            }
            Verdict::Close => Err(HandshakeError::ExportNameWithoutTls),
            Verdict::StartTls if input.is_empty() => Ok(self.start_tls(out)),
            Verdict::StartTls => Err(HandshakeError::ClearBehindStartTls { bytes: input.len() }),
        }
    }

    /// The client begins anew: only its flags stay, which it does not send again.
    fn start_tls(&mut self, out: &mut BytesMut) -> Progress {
        Replies { option: wire::option::STARTTLS, out }.ack();
        self.protection = Protection::Begun;
        (self.framing, self.chosen) = (Framing::Simple, None);
        Progress::StartTls
    }

    fn answer(
        &mut self,
        exports: &[ExportInfo],
        code: u32,
        data: &[u8],
        out: &mut BytesMut,
    ) -> Result<Progress, HandshakeError> {
        let mut reply = Replies { option: code, out };
        let has_data = !data.is_empty();
        match code {
            wire::option::EXPORT_NAME => return self.export_name(exports, data, out),
            wire::option::ABORT => {
                reply.ack();
                return Ok(Progress::Aborted);
            }
            wire::option::INFO | wire::option::GO => {
                let agreed = self.info(exports, data, &mut reply);
                if let (Some(export), wire::option::GO) = (agreed, code) {
                    return Ok(Progress::Transmission(self.agreement(exports, export)));
                }
            }
            wire::option::LIST | wire::option::STRUCTURED_REPLY | wire::option::EXTENDED_HEADERS if has_data => {
                reply.invalid("this option takes no data");
            }
            wire::option::LIST => {
                exports.iter().for_each(|export| reply.server(export));
                reply.ack();
            }
            wire::option::STRUCTURED_REPLY if self.framing == Framing::Extended => {
                reply.error(option_reply::ERR_EXT_HEADER_REQD, "extended headers are agreed on already");
            }
            wire::option::STRUCTURED_REPLY => {
                self.framing = Framing::Structured;
                reply.ack();
            }
            wire::option::EXTENDED_HEADERS if self.framing == Framing::Extended => {
                reply.invalid("extended headers are agreed on already");
            }
            wire::option::EXTENDED_HEADERS => {
                self.framing = Framing::Extended;
                reply.ack();
            }
            wire::option::LIST_META_CONTEXT => self.list_contexts(exports, data, &mut reply),
            wire::option::SET_META_CONTEXT => self.set_contexts(exports, data, &mut reply),
            _ => reply.error(option_reply::ERR_UNSUP, "this option is not known here"),
        }
        Ok(Progress::Replied)
    }

    fn export_name(
        &self,
        exports: &[ExportInfo],
        data: &[u8],
        out: &mut BytesMut,
    ) -> Result<Progress, HandshakeError> {
        if self.framing == Framing::Extended {
            return Err(HandshakeError::ExportNameAfterExtended);
        }
        let name = String::from_utf8_lossy(&data[..data.len().min(NBD_STRING_BYTES_MAX)]);
        let found = std::str::from_utf8(data).ok().and_then(|name| find(exports, name));
        let export = found.ok_or_else(|| HandshakeError::UnknownExport { name: name.into_owned() })?;
        out.put_u64(exports[export].size_bytes);
        out.put_u16(option::transmission_flags(&exports[export], self.framing));
        if !self.no_zeroes {
            out.put_bytes(0, 124);
        }
        Ok(Progress::Transmission(self.agreement(exports, export)))
    }

    fn agreement(&self, exports: &[ExportInfo], export: usize) -> Agreement {
        Agreement {
            export,
            framing: self.framing,
            contexts: self.chosen.filter(|(of, _)| *of == export).map_or(Contexts::default(), |(_, contexts)| contexts),
            size_bytes: exports[export].size_bytes,
            read_only: exports[export].read_only,
            sector_bytes: exports[export].sector_bytes,
        }
    }

    /// Answers INFO and GO; the export, if that is not an error.
    fn info(&self, exports: &[ExportInfo], data: &[u8], reply: &mut Replies<'_>) -> Option<usize> {
        let Some(wanted) = option::InfoRequest::parse(data) else {
            reply.invalid("name and list of information requests do not fit the option's length");
            return None;
        };
        let Some(export) = find(exports, wanted.name) else {
            reply.error(option_reply::ERR_UNKNOWN, "there is no export of this name");
            return None;
        };
        for payload in option::export_infos(&exports[export], self.framing, &wanted) {
            reply.send(option_reply::INFO, &payload);
        }
        reply.ack();
        Some(export)
    }

    fn list_contexts(&self, exports: &[ExportInfo], data: &[u8], reply: &mut Replies<'_>) {
        let Some((export, queries)) = self.context_request(exports, data, reply) else { return };
        context::listed(&exports[export], &queries).for_each(|(_, name)| reply.context(0, name));
        reply.ack();
    }

    fn set_contexts(&mut self, exports: &[ExportInfo], data: &[u8], reply: &mut Replies<'_>) {
        self.chosen = None;
        let Some((export, queries)) = self.context_request(exports, data, reply) else { return };
        let mut contexts = Contexts::default();
        for (context, name) in context::chosen(&exports[export], &queries) {
            contexts = contexts.with(context);
            reply.context(context::id(context), name);
        }
        self.chosen = Some((export, contexts));
        reply.ack();
    }

    /// Export and queries of a metadata option; nothing if an error was sent.
    fn context_request<'a>(
        &self,
        exports: &[ExportInfo],
        data: &'a [u8],
        reply: &mut Replies<'_>,
    ) -> Option<(usize, Vec<&'a str>)> {
        if self.framing == Framing::Simple {
            reply.invalid("contexts need structured replies or extended headers");
            return None;
        }
        let Some((name, queries)) = option::parse_context_queries(data) else {
            reply.invalid("name and queries do not fit the option's length");
            return None;
        };
        if queries.iter().any(|query| !query.contains(':')) {
            reply.invalid("a query has no namespace");
            return None;
        }
        let Some(export) = find(exports, name) else {
            reply.error(option_reply::ERR_UNKNOWN, "there is no export of this name");
            return None;
        };
        Some((export, queries))
    }
}

/// The export of a name. The empty name is the default export, if there is only one.
fn find(exports: &[ExportInfo], name: &str) -> Option<usize> {
    if name.is_empty() && exports.len() == 1 {
        return Some(0);
    }
    exports.iter().position(|export| export.name == name)
}

/// Writes replies to one option.
struct Replies<'a> {
    option: u32,
    out: &'a mut BytesMut,
}

impl Replies<'_> {
    fn send(&mut self, kind: u32, data: &[u8]) {
        self.out.put_u64(OPTION_REPLY_MAGIC);
        self.out.put_u32(self.option);
        self.out.put_u32(kind);
        self.out.put_u32(u32::try_from(data.len()).expect("replies are a few strings"));
        self.out.put_slice(data);
    }

    fn ack(&mut self) {
        self.send(option_reply::ACK, &[]);
    }

    fn error(&mut self, kind: u32, message: &str) {
        self.send(kind, message.as_bytes());
    }

    fn invalid(&mut self, message: &str) {
        self.error(option_reply::ERR_INVALID, message);
    }

    fn server(&mut self, export: &ExportInfo) {
        let mut data = Vec::with_capacity(4 + export.name.len() + export.description.len());
        data.put_u32(u32::try_from(export.name.len()).expect("names are bounded"));
        data.put_slice(export.name.as_bytes());
        data.put_slice(export.description.as_bytes());
        self.send(option_reply::SERVER, &data);
    }

    fn context(&mut self, id: u32, name: &str) {
        let mut data = Vec::with_capacity(4 + name.len());
        data.put_u32(id);
        data.put_slice(name.as_bytes());
        self.send(option_reply::META_CONTEXT, &data);
    }
}
