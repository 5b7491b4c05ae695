//! The language of the control socket: one JSON object on one line asks, one answers. Pure; documented in `docs/vhost-user-blk.md`.
//!
//! ```text
//! > {"version":1,"request":{"attach":{"spec":{"volume":"vm1","socket":"/run/ogee/vm1.sock"}}}}
//! < {"version":1,"reply":"done"}
//! > {"version":1,"request":"list"}
//! < {"version":1,"reply":{"list":[{"volume":"vm1", ...}]}}
//! > nonsense
//! < {"version":1,"reply":{"error":{"kind":"usage","message":"request: expected ident at line 1 column 2"}}}
//! ```
//!
//! Invariants: no bytes make the parser panic or take more memory than a few times their own; an unknown field, command or version is
//! an error and is never passed over. Both sides are one program, so there is one version; the number is for the day on which
//! they are not.

use super::spec::Spec;
use crate::error::{CliError, ErrorKind};
use ogee_common::limits::VHOST_CONTROL_LINE_BYTES_MAX;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::path::PathBuf;

/// The version that is spoken.
pub(crate) const VERSION: u32 = 1;

/// What a client may ask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    /// Attach a volume and serve it; answered when its socket can be connected to.
    Attach(Attach),
    /// Stop serving a volume and give it back; answered when that is done.
    Detach(Detach),
    /// What is attached.
    List,
    /// What the volumes did.
    Stats,
}

/// See [`Request::Attach`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Attach {
    /// What and where.
    pub spec: Spec,
    /// Take it from the client that has it attached.
    #[serde(default)]
    pub steal: bool,
}

/// See [`Request::Detach`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Detach {
    /// Which.
    pub of: Which,
    /// Also under a front end, which loses its disk.
    #[serde(default)]
    pub force: bool,
}

/// How an attached volume is named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Which {
    /// By its name; refused if several sockets have it.
    Volume(String),
    /// By its socket, an absolute path.
    Socket(PathBuf),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// An attach or detach is done.
    Done,
    /// What is attached, by socket.
    List(Vec<Listed>),
    /// What the volumes did, by socket.
    Stats(Vec<Figures>),
    /// It was refused or failed.
    Error(Refusal),
}

/// How an attached volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// It is being attached.
    Starting,
    /// Its socket is served.
    Serving,
    /// As serving, but another client has taken the volume: every IO of the guest fails.
    Fenced,
    /// It could not be attached, or its server ended; it is tried again.
    Waiting,
    /// It is being given back.
    Leaving,
}

impl Phase {
    /// The word for people.
    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Fenced => "fenced",
            Self::Waiting => "waiting",
            Self::Leaving => "leaving",
        }
    }
}

/// One attached volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listed {
    /// Its name.
    pub volume: String,
    /// Where it is served.
    pub socket: PathBuf,
    /// Whether writes are refused.
    pub read_only: bool,
    /// How it is.
    pub state: Phase,
    /// Whether a front end is connected.
    pub connected: bool,
    /// Queues offered.
    pub queues: u16,
    /// Its size; 0 while it is not attached.
    pub size_bytes: u64,
    /// Since when it is attached, Unix time; 0 while it is not.
    pub since_unix_ms: u64,
    /// Why it waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What a volume did since it was attached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Figures {
    /// Its name.
    pub volume: String,
    /// Where it is served.
    pub socket: PathBuf,
    /// Front ends that connected.
    pub connections: u64,
    /// Requests of a dead daemon that were run again.
    pub resubmitted: u64,
    /// IOs that have not ended.
    pub in_flight: u64,
    /// IOs that waited for the volume's limits.
    pub throttled: u64,
    /// By kind of IO: read, write, flush, discard, write_zeroes.
    pub kinds: Vec<KindFigures>,
}

/// What a volume did of one kind of IO.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct KindFigures {
    /// Which.
    pub kind: String,
    /// IOs that ended, well or not.
    pub ios: u64,
    /// Of these, those that failed.
    pub errors: u64,
    /// Bytes of those that ended well.
    pub bytes: u64,
    /// Entry `i` counts IOs that took from 2^i up to 2^(i+1) microseconds, the last one all longer.
    pub latency_us_log2: Vec<u64>,
}

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refusal {
    /// What a script can act on.
    #[serde(serialize_with = "write_kind", deserialize_with = "read_kind")]
    pub kind: ErrorKind,
    /// One line.
    pub message: String,
}

impl Refusal {
    /// A refusal.
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

impl From<CliError> for Refusal {
    fn from(error: CliError) -> Self {
        Self::new(error.kind(), error.chain())
    }
}

impl From<Refusal> for CliError {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.kind, refusal.message)
    }
}

fn write_kind<S: Serializer>(kind: &ErrorKind, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(kind.as_str())
}

fn read_kind<'de, D: Deserializer<'de>>(from: D) -> Result<ErrorKind, D::Error> {
    use ErrorKind::{Conflict, Failure, NoSpace, NotFound, Unavailable, Usage};
    let word = String::deserialize(from)?;
    let kinds = [Failure, Usage, NotFound, Conflict, Unavailable, NoSpace];
    // A kind that a newer daemon knows is a failure to us.
    Ok(kinds.into_iter().find(|kind| kind.as_str() == word).unwrap_or(Failure))
}

/// The version alone, whatever else the line says.
#[derive(Deserialize)]
struct Spoken {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    version: u32,
    request: Request,
}

#[derive(Serialize, Deserialize)]
struct Answered {
    version: u32,
    reply: Reply,
}

/// Reads a request line, with or without its end.
///
/// # Errors
/// [`ErrorKind::Usage`]: too long, no JSON of ours, or another version.
pub(crate) fn parse_request(line: &[u8]) -> Result<Request, Refusal> {
    let wrong = |text: String| Refusal::new(ErrorKind::Usage, text);
    if line.len() > VHOST_CONTROL_LINE_BYTES_MAX {
        return Err(wrong(format!("request: longer than {VHOST_CONTROL_LINE_BYTES_MAX} bytes")));
    }
    let Spoken { version } = serde_json::from_slice(line).map_err(|e| wrong(format!("request: {e}")))?;
    if version != VERSION {
        return Err(wrong(format!("request: version {version}; this daemon speaks version {VERSION}")));
    }
    let asked: Asked = serde_json::from_slice(line).map_err(|e| wrong(format!("request: {e}")))?;
    Ok(asked.request)
}

/// A request as a line with its end.
///
/// # Errors
/// A path that is not UTF-8 ([`ErrorKind::Usage`]).
pub(crate) fn request_line(request: Request) -> Result<String, CliError> {
    let asked = Asked { version: VERSION, request };
    let line = serde_json::to_string(&asked);
    line.map(|line| line + "\n").map_err(|e| CliError::caused(ErrorKind::Usage, "write the request as JSON", e))
}

/// A reply as a line with its end.
#[must_use]
pub(crate) fn reply_line(reply: Reply) -> String {
    let line = serde_json::to_string(&Answered { version: VERSION, reply });
    line.expect("its only paths are sockets, which came as JSON and so are text") + "\n"
}

/// Reads a reply line.
///
/// # Errors
/// No JSON of ours, or another version ([`ErrorKind::Failure`]); what the daemon refused.
pub(crate) fn parse_reply(line: &[u8]) -> Result<Reply, CliError> {
    let wrong = |e| CliError::caused(ErrorKind::Failure, "read the daemon's answer", e);
    let answered: Answered = serde_json::from_slice(line).map_err(wrong)?;
    match (answered.version, answered.reply) {
        (VERSION, Reply::Error(refusal)) => Err(refusal.into()),
        (VERSION, reply) => Ok(reply),
        (version, _) => {
            let text = format!("the daemon speaks version {version} on its control socket, this command version {VERSION}");
            Err(CliError::new(ErrorKind::Failure, text))
        }
    }
}

#[cfg(test)]
mod tests;
