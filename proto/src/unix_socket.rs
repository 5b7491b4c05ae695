//! A listening UNIX socket: made with care for what is at its path already, removed at the end.
//!
//! Used by the servers of front ends (vhost-blk, nbd). Invariants: only a socket that nobody listens on is replaced, never a file and never a live
//! socket; at the end only the socket that was made here is removed, not one that somebody put in its place.

use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Bytes of a socket path: `sun_path` has 108 with the terminator (unix(7)).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Longer than [`SOCKET_PATH_BYTES_MAX`].
    #[error("listen on {path}: the path has {len} bytes, a socket path at most {SOCKET_PATH_BYTES_MAX}")]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its bytes.
        len: usize,
    },
    /// The directory does not exist or is not a directory.
    #[error("listen on {path}: there is no such directory")]
    NoDirectory {
        /// The path.
        path: PathBuf,
    },
    /// Another process listens there.
    #[error("listen on {path}: another process serves this socket")]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// Something that is not a socket is there.
    #[error("listen on {path}: there is a file that is not a socket")]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A system call failed.
    #[error("{verb} {path}")]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// A listening socket that removes its path when dropped.
#[derive(Debug)]
pub struct BoundSocket {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl BoundSocket {
    /// Listens at `path`, with the permission bits `mode` if given, else as the umask has it.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn bind(path: &Path, mode: Option<u32>) -> Result<(Self, UnixListener), SocketError> {
        let io_error = |verb| move |source| SocketError::Io { verb, path: path.to_owned(), source };
        check_path(path)?;
        if has_stale(path)? {
            fs::remove_file(path).map_err(io_error("remove stale socket"))?;
        }
        let listener = UnixListener::bind(path).map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => SocketError::InUse { path: path.to_owned() },
            _ => io_error("listen on")(source),
        })?;
        let metadata = fs::symlink_metadata(path).map_err(io_error("look at"))?;
        let socket = Self { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() };
        if let Some(mode) = mode {
            fs::set_permissions(path, Permissions::from_mode(mode)).map_err(io_error("set the mode of"))?;
        }
        Ok((socket, listener))
    }

    /// Whether [`BoundSocket::bind`] would find fault with the path or with what is there; changes nothing. Whether the folder may be written
    /// to is not looked at.
    ///
    /// # Errors
    /// See [`SocketError`].
    pub fn check(path: &Path) -> Result<(), SocketError> {
        check_path(path)?;
        has_stale(path).map(drop)
    }

    /// The socket of another process at `path`, whose listener was given to this one: from now on it is removed here.
    ///
    /// # Errors
    /// [`SocketError`]: there is none.
    pub fn adopt(path: &Path) -> Result<Self, SocketError> {
        let metadata = fs::symlink_metadata(path);
        let metadata = metadata.map_err(|source| SocketError::Io { verb: "look at", path: path.to_owned(), source })?;
        if !metadata.file_type().is_socket() {
            return Err(SocketError::NotASocket { path: path.to_owned() });
        }
        Ok(Self { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() })
    }

    /// The listener was given to another process, which removes the socket: it stays.
    pub fn leave(mut self) {
        // No socket has this number, so the drop finds another one's.
        self.inode = 0;
    }

    fn is(&self, metadata: &Metadata) -> bool {
        metadata.dev() == self.device && metadata.ino() == self.inode
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|metadata| self.is(&metadata))
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(target: "controlpath", path = %self.path.display(), %error, "socket not removed");
        }
    }
}

fn check_path(path: &Path) -> Result<(), SocketError> {
    let len = path.as_os_str().len();
    if len > SOCKET_PATH_BYTES_MAX {
        return Err(SocketError::PathTooLong { path: path.to_owned(), len });
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if directory.is_dir() { Ok(()) } else { Err(SocketError::NoDirectory { path: path.to_owned() }) }
}

/// Whether a socket is there that nobody listens on; anything else that is there is the error.
fn has_stale(path: &Path) -> Result<bool, SocketError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(source) => return Err(SocketError::Io { verb: "look at", path: path.to_owned(), source }),
    };
    if !metadata.file_type().is_socket() {
        return Err(SocketError::NotASocket { path: path.to_owned() });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
        Ok(_) => Err(SocketError::InUse { path: path.to_owned() }),
        Err(source) => Err(SocketError::Io { verb: "probe", path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        BoundSocket::check(&path).unwrap();
        assert!(path.exists(), "a closed listener leaves its socket, and a look changes nothing");
        let (socket, _listener) = BoundSocket::bind(&path, Some(0o600)).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(BoundSocket::bind(&path, None), Err(SocketError::InUse { .. })));
        assert!(matches!(BoundSocket::check(&path), Err(SocketError::InUse { .. })));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_socket_that_was_given_away_is_removed_by_its_new_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (old, _listener) = BoundSocket::bind(&path, None).unwrap();
        let new = BoundSocket::adopt(&path).unwrap();
        old.leave();
        assert!(path.exists());
        drop(new);
        assert!(!path.exists());
        assert!(BoundSocket::adopt(&path).is_err());
        fs::write(&path, "data").unwrap();
        assert!(matches!(BoundSocket::adopt(&path), Err(SocketError::NotASocket { .. })));
    }

    #[test]
    fn files_are_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(BoundSocket::bind(&path, None), Err(SocketError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"data");

        let path = dir.path().join("s");
        let (socket, _listener) = BoundSocket::bind(&path, None).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "other").unwrap();
        drop(socket);
        assert_eq!(fs::read(&path).unwrap(), b"other", "what took the socket's place stays");
    }

    #[test]
    fn a_missing_directory_and_a_long_path_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("no/s");
        assert!(matches!(BoundSocket::bind(&missing, None), Err(SocketError::NoDirectory { .. })));
        let long = dir.path().join("x".repeat(SOCKET_PATH_BYTES_MAX));
        let error = BoundSocket::bind(&long, None).unwrap_err();
        assert!(error.to_string().contains("at most 107"), "{error}");
    }
}
