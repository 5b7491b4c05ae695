//! An open volume: attach, IO through handles, detach.
//!
//! Called by the front ends. A guest's write takes these steps: [`Volume`] (here: limits, checks, ticket, order, statistics) ->
//! `io.rs` (cut at chunk bounds, placement) -> `attempt.rs` (fence, leader, retries) -> `session.rs` (connection).
//! Invariants: no IO is sent after detach told the MDS; all handles of a volume share its fate, its seq and its
//! statistics; every handle has its own connections. Absent: anything about VMs.

use crate::attachment::{AttachInfo, Attachment};
use crate::backup::UnknownRepository;
use crate::below::{self, BadBelow};
use crate::attempt::{DataPath, Failure};
use crate::block_device::{BlockDevice, DeviceInfo, Extent, IoError, IoErrorKind, Moment, ReadData};
use crate::cluster::Cluster;
use crate::gate::Gate;
use crate::io::{LEN_MAX, check_range};
use crate::layout::LayoutCache;
use crate::lazy::Lazy;
use crate::mds_client::MdsCallError;
use crate::profile::{PageRun, Recorder};
use crate::session::Session;
use crate::space::VolumeSpace;
use crate::stats::{Stats, Verb, VolumeStats, bump};
use crate::throttle::Throttle;
use crate::token_bucket::Lane;
use crate::watch as control;
use bytes::Bytes;
use ogee_common::id::{AttachEpoch, LayerId, VolumeId, VolumeSeq};
use ogee_common::limits::{ANCESTRY_DEPTH_MAX, PAGE_BYTES, SECTOR_BYTES, VOLUME_BYTES_MAX};
use ogee_common::name::VolumeRef;
use ogee_common::qos::VolumeLimits;
use ogee_proto::{MdsErrorKind, volume_limits};
use ogee_proto::data::Ancestor;
use ogee_proto::mds::{AttachGrant, AttachVolumeRequest, DetachVolumeRequest};
use std::future::Future;
use std::sync::{Arc, OnceLock};
use tokio::sync::watch;

/// The seq at which a live volume is read by a client that does not write it: newer than every write. Half of the
/// range, so that a reader of the message may add to it.
const LIVE_READ_SEQ: VolumeSeq = VolumeSeq(u64::MAX >> 1);
/// Copysets whose leaders are connected to ahead of the first IO; the leaders of so many are on nearly every chunkserver of a cluster.
const WARM_COPYSETS_MAX: usize = 1024;

/// How to open a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// Read and write; raises the fence against every earlier writer.
    ReadWrite {
        /// Take it from another client that has it attached.
        steal: bool,
    },
    /// Read and write, as the client that has it attached now; refused (`attached`, `fenced`) if that is not this very client.
    Resume,
    /// Read a snapshot, or the live volume while others may write it.
    ReadOnly,
}

/// Why a volume could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The MDS refused; the source says why (`not-found`, `attached`, ...).
    #[error("attach {volume}")]
    Attach {
        /// What was asked for.
        volume: String,
        /// The refusal.
        #[source]
        source: MdsCallError,
    },
    /// A snapshot cannot be written.
    #[error("{volume} is a snapshot; open it read-only or clone it")]
    SnapshotIsReadOnly {
        /// What was asked for.
        volume: String,
    },
    /// It stands on a backup in a repository that this process has no access to: it was not attached, or the attach was given back.
    #[error("{volume} stands on a backup that this process cannot read")]
    NoRepository {
        /// What was asked for.
        volume: String,
        /// Which repository.
        #[source]
        source: UnknownRepository,
    },
    /// The MDS granted something that makes no sense; nothing was touched.
    #[error("the MDS granted an attach of {volume} with a bad {field}")]
    BadGrant {
        /// What was asked for.
        volume: String,
        /// The field.
        field: &'static str,
    },
}

/// Why a volume could not be detached.
#[derive(Debug, thiserror::Error)]
#[error("detach volume")]
pub struct DetachError(#[source] pub MdsCallError);

/// An open volume. Clones share the handle with its connections; [`BlockDevice::for_thread`] makes a handle of its own.
/// A volume that is dropped without [`Volume::detach`] stays attached at the MDS until somebody else takes it.
#[derive(Debug, Clone)]
pub struct Volume {
    at: Arc<Attachment>,
    session: Arc<Session>,
    /// What this handle says it is, if not the volume's own serial.
    serial: Option<Arc<str>>,
}

impl Volume {
    /// Attaches a volume, or a snapshot of one. Connections to chunkservers are made when first needed. A second
    /// `open` for writing of the same volume through the same [`Cluster`] takes it from the first without being asked
    /// to steal: to the MDS it is the same client.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(cluster: &Cluster, volume: &VolumeRef, mode: OpenMode) -> Result<Self, OpenError> {
        let name = volume.to_string();
        if volume.snapshot.is_some() && mode != OpenMode::ReadOnly {
            return Err(OpenError::SnapshotIsReadOnly { volume: name });
        }
        let request = AttachVolumeRequest {
            path: volume.path.to_string(),
            snapshot: volume.snapshot.clone().unwrap_or_default(),
            read_only: mode == OpenMode::ReadOnly,
            steal: mode == OpenMode::ReadWrite { steal: true },
            resume: mode == OpenMode::Resume,
            client: cluster.0.client,
            description: cluster.0.config.description.clone(),
            reads_backups: cluster.0.config.backups.is_some(),
        };
        if mode != OpenMode::ReadOnly {
            Box::pin(below::look_first(cluster, &name, &request.path)).await?;
        }
        let attach = cluster.mds().attach_volume(request);
        let grant = attach.await.map_err(|source| OpenError::Attach { volume: name.clone(), source })?;
        let bad = |field| OpenError::BadGrant { volume: name.clone(), field };
        let below = match below::of(cluster, &grant) {
            Ok(below) => below,
            Err(BadBelow::Field(field)) => return Err(bad(field)),
            Err(BadBelow::NoAccess(source)) => {
                below::give_back(cluster, &grant).await;
                return Err(OpenError::NoRepository { volume: name, source });
            }
        };
        let lazy = below.as_ref().map(|below| below.lazy.clone());
        let volume = Self::with_grant(cluster, volume, (mode, lazy), &grant).map_err(bad)?;
        if let Some(below) = below {
            below.start(&volume.at, &volume.session);
        }
        volume.at.limit(volume_limits(grant.volume.as_ref().and_then(|v| v.limits.as_ref())));
        if !volume.at.is_read_only() {
            control::start(&volume.at);
        }
        control::warm_up(&volume.at);
        Ok(volume)
    }

    /// Checks a grant; the error names the field that is wrong.
    fn with_grant(
        cluster: &Cluster,
        name: &VolumeRef,
        (mode, lazy): (OpenMode, Option<Arc<Lazy>>),
        grant: &AttachGrant,
    ) -> Result<Self, &'static str> {
        let volume = grant.volume.as_ref().filter(|v| v.id != 0).ok_or("volume")?;
        let writes = mode != OpenMode::ReadOnly;
        let page = u64::from(PAGE_BYTES);
        let sector_bytes = if volume.sector_bytes == 0 { SECTOR_BYTES } else { volume.sector_bytes };
        let identity: [u8; 16] = grant.cluster.as_ref().try_into().map_err(|_| "cluster")?;
        let bad = [
            (grant.layer == 0, "layer"),
            (grant.seq == 0, "seq"),
            ((grant.epoch != 0) != writes, "epoch"),
            (grant.size_bytes > VOLUME_BYTES_MAX || !grant.size_bytes.is_multiple_of(page), "size"),
            (![SECTOR_BYTES, PAGE_BYTES].contains(&sector_bytes), "sector size"),
            (grant.ancestry.len() > ANCESTRY_DEPTH_MAX, "ancestry"),
            (grant.ancestry.iter().any(|a| a.layer == 0), "ancestry"),
        ];
        if let Some((_, field)) = bad.into_iter().find(|(is_bad, _)| *is_bad) {
            return Err(field);
        }
        let live_reader = !writes && name.snapshot.is_none();
        let seq = if live_reader { LIVE_READ_SEQ } else { VolumeSeq(grant.seq) };
        let layer = LayerId(grant.layer);
        let parent = |a: &ogee_proto::mds::Ancestor| Ancestor { layer: LayerId(a.layer), seq: VolumeSeq(a.seq) };
        let at = Attachment {
            cluster: cluster.0.clone(),
            info: AttachInfo {
                name: name.clone(),
                volume: VolumeId(volume.id),
                layer,
                epoch: AttachEpoch(grant.epoch),
                sector_bytes,
            },
            chain: grant.ancestry.iter().map(parent).collect(),
            lazy,
            recorder: OnceLock::new(),
            gate: Gate::new(seq),
            throttle: Throttle::default(),
            order: Arc::default(),
            layout: LayoutCache::new(layer, live_reader.then_some(cluster.0.config.timing.live_layout_ttl)),
            fences: Default::default(),
            size: watch::Sender::new(grant.size_bytes),
            stats: Stats::default(),
            resubscribe: Arc::default(),
            tasks: Default::default(),
        };
        let session = Session::new(identity, cluster.0.config.network.clone());
        Ok(Self { at: Arc::new(at), session, serial: None })
    }

    /// What is open.
    #[must_use]
    pub fn attach_info(&self) -> &AttachInfo {
        &self.at.info
    }

    /// What is seen, nearest first: the layer with the seq it is read at (of a snapshot, that is the snapshot's moment),
    /// then its ancestors.
    #[must_use]
    pub fn moments(&self) -> Vec<Moment> {
        self.at.moments().collect()
    }

    /// Whether what is seen can be told from a moment, page by page: it is one of [`Volume::moments`], or earlier in the
    /// same layer. Of any other everything counts as changed.
    #[must_use]
    pub fn can_compare(&self, moment: Moment) -> bool {
        self.at.can_compare(moment)
    }

    /// The limits that it obeys now.
    #[must_use]
    pub fn limits(&self) -> VolumeLimits {
        self.at.throttle.limits()
    }

    /// This handle, and those made from it, with another serial in [`DeviceInfo`]; see there for what it may be.
    #[must_use]
    pub fn with_serial(self, serial: &str) -> Self {
        Self { serial: Some(serial.into()), ..self }
    }

    /// What it did since it was opened, all handles together.
    #[must_use]
    pub fn stats(&self) -> VolumeStats {
        self.at.stats.snapshot()
    }

    /// Counts what it holds in the cluster. A question to a copyset for each chunk (16 MiB) of a segment (1 GiB) that was ever written; `told` hears
    /// after each segment how many are done, of how many. Obeys no limits, and no timeout of IO: it may be dropped at any time.
    ///
    /// # Errors
    /// A copyset cannot be asked for good, or the volume was closed. One without a leader is waited for.
    pub async fn space(&self, told: impl FnMut(u32, u32)) -> Result<VolumeSpace, IoError> {
        let size = self.info().size_bytes;
        let counted = async {
            let _ticket = self.at.gate.enter_read()?;
            self.path().space(size, told).await
        };
        counted.await.map_err(|Failure { kind, source }| IoError { kind, verb: "space", offset: 0, len: size, source })
    }

    /// From now on records which pages are read first, of all handles together, until so many bytes of pages are known. Once for a volume.
    pub fn record(&self, limit_bytes: u64) {
        // An error means that it is recording already.
        let _ = self.at.recorder.set(Recorder::new(limit_bytes));
    }

    /// What [`Volume::record`] has seen so far, in order.
    #[must_use]
    pub fn recorded(&self) -> Vec<PageRun> {
        self.at.recorder.get().map(Recorder::runs).unwrap_or_default()
    }

    /// Refuses further IO through every handle, waits for IO in flight, and gives the attach back to the MDS. IO that
    /// cannot end (its copyset has no quorum and there is no IO timeout) is waited for without limit.
    ///
    /// # Errors
    /// [`DetachError`]; the volume is closed for IO either way, and detaching may be tried again.
    pub async fn detach(&self) -> Result<(), DetachError> {
        // First the gate, which refuses what waits for limits and is let go then.
        self.at.gate.refuse_new();
        self.at.throttle.close();
        self.at.gate.close().await;
        let fenced = self.at.gate.check() == Err(IoErrorKind::Fenced);
        if !self.at.is_read_only() && !fenced {
            let (volume, epoch) = (self.at.info.volume.0, self.at.info.epoch.0);
            let request = DetachVolumeRequest { volume, epoch, unclean: self.at.gate.has_strays() };
            match self.at.cluster.mds.detach_volume(request).await {
                // Whoever took it has ended this attach already.
                Err(e) if !matches!(e.kind, MdsErrorKind::Fenced | MdsErrorKind::NotFound) => {
                    return Err(DetachError(e));
                }
                _ => {}
            }
        }
        self.at.end(false);
        self.at.stop_tasks();
        Ok(())
    }

    /// Waits until the layout is loaded, as far as the MDS answers.
    pub(crate) async fn load_layout(&self) {
        let loading = self.at.cluster.control().spawn(control::load_layout(Arc::downgrade(&self.at)));
        if let Err(error) = loading.await {
            tracing::debug!(target: "controlpath", %error, "load layout");
        }
    }

    /// Learns the placements that another open volume of the same layer knows.
    pub(crate) fn adopt_layout(&self, other: &Self) {
        self.at.layout.learn_from(&other.at.layout);
    }

    /// The attach of `granted` through the connections of this handle, with its serial.
    pub(crate) fn with_attach_of(&self, granted: &Self) -> Self {
        Self { at: granted.at.clone(), session: self.session.clone(), serial: self.serial.clone() }
    }

    /// Whether another attach has taken the volume; this one never serves IO again then.
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        self.at.gate.check() == Err(IoErrorKind::Fenced)
    }

    fn path(&self) -> DataPath<'_> {
        DataPath { at: &self.at, session: &self.session }
    }

    fn size(&self) -> u64 {
        *self.at.size.borrow()
    }

    fn check(&self, offset: u64, len: u64, len_max: u64) -> Result<(), IoErrorKind> {
        check_range((offset, len), (self.size(), self.at.info.sector_bytes), len_max)
    }

    fn check_write(&self, offset: u64, len: u64, len_max: u64) -> Result<(), Failure> {
        self.check(offset, len, len_max)?;
        if self.at.is_read_only() { Err(IoErrorKind::ReadOnly.into()) } else { Ok(()) }
    }

    async fn zero(&self, verb: Verb, offset: u64, len: u64) -> Result<(), IoError> {
        let io = async {
            self.check_write(offset, len, u64::MAX)?;
            let ticket = self.at.gate.enter_write().await?;
            // After the ticket: a flush, a hold and a detach wait for whoever waits here.
            let place = self.at.order.enter(offset..offset + len);
            place.turn().await;
            self.path().zero(&ticket, offset, len).await
        };
        self.timed(verb, offset, len, io).await
    }

    /// Runs an IO under the policy's time.
    async fn limited<T>(&self, io: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        match self.at.cluster.config.io_timeout {
            None => io.await,
            Some(limit) => match tokio::time::timeout(limit, io).await {
                Ok(result) => result,
                Err(_) => Err(IoErrorKind::TimedOut.into()),
            },
        }
    }

    /// Waits until an IO may begin. What will be refused waits too.
    async fn throttle(&self, verb: Verb, len: u64) {
        let (lane, bytes) = match verb {
            Verb::Read => (Lane::Read, len.min(LEN_MAX)),
            Verb::Write => (Lane::Write, len.min(LEN_MAX)),
            Verb::Discard | Verb::WriteZeroes => (Lane::Write, 0),
            Verb::Flush => return,
        };
        if self.at.throttle.enter(lane, bytes).await {
            bump(&self.at.stats.throttled);
        }
    }

    /// Runs an IO within the volume's limits and under the policy's time, counts it, and says in its error what it was.
    async fn timed<T>(
        &self,
        verb: Verb,
        offset: u64,
        len: u64,
        io: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, IoError> {
        let timer = self.at.stats.start(verb);
        self.throttle(verb, len).await;
        match self.limited(io).await {
            Ok(value) => {
                timer.done(len);
                Ok(value)
            }
            Err(Failure { kind, source }) => Err(IoError { kind, verb: verb.as_str(), offset, len, source }),
        }
    }
}

/// The serial that guests see of a volume.
pub(crate) fn serial(volume: VolumeId) -> String {
    format!("ogee{:016x}", volume.0)
}

impl BlockDevice for Volume {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            size_bytes: self.size(),
            read_only: self.at.is_read_only(),
            sector_bytes: self.at.info.sector_bytes,
            serial: self.serial.as_deref().map_or_else(|| serial(self.at.info.volume), str::to_owned),
        }
    }

    fn for_thread(&self) -> Self {
        Self { at: self.at.clone(), session: self.session.another(), serial: self.serial.clone() }
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadData, IoError> {
        let io = async {
            self.check(offset, u64::from(len), LEN_MAX)?;
            if let Some(recorder) = self.at.recorder.get() {
                recorder.touch(offset, len);
            }
            let _ticket = self.at.gate.enter_read()?;
            self.path().read(offset, len).await
        };
        self.timed(Verb::Read, offset, u64::from(len), io).await
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<(), IoError> {
        let len = data.len() as u64;
        let io = async {
            self.check_write(offset, len, LEN_MAX)?;
            let ticket = self.at.gate.enter_write().await?;
            // After the ticket: a flush, a hold and a detach wait for whoever waits here.
            let place = self.at.order.enter(offset..offset + len);
            place.turn().await;
            self.path().write(&ticket, offset, data).await
        };
        self.timed(Verb::Write, offset, len, io).await
    }

    /// A write is durable when it completes, so there is nothing to send. Waits for the writes of all handles that
    /// started before, as ARCHITECTURE.md section 7 promises.
    async fn flush(&self) -> Result<(), IoError> {
        let io = async { self.at.gate.settle().await.map_err(Failure::from) };
        self.timed(Verb::Flush, 0, 0, io).await
    }

    async fn discard(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.zero(Verb::Discard, offset, len).await
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<(), IoError> {
        self.zero(Verb::WriteZeroes, offset, len).await
    }

    /// By page. The answer ends soon after the second extent began, or after 1 GiB of what was written.
    /// A moment can be compared with that is one of [`Volume::moments`], or earlier in the same layer; of any other (after
    /// a rollback: of what was given up) everything counts as changed. So it does where a chunkserver is too old to say.
    /// One question to a copyset for each chunk (16 MiB) of a segment that was ever written. Counts in no statistics.
    async fn extents(&self, offset: u64, len: u64, since: Option<Moment>) -> Result<Vec<Extent>, IoError> {
        let io = async {
            self.check(offset, len, u64::MAX)?;
            let _ticket = self.at.gate.enter_read()?;
            self.path().extents(offset, len, since).await
        };
        let failed = |Failure { kind, source }| IoError { kind, verb: "extents", offset, len, source };
        self.limited(io).await.map_err(failed)
    }

    /// Finds the leaders of the copysets that the layout names and connects to them.
    async fn warm_up(&self) {
        for copyset in self.at.layout.copysets(WARM_COPYSETS_MAX) {
            // One that cannot be reached is asked for again when it is needed.
            let _ = self.path().connection(copyset).await;
        }
    }

    fn leave(&self) {
        self.at.end(false);
        self.at.stop_tasks();
    }

    fn resized(&self) -> watch::Receiver<u64> {
        self.at.size.subscribe()
    }
}
