//! NBD under TLS: real clients (libnbd, its tools, QEMU's tools) with certificates of `ogee tls`, and those that must not be let in.
//!
//! GnuTLS is on the other side, so this is also the test that our certificates suit it.

use anyhow::{Context, Result, ensure};
use ogee_vm_tests::cluster::Cluster;
use ogee_vm_tests::deadline::wait_for;
use ogee_vm_tests::nbd::{NbdServer, client, script};
use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};
use std::path::{Path, PathBuf};
use std::time::Duration;

const MIB: usize = 1 << 20;
/// For a line of the server's log.
const LOG_LIMIT: Duration = Duration::from_secs(60);

fn text(path: &Path) -> &str {
    path.to_str().expect("scratch paths are plain")
}

/// Folders with certificates, made by `ogee tls`.
struct Certificates {
    /// Of the server, for 127.0.0.1.
    server: PathBuf,
    /// Of a client of the same authority.
    client: PathBuf,
    /// Believes the server's authority, and has a certificate of another one.
    stranger: PathBuf,
    /// Believes the server's authority, and has no certificate.
    anonymous: PathBuf,
    /// Has a certificate of the server's authority, and believes another one.
    unbelieving: PathBuf,
}

impl Certificates {
    fn make(cluster: &Cluster) -> Result<Self> {
        let at = |name: &str| cluster.folder().join(name);
        let [ca, other, server, good, foreign] = ["ca", "other", "server", "client", "foreign"].map(at);
        cluster.ok(&["tls", "authority", text(&ca)])?;
        cluster.ok(&["tls", "authority", text(&other)])?;
        cluster.ok(&["tls", "daemon", "127.0.0.1", "localhost", "--authority", text(&ca), "--out", text(&server)])?;
        cluster.ok(&["tls", "client", "me", "--authority", text(&ca), "--out", text(&good)])?;
        cluster.ok(&["tls", "client", "me", "--authority", text(&other), "--out", text(&foreign)])?;
        let mix = |name: &str, authority: &Path, own: Option<&Path>| -> Result<PathBuf> {
            let folder = at(name);
            std::fs::create_dir(&folder)?;
            std::fs::copy(authority.join("ca.pem"), folder.join("ca-cert.pem"))?;
            for file in ["client-cert.pem", "client-key.pem"] {
                own.map(|own| std::fs::copy(own.join(file), folder.join(file))).transpose()?;
            }
            Ok(folder)
        };
        Ok(Self {
            stranger: mix("stranger", &ca, Some(&foreign))?,
            anonymous: mix("anonymous", &ca, None)?,
            unbelieving: mix("unbelieving", &other, Some(&good))?,
            server,
            client: good,
        })
    }

    /// The URI, with what a good client shows.
    fn shown(&self, uri: &str) -> String {
        let first = if uri.contains('?') { '&' } else { '?' };
        format!("{uri}{first}tls-certificates={}", text(&self.client))
    }
}

/// A figure of `/metrics`.
fn figure(page: &str, name: &str) -> Result<u64> {
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.parse().ok()).with_context(|| format!("no {name} in {page}"))
}

fn port(uri: &str) -> Result<&str> {
    uri.rsplit_once(':').and_then(|(_, rest)| rest.split('/').next()).with_context(|| format!("no port in {uri}"))
}

#[test]
fn libnbd_and_its_tools_under_tls() -> Result<()> {
    let cluster = Cluster::start("nbd-tls-libnbd", 3, 1)?;
    let certificates = Certificates::make(&cluster)?;
    cluster.ok(&["volume", "create", "rw", "--size", "3G"])?;
    cluster.ok(&["volume", "create", "ro", "--size", "64M"])?;
    cluster.ok(&["snapshot", "create", "ro@s"])?;
    let tls = ["rw", "ro@s", "ro", "--tls", text(&certificates.server)];
    let server = NbdServer::start(&cluster, "nbd-tls-libnbd-1", &tls)?;
    ensure!(server.tcp("rw")?.starts_with("nbds://127.0.0.1:"), "{}", server.tcp("rw")?);
    ensure!(server.unix("rw")?.starts_with("nbds+unix:///rw?"), "{}", server.unix("rw")?);
    let (source, back) = (cluster.folder().join("source"), cluster.folder().join("back"));
    let mut data = vec![0; 64 * MIB];
    StdRng::seed_from_u64(7).fill_bytes(&mut data[..20 * MIB]);
    std::fs::write(&source, &data)?;
    for uri in [server.tcp("ro")?, server.unix("ro")?] {
        let uri = certificates.shown(&uri);
        client("nbdcopy", &[text(&source), &uri])?;
        client("nbdcopy", &["--connections=4", &uri, text(&back)])?;
        client("cmp", &[&source, &back])?;
        let info: serde_json::Value = serde_json::from_str(&client("nbdinfo", &["--json", &uri])?)?;
        ensure!(info["TLS"] == true && info["exports"][0]["export-size"] == 64 * MIB, "{info}");
    }
    server.stop()?;

    // Two exports, as the script wants it.
    let tls = ["rw", "ro@s", "--tls", text(&certificates.server), "--metrics", "127.0.0.1:0"];
    let server = NbdServer::start(&cluster, "nbd-tls-libnbd-2", &tls)?;
    let size = (3_u64 << 30).to_string();
    let file = script("nbd-commands.py");
    let (rw, ro) = (certificates.shown(&server.tcp("rw")?), certificates.shown(&server.tcp("ro@s")?));
    let said = client("/usr/bin/python3", &[text(&file), &rw, &ro, &size])?;
    ensure!(said.ends_with("ok\n"), "{said}");
    // Every command was used, with and without success.
    let page = server.metrics()?;
    for command in ["read", "write", "flush", "trim", "write_zeroes", "cache", "block_status"] {
        for name in ["requests", "request_bytes", "request_microseconds"] {
            let count = figure(&page, &format!("ogee_nbd_{name}_total{{command=\"{command}\"}}"))?;
            ensure!(count > 0 || (command, name) == ("flush", "request_bytes"), "{name} of {command}: {page}");
        }
        let errors = figure(&page, &format!("ogee_nbd_request_errors_total{{command=\"{command}\"}}"))?;
        ensure!(errors > 0 || ["flush", "cache"].contains(&command), "errors of {command}: {page}");
    }
    let connections = figure(&page, "ogee_nbd_connections_total")?;
    ensure!(connections > 6 && figure(&page, "ogee_nbd_tls_connections_total")? == connections, "{page}");
    ensure!(figure(&page, "ogee_nbd_connections_refused_total")? == 0, "{page}");
    ensure!(figure(&page, "ogee_nbd_requests_in_flight")? == 0, "{page}");
    figure(&page, "ogee_nbd_connections_open")?;
    ensure!(figure(&page, "ogee_volume_ios_total{kind=\"write\"}")? > 0, "{page}");
    ensure!(!server.output().text().contains("WARN"), "{}", server.output().text());
    server.stop()?;
    cluster.shut_down()
}

#[test]
fn strangers_are_refused_and_the_others_go_on() -> Result<()> {
    let cluster = Cluster::start("nbd-tls-strangers", 3, 1)?;
    let certificates = Certificates::make(&cluster)?;
    cluster.ok(&["volume", "create", "disk", "--size", "64M"])?;
    let tls = ["disk", "--tls", text(&certificates.server), "--metrics", "127.0.0.1:0"];
    let server = NbdServer::start(&cluster, "nbd-tls-strangers", &tls)?;
    let (file, uri) = (script("nbd-tls.py"), server.tcp("disk")?);
    let Certificates { client: good, stranger, anonymous, unbelieving, .. } = &certificates;
    let arguments = [text(&file), "127.0.0.1", port(&uri)?, "disk", text(good), text(stranger), text(anonymous), text(unbelieving)];
    let said = client("/usr/bin/python3", &arguments)?;
    eprintln!("{said}");
    ensure!(said.ends_with("ok\n"), "{said}");
    for reason in [
        "the peer's certificate is not of an authority in ca.pem",
        "the peer shows no certificate",
        // GnuTLS ends a handshake with a server that it does not believe without an alert, and libnbd the connection.
        "TLS handshake: ",
        "the client began no TLS, which is demanded here",
    ] {
        wait_for(&format!("{reason:?} in the log"), LOG_LIMIT, || Ok(server.output().text().contains(reason).then_some(())))?;
    }
    // Three strangers and one that knows nothing of TLS; what was sent behind STARTTLS counts as one or the other.
    wait_for("failures by stage", LOG_LIMIT, || {
        let page = server.metrics()?;
        let failed = |stage: &str| figure(&page, &format!("ogee_nbd_connections_failed_total{{stage=\"{stage}\"}}"));
        let all = (failed("tls")?, failed("handshake")?, failed("transmission")?);
        Ok(matches!(all, (3, 2, 0) | (4, 1, 0)).then_some(()))
    })?;
    // Clients that know nothing of TLS.
    let clear = uri.replace("nbds://", "nbd://");
    for program in ["nbdinfo", "nbdcopy"] {
        let arguments = if program == "nbdinfo" { vec![clear.as_str()] } else { vec![clear.as_str(), "/dev/null"] };
        ensure!(client(program, &arguments).is_err(), "{program} was let in");
    }
    let refused = client("qemu-img", &["info", &clear]).expect_err("in the clear").to_string();
    ensure!(refused.contains("TLS"), "{refused}");
    server.stop()?;
    cluster.shut_down()
}

#[test]
fn qemu_tools_under_tls() -> Result<()> {
    let cluster = Cluster::start("nbd-tls-qemu", 3, 1)?;
    let certificates = Certificates::make(&cluster)?;
    cluster.ok(&["volume", "create", "disk", "--size", "64M"])?;
    let server = NbdServer::start(&cluster, "nbd-tls-qemu", &["disk", "--tls", text(&certificates.server)])?;
    let uri = server.tcp("disk")?;
    let object = |folder: &Path| format!("tls-creds-x509,id=tls,endpoint=client,dir={}", text(folder));
    let good = object(&certificates.client);
    let image = format!("driver=nbd,host=127.0.0.1,port={},export=disk,tls-creds=tls", port(&uri)?);
    let source = cluster.folder().join("source");
    let mut data = vec![0; 64 * MIB];
    StdRng::seed_from_u64(8).fill_bytes(&mut data[..10 * MIB]);
    std::fs::write(&source, &data)?;
    let target = ["--object", good.as_str(), "--target-image-opts"];
    let convert = [&["convert", "-n", "-f", "raw"][..], &target, &[text(&source), &image]].concat();
    client("qemu-img", &convert)?;
    let source_image = format!("driver=raw,file.driver=file,file.filename={}", text(&source));
    client("qemu-img", &["compare", "--object", &good, "--image-opts", &image, &source_image])?;
    let io = ["--object", good.as_str(), "--image-opts", "-c", "write -P 5 1M 2M", "-c", "flush", "-c", "read -P 5 1M 2M", &image];
    let said = client("qemu-io", &io)?;
    ensure!(!said.contains("fail"), "{said}");
    for (who, folder) in [("stranger", &certificates.stranger), ("unbelieving", &certificates.unbelieving)] {
        let refused = client("qemu-img", &["info", "--object", &object(folder), "--image-opts", &image]);
        ensure!(refused.is_err(), "{who} was let in: {refused:?}");
    }
    client("qemu-img", &["info", "--object", &good, "--image-opts", &image])?;
    let listed = client("qemu-nbd", &["--list", "-b", "127.0.0.1", "-p", port(&uri)?, "--object", &good, "--tls-creds", "tls"])?;
    ensure!(listed.contains("disk"), "{listed}");
    server.stop()?;
    cluster.shut_down()
}

#[test]
fn modes_and_bad_certificates() -> Result<()> {
    let cluster = Cluster::start("nbd-tls-modes", 3, 1)?;
    let certificates = Certificates::make(&cluster)?;
    cluster.ok(&["volume", "create", "disk", "--size", "64M"])?;
    let folder = text(&certificates.server);
    let size = |uri: &str| client("nbdinfo", &["--size", uri]);

    // By TCP with TLS only, by the socket in the clear as well.
    let server = NbdServer::start(&cluster, "nbd-tls-modes-1", &["disk", "--tls", folder, "--tls-mode", "tcp"])?;
    let (tcp, unix) = (server.tcp("disk")?, server.unix("disk")?);
    ensure!(unix.starts_with("nbd+unix") && tcp.starts_with("nbds:"), "{unix} {tcp}");
    for uri in [unix.clone(), certificates.shown(&unix.replace("nbd+", "nbds+")), certificates.shown(&tcp)] {
        ensure!(size(&uri)? == "67108864\n", "{uri}");
    }
    ensure!(size(&tcp.replace("nbds:", "nbd:")).is_err(), "TCP in the clear");
    server.stop()?;

    let server = NbdServer::start(&cluster, "nbd-tls-modes-2", &["disk", "--tls", folder, "--tls-mode", "allowed"])?;
    let clear = server.tcp("disk")?;
    for uri in [clear.clone(), certificates.shown(&clear.replace("nbd:", "nbds:"))] {
        ensure!(size(&uri)? == "67108864\n", "{uri}");
    }
    server.stop()?;

    let server = NbdServer::start(&cluster, "nbd-tls-modes-3", &["disk", "--tls", folder, "--tls-anonymous"])?;
    let anonymous = format!("{}?tls-certificates={}", server.tcp("disk")?, text(&certificates.anonymous));
    ensure!(size(&anonymous)? == "67108864\n", "without a certificate");
    server.stop()?;

    let socket = cluster.folder().join("s");
    let serve = |more: &[&'static str], dir: &str| -> Result<String> {
        let arguments = [&["nbd", "serve", "disk", "--socket", text(&socket)][..], more, &[dir]].concat();
        cluster.refused(&arguments)
    };
    for (dir, word) in [(certificates.client.as_path(), "for clients"), (Path::new("/nowhere"), "/nowhere/ca.pem")] {
        let line = serve(&["--tls"], text(dir))?;
        ensure!(line.contains(word) && line.contains("ogee tls daemon"), "{line}");
    }
    // The key of another certificate.
    std::fs::copy(certificates.client.join("key.pem"), certificates.server.join("key.pem"))?;
    let line = serve(&["--tls"], folder)?;
    ensure!(line.contains(folder), "{line}");
    cluster.shut_down()
}
