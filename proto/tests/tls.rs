//! TLS on real sockets: what goes through, who is refused, and that nothing readable passes the wire.

use bytes::Bytes;
use ogee_common::id::{ConnectionGeneration, SessionId};
use ogee_proto::data::{Frame, HelloHead, Opcode, Role, Status};
use ogee_proto::link::{Handler, Link, LinkError, Responder, serve};
use ogee_proto::net::{self, CA_FILE, CERTIFICATE_FILE, KEY_FILE, Network, Peer, Plane, TlsConfig};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose as Usage, IsCa, Issuer, KeyPair};
use smallvec::smallvec;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const DAEMON: [Usage; 2] = [Usage::ServerAuth, Usage::ClientAuth];
const CLIENT: [Usage; 1] = [Usage::ClientAuth];

struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let key = KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    fn write(&self, dir: &Path, names: &[&str], usages: &[Usage]) {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let mut params = CertificateParams::new(names).expect("names");
        params.extended_key_usages = usages.to_vec();
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        for (file, text) in [(CA_FILE, &self.pem), (CERTIFICATE_FILE, &certificate.pem()), (KEY_FILE, &key.serialize_pem())] {
            std::fs::write(dir.join(file), text).expect("written");
        }
    }

    fn network(&self, names: &[&str], usages: &[Usage]) -> Network {
        let dir = tempfile::tempdir().expect("a folder");
        self.write(dir.path(), names, usages);
        load(dir.path())
    }
}

fn load(dir: &Path) -> Network {
    Network::new(Some(&TlsConfig { dir: dir.to_owned(), loopback: true })).expect("certificates")
}

struct Echo;

impl Handler for Echo {
    fn handle(&self, frame: Frame, responder: Responder) {
        responder.send(Status::Ok, frame.head(), frame.payload());
    }
}

/// Serves frames to whoever is admitted.
async fn start(network: Network) -> SocketAddr {
    let listener = net::listen(([127, 0, 0, 1], 0).into()).await.expect("listen");
    let addr = listener.local_addr().expect("bound");
    tokio::spawn(async move {
        while let Ok(accepted) = net::accept(&listener).await {
            let network = network.clone();
            tokio::spawn(async move {
                if let Ok(stream) = network.admit(accepted).await {
                    // Its end is the client's business.
                    let _ = serve(stream, 9, |_| Ok(Echo)).await;
                }
            });
        }
    });
    addr
}

fn hello(role: Role) -> HelloHead {
    HelloHead {
        version_min: 1,
        version_max: 1,
        role,
        process: 0,
        target: 9,
        session: SessionId(1),
        generation: ConnectionGeneration(1),
        cluster: [0; 16],
    }
}

async fn connect(network: &Network, addr: SocketAddr) -> Result<Link, LinkError> {
    Link::connect(network, addr, &hello(Role::Client)).await
}

fn text(error: &LinkError) -> String {
    use std::error::Error;
    error.source().map_or_else(|| error.to_string(), ToString::to_string)
}

#[tokio::test]
async fn many_and_large_frames_pass_both_ways() {
    let authority = Authority::new();
    let addr = start(authority.network(&["127.0.0.1"], &DAEMON)).await;
    let link = connect(&authority.network(&[], &CLIENT), addr).await.expect("connect");
    let big = Bytes::from((0..1u32 << 20).map(|i| (i % 251).to_le_bytes()[0]).collect::<Vec<_>>());
    let payload = |i: u32| if i.is_multiple_of(50) { big.clone() } else { Bytes::copy_from_slice(&i.to_le_bytes()) };
    let calls: Vec<_> = (0..500u32).map(|i| link.call(Opcode::Status, &i.to_le_bytes(), smallvec![payload(i)])).collect();
    for (i, call) in (0..500u32).zip(calls) {
        let reply = tokio::time::timeout(Duration::from_secs(30), call).await.expect("in time").expect("a reply");
        assert_eq!(reply.head(), i.to_le_bytes());
        assert!(reply.payload() == payload(i), "frame {i}");
    }
}

#[tokio::test]
async fn who_has_no_certificate_of_the_authority_is_refused() {
    let (authority, other) = (Authority::new(), Authority::new());
    let addr = start(authority.network(&["127.0.0.1"], &DAEMON)).await;
    let plain = connect(&Network::default(), addr).await.expect_err("plain");
    assert!(!matches!(plain, LinkError::Refused { .. }), "the server understood a plain frame: {plain}");
    let stranger = connect(&other.network(&[], &CLIENT), addr).await.expect_err("another authority");
    assert!(text(&stranger).contains("is not of an authority"), "{}", text(&stranger));
    let friend = authority.network(&[], &CLIENT);
    let elsewhere = start(authority.network(&["10.1.2.3"], &DAEMON)).await;
    let error = connect(&friend, elsewhere).await.expect_err("a certificate for another address");
    assert!(text(&error).contains("127.0.0.1"), "{}", text(&error));
    let impostor = start(authority.network(&["127.0.0.1"], &CLIENT)).await;
    let error = connect(&friend, impostor).await.expect_err("a client poses as a server");
    assert!(text(&error).contains("invalid peer certificate"), "{}", text(&error));
    let unencrypted = start(Network::default()).await;
    let error = connect(&friend, unencrypted).await.expect_err("a server without TLS");
    assert!(!matches!(error, LinkError::Refused { .. }), "{error}");
    connect(&friend, addr).await.expect("and the right one is not");
}

#[tokio::test]
async fn a_server_without_certificates_from_the_client_learns_of_it() {
    let (authority, other) = (Authority::new(), Authority::new());
    // The client believes the server, the server does not believe the client.
    let dir = tempfile::tempdir().expect("a folder");
    other.write(dir.path(), &[], &CLIENT);
    std::fs::write(dir.path().join(CA_FILE), &authority.pem).expect("written");
    let addr = start(authority.network(&["127.0.0.1"], &DAEMON)).await;
    connect(&load(dir.path()), addr).await.expect_err("an unknown client");
}

#[tokio::test]
async fn a_clients_certificate_is_not_good_for_a_daemon() {
    let authority = Authority::new();
    let addr = start(authority.network(&["127.0.0.1"], &DAEMON)).await;
    let client = authority.network(&[], &CLIENT);
    for role in [Role::Chunkserver, Role::Mds] {
        let refused = Link::connect(&client, addr, &hello(role)).await.expect_err("a client as a daemon");
        assert!(matches!(refused, LinkError::Refused { status: Status::Forbidden, .. }), "{refused}");
        let daemon = authority.network(&["10.0.0.1"], &DAEMON);
        Link::connect(&daemon, addr, &hello(role)).await.expect("a daemon as a daemon");
    }
}

#[tokio::test]
async fn the_plane_and_the_peer_are_known_before_a_byte_is_said() {
    let authority = Authority::new();
    let listener = net::listen(([127, 0, 0, 1], 0).into()).await.expect("listen");
    let addr = listener.local_addr().expect("bound");
    let server = authority.network(&["127.0.0.1", "localhost"], &DAEMON);
    let client = authority.network(&[], &CLIENT);
    for plane in [Plane::Data, Plane::Control] {
        let admitted = async { server.admit(net::accept(&listener).await.expect("accept")).await };
        let (stream, other) = tokio::join!(admitted, client.connect(addr, plane));
        let (mut stream, other) = (stream.expect("admitted"), other.expect("connected"));
        assert_eq!((stream.plane().await.expect("known"), stream.peer()), (Some(plane), Peer::Client));
        assert_eq!(other.peer(), Peer::Daemon);
    }
    let name = format!("localhost:{}", addr.port());
    let admitted = async { server.admit(net::accept(&listener).await.expect("accept")).await };
    let (stream, other) = tokio::join!(admitted, client.connect_host(&name, Plane::Control));
    assert!(stream.is_ok() && other.is_ok(), "by name: {stream:?} {other:?}");
}

/// A relay that keeps what passes.
async fn tap(to: SocketAddr) -> (SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let (addr, seen) = (listener.local_addr().expect("bound"), Arc::new(Mutex::new(vec![])));
    let kept = seen.clone();
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.expect("accept");
        let server = tokio::net::TcpStream::connect(to).await.expect("connect");
        let ((mut cr, mut cw), (mut sr, mut sw)) = (client.into_split(), server.into_split());
        let up = async {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(n @ 1..) = cr.read(&mut buffer).await {
                kept.lock().expect("no panics").extend_from_slice(&buffer[..n]);
                sw.write_all(&buffer[..n]).await.expect("sent on");
            }
        };
        tokio::join!(up, async { tokio::io::copy(&mut sr, &mut cw).await.expect("sent back") });
    });
    (addr, seen)
}

#[tokio::test]
async fn nothing_readable_passes_the_wire() {
    const SECRET: &[u8] = b"the quick brown fox jumps over the lazy dog";
    let authority = Authority::new();
    for (server, client, readable) in [
        (Network::default(), Network::default(), true),
        (authority.network(&["127.0.0.1"], &DAEMON), authority.network(&[], &CLIENT), false),
    ] {
        let (addr, seen) = tap(start(server).await).await;
        let link = connect(&client, addr).await.expect("connect");
        link.call(Opcode::Status, b"head", smallvec![Bytes::from_static(SECRET)]).await.expect("a reply");
        let found = seen.lock().expect("no panics").windows(SECRET.len()).any(|w| w == SECRET);
        assert_eq!(found, readable);
    }
}

#[tokio::test]
async fn changed_certificates_are_used_and_bad_ones_are_not() {
    let (old, new) = (Authority::new(), Authority::new());
    let dir = tempfile::tempdir().expect("a folder");
    old.write(dir.path(), &["127.0.0.1"], &DAEMON);
    let server = load(dir.path());
    let addr = start(server).await;
    let (before, after) = (old.network(&[], &CLIENT), new.network(&[], &CLIENT));
    connect(&before, addr).await.expect("the old authority");
    std::fs::write(dir.path().join(CERTIFICATE_FILE), "rubbish").expect("written");
    later().await;
    connect(&before, addr).await.expect("rubbish leaves the old certificate in use");
    new.write(dir.path(), &["127.0.0.1"], &DAEMON);
    later().await;
    connect(&after, addr).await.expect("the new authority");
    connect(&before, addr).await.expect_err("the old authority is gone");
}

#[tokio::test]
async fn an_authority_is_replaced_without_a_pause_by_believing_both_for_a_while() {
    // Both have the same name, as those that `ogee tls` makes.
    let (old, new) = (Authority::new(), Authority::new());
    let (server, client) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let both = format!("{}{}", old.pem, new.pem);
    for (issuer, of_client) in [(&old, &new), (&new, &old)] {
        issuer.write(server.path(), &["127.0.0.1"], &DAEMON);
        of_client.write(client.path(), &[], &CLIENT);
        for dir in [&server, &client] {
            std::fs::write(dir.path().join(CA_FILE), &both).expect("written");
        }
        let addr = start(load(server.path())).await;
        connect(&load(client.path()), addr).await.expect("each has a certificate of one of the two");
    }
}

#[tokio::test]
async fn a_certificate_that_says_nothing_of_its_use_is_a_daemons() {
    let authority = Authority::new();
    let addr = start(authority.network(&["127.0.0.1"], &[])).await;
    let silent = authority.network(&["10.0.0.1"], &[]);
    Link::connect(&silent, addr, &hello(Role::Chunkserver)).await.expect("a daemon");
}

/// Lets the time pass after which files are looked at again.
async fn later() {
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(11)).await;
    tokio::time::resume();
}

#[test]
fn files_of_no_use_are_named() {
    let authority = Authority::new();
    let dir = tempfile::tempdir().expect("a folder");
    let why = || {
        use std::error::Error;
        let config = TlsConfig { dir: dir.path().to_owned(), loopback: false };
        let error = Network::new(Some(&config)).expect_err("of no use");
        let below = error.source().map(ToString::to_string).unwrap_or_default();
        format!("{error}: {below}")
    };
    assert!(why().contains(CA_FILE), "{}", why());
    authority.write(dir.path(), &["127.0.0.1"], &DAEMON);
    let other = KeyPair::generate().expect("a key").serialize_pem();
    for (file, text) in [(CERTIFICATE_FILE, ""), (CERTIFICATE_FILE, "-----BEGIN"), (KEY_FILE, ""), (KEY_FILE, &other)] {
        authority.write(dir.path(), &["127.0.0.1"], &DAEMON);
        std::fs::write(dir.path().join(file), text).expect("written");
        let named = if text == other { dir.path().display().to_string() } else { file.to_owned() };
        assert!(why().contains(&named), "{}", why());
    }
}
