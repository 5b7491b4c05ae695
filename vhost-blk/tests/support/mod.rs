//! What the end-to-end tests share: a server in a thread, a device with faults, and a small driver.

pub mod driver;
pub mod fault;

use ogee_client::BlockDevice;
use ogee_vhost_blk::{ServeEnd, ServeError, StopHandle, VhostBlkConfig, VhostBlkServer, VhostBlkStats};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tempfile::TempDir;

/// A test waits at most this long for something that must happen.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A server of its own in a thread.
pub struct TestServer {
    pub path: PathBuf,
    pub stats: Arc<VhostBlkStats>,
    pub stop: StopHandle,
    thread: Option<JoinHandle<Result<ServeEnd, ServeError>>>,
    _dir: TempDir,
}

impl TestServer {
    pub fn start<D: BlockDevice>(device: D, num_queues: u16) -> Self {
        Self::start_with(device, |config| config.num_queues = num_queues)
    }

    pub fn start_with<D: BlockDevice>(device: D, change: impl FnOnce(&mut VhostBlkConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vhost.sock");
        let mut config = VhostBlkConfig::new(&path);
        change(&mut config);
        let stop = StopHandle::new().unwrap();
        let server = VhostBlkServer::bind(device, config, stop.clone()).unwrap();
        let stats = server.stats();
        let thread = std::thread::spawn(move || server.run());
        Self { path, stats, stop, thread: Some(thread), _dir: dir }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Stops the server and waits for its end.
    pub fn end(mut self) {
        self.stop.stop();
        self.thread.take().expect("server still runs").join().unwrap().unwrap();
        assert!(!self.path.exists(), "the socket is removed at the end");
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.unwrap().unwrap();
            }
        }
    }
}

/// Polls a level until it holds or patience ends.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = ogee_common::clock::now() + PATIENCE;
    while !holds() {
        assert!(ogee_common::clock::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
