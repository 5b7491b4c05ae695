//! What the handles of one open volume share.
//!
//! Made by `volume.rs`, used by every handle, the IO path and the control task. Invariant: the identity of the attach
//! (volume, layer, epoch, ancestry) never changes; what changes is in the gate (seq, life), the caches and the size,
//! which only grows. Absent: sessions, which belong to a handle.

use crate::block_device::Moment;
use crate::cluster::{ClusterInner, LimitsPolicy};
use crate::fence::FenceTable;
use crate::gate::Gate;
use crate::lazy::Lazy;
use crate::profile::Recorder;
use crate::layout::LayoutCache;
use crate::stats::Stats;
use crate::throttle::{self, Throttle};
use crate::write_order::WriteOrder;
use ogee_common::id::{AttachEpoch, LayerId, VolumeId};
use ogee_common::name::VolumeRef;
use ogee_common::qos::VolumeLimits;
use ogee_proto::data::Ancestor;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

/// What an open volume is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachInfo {
    /// What was opened.
    pub name: VolumeRef,
    /// The volume.
    pub volume: VolumeId,
    /// The layer read and written.
    pub layer: LayerId,
    /// The attach; 0 when read-only.
    pub epoch: AttachEpoch,
    /// Bytes of a logical sector: IO is in multiples of it.
    pub sector_bytes: u32,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Attachment {
    pub(crate) cluster: Arc<ClusterInner>,
    pub(crate) info: AttachInfo,
    /// Parents of the layer, nearest first.
    pub(crate) chain: Vec<Ancestor>,
    /// What the last of the chain, or the layer without one, stands on.
    pub(crate) lazy: Option<Arc<Lazy>>,
    /// What is read first, if that is recorded.
    pub(crate) recorder: OnceLock<Recorder>,
    pub(crate) gate: Gate,
    pub(crate) throttle: Throttle,
    pub(crate) order: Arc<WriteOrder>,
    pub(crate) layout: LayoutCache,
    pub(crate) fences: FenceTable,
    pub(crate) size: watch::Sender<u64>,
    pub(crate) stats: Stats,
    /// Wakes the control task to ask the MDS for the current state.
    pub(crate) resubscribe: Arc<Notify>,
    pub(crate) tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl Attachment {
    /// Whether writes are refused.
    pub(crate) fn is_read_only(&self) -> bool {
        self.info.epoch.0 == 0
    }

    /// The layers that are looked through, nearest first, each with the seq it is seen at.
    pub(crate) fn moments(&self) -> impl Iterator<Item = Moment> {
        let own = Moment { layer: self.info.layer, seq: self.gate.seq() };
        std::iter::once(own).chain(self.chain.iter().map(|a| Moment { layer: a.layer, seq: a.seq }))
    }

    /// Whether what is seen can be told from a moment: it is one of those looked through, or before it in the same layer.
    pub(crate) fn can_compare(&self, moment: Moment) -> bool {
        let seen = self.moments().find(|seen| seen.layer == moment.layer);
        seen.is_some_and(|seen| moment.seq <= seen.seq)
    }

    /// The MDS's word on the size; it never shrinks.
    pub(crate) fn grow(&self, size_bytes: u64) {
        self.size.send_if_modified(|size| {
            let grows = size_bytes > *size;
            *size = (*size).max(size_bytes);
            grows
        });
    }

    /// The MDS's word on the limits, unless this client does not obey any.
    pub(crate) fn limit(self: &Arc<Self>, limits: VolumeLimits) {
        if self.cluster.config.limits == LimitsPolicy::Obey && self.throttle.set(limits) {
            let task = self.cluster.control().spawn(throttle::run(Arc::downgrade(self)));
            self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
        }
    }

    /// Ends the attach: the gate refuses all IO, also what waits for limits.
    pub(crate) fn end(&self, fenced: bool) {
        self.gate.end(fenced);
        self.throttle.close();
    }

    /// Ends the control tasks.
    pub(crate) fn stop_tasks(&self) {
        for task in self.tasks.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.stop_tasks();
    }
}
