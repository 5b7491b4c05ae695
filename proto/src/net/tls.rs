//! TLS 1.3 with certificates on both sides.
//!
//! One directory holds what a process needs: its certificate chain, its key, and the authorities it believes. Who has a
//! certificate of the authority is in; one whose extended key usage leaves out server authentication is a client and may
//! not speak as a daemon ([`Peer`]). Invariants: a connection comes about only when both certificates were verified, the
//! server's for the very address or name that was connected to. Files: `certificates.rs`. Absent: revocation (replace the
//! authority).

use super::certificates::{Identity, TlsError, Watched};
use super::{Peer, Plane, Stream};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, ClientConfig, RootCertStore, ServerConfig, version};
use serde::{Deserialize, Serialize};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

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

/// Certificates in use.
#[derive(Debug)]
pub(super) struct Tls {
    loopback: bool,
    files: Watched<Loaded>,
}

impl Tls {
    pub(super) fn load(config: &TlsConfig) -> Result<Self, TlsError> {
        Ok(Self { loopback: config.loopback, files: Watched::load(&config.dir, Loaded::read)? })
    }

    pub(super) fn covers_loopback(&self) -> bool {
        self.loopback
    }

    pub(super) async fn connect(&self, stream: TcpStream, server: Server, plane: Plane) -> io::Result<Stream> {
        let loaded = self.files.current();
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
        let loaded = self.files.current();
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

/// The commonest mistakes by their names.
pub(super) fn explain(error: io::Error) -> io::Error {
    let Some(inner) = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) else { return error };
    let text = match inner {
        rustls::Error::InvalidMessage(_) => "the peer does not speak TLS; configure it there as well".to_owned(),
        rustls::Error::NoCertificatesPresented => "TLS: the peer shows no certificate".to_owned(),
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "TLS: the peer's certificate is not of an authority in ca.pem".to_owned()
        }
        rustls::Error::AlertReceived(alert) => format!("TLS: the peer refuses: {alert:?}"),
        other => format!("TLS: {other}"),
    };
    io::Error::new(io::ErrorKind::InvalidData, text)
}

impl Loaded {
    fn read(dir: &Path) -> Result<Self, TlsError> {
        let Identity { roots, chain, key } = Identity::read(dir)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build();
        let verifier = verifier.map_err(|e| TlsError::unusable(dir, e))?;
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&version::TLS13])
            .and_then(|b| b.with_client_cert_verifier(verifier).with_single_cert(chain.clone(), key.clone_key()));
        let mut server = server.map_err(|e| TlsError::unusable(dir, e))?;
        server.alpn_protocols = vec![ALPN_DATA.to_vec(), ALPN_CONTROL.to_vec()];
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])
            .and_then(|b| b.with_root_certificates(roots.clone()).with_client_auth_cert(chain, key));
        let client = client.map_err(|e| TlsError::unusable(dir, e))?;
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
