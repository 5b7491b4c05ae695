//! An authority, a server and clients with certificates of it, for tests of TLS. The server is called `localhost`.

use ogee_proto::net::{CA_FILE, CERTIFICATE_FILE, ClientProof, KEY_FILE, ServerTls};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose as Usage, IsCa, Issuer, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use std::sync::Arc;

/// Makes certificates.
pub(crate) struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// Certificate and key.
    fn issue(&self, usage: Usage) -> (String, String) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    pub(crate) fn server(&self, proof: ClientProof) -> ServerTls {
        let dir = tempfile::tempdir().unwrap();
        let (certificate, key) = self.issue(Usage::ServerAuth);
        for (file, text) in [(CA_FILE, &self.pem), (CERTIFICATE_FILE, &certificate), (KEY_FILE, &key)] {
            std::fs::write(dir.path().join(file), text).unwrap();
        }
        ServerTls::load(dir.path(), proof).unwrap()
    }

    /// A client that believes this authority and shows a certificate of it.
    pub(crate) fn client(&self) -> Arc<ClientConfig> {
        self.client_of(self)
    }

    /// A client that believes `server` and shows a certificate of this authority.
    pub(crate) fn client_of(&self, server: &Self) -> Arc<ClientConfig> {
        let (certificate, key) = self.issue(Usage::ClientAuth);
        let chain = vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()];
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        Arc::new(server.believed().with_client_auth_cert(chain, key).unwrap())
    }

    pub(crate) fn client_without_certificate(&self) -> Arc<ClientConfig> {
        Arc::new(self.believed().with_no_client_auth())
    }

    fn believed(&self) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider);
        builder.with_protocol_versions(&[&rustls::version::TLS13]).unwrap().with_root_certificates(roots)
    }
}
