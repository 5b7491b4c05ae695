//! The SDK against scripted chunkservers and a scripted MDS, on real sockets, in one process.

mod chunkserver;
mod control_plane;
mod extents;
mod hold;
mod incoming;
mod io_errors;
mod lazy;
mod limits;
mod mds;
mod order;
mod oracle;
mod routing;
mod standby;

use bytes::Bytes;
use chunkserver::Chunkservers;
use mds::FakeMds;
use ogee_client::{BlockDevice, Cluster, ClusterConfig, OpenMode, Timing, Volume};
use ogee_common::name::VolumeRef;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// Short times, so that what waits for a timeout does not wait long.
fn timing() -> Timing {
    let ms = Duration::from_millis;
    Timing {
        attempt_timeout: ms(200),
        status_timeout: ms(100),
        backoff_min: ms(1),
        backoff_max: ms(20),
        hold_timeout: ms(200),
        hold_release_after: ms(400),
        live_layout_ttl: ms(30),
    }
}

/// Three chunkservers, one MDS node, and a client.
struct Fixture {
    data: Arc<Chunkservers>,
    mds: Arc<FakeMds>,
    cluster: Cluster,
}

impl Fixture {
    async fn new() -> Self {
        Self::with(|_| ()).await
    }

    async fn with(change: impl FnOnce(&mut ClusterConfig)) -> Self {
        let data = Chunkservers::start(3).await;
        let mds = FakeMds::start(data.clone(), 1).await;
        let mut config = mds.config();
        change(&mut config);
        let cluster = Cluster::connect(config).await.expect("the MDS answers");
        Self { data, mds, cluster }
    }

    async fn open(&self) -> Volume {
        self.open_as("vol", OpenMode::ReadWrite { steal: false }).await
    }

    async fn open_as(&self, name: &str, mode: OpenMode) -> Volume {
        let name = VolumeRef::parse(name).expect("a valid name");
        Volume::open(&self.cluster, &name, mode).await.expect("the volume opens")
    }

    /// Opens the volume and waits until the MDS has its event stream.
    async fn open_watched(&self) -> Volume {
        let before = self.mds.inner().subscriptions;
        let volume = self.open().await;
        eventually("the event stream", || self.mds.inner().subscriptions > before).await;
        volume
    }
}

/// A pattern that differs in every 512 bytes.
fn pattern(tag: u8, len: usize) -> Bytes {
    let byte = |i: usize| u8::try_from((usize::from(tag) * 31 + i / 512 + i % 7) % 251).expect("below 251");
    (0..len).map(byte).collect()
}

async fn read(volume: &Volume, offset: u64, len: u32) -> Vec<u8> {
    let data = within(volume.read(offset, len)).await.expect("the read succeeds");
    assert_eq!(data.len(), len as usize);
    data.to_vec()
}

async fn write(volume: &Volume, offset: u64, data: Bytes) {
    within(volume.write(offset, data)).await.expect("the write succeeds");
}

/// Waits for something that must happen soon.
async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), what).await.expect("in time")
}

/// Waits until a condition holds.
async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(tokio::time::Instant::now() < deadline, "{what} did not come");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
