//! TLS 1.3 for a server of another protocol than the cluster's own: NBD.
//!
//! The same files as in `tls.rs`, a certificate of a daemon, and no ALPN, which such clients do not know. Invariants: a
//! stream comes about only after the handshake, and with [`ClientProof::Certificate`] only for clients with a certificate
//! of an authority in `ca.pem`; nothing is remembered for a resumption, so that every connection shows its certificate.
//! Absent: what is said before and after.

use super::certificates::{Identity, TlsError, Watched};
use super::tls::explain;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::pki_types::UnixTime;
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, Error, ServerConfig, version};
use std::io;
use std::path::Path;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;

/// A connection under TLS, the server's side. What was written may stay in it until it is flushed.
pub use tokio_rustls::server::TlsStream as ServerTlsStream;

/// What a client must show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientProof {
    /// A certificate of an authority in `ca.pem` that is good for clients.
    Certificate,
    /// Nothing: anybody may connect, and knows whom it talks to.
    Nothing,
}

/// A handshake that failed.
#[derive(Debug)]
pub struct TlsRefused<IO> {
    /// Why, for people.
    pub error: io::Error,
    /// What the handshake went over; the client was told already.
    pub io: IO,
}

/// The certificates of a server, read anew when their files change.
#[derive(Debug)]
pub struct ServerTls(Watched<Arc<ServerConfig>>);

impl ServerTls {
    /// Reads and checks `ca.pem`, `cert.pem` and `key.pem` in `dir`.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn load(dir: &Path, proof: ClientProof) -> Result<Self, TlsError> {
        let read: fn(&Path) -> Result<Arc<ServerConfig>, TlsError> = match proof {
            ClientProof::Certificate => |dir| server(dir, ClientProof::Certificate),
            ClientProof::Nothing => |dir| server(dir, ClientProof::Nothing),
        };
        Watched::load(dir, read).map(Self)
    }

    /// Shakes hands with a client. It decides how long that takes.
    ///
    /// # Errors
    /// [`TlsRefused`]: the client speaks no TLS 1.3, shows no certificate that is believed, or does not believe ours.
    pub async fn accept<IO>(&self, io: IO) -> Result<ServerTlsStream<IO>, TlsRefused<IO>>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let config = Arc::clone(&*self.0.current());
        let accepted = TlsAcceptor::from(config).accept(io).into_fallible().await;
        accepted.map_err(|(error, io)| TlsRefused { error: explain(error), io })
    }
}

fn server(dir: &Path, proof: ClientProof) -> Result<Arc<ServerConfig>, TlsError> {
    let own = Identity::read(dir)?;
    if is_for_clients_alone(&own) {
        return Err(TlsError::ForClients { dir: dir.to_owned() });
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone()).with_protocol_versions(&[&version::TLS13]);
    let builder = builder.map_err(|e| TlsError::unusable(dir, e))?;
    let builder = match proof {
        ClientProof::Certificate => {
            let verifier = WebPkiClientVerifier::builder_with_provider(own.roots, provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|e| TlsError::unusable(dir, e))?)
        }
        ClientProof::Nothing => builder.with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(own.chain, own.key).map_err(|e| TlsError::unusable(dir, e))?;
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(Arc::new(config))
}

/// Whether the certificate's usages leave out servers, as far as its authority is one of ours and tells.
fn is_for_clients_alone(own: &Identity) -> bool {
    let Some((first, between)) = own.chain.split_first() else { return false };
    let algorithms = rustls::crypto::ring::default_provider().signature_verification_algorithms.all;
    let verified = ParsedCertificate::try_from(first).and_then(|first| {
        verify_server_cert_signed_by_trust_anchor(&first, &own.roots, between, UnixTime::now(), algorithms)
    });
    let purpose = |e: &CertificateError| {
        matches!(e, CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. })
    };
    matches!(verified, Err(Error::InvalidCertificate(e)) if purpose(&e))
}
