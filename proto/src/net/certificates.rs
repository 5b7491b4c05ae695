//! The files of a process's certificates: read, checked, and read anew when they change.
//!
//! Used by `tls.rs` (connections of the cluster) and `serve.rs` (servers of other protocols). Invariants: what is in use
//! was read whole and goes together; changed files are used for new connections within [`RELOAD_INTERVAL`], and files
//! that went bad leave the old ones in use, with a warning. Absent: who is let in.

use ogee_common::clock::{self, Instant};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// PEM file of the authorities whose certificates are believed.
pub const CA_FILE: &str = "ca.pem";
/// PEM file of this process's certificate, and those between it and the authority.
pub const CERTIFICATE_FILE: &str = "cert.pem";
/// PEM file of this process's private key.
pub const KEY_FILE: &str = "key.pem";

/// Files are looked at again when a connection is made and the last look is older.
const RELOAD_INTERVAL: Duration = Duration::from_secs(10);

/// Why the files are of no use.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds none of what it should.
    #[error("read {what} from {path}: {why}")]
    File {
        /// What was looked for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What was wrong.
        why: String,
    },
    /// The files do not go together, e.g. a key of another certificate.
    #[error("use the certificate in {dir}")]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// What was found.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The certificate is for clients alone: every client would refuse a server that shows it.
    #[error("the certificate in {dir} is for clients, not for servers")]
    ForClients {
        /// The directory.
        dir: PathBuf,
    },
}

impl TlsError {
    pub(super) fn unusable(dir: &Path, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Unusable { dir: dir.to_owned(), source: source.into() }
    }
}

/// What the three files hold.
#[derive(Debug)]
pub(super) struct Identity {
    /// The authorities that are believed.
    pub(super) roots: Arc<RootCertStore>,
    /// The certificate, and those between it and its authority.
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) key: PrivateKeyDer<'static>,
}

impl Identity {
    pub(super) fn read(dir: &Path) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for authority in certificates(dir, CA_FILE, "the authorities")? {
            roots.add(authority).map_err(|e| TlsError::unusable(dir, e))?;
        }
        let chain = certificates(dir, CERTIFICATE_FILE, "the certificate")?;
        let path = dir.join(KEY_FILE);
        let key = PrivateKeyDer::from_pem_file(&path);
        let key = key.map_err(|e| TlsError::File { what: "the private key", path, why: e.to_string() })?;
        Ok(Self { roots: Arc::new(roots), chain, key })
    }
}

fn certificates(dir: &Path, file: &str, what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let path = dir.join(file);
    let fail = |why: String| TlsError::File { what, path: path.clone(), why };
    let list = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let list = list.map_err(|e| fail(e.to_string()))?;
    if list.is_empty() { Err(fail("it holds no certificate in PEM".to_owned())) } else { Ok(list) }
}

/// Times of change of the three files, `None` for one that cannot be looked at.
type Stamps = [Option<SystemTime>; 3];

fn stamps(dir: &Path) -> Stamps {
    [CA_FILE, CERTIFICATE_FILE, KEY_FILE].map(|file| std::fs::metadata(dir.join(file)).and_then(|m| m.modified()).ok())
}

#[derive(Debug)]
struct State<T> {
    loaded: Arc<T>,
    stamps: Stamps,
    looked: Instant,
}

/// What was made of the files of a directory, made anew when they change.
pub(super) struct Watched<T> {
    dir: PathBuf,
    read: fn(&Path) -> Result<T, TlsError>,
    state: Mutex<State<T>>,
}

impl<T> fmt::Debug for Watched<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl<T> Watched<T> {
    pub(super) fn load(dir: &Path, read: fn(&Path) -> Result<T, TlsError>) -> Result<Self, TlsError> {
        // Looked at first: files that change while they are read are read once more.
        let stamps = stamps(dir);
        let state = State { loaded: Arc::new(read(dir)?), stamps, looked: clock::now() };
        Ok(Self { dir: dir.to_owned(), read, state: Mutex::new(state) })
    }

    /// What to use for a new connection.
    pub(super) fn current(&self) -> Arc<T> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() >= RELOAD_INTERVAL {
            state.looked = clock::now();
            self.reload(&mut state);
        }
        state.loaded.clone()
    }

    fn reload(&self, state: &mut State<T>) {
        let now = stamps(&self.dir);
        if now == state.stamps {
            return;
        }
        match (self.read)(&self.dir) {
            Ok(loaded) => {
                tracing::info!(dir = %self.dir.display(), "certificates were read anew");
                (state.loaded, state.stamps) = (Arc::new(loaded), now);
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "changed certificates are of no use; the old ones stay in use");
            }
        }
    }
}
