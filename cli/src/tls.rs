//! `ogee tls`: an authority for the cluster, and certificates for its daemons and clients.
//!
//! Whoever has an authority already uses its own tools; these commands make what `docs/tls.md` describes and nothing
//! else. Invariants: nothing that exists is overwritten; private keys are readable by their owner alone; the authority's
//! key never leaves its folder. All authorities made here have one name, so that only the key is needed to issue.

use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use clap::{Args, Subcommand};
use ogee_common::clock;
use ogee_proto::net::{CA_FILE, CERTIFICATE_FILE, KEY_FILE};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};
use serde::Serialize;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

/// PEM file of the authority's key, in the authority's folder only.
const CA_KEY_FILE: &str = "ca-key.pem";
/// The subject of every authority made here.
const CA_NAME: &str = "Ogee cluster authority";
/// An authority is valid this long.
const CA_DAYS: u32 = 3650;
/// A certificate is valid this long unless said otherwise.
const DAYS: u32 = 730;
/// Names by which other NBD clients (libnbd, QEMU) look for a client's files: links to ours.
const NBD_NAMES: [(&str, &str); 3] =
    [(CA_FILE, "ca-cert.pem"), (CERTIFICATE_FILE, "client-cert.pem"), (KEY_FILE, "client-key.pem")];
/// Certificates are valid from a little earlier, for hosts whose clocks differ.
const BACKDATED: Duration = Duration::from_secs(3600);

/// The commands.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum TlsCommand {
    /// Make an authority: its certificate and its key, in a new folder
    #[command(after_help = "Example:\n  ogee tls authority /root/ogee-ca\n\nKeep the folder off the hosts of the cluster: who has ca-key.pem can make certificates.")]
    Authority(AuthorityArgs),
    /// Make a certificate for the daemons of a host: all that others may call it by
    #[command(after_help = "Example:\n  ogee tls daemon 10.0.0.11 node-11.example --authority /root/ogee-ca --out node-11\n\n\
        Copy the folder to the host and name it in the daemons' configuration:\n  [tls]\n  dir = \"/etc/ogee/tls\"")]
    Daemon(DaemonCertificateArgs),
    /// Make a certificate for a client: vhost-blk, commands, an NBD client
    #[command(after_help = "Example:\n  ogee tls client hypervisor-7 --authority /root/ogee-ca --out hypervisor-7\n\n\
        Use it with --tls-dir DIR or OGEE_TLS_DIR=DIR. NBD clients that are not ours find their names in it as well:\n  \
        nbdinfo 'nbds://10.0.0.5:10809/vm1?tls-certificates=/etc/ogee/tls'")]
    Client(ClientCertificateArgs),
}

/// Arguments of `tls authority`.
#[derive(Debug, Clone, Args)]
pub(crate) struct AuthorityArgs {
    /// The folder to make
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// What every certificate needs.
#[derive(Debug, Clone, Args)]
struct Issued {
    /// Folder of the authority
    #[arg(long, value_name = "DIR")]
    authority: PathBuf,
    /// The folder to make, with ca.pem, cert.pem and key.pem
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Days until it expires
    #[arg(long, value_name = "N", default_value_t = DAYS, value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,
}

/// Arguments of `tls daemon`.
#[derive(Debug, Clone, Args)]
pub(crate) struct DaemonCertificateArgs {
    /// Addresses and names by which others connect to the host
    #[arg(required = true, value_name = "ADDRESS")]
    addresses: Vec<String>,
    #[command(flatten)]
    issued: Issued,
}

/// Arguments of `tls client`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ClientCertificateArgs {
    /// Who it is, for people
    #[arg(value_name = "NAME")]
    name: String,
    #[command(flatten)]
    issued: Issued,
}

/// What was made.
#[derive(Debug, Serialize)]
struct MadeView {
    dir: String,
    files: Vec<&'static str>,
}

/// Carries out a command.
///
/// # Errors
/// A folder exists, the authority cannot be read, or a name is none.
pub(crate) fn run(context: &Context, command: TlsCommand) -> Result<(), CliError> {
    let (dir, files) = match command {
        TlsCommand::Authority(args) => {
            authority(&args.folder)?;
            (args.folder, vec![CA_FILE, CA_KEY_FILE])
        }
        TlsCommand::Daemon(DaemonCertificateArgs { addresses, issued }) => {
            issue(&issued.authority, &issued.out, Holder::Daemon(&addresses), issued.days)?;
            (issued.out, vec![CA_FILE, CERTIFICATE_FILE, KEY_FILE])
        }
        TlsCommand::Client(ClientCertificateArgs { name, issued }) => {
            issue(&issued.authority, &issued.out, Holder::Client(&name), issued.days)?;
            (issued.out, vec![CA_FILE, CERTIFICATE_FILE, KEY_FILE])
        }
    };
    let view = MadeView { dir: dir.display().to_string(), files };
    context.out.result(&view, |v| format!("made {} in {}", v.files.join(", "), v.dir))
}

/// Who a certificate is for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Holder<'a> {
    /// The daemons of a host, which is called by these addresses and names.
    Daemon(&'a [String]),
    /// A client of this name.
    Client(&'a str),
}

/// Makes an authority in the new folder `dir`.
///
/// # Errors
/// The folder exists, or cannot be made.
pub(crate) fn authority(dir: &Path) -> Result<(), CliError> {
    let failed = |e: rcgen::Error| CliError::caused(ErrorKind::Failure, "make an authority", e);
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = authority_params().self_signed(&key).map_err(failed)?;
    make_folder(dir)?;
    write_new(&dir.join(CA_KEY_FILE), &key.serialize_pem(), 0o600)?;
    write_new(&dir.join(CA_FILE), &certificate.pem(), 0o644)
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    name(&mut params, CA_NAME);
    validity(&mut params, CA_DAYS);
    params
}

fn name(params: &mut CertificateParams, name: &str) {
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
}

fn validity(params: &mut CertificateParams, days: u32) {
    let now = UNIX_EPOCH + Duration::from_millis(clock::unix_ms());
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + Duration::from_secs(u64::from(days) * 86_400)).into();
}

/// Makes a certificate of the authority in the new folder `out`.
///
/// # Errors
/// The authority cannot be read, an address or name is none, or the folder exists.
pub(crate) fn issue(authority: &Path, out: &Path, holder: Holder<'_>, days: u32) -> Result<(), CliError> {
    let failed = |e: rcgen::Error| CliError::caused(ErrorKind::Failure, "make a certificate", e);
    let read = |file: &str| {
        let path = authority.join(file);
        std::fs::read_to_string(&path).map_err(|e| {
            CliError::file("read", &path, e).with_advice("make an authority first: ogee tls authority DIR")
        })
    };
    let (ca, ca_key) = (read(CA_FILE)?, read(CA_KEY_FILE)?);
    let bad_key = |e| CliError::caused(ErrorKind::Usage, format!("read {}", authority.join(CA_KEY_FILE).display()), e);
    let issuer = Issuer::new(authority_params(), KeyPair::from_pem(&ca_key).map_err(bad_key)?);
    let (names, common, usages) = match holder {
        Holder::Daemon(addresses) => {
            let usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            (addresses.to_vec(), addresses.first().map_or("daemon", String::as_str), usages)
        }
        Holder::Client(name) => (vec![], name, vec![ExtendedKeyUsagePurpose::ClientAuth]),
    };
    let bad_name = |e| CliError::caused(ErrorKind::Usage, format!("addresses {}", names.join(", ")), e);
    let mut params = CertificateParams::new(names.clone()).map_err(bad_name)?;
    name(&mut params, common);
    validity(&mut params, days);
    // QEMU wants the second for every key, although only RSA's can be used so.
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages = usages;
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.signed_by(&key, &issuer).map_err(failed)?;
    make_folder(out)?;
    write_new(&out.join(CA_FILE), &ca, 0o644)?;
    write_new(&out.join(CERTIFICATE_FILE), &certificate.pem(), 0o644)?;
    if matches!(holder, Holder::Client(_)) {
        for (file, other) in NBD_NAMES {
            let link = out.join(other);
            std::os::unix::fs::symlink(file, &link).map_err(|e| CliError::file("create", &link, e))?;
        }
    }
    // The key comes last: a folder that has it is whole.
    write_new(&out.join(KEY_FILE), &key.serialize_pem(), 0o600)
}

fn make_folder(dir: &Path) -> Result<(), CliError> {
    std::fs::create_dir(dir).map_err(|e| CliError::file("create", dir, e))
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), CliError> {
    let opened = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = opened.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.map_err(|e| CliError::file("write", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_proto::net::{ClientProof, Network, ServerTls, TlsConfig, TlsError};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_is_made_can_be_used_and_nothing_is_overwritten() {
        let dir = tempfile::tempdir().expect("a folder");
        let at = |name: &str| dir.path().join(name);
        let error = issue(&at("ca"), &at("x"), Holder::Client("x"), 1).expect_err("no authority");
        assert!(error.kind() == ErrorKind::NotFound && error.chain().contains("ogee tls authority"), "{}", error.chain());
        authority(&at("ca")).expect("an authority");
        issue(&at("ca"), &at("d"), Holder::Daemon(&["127.0.0.1".to_owned(), "node".to_owned()]), 1).expect("a daemon");
        issue(&at("ca"), &at("c"), Holder::Client("me"), 1).expect("a client");
        for made in ["d", "c"] {
            let config = TlsConfig { dir: at(made), loopback: true };
            Network::new(Some(&config)).expect("certificates that can be used");
            let mode = std::fs::metadata(at(made).join(KEY_FILE)).expect("a key").permissions().mode();
            assert_eq!(mode & 0o077, 0, "others may read the key of {made}");
        }
        for (file, other) in NBD_NAMES {
            let same = |name: &str| std::fs::read(at("c").join(name)).expect("a file");
            assert_eq!(same(file), same(other));
            assert!(!at("d").join(other).exists(), "a daemon is no NBD client");
        }
        let serves = |made: &str| ServerTls::load(&at(made), ClientProof::Certificate);
        serves("d").expect("a certificate for a server");
        let error = serves("c").expect_err("a client's certificate");
        assert!(matches!(error, TlsError::ForClients { .. }), "{error}");
        assert_eq!(authority(&at("ca")).expect_err("exists").kind(), ErrorKind::Conflict);
        assert_eq!(issue(&at("ca"), &at("d"), Holder::Client("x"), 1).expect_err("exists").kind(), ErrorKind::Conflict);
    }
}
