//! The front end against our own back end over memory.

use super::*;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use ogee_client::MemoryDevice;
use ogee_vhost_blk::{StopHandle, VhostBlkConfig, VhostBlkServer};
use std::thread::JoinHandle;

const DEVICE_BYTES: u64 = 4 << 20;

struct Server {
    dir: tempfile::TempDir,
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let stop = StopHandle::new().expect("a descriptor");
        let config = VhostBlkConfig { num_queues: 2, ..VhostBlkConfig::new(dir.path().join("s")) };
        let device = MemoryDevice::new(usize::try_from(DEVICE_BYTES).expect("small"));
        let server = VhostBlkServer::bind(device, config, stop.clone()).expect("bound");
        let thread = std::thread::spawn(move || {
            server.run().expect("served");
        });
        Self { dir, stop, thread: Some(thread) }
    }

    fn options(&self) -> VhostOptions {
        VhostOptions { socket: self.dir.path().join("s"), num_queues: 2, depth: 4, io_bytes_max: 8192 }
    }

    fn end(&mut self) {
        self.stop.stop();
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
async fn drive<T>(target: &VhostTarget, io: impl Future<Output = T>) -> T {
    tokio::select! {
        done = io => done,
        () = target.drive() => panic!("the driver ended"),
    }
}

#[tokio::test]
async fn what_is_written_on_one_queue_is_read_on_another() {
    let server = Server::start();
    let source = VhostSource::connect(&server.options()).expect("connected");
    assert_eq!(source.size_bytes(), DEVICE_BYTES);
    let (one, two) = (source.open().await.expect("a queue"), source.open().await.expect("both on one thread"));
    assert_eq!(source.open().await.map(drop).expect_err("no third").kind(), ErrorKind::Usage);
    let mut buffer = one.buffer(8192).expect("a slot");
    buffer.fill().fill(7);
    let mut back = two.buffer(8192).expect("a slot");
    drive(&one, one.write(4096, 8192, &mut buffer)).await.expect("written");
    drive(&two, two.read(4096, 8192, &mut back)).await.expect("read");
    assert_eq!(back.contents(), [7; 8192]);
    buffer.fill().fill(8);
    drive(&one, one.write(4096, 512, &mut buffer)).await.expect("written");
    drive(&one, one.flush()).await.expect("flushed");
    drive(&one, one.discard(8192, 4096)).await.expect("discarded");
    drive(&two, two.read(4096, 8192, &mut back)).await.expect("read");
    let want = [[8; 512].as_slice(), &[7; 4096 - 512], &[0; 4096]].concat();
    assert_eq!(back.contents(), want);
}

#[tokio::test]
async fn many_are_in_flight_and_every_one_is_answered() {
    let server = Server::start();
    let source = VhostSource::connect(&server.options()).expect("connected");
    let target = source.open().await.expect("a queue");
    let mut buffers: Vec<VhostBuffer> = (0..4).map(|_| target.buffer(512).expect("a slot")).collect();
    assert!(target.buffer(512).is_err(), "the depth is 4");
    let one = async |i: u64, buffer: &mut VhostBuffer| {
        for round in 0..500_u64 {
            let value = u8::try_from((round + i) % 251).expect("small");
            buffer.fill().fill(value);
            target.write(i * 512, 512, buffer).await.expect("written");
            target.read(i * 512, 512, buffer).await.expect("read");
            assert_eq!(buffer.contents(), [value; 512]);
        }
    };
    let all: FuturesUnordered<_> = (0..).zip(&mut buffers).map(|(i, buffer)| one(i, buffer)).collect();
    drive(&target, all.for_each(|()| std::future::ready(()))).await;
}

#[tokio::test]
async fn a_queue_is_used_again_by_the_next_load() {
    let server = Server::start();
    let source = VhostSource::connect(&server.options()).expect("connected");
    for value in 1..4 {
        let (target, _other) = (source.open().await.expect("a queue"), source.open().await.expect("a queue"));
        let mut buffer = target.buffer(512).expect("a slot");
        buffer.fill().fill(value);
        drive(&target, target.write(0, 512, &mut buffer)).await.expect("written");
        drive(&target, target.read(0, 512, &mut buffer)).await.expect("read");
        assert_eq!(buffer.contents(), [value; 512]);
    }
}

#[tokio::test]
async fn a_bad_status_is_an_error_and_a_dead_device_ends_it() {
    let mut server = Server::start();
    let source = VhostSource::connect(&server.options()).expect("connected");
    let target = source.open().await.expect("a queue");
    let mut buffer = target.buffer(512).expect("a slot");
    let error = drive(&target, target.read(DEVICE_BYTES, 512, &mut buffer)).await.expect_err("behind the end");
    assert!(!error.is_final, "{error:?}");
    drive(&target, target.read(0, 512, &mut buffer)).await.expect("still alive");
    server.end();
    let error = drive(&target, target.read(0, 512, &mut buffer)).await.expect_err("nobody is there");
    assert!(error.is_final, "{error:?}");
}

#[test]
fn nobody_at_the_socket_and_bad_depths_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let options = VhostOptions { socket: dir.path().join("s"), num_queues: 1, depth: 1, io_bytes_max: 512 };
    let kind = |options: &VhostOptions| VhostSource::connect(options).map(drop).expect_err("refused").kind();
    assert_eq!(kind(&options), ErrorKind::Unavailable);
    assert_eq!(kind(&VhostOptions { depth: 0, ..options.clone() }), ErrorKind::Usage);
    assert_eq!(kind(&VhostOptions { depth: DEPTH_MAX + 1, ..options }), ErrorKind::Usage);
    let server = Server::start();
    assert_eq!(kind(&VhostOptions { num_queues: 3, ..server.options() }), ErrorKind::Failure);
}
