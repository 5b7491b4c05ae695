//! Calls of attached clients: attach, detach, watch, acknowledge, layout, segments.

use super::status::CallError;
use super::topology::weigh;
use super::{Core, convert, names};
use crate::hub::EventStream;
use crate::machine::attach::{self, WantedSegment};
use crate::machine::command::{Command, Grant, Outcome};
use crate::machine::row::{AttachRow, CopysetRow, LayerRow, SegmentRow};
use crate::machine::{layers, namespace, options};
use crate::refusal::Refusal;
use crate::segments;
use ogee_common::id::{AttachEpoch, LayerId, PoolId, SegmentIndex, VolumeId};
use ogee_common::limits::{SEGMENT_BYTES, VOLUME_BYTES_MAX};
use ogee_common::rng;
use ogee_proto::mds;
use std::time::Duration;

/// Segments asked for in one call: a layout of 4 TiB, about 1 MiB of answer.
pub(crate) const LAYOUT_SEGMENTS_MAX: usize = 4096;
/// The seal of a new segment is waited for this long; then the client asks again. Below one attempt of the SDK.
const SEAL_TIMEOUT: Duration = Duration::from_millis(1500);
/// How often an attach may find that another came first before it gives up.
const ATTEMPTS: usize = 4;

const _: () = assert!(VOLUME_BYTES_MAX / SEGMENT_BYTES <= u32::MAX as u64);
const _: () = assert!(SEAL_TIMEOUT.as_millis() < ogee_common::limits::MDS_ATTEMPT_TIMEOUT.as_millis());

/// Why a client that cannot read backups may not have a grant, if it may not.
fn unreadable(grant: &Grant, reads_backups: bool) -> Option<Refusal> {
    let (_, row) = grant.backup.as_ref().filter(|_| !reads_backups)?;
    Some(Refusal::NeedsBackup { repository: row.repository.clone() })
}

impl Core {
    pub(crate) async fn attach_volume(
        &self,
        r: mds::AttachVolumeRequest,
    ) -> Result<mds::AttachGrant, CallError> {
        let path = names::path("path", &r.path)?;
        let description = names::description(&r.description)?;
        let snapshot = if r.snapshot.is_empty() { None } else { Some(names::snapshot(&r.snapshot)?) };
        self.lead().await?;
        if r.read_only || snapshot.is_some() {
            if !r.read_only {
                return Err(CallError::Argument { what: "read_only", wanted: "a snapshot is attached read-only" });
            }
            let grant = self.read(|tx| attach::read_only(tx, &path, snapshot.as_deref()))?;
            return match unreadable(&grant, r.reads_backups) {
                Some(refusal) => Err(refusal.into()),
                None => self.granted(grant),
            };
        }
        if !r.reads_backups {
            let (_, row) = self.read(|tx| namespace::volume(tx, &path))?;
            self.check_reads_backups(row.layer)?;
        }
        let client = names::id("client", r.client)?;
        let mut attempts = ATTEMPTS;
        loop {
            let takes_over = if r.resume { Some(self.own(&path, client)?) } else { self.takes_over(&path, client, r.steal)? };
            let (path, description) = (path.clone(), description.clone());
            let command = Command::AttachVolume { path, client, description, takes_over };
            attempts -= 1;
            match self.propose(None, command).await {
                Ok(Outcome::Attached(grant)) => {
                    self.hub.attached(grant.volume.id, grant.epoch);
                    let Some(refusal) = unreadable(&grant, r.reads_backups) else { return self.granted(*grant) };
                    // Another volume got the name since the look.
                    let (volume, epoch) = (grant.volume.id, grant.epoch);
                    self.propose(None, Command::DetachVolume { volume, epoch }).await?;
                    self.hub.detached(volume, epoch);
                    return Err(refusal.into());
                }
                Ok(_) => return Err(CallError::Answer(crate::machine::command::DecodeError::Trailing)),
                // Somebody attached or detached between the look and the command.
                Err(e) if attempts > 0 && e.is_refusal(|r| matches!(r, Refusal::Attached { .. })) => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// The attach of this very client. Nobody but that client ends it and leaves the volume free, so the command that names it is not
    /// carried out after any other attach.
    fn own(&self, path: &str, client: u64) -> Result<AttachEpoch, CallError> {
        let (_, row) = self.read(|tx| namespace::volume(tx, path))?;
        match row.attached {
            Some(AttachRow { epoch, client: holder, .. }) if holder == client => Ok(epoch),
            Some(AttachRow { epoch, description, .. }) => Err(Refusal::Attached { by: description, epoch }.into()),
            None => Err(CallError::NotHeld),
        }
    }

    fn granted(&self, grant: Grant) -> Result<mds::AttachGrant, CallError> {
        let options = self.read(|tx| options::of(tx, grant.volume.id))?;
        Ok(convert::grant(grant, options))
    }

    /// The attach that this one may take over: its own, a dead one, or any when stealing.
    fn takes_over(&self, path: &str, client: u64, steal: bool) -> Result<Option<AttachEpoch>, CallError> {
        let (volume, row) = self.read(|tx| namespace::volume(tx, path))?;
        let Some(AttachRow { epoch, client: holder, description }) = row.attached else { return Ok(None) };
        if steal || holder == client || !self.hub.is_alive(volume, epoch) {
            return Ok(Some(epoch));
        }
        if self.hub.is_connected(volume, epoch) {
            return Err(Refusal::Attached { by: description, epoch }.into());
        }
        // Its client may have died with the machine: whoever asks again gets the volume when the grace is over, and no
        // lock outlives a power cut.
        Err(Refusal::MaybeAttached { by: description }.into())
    }

    pub(crate) async fn detach_volume(&self, r: mds::DetachVolumeRequest) -> Result<mds::Empty, CallError> {
        let volume = VolumeId(names::id("volume", r.volume)?);
        let epoch = AttachEpoch(names::id("epoch", r.epoch)?);
        self.lead().await?;
        let unclean = Command::DetachUnclean { volume, epoch };
        self.propose(None, if r.unclean { unclean } else { Command::DetachVolume { volume, epoch } }).await?;
        self.hub.detached(volume, epoch);
        Ok(mds::Empty {})
    }

    pub(crate) async fn watch_attach(&self, r: mds::WatchAttachRequest) -> Result<EventStream, CallError> {
        let (volume, epoch) = (VolumeId(r.volume), AttachEpoch(r.epoch));
        self.lead().await?;
        let row = self.read(|tx| attach::current(tx, volume, epoch))?;
        if row.attached.is_some_and(|a| a.client != r.client) {
            return Err(Refusal::Fenced { given: epoch, current: row.epoch }.into());
        }
        // Between the look and now the attach or the lead may have ended; the next try learns which.
        self.hub.watch(volume, epoch, || self.current(volume)).ok_or(CallError::Raft(ogee_raft::RaftError::Unknown))
    }

    pub(crate) async fn ack_hold(&self, r: mds::AckHoldRequest) -> Result<mds::Empty, CallError> {
        self.lead().await?;
        if self.hub.acknowledge(VolumeId(r.volume), AttachEpoch(r.epoch), r.token) {
            Ok(mds::Empty {})
        } else {
            Err(CallError::NoSuchHold)
        }
    }

    pub(crate) async fn get_layout(&self, r: mds::GetLayoutRequest) -> Result<mds::Layout, CallError> {
        if r.count as usize > LAYOUT_SEGMENTS_MAX {
            return Err(CallError::TooMany { what: "segments", max: LAYOUT_SEGMENTS_MAX });
        }
        let layer = LayerId(names::id("layer", r.layer)?);
        self.lead().await?;
        let rows = self.read(|tx| {
            if r.epoch != 0 {
                attach::writes_to(tx, VolumeId(r.volume), AttachEpoch(r.epoch), layer)?;
            }
            let row: Option<LayerRow> = tx.get(&layer)?;
            let row = row.filter(|l| !l.dropping).ok_or(Refusal::NoSuchLayer(layer))?;
            layers::placement(tx, layer, &row, SegmentIndex(r.first), r.count)
        })?;
        let open = rows.into_iter().filter(|(_, row)| row.sealing.is_none());
        Ok(convert::layout(layer, open.map(|(index, row)| (index, row.copysets))))
    }

    pub(crate) async fn allocate_segment(
        &self,
        r: mds::AllocateSegmentRequest,
    ) -> Result<mds::Layout, CallError> {
        let wanted = WantedSegment {
            volume: VolumeId(names::id("volume", r.volume)?),
            epoch: AttachEpoch(names::id("epoch", r.epoch)?),
            layer: LayerId(names::id("layer", r.layer)?),
            index: SegmentIndex(r.index),
        };
        self.lead().await?;
        let row = match self.read(|tx| attach::placed(tx, wanted))? {
            Some(row) => row,
            None => self.place(wanted).await?,
        };
        let copysets = match row.sealing {
            None => row.copysets,
            Some(_) => {
                let open = |tx: &crate::machine::tx::Tx<'_>| {
                    let row = attach::placed(tx, wanted)?;
                    Ok(row.filter(|row| row.sealing.is_none()).map(|row| row.copysets))
                };
                self.wait_for_tasks("sealing the new segment", SEAL_TIMEOUT, open).await?
            }
        };
        Ok(convert::layout(wanted.layer, [(wanted.index, copysets)]))
    }

    async fn place(&self, wanted: WantedSegment) -> Result<SegmentRow, CallError> {
        let pool = self.read(|tx| Ok(tx.expect::<LayerRow>(&wanted.layer)?.pool))?;
        let candidates = self.candidates(pool)?;
        let copysets = segments::choose(&candidates, rng::nonzero_u64()).ok_or(CallError::NoRoom)?;
        let WantedSegment { volume, epoch, layer, index } = wanted;
        match self.propose(None, Command::AllocateSegment { volume, epoch, layer, index, copysets }).await? {
            Outcome::Segment { copysets, sealing } => {
                Ok(SegmentRow { copysets, sealing, seq: ogee_common::id::VolumeSeq(0) })
            }
            _ => Err(CallError::Answer(crate::machine::command::DecodeError::Trailing)),
        }
    }

    /// The reachable copysets of a pool, by room.
    ///
    /// # Errors
    /// `Unavailable` when none is reachable.
    pub(super) fn candidates(&self, pool: PoolId) -> Result<Vec<segments::Candidate>, CallError> {
        let rows = self.read(|tx| Ok(tx.scan::<CopysetRow>(&(), None, usize::MAX)?))?;
        let disks = self.disks()?;
        let of_pool = rows.iter().filter(|(_, row)| row.pool == pool);
        let reachable: Vec<_> = of_pool.filter_map(|(id, row)| weigh(*id, row, &disks)).collect();
        if reachable.is_empty() { Err(CallError::NoCopyset) } else { Ok(reachable) }
    }
}
