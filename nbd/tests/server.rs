//! The server over real sockets and a device in memory: one client of our own that speaks all three framings.

#![allow(clippy::unwrap_used, reason = "test code")]

mod certificates;

use bytes::{BufMut, Bytes, BytesMut};
use certificates::Authority;
use ogee_client::{BlockDevice, DeviceInfo, IoError, MemoryDevice, Moment, ReadData};
use ogee_common::id::{LayerId, VolumeSeq};
use ogee_common::limits::NBD_CONNECTION_REQUESTS_MAX;
use ogee_nbd::client::ClientError;
use ogee_nbd::wire::transmission_flag;
use ogee_nbd::{
    CommandFigures, CommandKind, Export, ListenError, ListenOn, NbdConfig, NbdServer, NbdStats, NbdTls, ServeError, Stage,
    TlsMode,
};
use ogee_proto::net::ClientProof;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::task::JoinHandle;

const SIZE: usize = 4 << 20;

/// A device whose writes of sector 8 wait until the gate is opened, and that counts how many run at once.
#[derive(Debug, Clone)]
struct Gated {
    inner: MemoryDevice,
    gate: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
}

impl Gated {
    fn new(inner: MemoryDevice) -> Self {
        Self { inner, gate: Arc::new(Semaphore::new(0)), waiting: Arc::default() }
    }

    async fn until_waiting(&self, count: usize) {
        while self.waiting.load(Ordering::SeqCst) < count {
            tokio::task::yield_now().await;
        }
    }
}

impl BlockDevice for Gated {
    fn info(&self) -> DeviceInfo {
        self.inner.info()
    }
    fn for_thread(&self) -> Self {
        self.clone()
    }
    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, IoError> {
        self.inner.read(offset, len).await
    }
    async fn write(&self, offset: u64, data: Bytes) -> Result<(), IoError> {
        if offset == 4096 {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            self.gate.acquire().await.expect("never closed").forget();
        }
        self.inner.write(offset, data).await
    }
    async fn flush(&self) -> Result<(), IoError> {
        self.inner.flush().await
    }
    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.inner.discard(offset, len).await
    }
    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.inner.write_zeroes(offset, len).await
    }
    fn resized(&self) -> watch::Receiver<u64> {
        self.inner.resized()
    }
}

struct Running {
    socket: PathBuf,
    _dir: tempfile::TempDir,
    stats: NbdStats,
    stop: oneshot::Sender<()>,
    server: JoinHandle<Result<(), ServeError>>,
}

fn start<D: BlockDevice>(devices: Vec<(&str, D)>, change: impl FnOnce(&mut NbdConfig)) -> Running {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let export = |(name, device): (&str, D)| Export { name: name.to_owned(), description: String::new(), device, changed_since: vec![] };
    let mut config = NbdConfig::new(vec![ListenOn::Unix { path: socket.clone(), mode: Some(0o600) }]);
    config.threads = 2;
    change(&mut config);
    let server = NbdServer::bind(devices.into_iter().map(export).collect(), config).unwrap();
    let stats = server.stats();
    let (stop, stopped) = oneshot::channel();
    let server = tokio::spawn(server.run(async {
        let _ = stopped.await;
    }));
    Running { socket, _dir: dir, stats, stop, server }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Simple,
    Structured,
    Extended,
}

/// What a client speaks over.
trait Wire: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Wire for T {}

struct Client {
    stream: Box<dyn Wire>,
    form: Form,
}

const READ: u16 = 0;
const WRITE: u16 = 1;
const DISC: u16 = 2;
const FLUSH: u16 = 3;
const TRIM: u16 = 4;
const CACHE: u16 = 5;
const ZEROES: u16 = 6;
const STATUS: u16 = 7;

impl Client {
    async fn connect(running: &Running, name: &str, form: Form) -> Self {
        let client = Self::greeted(running, form).await;
        client.go(name).await
    }

    /// After the flags.
    async fn greeted(running: &Running, form: Form) -> Self {
        let mut stream = Box::new(UnixStream::connect(&running.socket).await.unwrap());
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).await.unwrap();
        stream.write_u32(3).await.unwrap();
        Self { stream, form }
    }

    /// Chooses an export.
    async fn go(self, name: &str) -> Self {
        let form = self.form;
        let mut client = self;
        if form != Form::Simple {
            client.option(if form == Form::Extended { 11 } else { 8 }, &[]).await;
            let mut data = BytesMut::new();
            data.put_u32(u32::try_from(name.len()).unwrap());
            data.put_slice(name.as_bytes());
            data.put_u32(1);
            data.put_u32(15);
            data.put_slice(b"base:allocation");
            client.option(10, &data).await;
        }
        let mut data = BytesMut::new();
        data.put_u32(u32::try_from(name.len()).unwrap());
        data.put_slice(name.as_bytes());
        data.put_u16(0);
        client.option(7, &data).await;
        client
    }

    /// Sends an option and reads its replies up to the acknowledgement.
    async fn option(&mut self, code: u32, data: &[u8]) {
        let mut out = BytesMut::from(&b"IHAVEOPT"[..]);
        out.put_u32(code);
        out.put_u32(u32::try_from(data.len()).unwrap());
        out.put_slice(data);
        self.stream.write_all(&out).await.unwrap();
        self.stream.flush().await.unwrap();
        loop {
            let mut head = [0; 20];
            self.stream.read_exact(&mut head).await.unwrap();
            let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
            let mut body = vec![0; word(16) as usize];
            self.stream.read_exact(&mut body).await.unwrap();
            assert!(word(12) < 1 << 31, "option {code} refused with {:#x}", word(12));
            if word(12) == 1 {
                return;
            }
        }
    }

    async fn send(&mut self, cookie: u64, kind: u16, flags: u16, (offset, len): (u64, u64), payload: &[u8]) {
        let mut out = BytesMut::new();
        let extended = self.form == Form::Extended;
        out.put_u32(if extended { 0x21e4_1c71 } else { 0x2560_9513 });
        out.put_u16(if extended && kind == WRITE { flags | 0x20 } else { flags });
        out.put_u16(kind);
        out.put_u64(cookie);
        out.put_u64(offset);
        if extended {
            out.put_u64(len);
        } else {
            out.put_u32(u32::try_from(len).unwrap());
        }
        out.put_slice(payload);
        self.stream.write_all(&out).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// One whole reply: cookie, errno, body. `read_len`: bytes that a simple reply to a read carries.
    async fn reply(&mut self, read_len: usize) -> (u64, u32, Vec<u8>) {
        let mut body = vec![];
        loop {
            match self.stream.read_u32().await.unwrap() {
                0x6744_6698 => {
                    let errno = self.stream.read_u32().await.unwrap();
                    let cookie = self.stream.read_u64().await.unwrap();
                    body.resize(if errno == 0 { read_len } else { 0 }, 0);
                    self.stream.read_exact(&mut body).await.unwrap();
                    return (cookie, errno, body);
                }
                magic => {
                    let extended = magic == 0x6e8a_278c;
                    assert_eq!(extended, self.form == Form::Extended);
                    let flags = self.stream.read_u16().await.unwrap();
                    let kind = self.stream.read_u16().await.unwrap();
                    let cookie = self.stream.read_u64().await.unwrap();
                    if extended {
                        self.stream.read_u64().await.unwrap();
                    }
                    let len = if extended {
                        self.stream.read_u64().await.unwrap()
                    } else {
                        u64::from(self.stream.read_u32().await.unwrap())
                    };
                    let mut chunk = vec![0; usize::try_from(len).unwrap()];
                    self.stream.read_exact(&mut chunk).await.unwrap();
                    match kind {
                        0 => {}
                        1 => body.extend_from_slice(&chunk[8..]),
                        2 => body.resize(body.len() + u32::from_be_bytes(chunk[8..12].try_into().unwrap()) as usize, 0),
                        5 | 6 => body = chunk,
                        0x8001 => return (cookie, u32::from_be_bytes(chunk[..4].try_into().unwrap()), vec![]),
                        other => panic!("chunk of type {other}"),
                    }
                    if flags & 1 == 1 {
                        return (cookie, 0, body);
                    }
                }
            }
        }
    }

    async fn ask(&mut self, kind: u16, flags: u16, offset: u64, len: u64, payload: &[u8]) -> (u32, Vec<u8>) {
        self.send(0x77, kind, flags, (offset, len), payload).await;
        let read_len = if kind == READ { usize::try_from(len).unwrap() } else { 0 };
        let (cookie, errno, body) = self.reply(read_len).await;
        assert_eq!(cookie, 0x77);
        (errno, body)
    }

    async fn closes_after_the_greeting(mut self) -> bool {
        self.stream.read_exact(&mut [0; 18]).await.is_ok() && self.closes().await
    }

    /// Whether the server closes the connection.
    async fn closes(mut self) -> bool {
        let mut byte = [0];
        matches!(self.stream.read(&mut byte).await, Ok(0) | Err(_))
    }
}

impl Running {
    async fn end(self) {
        self.stop.send(()).unwrap();
        self.server.await.unwrap().unwrap();
        assert!(!self.socket.exists(), "the socket is removed");
    }
}

#[tokio::test]
async fn every_command_in_every_framing() {
    for form in [Form::Simple, Form::Structured, Form::Extended] {
        let device = MemoryDevice::new(SIZE);
        let running = start(vec![("disk", device.clone())], |_| {});
        let mut client = Client::connect(&running, "disk", form).await;
        let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
        assert_eq!(client.ask(WRITE, 1, 512, 1 << 20, &data).await.0, 0);
        assert_eq!(client.ask(READ, 0, 512, 1 << 20, &[]).await, (0, data.clone()), "{form:?}");
        assert_eq!(device.read(512, 1 << 20).await.unwrap().to_vec(), data);
        assert_eq!(client.ask(TRIM, 1, 512, 4096, &[]).await.0, 0);
        assert_eq!(client.ask(ZEROES, 0, 8192, 4096, &[]).await.0, 0);
        assert_eq!(client.ask(ZEROES, 2, 16384, 4096, &[]).await.0, 0);
        for (offset, len) in [(512, 4096), (8192, 4096), (16384, 4096)] {
            assert_eq!(client.ask(READ, 0, offset, len, &[]).await.1, vec![0; 4096]);
        }
        assert_eq!(client.ask(FLUSH, 0, 0, 0, &[]).await.0, 0);
        assert_eq!(client.ask(CACHE, 0, 0, SIZE as u64, &[]).await.0, 0);
        let counters = device.counters();
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        assert_eq!((count(&counters.writes), count(&counters.flushes)), (2, 1));
        assert_eq!((count(&counters.discards), count(&counters.write_zeroes)), (1, 1));
        let status = client.ask(STATUS, 0, 0, SIZE as u64, &[]).await;
        match form {
            Form::Simple => assert_eq!(status.0, 22),
            Form::Structured => assert_eq!(status.1, [&[0, 0, 0, 1, 0, 0x40, 0, 0][..], &[0; 4]].concat()),
            Form::Extended => assert_eq!(status.1, [&[0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0x40, 0, 0][..], &[0; 8]].concat()),
        }
        // Refused, and the connection goes on.
        assert_eq!(client.ask(READ, 0, SIZE as u64, 512, &[]).await.0, 22);
        assert_eq!(client.ask(WRITE, 0, SIZE as u64, 512, &[1; 512]).await.0, 28);
        assert_eq!(client.ask(99, 0, 0, 512, &[]).await.0, 22);
        assert_eq!(client.ask(READ, 0, 0, 512, &[]).await.0, 0);
        client.send(1, DISC, 0, (0, 0), &[]).await;
        assert!(client.closes().await);
        running.end().await;
    }
}

#[tokio::test]
async fn read_only_exports_refuse_and_others_are_apart() {
    let locked = MemoryDevice::with_data(vec![9; SIZE], true);
    let running = start(vec![("a", MemoryDevice::new(SIZE)), ("b", locked)], |_| {});
    let mut a = Client::connect(&running, "a", Form::Structured).await;
    let mut b = Client::connect(&running, "b", Form::Structured).await;
    for (kind, payload) in [(WRITE, &[1; 512][..]), (TRIM, &[]), (ZEROES, &[])] {
        assert_eq!(a.ask(kind, 0, 0, 512, payload).await.0, 0);
        assert_eq!(b.ask(kind, 0, 0, 512, payload).await.0, 1, "EPERM");
    }
    assert_eq!(b.ask(READ, 0, 0, 512, &[]).await.1, vec![9; 512]);
    assert_eq!(a.ask(READ, 0, 0, 512, &[]).await.1, vec![0; 512]);
    running.end().await;
}

#[tokio::test]
async fn requests_run_concurrently_and_are_answered_as_they_end() {
    let device = Gated::new(MemoryDevice::new(SIZE));
    let running = start(vec![("disk", device.clone())], |_| {});
    let mut client = Client::connect(&running, "disk", Form::Simple).await;
    client.send(1, WRITE, 0, (4096, 512), &[5; 512]).await;
    device.until_waiting(1).await;
    for cookie in 2..200 {
        client.send(cookie, WRITE, 0, (8192 + cookie * 512, 512), &[6; 512]).await;
    }
    let mut cookies: Vec<u64> = vec![];
    for _ in 2..200 {
        cookies.push(client.reply(0).await.0);
    }
    cookies.sort_unstable();
    assert_eq!(cookies, (2..200).collect::<Vec<_>>(), "all but the one that waits");
    device.gate.add_permits(1);
    assert_eq!(client.reply(0).await, (1, 0, vec![]));
    running.end().await;
}

#[tokio::test]
async fn a_repeated_write_waits_for_the_first_one_even_when_its_client_is_gone() {
    let device = Gated::new(MemoryDevice::new(SIZE));
    let running = start(vec![("disk", device.clone())], |_| {});
    let mut first = Client::connect(&running, "disk", Form::Simple).await;
    first.send(1, WRITE, 0, (4096, 512), &[1; 512]).await;
    device.until_waiting(1).await;
    drop(first);
    let mut second = Client::connect(&running, "disk", Form::Simple).await;
    second.send(2, WRITE, 0, (4096, 512), &[1; 512]).await;
    second.send(3, WRITE, 0, (0, 512), &[3; 512]).await;
    assert_eq!(second.reply(0).await.0, 3, "the other sector does not wait");
    assert_eq!(device.waiting.load(Ordering::SeqCst), 1, "the repeated write has not begun");
    device.gate.add_permits(2);
    assert_eq!(second.reply(0).await, (2, 0, vec![]));
    device.gate.add_permits(1);
    assert_eq!(second.ask(WRITE, 0, 4096, 512, &[4; 512]).await.0, 0);
    assert_eq!(device.inner.read(4096, 512).await.unwrap().to_vec(), vec![4; 512]);
    running.end().await;
}

/// The kernel's client does this when an answer takes too long: it shuts the socket in both directions, which looks the same as a close,
/// repeats on another one, and then
/// writes something newer to the same place. The server has not read the old request yet: as many as it takes are in flight.
#[tokio::test]
async fn what_a_cut_connection_left_unread_is_never_carried_out() {
    let device = Gated::new(MemoryDevice::new(SIZE));
    let running = start(vec![("disk", device.clone())], |c| c.connections_max = 2);
    let mut first = Client::connect(&running, "disk", Form::Simple).await;
    for cookie in 0..NBD_CONNECTION_REQUESTS_MAX as u64 {
        first.send(cookie, WRITE, 0, (4096, 512), &[1; 512]).await;
    }
    first.send(1000, WRITE, 0, (8192, 512), &[0xbb; 512]).await;
    device.until_waiting(1).await;
    drop(first);
    let mut second = Client::connect(&running, "disk", Form::Simple).await;
    assert_eq!(second.ask(WRITE, 0, 8192, 512, &[0xbb; 512]).await.0, 0);
    assert_eq!(second.ask(WRITE, 0, 8192, 512, &[0xcc; 512]).await.0, 0);
    // Now the old connection's requests end one after the other, and the server would read on. It is done with it when a third client
    // is let in.
    device.gate.add_permits(NBD_CONNECTION_REQUESTS_MAX);
    loop {
        let mut third = UnixStream::connect(&running.socket).await.unwrap();
        if third.read_exact(&mut [0; 18]).await.is_ok() {
            break;
        }
    }
    running.end().await;
    assert_eq!(device.inner.read(8192, 512).await.unwrap().to_vec(), vec![0xcc; 512]);
    assert_eq!(device.inner.read(4096, 512).await.unwrap().to_vec(), vec![1; 512], "what was taken is carried out");
}

/// What the kernel gets: our own handshake with our own server, and a socket that is as it was.
#[tokio::test(flavor = "multi_thread")]
async fn the_kernels_connections_are_negotiated() {
    let running = start(vec![("disk", MemoryDevice::new(SIZE))], |_| {});
    let socket = running.socket.clone();
    let talk = tokio::task::spawn_blocking(move || {
        use std::io::{Read, Write};
        let limit = Duration::from_secs(60);
        let refused = ogee_nbd::client::connect(&socket, "other", limit).unwrap_err();
        assert!(matches!(refused, ClientError::Refused { reply: 0x8000_0006, .. }), "{refused:?}");
        let (mut stream, negotiated) = ogee_nbd::client::connect(&socket, "disk", limit).unwrap();
        assert_eq!(negotiated.size_bytes, SIZE as u64);
        let wanted = transmission_flag::CAN_MULTI_CONN | transmission_flag::SEND_FLUSH | transmission_flag::SEND_TRIM;
        assert_eq!(negotiated.flags & wanted, wanted);
        assert_eq!((stream.read_timeout().unwrap(), ogee_nbd::kernel::is_taken(&stream).unwrap()), (None, false));
        let request = [&0x2560_9513_u32.to_be_bytes()[..], &[0; 4], &7_u64.to_be_bytes(), &[0; 8], &512_u32.to_be_bytes()];
        stream.write_all(&request.concat()).unwrap();
        let mut reply = [0xff; 16 + 512];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..16], [&0x6744_6698_u32.to_be_bytes()[..], &[0; 4], &7_u64.to_be_bytes()].concat());
        assert_eq!(reply[16..], [0; 512]);
    });
    talk.await.unwrap();
    running.end().await;
}

#[tokio::test]
async fn half_a_close_and_a_goodbye_lose_nothing() {
    let device = MemoryDevice::new(SIZE);
    let running = start(vec![("disk", device.clone())], |_| {});
    let mut half = Client::connect(&running, "disk", Form::Simple).await;
    half.send(7, WRITE, 0, (512, 512), &[7; 512]).await;
    half.stream.shutdown().await.unwrap();
    assert_eq!(half.reply(0).await, (7, 0, vec![]));
    let mut polite = Client::connect(&running, "disk", Form::Simple).await;
    polite.send(8, WRITE, 0, (1024, 512), &[8; 512]).await;
    polite.send(9, DISC, 0, (0, 0), &[]).await;
    drop(polite);
    while device.read(1024, 512).await.unwrap().to_vec() != vec![8; 512] {
        tokio::task::yield_now().await;
    }
    running.end().await;
}

#[tokio::test]
async fn a_stop_answers_what_was_taken() {
    let device = Gated::new(MemoryDevice::new(SIZE));
    let running = start(vec![("disk", device.clone())], |_| {});
    let mut client = Client::connect(&running, "disk", Form::Simple).await;
    client.send(1, WRITE, 0, (4096, 512), &[5; 512]).await;
    device.until_waiting(1).await;
    running.stop.send(()).unwrap();
    while UnixStream::connect(&running.socket).await.is_ok() {
        tokio::task::yield_now().await;
    }
    device.gate.add_permits(1);
    assert_eq!(client.reply(0).await, (1, 0, vec![]));
    assert!(client.closes().await);
    running.server.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_stop_has_an_end() {
    let device = Gated::new(MemoryDevice::new(SIZE));
    let running = start(vec![("disk", device.clone())], |c| c.drain_timeout = Duration::from_millis(50));
    let mut client = Client::connect(&running, "disk", Form::Simple).await;
    client.send(1, WRITE, 0, (4096, 512), &[5; 512]).await;
    device.until_waiting(1).await;
    running.stop.send(()).unwrap();
    let ended = running.server.await.unwrap();
    assert!(matches!(ended, Err(ServeError::NotDrained { connections: 1, .. })), "{ended:?}");
}

#[tokio::test]
async fn broken_clients_end_alone() {
    let running = start(vec![("disk", MemoryDevice::new(SIZE))], |c| c.handshake_timeout = Duration::from_millis(200));
    let mut good = Client::connect(&running, "disk", Form::Structured).await;
    // Silent: ended by the handshake's limit.
    let silent = UnixStream::connect(&running.socket).await.unwrap();
    let mut greeted = Client { stream: Box::new(silent), form: Form::Simple };
    greeted.stream.read_exact(&mut [0; 18]).await.unwrap();
    assert!(greeted.closes().await);
    // Wrong magic, a payload that is too long, half a message.
    let mut wrong = Client::connect(&running, "disk", Form::Simple).await;
    wrong.stream.write_all(&[0xee; 64]).await.unwrap();
    assert!(wrong.closes().await);
    let mut long = Client::connect(&running, "disk", Form::Simple).await;
    long.send(1, WRITE, 0, (0, 1 << 31), &[]).await;
    assert!(long.closes().await);
    let mut half = Client::connect(&running, "disk", Form::Simple).await;
    half.send(1, WRITE, 0, (0, 512), &[1; 100]).await;
    drop(half);
    assert_eq!(good.ask(READ, 0, 0, 512, &[]).await, (0, vec![0; 512]));
    running.end().await;
}

#[tokio::test]
async fn connections_are_bounded() {
    let running = start(vec![("disk", MemoryDevice::new(SIZE))], |c| c.connections_max = 1);
    let mut good = Client::connect(&running, "disk", Form::Simple).await;
    let refused = UnixStream::connect(&running.socket).await.unwrap();
    assert!(Client { stream: Box::new(refused), form: Form::Simple }.closes().await);
    good.send(1, DISC, 0, (0, 0), &[]).await;
    assert!(good.closes().await);
    // The place is free as soon as the first has ended.
    loop {
        let mut again = UnixStream::connect(&running.socket).await.unwrap();
        if again.read_exact(&mut [0; 18]).await.is_ok() {
            break;
        }
    }
    running.end().await;
}

#[tokio::test]
async fn bad_configurations_are_named() {
    let device = || Export { name: "x".to_owned(), description: String::new(), device: MemoryDevice::new(SIZE), changed_since: vec![] };
    let bind = |exports, config| NbdServer::<MemoryDevice>::bind(exports, config).map(drop);
    let tcp = || NbdConfig::new(vec![ListenOn::Tcp("127.0.0.1:0".parse().unwrap())]);
    assert!(matches!(bind(vec![], tcp()), Err(ServeError::ExportCount { count: 0 })));
    assert!(matches!(bind(vec![device(), device()], tcp()), Err(ServeError::ExportTwice { .. })));
    let long = Export { name: "x".repeat(4097), ..device() };
    assert!(matches!(bind(vec![long], tcp()), Err(ServeError::ExportName { len: 4097 })));
    assert!(matches!(bind(vec![device()], NbdConfig { threads: 0, ..tcp() }), Err(ServeError::Threads { .. })));
    let moment = Moment { layer: LayerId(1), seq: VolumeSeq(1) };
    let of = |names: &[String]| Export { changed_since: names.iter().map(|n| (n.clone(), moment)).collect(), ..device() };
    let many: Vec<String> = (0..64).map(|i| format!("ogee:changed:{i}")).collect();
    let twice = vec![many[0].clone(), many[0].clone()];
    for bad in [many.clone(), twice, vec!["base:allocation".to_owned()], vec![format!("ogee:{}", "x".repeat(4092))]] {
        assert!(matches!(bind(vec![of(&bad)], tcp()), Err(ServeError::Contexts { .. })), "{}", bad.len());
    }
    assert!(bind(vec![of(&many[..63])], tcp()).is_ok());
    let none = NbdConfig { connections_max: 0, ..tcp() };
    assert!(matches!(bind(vec![device()], none), Err(ServeError::Connections { .. })));
    let inherited = bind(vec![device()], NbdConfig::new(vec![ListenOn::Inherited]));
    assert!(matches!(inherited, Err(ServeError::Listen(ListenError::NothingInherited))), "{inherited:?}");
    let taken = NbdServer::bind(vec![device()], tcp()).unwrap();
    let again = NbdConfig::new(vec![ListenOn::Tcp(taken.tcp_addrs()[0])]);
    assert!(matches!(bind(vec![device()], again), Err(ServeError::Listen(ListenError::Tcp { .. }))));
}

#[tokio::test]
async fn tcp_clients_are_served_with_keepalive() {
    let export = Export { name: "x".to_owned(), description: String::new(), device: MemoryDevice::new(SIZE), changed_since: vec![] };
    let config = NbdConfig::new(vec![ListenOn::Tcp("127.0.0.1:0".parse().unwrap())]);
    let server = NbdServer::bind(vec![export], config).unwrap();
    let addr = server.tcp_addrs()[0];
    let (stop, stopped) = oneshot::channel::<()>();
    let server = tokio::spawn(server.run(async {
        let _ = stopped.await;
    }));
    let mut client = tokio::net::TcpStream::connect(addr).await.unwrap();
    let mut greeting = [0; 18];
    client.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    // The kernel shows the timer of the server's side: 02 is keepalive (proc_net_tcp).
    let ports = format!(":{:04X} 0100007F:{:04X} 01 ", addr.port(), client.local_addr().unwrap().port());
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let line = table.lines().find(|line| line.contains(&ports)).unwrap();
    assert_eq!(line.split_whitespace().nth(5).and_then(|timer| timer.split(':').next()), Some("02"), "{line}");
    stop.send(()).unwrap();
    server.await.unwrap().unwrap();
}

impl Client {
    /// Begins TLS; `Err` if the server does not let the client in, which it sees when it reads.
    async fn start_tls(mut self, client: &Arc<rustls::ClientConfig>) -> std::io::Result<Self> {
        self.option(5, &[]).await;
        let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
        let stream = tokio_rustls::TlsConnector::from(client.clone()).connect(name, self.stream).await?;
        Ok(Self { stream: Box::new(stream), form: self.form })
    }
}

/// A server that wants TLS with a certificate.
fn start_tls_server<D: BlockDevice>(device: D, authority: &Authority, mode: TlsMode) -> Running {
    let certificates = Arc::new(authority.server(ClientProof::Certificate));
    start(vec![("disk", device)], |c| c.tls = Some(NbdTls { certificates, mode }))
}

#[tokio::test]
async fn under_tls_every_framing_works_and_long_requests_are_whole() {
    let authority = Authority::new();
    let tls = authority.client();
    for form in [Form::Simple, Form::Structured, Form::Extended] {
        let device = MemoryDevice::new(64 << 20);
        let running = start_tls_server(device.clone(), &authority, TlsMode::Required);
        let client = Client::greeted(&running, form).await.start_tls(&tls).await.unwrap();
        let mut client = client.go("disk").await;
        let long = 32 << 20;
        let data: Vec<u8> = (0..long).map(|i: u32| (i % 249) as u8).collect();
        assert_eq!(client.ask(WRITE, 1, 4096, u64::from(long), &data).await.0, 0);
        assert_eq!(client.ask(READ, 0, 4096, u64::from(long), &[]).await, (0, data.clone()), "{form:?}");
        assert_eq!(device.read(4096, long).await.unwrap().to_vec(), data);
        // Many at once, in both directions.
        for cookie in 0..100 {
            client.send(cookie, WRITE, 0, (4096 * cookie, 4096), &[u8::try_from(cookie).unwrap(); 4096]).await;
        }
        for _ in 0..100 {
            assert_eq!(client.reply(0).await.1, 0);
        }
        assert_eq!(client.ask(READ, 0, 99 * 4096, 4096, &[]).await.1, vec![99; 4096]);
        assert_eq!(client.ask(FLUSH, 0, 0, 0, &[]).await.0, 0);
        client.send(1, DISC, 0, (0, 0), &[]).await;
        let mut rest = vec![];
        assert_eq!(client.stream.read_to_end(&mut rest).await.unwrap(), 0, "closed with the alert that says so");
        running.end().await;
    }
}

#[tokio::test]
async fn who_has_no_certificate_of_the_authority_is_refused_alone() {
    let authority = Authority::new();
    let running = start_tls_server(MemoryDevice::new(SIZE), &authority, TlsMode::Required);
    let good = Client::greeted(&running, Form::Structured).await.start_tls(&authority.client()).await.unwrap();
    let mut good = good.go("disk").await;
    for stranger in [authority.client_without_certificate(), Authority::new().client_of(&authority)] {
        // TLS 1.3: the client is done before the server has looked at its certificate.
        let refused = match Client::greeted(&running, Form::Simple).await.start_tls(&stranger).await {
            Ok(mut client) => client.stream.read_u8().await.unwrap_err(),
            Err(error) => error,
        };
        let text = refused.to_string();
        assert!(text.contains("CertificateRequired") || text.contains("UnknownCA") || text.contains("DecryptError"), "{text}");
        assert_eq!(good.ask(READ, 0, 0, 512, &[]).await, (0, vec![0; 512]));
    }
    // In the clear instead of TLS, and in the clear behind STARTTLS.
    let mut clear = Client::greeted(&running, Form::Simple).await;
    clear.option(5, &[]).await;
    clear.stream.write_all(b"IHAVEOPT\0\0\0\x03\0\0\0\0").await.unwrap();
    let mut rest = vec![];
    // Either an alert or a reset; nothing of NBD.
    let _ = clear.stream.read_to_end(&mut rest).await;
    assert!(!rest.windows(4).any(|window| window == b"disk"), "{rest:02x?}");
    let mut injected = Client::greeted(&running, Form::Simple).await;
    injected.stream.write_all(b"IHAVEOPT\0\0\0\x05\0\0\0\0IHAVEOPT\0\0\0\x03\0\0\0\0").await.unwrap();
    let mut rest = vec![];
    // The option behind STARTTLS breaks the protocol or, if it was read later, the TLS handshake; it is never answered.
    let _ = injected.stream.read_to_end(&mut rest).await;
    assert!(!rest.windows(4).any(|window| window == b"disk"), "{rest:02x?}");
    assert_eq!(good.ask(READ, 0, 0, 512, &[]).await, (0, vec![0; 512]));
    running.end().await;
}

#[tokio::test]
async fn tls_is_demanded_where_the_mode_says_so() {
    let authority = Authority::new();
    let tls = authority.client();
    // The socket is a UNIX socket.
    for (mode, is_demanded) in [(TlsMode::Required, true), (TlsMode::RequiredOnTcp, false), (TlsMode::Allowed, false)] {
        let running = start_tls_server(MemoryDevice::new(SIZE), &authority, mode);
        let mut client = Client::greeted(&running, Form::Simple).await;
        client.stream.write_all(b"IHAVEOPT\0\0\0\x03\0\0\0\0").await.unwrap();
        let mut head = [0; 16];
        client.stream.read_exact(&mut head).await.unwrap();
        let kind = u32::from_be_bytes(head[12..].try_into().unwrap());
        assert_eq!(kind, if is_demanded { 0x8000_0005 } else { 2 }, "{mode:?}");
        let client = Client::greeted(&running, Form::Simple).await.start_tls(&tls).await.unwrap();
        assert_eq!(client.go("disk").await.ask(READ, 0, 0, 512, &[]).await.0, 0);
        running.end().await;
    }
    let certificates = Arc::new(authority.server(ClientProof::Nothing));
    let anonymous = NbdTls { certificates, mode: TlsMode::Required };
    let running = start(vec![("disk", MemoryDevice::new(SIZE))], |c| c.tls = Some(anonymous));
    let stranger = authority.client_without_certificate();
    let client = Client::greeted(&running, Form::Simple).await.start_tls(&stranger).await.unwrap();
    assert_eq!(client.go("disk").await.ask(READ, 0, 0, 512, &[]).await.0, 0);
    running.end().await;
}

#[tokio::test]
async fn the_limit_of_a_handshake_holds_for_tls_and_under_it() {
    let authority = Authority::new();
    let tls = authority.client();
    let certificates = Arc::new(authority.server(ClientProof::Certificate));
    let running = start(vec![("disk", MemoryDevice::new(SIZE))], |c| {
        c.tls = Some(NbdTls { certificates, mode: TlsMode::Required });
        c.handshake_timeout = Duration::from_secs(5);
    });
    let before_tls = async {
        let mut silent = Client::greeted(&running, Form::Simple).await;
        silent.option(5, &[]).await;
        silent.closes().await
    };
    let under_tls = async {
        let silent = Client::greeted(&running, Form::Simple).await.start_tls(&tls).await;
        silent.unwrap().closes().await
    };
    assert_eq!(tokio::join!(before_tls, under_tls), (true, true));
    running.end().await;
}

#[tokio::test]
async fn a_stop_under_tls_answers_what_was_taken() {
    let authority = Authority::new();
    let device = Gated::new(MemoryDevice::new(SIZE));
    let running = start_tls_server(device.clone(), &authority, TlsMode::Required);
    let client = Client::greeted(&running, Form::Simple).await.start_tls(&authority.client()).await.unwrap();
    let mut client = client.go("disk").await;
    client.send(1, WRITE, 0, (4096, 512), &[5; 512]).await;
    device.until_waiting(1).await;
    running.stop.send(()).unwrap();
    while UnixStream::connect(&running.socket).await.is_ok() {
        tokio::task::yield_now().await;
    }
    device.gate.add_permits(1);
    assert_eq!(client.reply(0).await, (1, 0, vec![]));
    assert!(client.closes().await);
    running.server.await.unwrap().unwrap();
}

#[tokio::test]
async fn what_is_done_is_counted() {
    let authority = Authority::new();
    let device = Gated::new(MemoryDevice::new(SIZE));
    let running = start_tls_server(device.clone(), &authority, TlsMode::Allowed);
    let stats = running.stats.clone();
    let mut client = Client::connect(&running, "disk", Form::Structured).await;
    for (kind, len, payload) in
        [(READ, 4096, vec![]), (WRITE, 8192, vec![1; 8192]), (FLUSH, 0, vec![]), (TRIM, 512, vec![]), (ZEROES, 1024, vec![])]
    {
        assert_eq!(client.ask(kind, 0, 0, len, &payload).await.0, 0);
    }
    assert_eq!(client.ask(CACHE, 0, 0, 2048, &[]).await.0, 0);
    assert_eq!(client.ask(STATUS, 0, 0, 4096, &[]).await.0, 0);
    // Refused.
    assert_eq!(client.ask(READ, 0, SIZE as u64, 512, &[]).await.0, 22);
    assert_eq!(client.ask(99, 0, 0, 512, &[]).await.0, 22);
    client.send(1, WRITE, 0, (4096, 512), &[5; 512]).await;
    device.until_waiting(1).await;
    assert_eq!(stats.now().in_flight, 1);
    device.gate.add_permits(1);
    assert_eq!(client.reply(0).await, (1, 0, vec![]));
    let now = stats.now();
    assert_eq!(now.in_flight, 0);
    for (kind, requests, errors, bytes) in [
        (CommandKind::Read, 2, 1, 4096),
        (CommandKind::Write, 2, 0, 8192 + 512),
        (CommandKind::Flush, 1, 0, 0),
        (CommandKind::Trim, 1, 0, 512),
        (CommandKind::WriteZeroes, 1, 0, 1024),
        (CommandKind::Cache, 1, 0, 2048),
        (CommandKind::BlockStatus, 1, 0, 4096),
        (CommandKind::Other, 1, 1, 0),
    ] {
        let figures = now.of(kind);
        assert_eq!(figures, CommandFigures { requests, errors, bytes, microseconds: figures.microseconds }, "{kind:?}");
    }
    assert!(now.of(CommandKind::Write).microseconds > 0, "one has waited");

    // Failed, each at another stage; the first is still there.
    let mut flags = UnixStream::connect(&running.socket).await.unwrap();
    flags.write_u32(4).await.unwrap();
    assert!(Client { stream: Box::new(flags), form: Form::Simple }.closes_after_the_greeting().await);
    let mut clear = Client::greeted(&running, Form::Simple).await;
    clear.option(5, &[]).await;
    clear.stream.write_all(&[0x77; 64]).await.unwrap();
    let _ = clear.stream.read_to_end(&mut vec![]).await;
    let mut wrong = Client::connect(&running, "disk", Form::Simple).await;
    wrong.stream.write_all(&[0xee; 64]).await.unwrap();
    assert!(wrong.closes().await);
    let tls = Client::greeted(&running, Form::Simple).await.start_tls(&authority.client()).await.unwrap();
    drop(tls.go("disk").await);
    while stats.now().connections_open > 1 {
        tokio::task::yield_now().await;
    }
    let now = stats.now();
    assert_eq!((now.connections, now.connections_open, now.connections_refused, now.tls_connections), (5, 1, 0, 1));
    for stage in Stage::ALL {
        assert_eq!(now.failed(stage), 1, "{}", stage.name());
    }
    running.end().await;

    let running = start(vec![("disk", MemoryDevice::new(SIZE))], |c| c.connections_max = 1);
    let _only = Client::connect(&running, "disk", Form::Simple).await;
    let refused = UnixStream::connect(&running.socket).await.unwrap();
    assert!(Client { stream: Box::new(refused), form: Form::Simple }.closes().await);
    assert_eq!(running.stats.now().connections_refused, 1);
    running.end().await;
}
