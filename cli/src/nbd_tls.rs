//! TLS of `ogee nbd serve`: its options, and what they mean for clients.
//!
//! The files are those of a daemon (`ogee tls daemon`), not of this process as a client of the cluster (`--tls-dir`).
//! Policy: with certificates every client must use TLS and show one, unless asked for otherwise; without them everything
//! goes in the clear, and if other hosts can connect, the log says so.

use crate::error::{CliError, ErrorKind};
use clap::{Args, ValueEnum};
use ogee_nbd::{NbdTls, TlsMode};
use ogee_proto::net::{ClientProof, ServerTls};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// Options of `ogee nbd serve`.
#[derive(Debug, Clone, Args)]
pub(crate) struct NbdTlsArgs {
    /// Serve with TLS: folder with ca.pem, cert.pem and key.pem, as `ogee tls daemon` makes it. Clients must show a
    /// certificate of an authority in ca.pem
    #[arg(long, value_name = "DIR")]
    tls: Option<PathBuf>,
    /// Which clients must use TLS [default: required]
    #[arg(long, value_name = "MODE", value_enum, requires = "tls")]
    tls_mode: Option<TlsModeArg>,
    /// Let clients in that show no certificate; they still know whom they talk to
    #[arg(long, requires = "tls")]
    tls_anonymous: bool,
}

/// Which clients must use TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TlsModeArg {
    /// All
    Required,
    /// Those that come by TCP; the UNIX socket has its permissions
    Tcp,
    /// None: who wants to uses it. Keeps nobody out
    Allowed,
}

/// First words of the URIs of an export.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Schemes {
    /// On the UNIX socket.
    pub(crate) unix: &'static str,
    /// On TCP.
    pub(crate) tcp: &'static str,
}

impl NbdTlsArgs {
    fn mode(&self) -> Option<TlsModeArg> {
        self.tls.as_ref().map(|_| self.tls_mode.unwrap_or(TlsModeArg::Required))
    }

    /// Reads and checks the certificates.
    ///
    /// # Errors
    /// They are of no use ([`ErrorKind::Usage`]).
    pub(crate) fn load(&self) -> Result<Option<NbdTls>, CliError> {
        let (Some(dir), Some(mode)) = (&self.tls, self.mode()) else { return Ok(None) };
        let proof = if self.tls_anonymous { ClientProof::Nothing } else { ClientProof::Certificate };
        let certificates = ServerTls::load(dir, proof).map_err(|e| {
            CliError::caused(ErrorKind::Usage, "set TLS up", e).with_advice("ogee tls daemon makes a certificate")
        })?;
        let mode = match mode {
            TlsModeArg::Required => TlsMode::Required,
            TlsModeArg::Tcp => TlsMode::RequiredOnTcp,
            TlsModeArg::Allowed => TlsMode::Allowed,
        };
        Ok(Some(NbdTls { certificates: Arc::new(certificates), mode }))
    }

    /// What clients write to be let in.
    pub(crate) fn schemes(&self) -> Schemes {
        let mode = self.mode();
        Schemes {
            unix: if mode == Some(TlsModeArg::Required) { "nbds+unix" } else { "nbd+unix" },
            tcp: if matches!(mode, Some(TlsModeArg::Required | TlsModeArg::Tcp)) { "nbds" } else { "nbd" },
        }
    }

    /// Says in the log when other hosts may read and write without anything that keeps them from it.
    pub(crate) fn warn_of_open_addresses(&self, listen: &[SocketAddr]) {
        let what = match self.mode() {
            None => "there is no TLS",
            Some(TlsModeArg::Allowed) => "TLS is not required",
            Some(TlsModeArg::Required | TlsModeArg::Tcp) if self.tls_anonymous => {
                "no certificate is asked for"
            }
            Some(TlsModeArg::Required | TlsModeArg::Tcp) => return,
        };
        for addr in listen.iter().filter(|addr| !addr.ip().to_canonical().is_loopback()) {
            tracing::warn!(target: "controlpath", %addr, "whoever reaches this address can read and write: {what}");
        }
    }
}
