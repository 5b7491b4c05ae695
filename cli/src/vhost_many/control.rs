//! The control socket of the daemon: connections, lines, answers.
//!
//! Who may connect is said by the socket's mode and group alone: 0600, or 0660 with `--control-group`; the
//! daemon makes it under a umask, so that it is never open to more, not for a moment. Who may, may do with volumes all that the daemon may. Invariants: at most
//! [`VHOST_CONTROL_CONNECTIONS_MAX`] connections, one that is silent ends after [`VHOST_CONTROL_IDLE`]; a line takes at most
//! [`VHOST_CONTROL_LINE_BYTES_MAX`] bytes of memory; whatever a line holds is answered with one line. A line that is too long ends
//! its connection, because nobody knows where the next one would begin; anything else that makes no sense does not.

use super::daemon::Daemon;
use super::protocol::{Refusal, Reply, parse_request, reply_line};
use crate::error::{CliError, ErrorKind};
use ogee_common::limits::{
    VHOST_CONTROL_ACCEPT_PAUSE, VHOST_CONTROL_CONNECTIONS_MAX, VHOST_CONTROL_IDLE, VHOST_CONTROL_LINE_BYTES_MAX,
};
use ogee_proto::unix_socket::{BoundSocket, SocketError};
use std::fs::Permissions;
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, lchown};
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// A bound control socket, removed when dropped.
pub(super) struct Control {
    listener: UnixListener,
    _socket: BoundSocket,
}

/// What came on a connection.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    /// A line without its end.
    Whole(Vec<u8>),
    /// More bytes than a line may have.
    TooLong,
    /// The peer is done; what it sent of a line before does not count.
    End,
}

impl Control {
    /// Listens at `path`, for the owner, or also for a group.
    ///
    /// # Errors
    /// The socket, its group or its mode.
    pub(super) fn bind(path: &Path, group: Option<u32>) -> Result<Self, CliError> {
        let (socket, listener) = BoundSocket::bind(path, Some(0o600)).map_err(socket_failed)?;
        if group.is_some() {
            lchown(path, None, group).map_err(|e| CliError::file("set the group of", path, e))?;
            let mode = Permissions::from_mode(0o660);
            std::fs::set_permissions(path, mode).map_err(|e| CliError::file("set the mode of", path, e))?;
        }
        let listener = listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener));
        let listener = listener.map_err(|e| CliError::file("listen on", path, e))?;
        Ok(Self { listener, _socket: socket })
    }

    /// Answers until it is dropped; the connections end with it.
    pub(super) async fn serve(self, daemon: Arc<Daemon>) {
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(ended) = connections.join_next() => {
                    if ended.is_err() {
                        tracing::error!(target: "controlpath", "a control connection's task panicked");
                    }
                    continue;
                }
            };
            match accepted {
                Ok((stream, _)) if connections.len() < VHOST_CONTROL_CONNECTIONS_MAX => {
                    connections.spawn(converse(stream, Arc::clone(&daemon)));
                }
                Ok((stream, _)) => turn_away(stream),
                Err(error) => {
                    tracing::warn!(target: "controlpath", %error, "accept a control connection");
                    tokio::time::sleep(VHOST_CONTROL_ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

fn socket_failed(error: SocketError) -> CliError {
    let kind = match &error {
        SocketError::PathTooLong { .. } | SocketError::NotASocket { .. } => ErrorKind::Usage,
        SocketError::NoDirectory { .. } => ErrorKind::NotFound,
        SocketError::InUse { .. } => ErrorKind::Conflict,
        SocketError::Io { .. } => ErrorKind::Failure,
    };
    CliError::caused(kind, "control socket", error)
}

/// Says why, if the peer takes it at once, and closes.
fn turn_away(stream: UnixStream) {
    let text = format!("{VHOST_CONTROL_CONNECTIONS_MAX} control connections are open, which is the limit");
    let line = reply_line(Reply::Error(Refusal::new(ErrorKind::Unavailable, text)));
    let said = stream.into_std().and_then(|mut stream| stream.write_all(line.as_bytes()));
    if let Err(error) = said {
        tracing::debug!(target: "controlpath", %error, "a control connection was turned away without a word");
    }
}

/// Answers line after line.
async fn converse(stream: UnixStream, daemon: Arc<Daemon>) {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    loop {
        let line = match timeout(VHOST_CONTROL_IDLE, next_line(&mut read)).await {
            Ok(Ok(line)) => line,
            Ok(Err(error)) => return tracing::debug!(target: "controlpath", %error, "control connection failed"),
            Err(_) => return tracing::debug!(target: "controlpath", "silent control connection closed"),
        };
        let (reply, is_last) = match line {
            Line::End => return,
            Line::Whole(line) => match parse_request(&line) {
                Ok(request) => (daemon.answer(request).await, false),
                Err(refusal) => (Reply::Error(refusal), false),
            },
            Line::TooLong => {
                let text = format!("request: longer than {VHOST_CONTROL_LINE_BYTES_MAX} bytes");
                (Reply::Error(Refusal::new(ErrorKind::Usage, text)), true)
            }
        };
        let line = reply_line(reply);
        let sent = timeout(VHOST_CONTROL_IDLE, write.write_all(line.as_bytes())).await;
        if is_last || !matches!(sent, Ok(Ok(()))) {
            return;
        }
    }
}

/// Reads up to the end of a line, and no more than a line may have.
async fn next_line(read: &mut (impl AsyncBufRead + Unpin)) -> io::Result<Line> {
    let mut line = vec![];
    let limit = VHOST_CONTROL_LINE_BYTES_MAX + 1;
    let mut limited = read.take(u64::try_from(limit).unwrap_or(u64::MAX));
    limited.read_until(b'\n', &mut line).await?;
    Ok(match line.pop() {
        Some(b'\n') => Line::Whole(line),
        Some(_) if line.len() + 1 == limit => Line::TooLong,
        _ => Line::End,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn lines(bytes: &[u8]) -> Vec<Line> {
        let (mut read, mut found) = (BufReader::with_capacity(16, bytes), vec![]);
        loop {
            let line = next_line(&mut read).await.expect("memory does not fail");
            let goes_on = matches!(line, Line::Whole(_));
            found.push(line);
            if !goes_on {
                return found;
            }
        }
    }

    #[tokio::test]
    async fn lines_are_cut_where_they_end_and_bounded() {
        let whole = |text: &str| Line::Whole(text.as_bytes().to_vec());
        assert_eq!(lines(b"").await, [Line::End]);
        assert_eq!(lines(b"a\n\nlonger than the buffer\nrest").await, [whole("a"), whole(""), whole("longer than the buffer"), Line::End]);
        let longest = "x".repeat(VHOST_CONTROL_LINE_BYTES_MAX);
        assert_eq!(lines(format!("{longest}\n").as_bytes()).await, [whole(&longest), Line::End]);
        assert_eq!(lines(format!("{longest}y\nz\n").as_bytes()).await, [Line::TooLong]);
    }

    #[tokio::test]
    async fn a_control_socket_is_its_owners() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("control");
        let mode = || std::fs::metadata(&path).expect("the socket").permissions().mode() & 0o777;
        let control = Control::bind(&path, None).expect("bound");
        assert_eq!(mode(), 0o600);
        let refused = Control::bind(&path, None).err().expect("in use");
        assert_eq!(refused.kind(), ErrorKind::Conflict);
        drop(control);
        assert!(!path.exists());
        let group = rustix::process::getgid().as_raw();
        let _control = Control::bind(&path, Some(group)).expect("bound");
        assert_eq!(mode(), 0o660);
        let missing = Control::bind(&dir.path().join("none/control"), None).err().expect("no folder");
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }
}
