//! The repository in a bucket: the same life as in a directory, and what goes wrong with servers.
//!
//! The server is moto's (`make moto` installs it), one for each test, on a port that the system chooses. It believes any
//! credentials; wrong ones are tested with a server that refuses, played here, as are broken and slow ones.

mod support;

use ogee_common::clock::now;
use ogee_snapclone::{Backend, OpenOptions, RepoErrorKind, Repository, S3Options, collect, verify};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::{BLOCK, back_up, device, open};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A server that ends with the test.
struct Moto {
    child: Child,
    addr: String,
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Moto {
    /// Starts one with a bucket named `bucket`.
    async fn start() -> Self {
        let cache = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache/ogee-moto"));
        let venv = std::env::var_os("OGEE_MOTO").map(PathBuf::from).or(cache).expect("a home");
        let program = venv.join("bin/moto_server");
        assert!(program.exists(), "{} is missing: make moto", program.display());
        let mut child = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", "0"])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("moto starts");
        let mut lines = BufReader::new(child.stderr.take().expect("a pipe"));
        let addr = loop {
            let mut line = String::new();
            assert_ne!(lines.read_line(&mut line).expect("text"), 0, "moto ended");
            if let Some((_, addr)) = line.split_once("Running on http://") {
                break addr.trim().to_owned();
            }
        };
        // It goes on logging; nobody may leave it with a full pipe.
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        let moto = Self { child, addr };
        moto.make_bucket().await;
        moto
    }

    async fn make_bucket(&self) {
        let mut stream = TcpStream::connect(&self.addr).await.expect("connected");
        let request = format!("PUT /bucket HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", self.addr);
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("answered");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
}

fn credentials(folder: &Path) -> PathBuf {
    let file = folder.join("credentials");
    let text = "[default]\naws_access_key_id=wrong\n[test]\naws_access_key_id = key\naws_secret_access_key = secret\n";
    std::fs::write(&file, text).expect("written");
    file
}

fn options(folder: &Path, addr: &str, prefix: &str) -> S3Options {
    S3Options {
        bucket: "bucket".to_owned(),
        prefix: prefix.to_owned(),
        endpoint: Some(format!("http://{addr}")),
        credentials: Some(credentials(folder)),
        profile: Some("test".to_owned()),
        ..S3Options::default()
    }
}

fn backend(folder: &Path, addr: &str, prefix: &str) -> Backend {
    Backend::s3(&options(folder, addr, prefix)).expect("options")
}

#[tokio::test]
async fn the_life_of_a_repository_in_a_bucket() {
    let (moto, folder) = (Moto::start().await, tempfile::tempdir().expect("a folder"));
    for (prefix, key) in [("", None), ("some/where", Some([3; 32]))] {
        let repo = open(backend(folder.path(), &moto.addr, prefix), key).await.expect("opened");
        support::whole_life(&repo).await;
    }
    // More objects than one page of a listing holds: every block differs in one byte.
    let repo = open(backend(folder.path(), &moto.addr, "paged"), None).await.expect("opened");
    let mut bytes = vec![0; 1030 * BLOCK];
    for block in 0..1030usize {
        bytes[block * BLOCK..][..8].copy_from_slice(&(block as u64 + 1).to_le_bytes());
    }
    let index = back_up(&repo, &device(&bytes), 1, "s").await.index;
    let report = collect(&repo, Duration::ZERO).await.expect("collected");
    assert_eq!((report.blocks, report.kept_blocks), (0, 1030 + 2));
    let checked = verify(&repo, &index, 1, |_| ()).await.expect("read");
    assert_eq!((checked.blocks, checked.damaged), (1030 + 2, 0));
    repo.remove(index.backup_id()).await.expect("removed");
    assert_eq!(collect(&repo, Duration::ZERO).await.expect("collected").blocks, 1030 + 2);
    let mut other = options(folder.path(), &moto.addr, "");
    other.bucket = "none".to_owned();
    let missing = open(Backend::s3(&other).expect("options"), None).await.expect_err("there is no bucket");
    assert!(missing.kind == RepoErrorKind::NotFound && missing.to_string().contains("bucket"), "{missing:?}");
}

/// What a played server does with a connection's request.
#[derive(Debug, Clone, Copy)]
enum Play {
    Answer(&'static str, &'static str),
    /// A body that ends before its length.
    CutBody,
}

/// A server that answers every request the same way, and counts them.
async fn played(play: Play) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let (addr, count) = (listener.local_addr().expect("bound"), Arc::new(AtomicUsize::new(0)));
    let counter = count.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            counter.fetch_add(1, Ordering::Relaxed);
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).await.is_ok() {
                head.push(byte[0]);
            }
            let answer = match play {
                Play::Answer(status, code) => {
                    let body = format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>no</Message></Error>");
                    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
                }
                Play::CutBody => "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\n{".to_owned(),
            };
            // The client may have gone; the test looks at what it says.
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    (addr, count)
}

#[tokio::test]
async fn what_servers_refuse_is_told_and_retries_are_bounded() {
    let folder = tempfile::tempdir().expect("a folder");
    let cases = [
        (Play::Answer("403 Forbidden", "SignatureDoesNotMatch"), RepoErrorKind::Denied, "secret key is wrong", 1),
        (Play::Answer("403 Forbidden", "InvalidAccessKeyId"), RepoErrorKind::Denied, "access key", 1),
        (Play::Answer("403 Forbidden", "QuotaExceeded"), RepoErrorKind::NoSpace, "full", 1),
        (Play::Answer("503 Service Unavailable", "SlowDown"), RepoErrorKind::Unavailable, "overloaded", 6),
        (Play::CutBody, RepoErrorKind::Unavailable, "ended early", 6),
    ];
    for (play, kind, words, attempts) in cases {
        let (addr, count) = played(play).await;
        let start = now();
        let opened = Repository::open(backend(folder.path(), &addr.to_string(), ""), OpenOptions::default()).await;
        let error = opened.expect_err("refused");
        assert!(error.kind == kind && error.to_string().contains(words), "{play:?}: {error:?}");
        assert_eq!(count.load(Ordering::Relaxed), attempts, "{play:?}");
        assert!(start.elapsed() < Duration::from_secs(100), "{play:?} took {:?}", start.elapsed());
    }
    // Nobody listens.
    let closed = TcpListener::bind("127.0.0.1:0").await.expect("bound").local_addr().expect("bound").to_string();
    let error = Repository::open(backend(folder.path(), &closed, ""), OpenOptions::default()).await.expect_err("refused");
    assert_eq!(error.kind, RepoErrorKind::Unavailable);
}

#[tokio::test]
async fn options_that_make_no_sense_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let good = options(folder.path(), "127.0.0.1:1", "");
    let refused = |options: S3Options| Backend::s3(&options).map(drop).expect_err("refused").kind;
    assert_eq!(refused(S3Options { profile: Some("none".to_owned()), ..good.clone() }), RepoErrorKind::Denied);
    assert_eq!(refused(S3Options { credentials: Some(folder.path().join("none")), ..good.clone() }), RepoErrorKind::Denied);
    assert_eq!(refused(S3Options { ca: Some(folder.path().join("none")), ..good.clone() }), RepoErrorKind::NotFound);
    let no_ca = folder.path().join("credentials");
    assert_eq!(refused(S3Options { ca: Some(no_ca), ..good }), RepoErrorKind::Unusable);
}
