//! A volume that is attached only when a guest starts to use it: the destination of a live migration.
//!
//! Used by `ogee vhost-blk --incoming`. While the guest still runs elsewhere this device tells its size and serial and touches nothing;
//! the source stays attached, and needs no MDS, whatever becomes of the migration. The start of the guest here is the moment at
//! which the migration cannot be taken back, and that is when the volume is taken.
//!
//! ```text
//!             guest_starts                     granted
//!   Waiting ─────────────────────► Attaching ───────────► Attached
//!    ▲  ▲  ▲                        │   │                    │
//!    │  │  └────── guest_left ──────┘   │ refused for good   │
//!    │  └───────── guest_left ─────── Refused                │
//!    └──────────── guest_left, the attach was taken by another ┘
//! ```
//!
//! Invariants:
//! - Nobody is stolen from but for a guest whose hypervisor is **new** here ([`Arrival::New`]): the source has stopped its guest before, and a
//!   guest that has run here never goes on at the source. A hypervisor that comes **back** gets the volume only if its last daemon here, which
//!   was the same client, still has it attached: it may be the stopped source of a migration, whose ring holds requests that the guest has
//!   long had answered elsewhere. See docs/adr/0013-live-migration.md.
//! - So that a guest may come back after its daemon was stopped, the volume is not given back while a guest uses it.
//! - No IO is sent before the attach is granted, so the fence (`fence.rs`) holds for every IO as for any other attach.
//! - An attempt ends with the guest it was made for: a volume is not taken for a guest that is gone.
//! - IO waits for the attach, at most for the cluster's IO timeout; it fails only if the attach is refused for good, or its guest left.

use crate::backup::can_read;
use crate::block_device::{Arrival, BlockDevice, DeviceInfo, Extent, IoError, IoErrorKind, Moment, ReadData};
use crate::cluster::Cluster;
use crate::mds_client::MdsCallError;
use crate::volume::{DetachError, OpenError, OpenMode, Volume, serial as own_serial};
use bytes::Bytes;
use ogee_common::id::VolumeId;
use ogee_common::limits::{PAGE_BYTES, SECTOR_BYTES, VOLUME_BYTES_MAX};
use ogee_common::name::{VolumePath, VolumeRef};
use ogee_common::rng;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds::StatVolumeRequest;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// See the drawing of the module.
#[derive(Debug, Clone)]
enum State {
    Waiting,
    Attaching,
    Attached(Volume),
    Refused,
}

/// How the use of an incoming volume ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IncomingEnd {
    /// It was attached, and is no more.
    GivenBack,
    /// It stays attached, for the guest that uses it and the next daemon of this client.
    Kept,
    /// No guest came.
    NeverAttached,
    /// An attempt to attach was cut short: the MDS may have the volume as attached by this client.
    Unknown,
}

/// What runs in the background.
#[derive(Debug, Default)]
struct Tasks {
    attach: Option<JoinHandle<()>>,
    /// Whether an attempt was given up whose outcome nobody knows.
    unknown: bool,
    /// Whether the volume was taken from us by another attach, or an attach was refused for good.
    lost: bool,
    /// Whether a guest has started and its front end has not left.
    guest: bool,
}

#[derive(Debug)]
struct Shared {
    cluster: Cluster,
    name: VolumeRef,
    id: VolumeId,
    serial: String,
    sector_bytes: u32,
    state: watch::Sender<State>,
    size: watch::Sender<u64>,
    tasks: Mutex<Tasks>,
}

/// See the module's documentation. Clones share the attach; [`BlockDevice::for_thread`] makes a handle with connections of its own.
#[derive(Debug, Clone)]
pub struct IncomingVolume {
    shared: Arc<Shared>,
    /// This handle of the attached volume, once it was used.
    handle: Arc<OnceLock<Volume>>,
}

impl IncomingVolume {
    /// Looks the volume up; nothing is attached. It shows `serial`, if there is one, in place of its own (see [`DeviceInfo`]).
    ///
    /// # Errors
    /// The MDS does not know the volume, does not answer, or says something that makes no sense; the volume stands on a backup that this
    /// process cannot read.
    pub async fn look_up(cluster: &Cluster, path: &VolumePath, serial: Option<&str>) -> Result<Self, OpenError> {
        let name = VolumeRef { path: path.clone(), snapshot: None };
        let found = cluster.mds().stat_volume(StatVolumeRequest { path: path.to_string() }).await;
        let found = found.map_err(|source| OpenError::Attach { volume: name.to_string(), source })?;
        let makes_sense = found.size_bytes <= VOLUME_BYTES_MAX && found.size_bytes.is_multiple_of(u64::from(PAGE_BYTES));
        if !makes_sense {
            return Err(OpenError::BadGrant { volume: name.to_string(), field: "size" });
        }
        let sector_bytes = if found.sector_bytes == 0 { SECTOR_BYTES } else { found.sector_bytes };
        if ![SECTOR_BYTES, PAGE_BYTES].contains(&sector_bytes) {
            return Err(OpenError::BadGrant { volume: name.to_string(), field: "sector size" });
        }
        if let Some(message) = &found.backup {
            // Said now, and not when a guest has arrived.
            let known = can_read(cluster.0.config.backups.as_ref(), message);
            known.map_err(|source| OpenError::NoRepository { volume: name.to_string(), source })?;
        }
        let shared = Shared {
            cluster: cluster.clone(),
            name,
            id: VolumeId(found.id),
            serial: serial.map_or_else(|| own_serial(VolumeId(found.id)), str::to_owned),
            sector_bytes,
            state: watch::Sender::new(State::Waiting),
            size: watch::Sender::new(found.size_bytes),
            tasks: Mutex::default(),
        };
        Ok(Self { shared: Arc::new(shared), handle: Arc::default() })
    }

    /// The volume's number.
    #[must_use]
    pub fn id(&self) -> VolumeId {
        self.shared.id
    }

    /// Ends attempts to attach, and gives the volume back if it is attached and no guest uses it. The caller has ended all IO.
    ///
    /// # Errors
    /// As [`Volume::detach`].
    pub async fn detach(&self) -> Result<IncomingEnd, DetachError> {
        let (unknown, guest) = {
            let mut tasks = self.shared.tasks();
            self.shared.stop_attaching(&mut tasks);
            (tasks.unknown, tasks.guest)
        };
        let attached = match &*self.shared.state.borrow() {
            State::Attached(volume) => Some(volume.clone()),
            State::Waiting | State::Attaching | State::Refused => None,
        };
        match attached {
            Some(volume) if guest && !volume.is_fenced() => Ok(IncomingEnd::Kept),
            Some(volume) => volume.detach().await.map(|()| IncomingEnd::GivenBack),
            None if unknown => Ok(IncomingEnd::Unknown),
            None => Ok(IncomingEnd::NeverAttached),
        }
    }

    /// The attached volume, as soon as there is one.
    async fn volume(&self, verb: &'static str, offset: u64, len: u64) -> Result<&Volume, IoError> {
        if let Some(volume) = self.handle.get() {
            return Ok(volume);
        }
        let failed = |kind| IoError { kind, verb, offset, len, source: None };
        let mut state = self.shared.state.subscribe();
        let decided = state.wait_for(|state| !matches!(state, State::Attaching));
        let decided = match self.shared.cluster.0.config.io_timeout {
            None => decided.await,
            Some(limit) => tokio::time::timeout(limit, decided).await.map_err(|_| failed(IoErrorKind::TimedOut))?,
        };
        let volume = match decided.as_deref() {
            Ok(State::Attached(volume)) => volume.for_thread(),
            Ok(State::Refused) => return Err(failed(IoErrorKind::Fenced)),
            _ => return Err(failed(IoErrorKind::Closed)),
        };
        Ok(self.handle.get_or_init(|| volume))
    }
}

/// What becomes of an attach that was not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Again,
    ForGood,
}

/// Whether an attach may be granted when it is asked for again.
fn after(error: &OpenError, arrival: Arrival) -> Refusal {
    let OpenError::Attach { source: MdsCallError { kind, .. }, .. } = error else { return Refusal::ForGood };
    match (kind, arrival) {
        // A new guest takes the volume from anybody; somebody came between.
        (MdsErrorKind::Unavailable, _) | (MdsErrorKind::Attached, Arrival::New) => Refusal::Again,
        _ => Refusal::ForGood,
    }
}

impl Shared {
    fn tasks(&self) -> MutexGuard<'_, Tasks> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends an attempt that is under way. The caller holds the lock, under which a granted attach is published too.
    fn stop_attaching(&self, tasks: &mut Tasks) {
        let under_way = matches!(*self.state.borrow(), State::Attaching);
        if let Some(task) = tasks.attach.take().filter(|_| under_way) {
            task.abort();
            tasks.unknown = true;
            self.state.send_replace(State::Waiting);
        }
    }

    /// Attaches, however long it takes.
    async fn attach(self: Arc<Self>, arrival: Arrival) {
        let timing = self.cluster.0.config.timing;
        let (mut pause, mut said) = (timing.backoff_min, None);
        let mode = match arrival {
            Arrival::New => OpenMode::ReadWrite { steal: true },
            Arrival::Back => OpenMode::Resume,
        };
        loop {
            match Volume::open(&self.cluster, &self.name, mode).await {
                Ok(volume) => return self.attached(volume),
                Err(error) => {
                    let text = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
                    let next = after(&error, arrival);
                    if said.as_ref() != Some(&text) {
                        tracing::warn!(target: "controlpath", volume = %self.name, ?arrival, error = %text, then = ?next,
                            "a guest has started here and the volume is not attached");
                        said = Some(text);
                    }
                    if next == Refusal::ForGood {
                        return self.refused();
                    }
                }
            }
            tokio::time::sleep(rng::jitter(pause)).await;
            pause = (pause * 2).min(timing.backoff_max);
        }
    }

    /// Publishes that there will be no attach for this guest.
    fn refused(&self) {
        let mut tasks = self.tasks();
        let under_way = matches!(*self.state.borrow(), State::Attaching);
        if under_way {
            tasks.lost = true;
            self.state.send_replace(State::Refused);
        }
    }

    /// Publishes an attach, and tells of its size from now on.
    fn attached(self: Arc<Self>, volume: Volume) {
        let tasks = self.tasks();
        let under_way = matches!(*self.state.borrow(), State::Attaching);
        if !under_way {
            // Ended between the grant and now; the abort finds nothing to end any more.
            return;
        }
        tracing::info!(target: "controlpath", volume = %self.name, epoch = volume.attach_info().epoch.0,
            "a guest has started here: volume attached");
        let mut sizes = volume.resized();
        let size = self.size.clone();
        tell(&size, *sizes.borrow_and_update());
        self.state.send_replace(State::Attached(volume));
        drop(tasks);
        // Ends with the volume.
        self.cluster.0.control().spawn(async move {
            while sizes.changed().await.is_ok() {
                tell(&size, *sizes.borrow_and_update());
            }
        });
    }
}

/// Publishes a size, if it is another one.
fn tell(size: &watch::Sender<u64>, found: u64) {
    size.send_if_modified(|size| std::mem::replace(size, found) != found);
}

impl BlockDevice for IncomingVolume {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            size_bytes: *self.shared.size.borrow(),
            read_only: false,
            sector_bytes: self.shared.sector_bytes,
            serial: self.shared.serial.clone(),
        }
    }

    fn for_thread(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), handle: Arc::default() }
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, IoError> {
        self.volume("read", offset, u64::from(len)).await?.read(offset, len).await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), IoError> {
        self.volume("write", offset, data.len() as u64).await?.write(offset, data).await
    }

    async fn flush(&self) -> Result<(), IoError> {
        self.volume("flush", 0, 0).await?.flush().await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.volume("discard", offset, len).await?.discard(offset, len).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.volume("write zeroes", offset, len).await?.write_zeroes(offset, len).await
    }

    async fn extents(&self, offset: u64, len: u64, since: Option<Moment>) -> Result<Vec<Extent>, IoError> {
        self.volume("extents", offset, len).await?.extents(offset, len, since).await
    }

    fn guest_starts(&self, arrival: Arrival) {
        let mut tasks = self.shared.tasks();
        tasks.guest = true;
        let waits = matches!(*self.shared.state.borrow(), State::Waiting);
        if !waits {
            return;
        }
        if tasks.lost && arrival == Arrival::Back {
            tracing::error!(target: "controlpath", volume = %self.shared.name,
                "another client has taken the volume from the guest that comes back: its IO fails");
            self.shared.state.send_replace(State::Refused);
            return;
        }
        self.shared.state.send_replace(State::Attaching);
        let attach = Arc::clone(&self.shared).attach(arrival);
        tasks.attach = Some(self.shared.cluster.0.control().spawn(attach));
    }

    fn guest_left(&self) {
        let mut tasks = self.shared.tasks();
        tasks.guest = false;
        self.shared.stop_attaching(&mut tasks);
        let (fenced, refused) = match &*self.shared.state.borrow() {
            State::Attached(volume) => (volume.is_fenced(), false),
            State::Refused => (false, true),
            State::Waiting | State::Attaching => (false, false),
        };
        tasks.lost |= fenced;
        if fenced || refused {
            self.shared.state.send_replace(State::Waiting);
        }
    }

    fn may_leave(&self) -> bool {
        !matches!(*self.shared.state.borrow(), State::Attaching)
    }

    fn leave(&self) {
        let mut tasks = self.shared.tasks();
        self.shared.stop_attaching(&mut tasks);
        if let State::Attached(volume) = &*self.shared.state.borrow() {
            volume.leave();
        }
    }

    fn resized(&self) -> watch::Receiver<u64> {
        self.shared.size.subscribe()
    }
}
