//! `ogee vhost-blk attach`, `detach`, `ls`, `stats`: one request to a daemon's control socket each.
//!
//! Invariants: paths go to the daemon absolute, because it has a working directory of its own; an answer takes at most
//! [`VHOST_CONTROL_REPLY_BYTES_MAX`] bytes and [`VHOST_CONTROL_REPLY_LIMIT`] of time. A command that gives up has not undone
//! anything: the daemon goes on with what it was asked.

use super::protocol::{Attach, Detach, Figures, KindFigures, Listed, Reply, Request, Which, parse_reply, request_line};
use super::spec::Spec;
use super::{AttachArgs, ControlArgs, DetachArgs};
use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use crate::output::{Table, date};
use ogee_common::limits::{VHOST_CONTROL_REPLY_BYTES_MAX, VHOST_CONTROL_REPLY_LIMIT};
use ogee_common::name::VolumeRef;
use ogee_common::size::ByteLen;
use serde::Serialize;
use std::io::{self, ErrorKind as IoKind};
use std::path::{Path, PathBuf};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

#[derive(Debug, Serialize)]
struct Attached<'a> {
    attached: bool,
    volume: &'a str,
    socket: &'a Path,
    read_only: bool,
    queues: u16,
}

#[derive(Debug, Serialize)]
struct Detached<'a> {
    detached: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    volume: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<&'a Path>,
}

/// Carries out `ogee vhost-blk attach`.
///
/// # Errors
/// No daemon answers, or what it refused.
pub(super) async fn attach(context: &Context, args: AttachArgs) -> Result<(), CliError> {
    let socket = match &args.socket {
        Some(path) => absolute(path)?,
        None => default_socket(&args.control.control, &args.volume)?,
    };
    let spec = Spec {
        volume: args.volume.to_string(),
        socket,
        read_only: args.read_only,
        queues: args.queues,
        serial: args.serial,
        socket_mode: args.socket_mode,
        socket_group: args.socket_group,
    };
    let attached = Attached { attached: true, volume: &spec.volume, socket: &spec.socket, read_only: spec.read_only, queues: spec.queues };
    let doing = format!("attach {}", spec.volume);
    let request = Request::Attach(Attach { spec: spec.clone(), steal: args.steal });
    expect_done(ask(&args.control.control, request).await).map_err(|e| e.within(doing))?;
    context.out.result(&attached, |it| format!("attached: {} on {}", it.volume, it.socket.display()))
}

/// Carries out `ogee vhost-blk detach`.
///
/// # Errors
/// No daemon answers, or what it refused.
pub(super) async fn detach(context: &Context, args: DetachArgs) -> Result<(), CliError> {
    let (what, of) = match (&args.volume, &args.socket) {
        (Some(volume), _) => (volume.to_string(), Which::Volume(volume.to_string())),
        (None, Some(socket)) => (socket.display().to_string(), Which::Socket(absolute(socket)?)),
        (None, None) => return Err(CliError::new(ErrorKind::Usage, "name a volume, or give --socket")),
    };
    let request = Request::Detach(Detach { of, force: args.force });
    let doing = format!("detach {what}");
    expect_done(ask(&args.control.control, request).await).map_err(|e| e.within(doing))?;
    let volume = args.volume.as_ref().map(ToString::to_string);
    let detached = Detached { detached: true, volume, socket: args.socket.as_deref() };
    context.out.result(&detached, |_| format!("detached: {what}"))
}

/// Carries out `ogee vhost-blk ls`.
///
/// # Errors
/// No daemon answers.
pub(super) async fn list(context: &Context, args: &ControlArgs) -> Result<(), CliError> {
    match ask(&args.control, Request::List).await.map_err(|e| e.within("list volumes"))? {
        Reply::List(volumes) => context.out.result(&volumes, |volumes| list_table(volumes)),
        _ => Err(not_asked_for()),
    }
}

/// Carries out `ogee vhost-blk stats`.
///
/// # Errors
/// No daemon answers.
pub(super) async fn stats(context: &Context, args: &ControlArgs) -> Result<(), CliError> {
    match ask(&args.control, Request::Stats).await.map_err(|e| e.within("ask for figures"))? {
        Reply::Stats(volumes) => context.out.result(&volumes, |volumes| stats_table(volumes)),
        _ => Err(not_asked_for()),
    }
}

/// Beside the control socket, under the volume's name. Names in folders have none, because two of them could come to one file name.
fn default_socket(control: &Path, volume: &VolumeRef) -> Result<PathBuf, CliError> {
    let name = volume.to_string();
    if name.contains('/') {
        return Err(CliError::new(ErrorKind::Usage, format!("{name} lies in a folder: say with --socket where to serve it")));
    }
    Ok(absolute(control)?.with_file_name(format!("{name}.sock")))
}

fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path).map_err(|e| CliError::file("find", path, e))
}

fn expect_done(reply: Result<Reply, CliError>) -> Result<(), CliError> {
    match reply? {
        Reply::Done => Ok(()),
        _ => Err(not_asked_for()),
    }
}

fn not_asked_for() -> CliError {
    CliError::new(ErrorKind::Failure, "the daemon answered something else than it was asked")
}

/// Asks the daemon one thing.
async fn ask(control: &Path, request: Request) -> Result<Reply, CliError> {
    let line = request_line(request)?;
    let failed = |e: io::Error| {
        let (kind, hint) = match e.kind() {
            IoKind::NotFound => (ErrorKind::NotFound, " (is it running? see: ogee vhost-blk serve --help)"),
            IoKind::ConnectionRefused => (ErrorKind::Unavailable, " (nobody listens there any more)"),
            _ => (ErrorKind::Failure, ""),
        };
        CliError::caused(kind, format!("ask the daemon at {}{hint}", control.display()), e)
    };
    let answer = async {
        let mut stream = UnixStream::connect(control).await?;
        // A daemon that turns us away may have closed already; what it said is there to be read.
        let sent = stream.write_all(line.as_bytes()).await;
        let mut answer = vec![];
        let limit = u64::try_from(VHOST_CONTROL_REPLY_BYTES_MAX).unwrap_or(u64::MAX);
        let read = BufReader::new(stream).take(limit).read_until(b'\n', &mut answer).await;
        if answer.last() == Some(&b'\n') {
            return Ok(answer);
        }
        sent?;
        read?;
        Err(io::Error::new(IoKind::UnexpectedEof, "it closed the connection without an answer"))
    };
    match tokio::time::timeout(VHOST_CONTROL_REPLY_LIMIT, answer).await {
        Ok(answer) => parse_reply(&answer.map_err(failed)?),
        Err(_) => {
            let limit = VHOST_CONTROL_REPLY_LIMIT.as_secs();
            let text = format!("the daemon at {} has not answered within {limit} s; it goes on with it", control.display());
            Err(CliError::new(ErrorKind::Unavailable, text))
        }
    }
}

fn yes_no(is: bool) -> String {
    if is { "yes".to_owned() } else { "no".to_owned() }
}

fn list_table(volumes: &[Listed]) -> String {
    let mut table = Table::new(&["VOLUME", "SIZE", "MODE", "STATE", "CONNECTED", "QUEUES", "SINCE", "SOCKET", "REASON"]);
    for it in volumes {
        let size = if it.size_bytes == 0 { "-".to_owned() } else { ByteLen(it.size_bytes).to_string() };
        table.row([
            it.volume.clone(),
            size,
            if it.read_only { "ro" } else { "rw" }.to_owned(),
            it.state.word().to_owned(),
            yes_no(it.connected),
            it.queues.to_string(),
            date(it.since_unix_ms),
            it.socket.display().to_string(),
            it.reason.clone().unwrap_or_default(),
        ]);
    }
    table.to_string()
}

fn stats_table(volumes: &[Figures]) -> String {
    let mut table = Table::new(&["VOLUME", "KIND", "IOS", "ERRORS", "BYTES", "P50", "P99", "SOCKET"]);
    for it in volumes {
        for of in it.kinds.iter().filter(|of| of.ios > 0) {
            table.row([
                it.volume.clone(),
                of.kind.clone(),
                of.ios.to_string(),
                of.errors.to_string(),
                of.bytes.to_string(),
                percentile(of, 50),
                percentile(of, 99),
                it.socket.display().to_string(),
            ]);
        }
    }
    table.to_string()
}

/// So many of a hundred IOs took less than this, as far as the buckets tell.
fn percentile(of: &KindFigures, percent: u64) -> String {
    let total: u64 = of.latency_us_log2.iter().sum();
    let wanted = u128::from(total) * u128::from(percent);
    let mut below = 0_u128;
    for (bucket, count) in of.latency_us_log2.iter().enumerate() {
        below += u128::from(*count);
        let is_last = bucket + 1 == of.latency_us_log2.len();
        if total > 0 && below * 100 >= wanted {
            // A daemon of another build may have more buckets than a number has bits.
            let end = u32::try_from(bucket + 1).ok().and_then(|bits| 1_u64.checked_shl(bits)).unwrap_or(u64::MAX);
            return if is_last { format!(">={} us", end / 2) } else { format!("<{end} us") };
        }
    }
    "-".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(latency: &[u64]) -> KindFigures {
        KindFigures { kind: "read".to_owned(), ios: 1, errors: 0, bytes: 512, latency_us_log2: latency.to_vec() }
    }

    #[test]
    fn percentiles_are_ends_of_buckets() {
        assert_eq!(percentile(&kind(&[]), 50), "-");
        assert_eq!(percentile(&kind(&[0, 0]), 50), "-");
        let figures = kind(&[0, 50, 49, 1]);
        assert_eq!(percentile(&figures, 50), "<4 us");
        assert_eq!(percentile(&figures, 99), "<8 us");
        assert_eq!(percentile(&figures, 100), ">=8 us");
        assert_eq!(percentile(&kind(&[0; 70].map(|n: u64| n + 1)), 100), format!(">={} us", u64::MAX / 2));
    }

    #[test]
    fn tables_show_what_waits_and_why() {
        let listed = Listed {
            volume: "vm1".to_owned(),
            socket: "/s".into(),
            read_only: true,
            state: super::super::protocol::Phase::Waiting,
            connected: false,
            queues: 8,
            size_bytes: 0,
            since_unix_ms: 0,
            reason: Some("open vm1: because".to_owned()),
        };
        let table = list_table(&[listed]);
        assert!(table.contains("waiting") && table.contains("open vm1: because") && table.contains("  ro  "), "{table}");
        let figures = Figures {
            volume: "vm1".to_owned(),
            socket: "/s".into(),
            connections: 1,
            resubmitted: 0,
            in_flight: 0,
            throttled: 0,
            kinds: vec![kind(&[0, 1]), KindFigures { kind: "flush".to_owned(), ios: 0, ..kind(&[]) }],
        };
        let table = stats_table(&[figures]);
        assert!(table.contains("read") && !table.contains("flush"), "{table}");
    }

    #[test]
    fn sockets_are_beside_the_control_socket() {
        let volume = |name| VolumeRef::parse(name).expect("a name");
        let control = Path::new("/run/ogee/vhost-blk.control");
        assert_eq!(default_socket(control, &volume("vm1")).expect("a path"), Path::new("/run/ogee/vm1.sock"));
        assert_eq!(default_socket(control, &volume("team/vm1")).expect_err("a folder").kind(), ErrorKind::Usage);
    }
}
