//! The client against our own server over memory.

use super::*;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use ogee_client::MemoryDevice;
use ogee_nbd::{Export, ListenOn, NbdConfig, NbdServer};
use std::thread::JoinHandle;
use tokio::sync::oneshot;

const DEVICE_BYTES: u64 = 4 << 20;

/// On a thread of its own: the client's handshake blocks.
struct Server {
    dir: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let config = NbdConfig::new(vec![ListenOn::Unix { path: dir.path().join("s"), mode: None }]);
        let (stop, stopped) = oneshot::channel();
        let (say_bound, bound) = std::sync::mpsc::sync_channel(1);
        let thread = std::thread::spawn(move || {
            let device = MemoryDevice::new(usize::try_from(DEVICE_BYTES).expect("small"));
            let export = Export { name: "disk".to_owned(), description: String::new(), device, changed_since: vec![] };
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let server = NbdServer::bind(vec![export], config).expect("bound");
                say_bound.send(()).expect("waited for");
                let stopped = async {
                    // An error: the test is over.
                    let _ = stopped.await;
                };
                server.run(stopped).await.expect("served");
            });
        });
        bound.recv().expect("bound");
        Self { dir, stop: Some(stop), thread: Some(thread) }
    }

    fn source(&self, io_bytes: usize) -> NbdSource {
        NbdSource::connect(&self.dir.path().join("s"), "disk", io_bytes).expect("connected")
    }

    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("no panic");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// Runs IO beside the target's own work, as the load loop does.
async fn drive<T>(target: &NbdTarget, io: impl Future<Output = T>) -> T {
    tokio::select! {
        done = io => done,
        () = target.drive() => panic!("the driver ended"),
    }
}

#[tokio::test]
async fn what_is_written_on_one_connection_is_read_on_another() {
    let server = Server::start();
    for len in [8192, 1 << 20] {
        let source = server.source(len);
        assert_eq!(source.size_bytes(), DEVICE_BYTES);
        let (one, two) = (source.open().await.expect("a connection"), source.open().await.expect("another"));
        let mut buffer = one.buffer(len).expect("memory");
        for (i, byte) in buffer.fill().iter_mut().enumerate() {
            *byte = u8::try_from(i % 251).expect("small");
        }
        let want = buffer.contents().to_vec();
        let mut back = two.buffer(len).expect("memory");
        drive(&one, one.write(4096, len, &mut buffer)).await.expect("written");
        drive(&two, two.read(4096, len, &mut back)).await.expect("read");
        assert!(back.contents() == want, "{len} bytes");
        drive(&one, one.flush()).await.expect("flushed");
        drive(&one, one.discard(4096, 4096)).await.expect("discarded");
        drive(&two, two.read(4096, len, &mut back)).await.expect("read");
        assert!(back.contents()[..4096].iter().all(|byte| *byte == 0) && back.contents()[4096..] == want[4096..]);
    }
}

#[tokio::test]
async fn many_are_in_flight_and_every_one_is_answered() {
    let server = Server::start();
    for len in [512, 64 << 10] {
        let target = server.source(len).open().await.expect("a connection");
        let one = |i: u64| {
            let target = &target;
            async move {
                let mut buffer = target.buffer(len).expect("memory");
                for round in 0..100_u64 {
                    let value = u8::try_from((round + i) % 251).expect("small");
                    buffer.fill().fill(value);
                    target.write(i * len as u64, len, &mut buffer).await.expect("written");
                    buffer.fill().fill(255);
                    target.read(i * len as u64, len, &mut buffer).await.expect("read");
                    assert!(buffer.contents().iter().all(|byte| *byte == value), "IO {i}, round {round}");
                }
            }
        };
        let all: FuturesUnordered<_> = (0..40).map(one).collect();
        drive(&target, all.for_each(|()| std::future::ready(()))).await;
    }
}

#[tokio::test]
async fn an_error_of_one_request_is_not_the_end_and_a_dead_server_is() {
    let mut server = Server::start();
    let target = server.source(512).open().await.expect("a connection");
    let mut buffer = target.buffer(512).expect("memory");
    let error = drive(&target, target.read(DEVICE_BYTES, 512, &mut buffer)).await.expect_err("behind the end");
    assert!(!error.is_final, "{error:?}");
    drive(&target, target.read(0, 512, &mut buffer)).await.expect("still alive");
    server.end();
    let error = drive(&target, target.read(0, 512, &mut buffer)).await.expect_err("nobody is there");
    assert!(error.is_final, "{error:?}");
}

#[test]
fn nobody_at_the_socket_and_unknown_exports_are_told_apart() {
    let dir = tempfile::tempdir().expect("a folder");
    let kind = |socket: &Path, export: &str| NbdSource::connect(socket, export, 512).map(drop).expect_err("refused").kind();
    assert_eq!(kind(&dir.path().join("s"), ""), ErrorKind::Unavailable);
    let server = Server::start();
    assert_eq!(kind(&server.dir.path().join("s"), "none"), ErrorKind::NotFound);
    NbdSource::connect(&server.dir.path().join("s"), "", 512).expect("the only export has the empty name as well");
}
