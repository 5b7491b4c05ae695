//! The state of a connection as another daemon takes it over, and a handler that goes on with such a state.
//!
//! Called by the hand-over, in the old process when its protocol thread is parked and its rings stand still, in the new one before its protocol thread
//! starts. Invariants: what comes from the other process is checked as what comes from the front end is; after an error the handler is of no more use;
//! no ring runs and no interrupt is sent before [`Handler::start_rings`].

use super::{Handler, Mapping, QueueFiles, copy, refused};
use crate::dirty_log::DirtyLog;
use crate::handover::state::{FrontEndState, InflightState, QueueState, RegionState, SharedMemory};
use crate::inflight::InflightArea;
use ogee_client::BlockDevice;
use ogee_common::limits::VHOST_QUEUE_SIZE_MAX;
use std::sync::Arc;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserLog, VhostUserMemoryRegion};
use vhost::vhost_user::{Error, Result, VhostUserBackendReqHandlerMut};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

impl<D: BlockDevice> Handler<D> {
    /// Everything that the front end has said, and where the rings stand; but for the channel, which is not here.
    ///
    /// # Errors
    /// No file descriptors.
    pub(crate) fn state(&self) -> Result<FrontEndState> {
        let inflight = match self.inflight.as_ref().and_then(InflightArea::source) {
            Some((message, file)) => {
                let memory = SharedMemory { size: message.mmap_size, offset: message.mmap_offset, file: duplicate(file)? };
                Some(InflightState { memory, num_queues: message.num_queues, queue_size: message.queue_size })
            }
            None => None,
        };
        let log = match self.log.as_ref().and_then(|log| log.source()) {
            Some((message, file)) => {
                Some(SharedMemory { size: message.mmap_size, offset: message.mmap_offset, file: duplicate(file)? })
            }
            None => None,
        };
        Ok(FrontEndState {
            features: self.acked_features,
            protocol_features: self.protocol_features,
            owned: self.owned,
            writeback: self.backend.config.has_writeback(),
            arrival: self.backend.known_arrival(),
            size_bytes: self.backend.device.info().size_bytes,
            regions: self.region_states()?,
            inflight,
            log,
            channel: None,
            queues: (0..self.backend.queues.len()).map(|index| self.queue_state(index)).collect::<Result<_>>()?,
        })
    }

    fn region_states(&self) -> Result<Vec<RegionState>> {
        let memory = self.backend.memory.memory();
        let state = |mapping: &Mapping| -> Result<RegionState> {
            let region = memory.find_region(GuestAddress(mapping.guest)).ok_or(Error::BackendInternalError)?;
            let at = region.file_offset().ok_or(Error::BackendInternalError)?;
            let Mapping { user, guest, len } = *mapping;
            Ok(RegionState { guest, user, memory: SharedMemory { size: len, offset: at.start(), file: duplicate(at.file())? } })
        };
        self.mappings.iter().map(state).collect()
    }

    fn queue_state(&self, index: usize) -> Result<QueueState> {
        let (queue, files) = (&self.backend.queues[index], &self.files[index]);
        let ring = queue.vring.get_ref();
        let enabled = ring.is_enabled();
        let of = ring.get_queue();
        Ok(QueueState {
            size: of.size(),
            next_avail: of.next_avail(),
            descriptors: of.desc_table(),
            available: of.avail_ring(),
            used: of.used_ring(),
            used_in_log: self.used_in_log[index].map(|at| at.0),
            ready: of.ready(),
            enabled,
            kick: copy(files.kick.as_ref())?,
            call: copy(files.call.as_ref())?,
            err: copy(files.err.as_ref())?,
        })
    }

    /// Goes on where another handler stopped; returns the rings that ran there, for [`Handler::start_rings`]. The features have been set before,
    /// since the crate must see that too.
    ///
    /// # Errors
    /// What this daemon would refuse if the front end said it, or cannot do.
    pub(crate) fn adopt(&mut self, state: FrontEndState) -> Result<Vec<usize>> {
        if state.features != self.acked_features || state.queues.len() > self.backend.queues.len() {
            return Err(Error::InvalidParam);
        }
        if state.owned {
            self.set_owner()?;
        }
        self.backend.config.adopt_writeback(state.writeback);
        self.backend.adopt_arrival(state.arrival);
        self.adopt_memory(state.regions)?;
        if let Some(InflightState { memory, num_queues, queue_size }) = state.inflight {
            let message = VhostUserInflight::new(memory.size, memory.offset, num_queues, queue_size);
            self.set_inflight_fd(&message, memory.file)?;
        }
        if let Some(SharedMemory { size, offset, file }) = state.log {
            let log = DirtyLog::map(&VhostUserLog::new(size, offset), file).map_err(refused)?;
            log.check_covers(&self.backend.memory.memory()).map_err(refused)?;
            self.log = Some(Arc::new(log));
        }
        let mut started = Vec::new();
        for (index, queue) in state.queues.into_iter().enumerate() {
            if queue.ready {
                started.push(index);
            }
            self.adopt_queue(index, queue)?;
        }
        self.apply_logs();
        Ok(started)
    }

    fn adopt_memory(&mut self, regions: Vec<RegionState>) -> Result<()> {
        let mapped = regions.into_iter().map(|RegionState { guest, user, memory }| {
            Self::region(&VhostUserMemoryRegion::new(guest, memory.size, user, memory.offset), memory.file)
        });
        let (mapped, mappings): (Vec<_>, Vec<_>) = mapped.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        if mappings.is_empty() {
            return Ok(());
        }
        self.replace_memory(GuestMemoryMmap::from_arc_regions(mapped).map_err(refused)?)?;
        self.mappings = mappings;
        Ok(())
    }

    fn adopt_queue(&mut self, index: usize, state: QueueState) -> Result<()> {
        if !state.size.is_power_of_two() || state.size > VHOST_QUEUE_SIZE_MAX || (state.ready && state.kick.is_none()) {
            return Err(Error::InvalidParam);
        }
        self.files[index] =
            QueueFiles { kick: copy(state.kick.as_ref())?, call: copy(state.call.as_ref())?, err: copy(state.err.as_ref())? };
        self.used_in_log[index] = state.used_in_log.map(GuestAddress);
        let queue = &self.backend.queues[index];
        let vring = &queue.vring;
        vring.set_queue_size(state.size);
        vring.set_queue_info(state.descriptors, state.available, state.used).map_err(refused)?;
        // Where the driver sees it, as at SET_VRING_ADDR; of a ring that runs this also shows that it is in guest memory.
        match vring.queue_used_idx().map_err(refused) {
            Ok(used) => vring.set_queue_next_used(used),
            Err(error) if state.ready => return Err(error),
            Err(_) => {}
        }
        vring.set_queue_next_avail(state.next_avail);
        vring.set_kick(state.kick);
        vring.set_call(state.call);
        vring.set_err(state.err);
        vring.set_enabled(state.enabled);
        Ok(())
    }

    /// Starts rings. Requests that were in flight in the other process are run again first, as after its death (`resubmit.rs`).
    pub(crate) fn start_rings(&self, started: &[usize]) {
        for index in started {
            let record = self.inflight.as_ref().and_then(|area| area.record(*index));
            self.backend.start_ring(&self.backend.queues[*index], record);
        }
    }
}

fn duplicate(file: &std::fs::File) -> Result<std::fs::File> {
    file.try_clone().map_err(Error::ReqHandlerError)
}
