//! TLS 1.3 with certificates on both sides.
//!
//! One directory holds what a process needs: its certificate chain, its key, and the authorities it believes. Who has a
//! certificate of the authority is in; one whose extended key usage leaves out server authentication is a client and may
//! not speak as a daemon ([`Peer`]). Invariants: a connection comes about only when both certificates were verified, the
//! server's for the very address or name that was connected to; changed files are used for new connections within
//! [`RELOAD_INTERVAL`], and files that went bad leave the old ones in use. Absent: revocation (replace the authority).

use super::{Peer, Plane, Stream};
use ogee_common::clock::{self, Instant};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig, version};
use serde::{Deserialize, Serialize};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// PEM file of the authorities whose certificates are believed.
pub const CA_FILE: &str = "ca.pem";
/// PEM file of this process's certificate, and those between it and the authority.
pub const CERTIFICATE_FILE: &str = "cert.pem";
/// PEM file of this process's private key.
pub const KEY_FILE: &str = "key.pem";

/// Files are looked at again when a connection is made and the last look is older.
const RELOAD_INTERVAL: Duration = Duration::from_secs(10);
/// ALPN of the data protocol.
const ALPN_DATA: &[u8] = b"ogee/1";
/// ALPN of gRPC.
const ALPN_CONTROL: &[u8] = b"h2";

/// Where certificates are, and for which peers they are used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// Directory with `ca.pem`, `cert.pem` and `key.pem`.
    pub dir: PathBuf,
    /// TLS also on loopback, where it is off by default. All processes of a cluster must agree.
    #[serde(default)]
    pub loopback: bool,
}

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
}

/// Who a server's certificate must be for.
#[derive(Debug, Clone)]
pub(super) enum Server {
    Address(IpAddr),
    Name(String),
}

/// The files as they were when they were last read.
#[derive(Debug)]
struct Loaded {
    data: Arc<ClientConfig>,
    control: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    roots: Arc<RootCertStore>,
}

#[derive(Debug)]
struct State {
    loaded: Arc<Loaded>,
    stamps: Stamps,
    looked: Instant,
}

/// Times of change of the three files, `None` for one that cannot be looked at.
type Stamps = [Option<SystemTime>; 3];

/// Certificates in use.
#[derive(Debug)]
pub(super) struct Tls {
    config: TlsConfig,
    state: Mutex<State>,
}

impl Tls {
    pub(super) fn load(config: TlsConfig) -> Result<Self, TlsError> {
        let stamps = stamps(&config.dir);
        let loaded = Arc::new(Loaded::read(&config.dir)?);
        Ok(Self { config, state: Mutex::new(State { loaded, stamps, looked: clock::now() }) })
    }

    pub(super) fn covers_loopback(&self) -> bool {
        self.config.loopback
    }

    /// What to use for a new connection.
    fn current(&self) -> Arc<Loaded> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() >= RELOAD_INTERVAL {
            state.looked = clock::now();
            self.reload(&mut state);
        }
        state.loaded.clone()
    }

    fn reload(&self, state: &mut State) {
        let now = stamps(&self.config.dir);
        if now == state.stamps {
            return;
        }
        match Loaded::read(&self.config.dir) {
            Ok(loaded) => {
                tracing::info!(dir = %self.config.dir.display(), "certificates were read anew");
                (state.loaded, state.stamps) = (Arc::new(loaded), now);
            }
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "changed certificates are of no use; the old ones stay in use");
            }
        }
    }

    pub(super) async fn connect(&self, stream: TcpStream, server: Server, plane: Plane) -> io::Result<Stream> {
        let loaded = self.current();
        let config = match plane {
            Plane::Data => &loaded.data,
            Plane::Control => &loaded.control,
        };
        let name = match server {
            Server::Address(ip) => ServerName::IpAddress(ip.to_canonical().into()),
            Server::Name(name) => ServerName::try_from(name).map_err(io::Error::other)?,
        };
        let stream = TlsConnector::from(config.clone()).connect(name, stream).await.map_err(explain)?;
        // Only servers have got this far, and a server's certificate was verified as such.
        Ok(Stream::tls(TlsStream::Client(stream), plane, Peer::Daemon))
    }

    pub(super) async fn accept(&self, stream: TcpStream) -> io::Result<Stream> {
        let loaded = self.current();
        let stream = TlsAcceptor::from(loaded.server.clone()).accept(stream).await.map_err(explain)?;
        let (_, session) = stream.get_ref();
        let plane = match session.alpn_protocol() {
            Some(ALPN_DATA) => Plane::Data,
            Some(ALPN_CONTROL) => Plane::Control,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "the client names no protocol (ALPN)")),
        };
        let peer = loaded.peer(session.peer_certificates().unwrap_or_default());
        Ok(Stream::tls(TlsStream::Server(stream), plane, peer))
    }
}

/// The commonest mistake by its name.
fn explain(error: io::Error) -> io::Error {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    match inner {
        Some(rustls::Error::InvalidMessage(_)) => {
            io::Error::new(io::ErrorKind::InvalidData, "the peer does not speak TLS; configure it there as well")
        }
        Some(other) => io::Error::new(io::ErrorKind::InvalidData, format!("TLS: {other}")),
        None => error,
    }
}

fn stamps(dir: &Path) -> Stamps {
    [CA_FILE, CERTIFICATE_FILE, KEY_FILE].map(|file| std::fs::metadata(dir.join(file)).and_then(|m| m.modified()).ok())
}

fn certificates(dir: &Path, file: &str, what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let path = dir.join(file);
    let fail = |why: String| TlsError::File { what, path: path.clone(), why };
    let list = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let list = list.map_err(|e| fail(e.to_string()))?;
    if list.is_empty() { Err(fail("it holds no certificate in PEM".to_owned())) } else { Ok(list) }
}

impl Loaded {
    fn read(dir: &Path) -> Result<Self, TlsError> {
        let unusable = |source: Box<dyn std::error::Error + Send + Sync>| TlsError::Unusable { dir: dir.to_owned(), source };
        let mut roots = RootCertStore::empty();
        for authority in certificates(dir, CA_FILE, "the authorities")? {
            roots.add(authority).map_err(|e| unusable(e.into()))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(dir, CERTIFICATE_FILE, "the certificate")?;
        let path = dir.join(KEY_FILE);
        let key = PrivateKeyDer::from_pem_file(&path);
        let key = key.map_err(|e| TlsError::File { what: "the private key", path, why: e.to_string() })?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build();
        let verifier = verifier.map_err(|e| unusable(e.into()))?;
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&version::TLS13])
            .and_then(|b| b.with_client_cert_verifier(verifier).with_single_cert(chain.clone(), key.clone_key()));
        let mut server = server.map_err(|e| unusable(e.into()))?;
        server.alpn_protocols = vec![ALPN_DATA.to_vec(), ALPN_CONTROL.to_vec()];
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])
            .and_then(|b| b.with_root_certificates(roots.clone()).with_client_auth_cert(chain, key));
        let client = client.map_err(|e| unusable(e.into()))?;
        let speaking = |alpn: &[u8]| {
            let mut client = client.clone();
            client.alpn_protocols = vec![alpn.to_vec()];
            Arc::new(client)
        };
        let (data, control) = (speaking(ALPN_DATA), speaking(ALPN_CONTROL));
        Ok(Self { data, control, server: Arc::new(server), roots })
    }

    /// What a verified client may be, by its certificate.
    fn peer(&self, chain: &[CertificateDer<'_>]) -> Peer {
        let Some((own, between)) = chain.split_first() else { return Peer::Client };
        let algorithms = self.server.crypto_provider().signature_verification_algorithms.all;
        let verified = ParsedCertificate::try_from(own).and_then(|own| {
            verify_server_cert_signed_by_trust_anchor(&own, &self.roots, between, UnixTime::now(), algorithms)
        });
        if verified.is_ok() { Peer::Daemon } else { Peer::Client }
    }
}
