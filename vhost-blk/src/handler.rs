//! What a front end says, message by message: the handler that the `vhost` crate calls for each request it has decoded.
//!
//! Made for each connection, called by its protocol thread alone. It keeps the translation of the front end's addresses and
//! the shared in-flight memory, sets rings up, and leaves running and stopping them to the back end. It stands in place of
//! vhost-user-backend's own handler, which refuses the in-flight messages and cannot be extended
//! (docs/adr/0011-in-flight-requests.md); rings are still that crate's.
//!
//! Invariants: everything from the front end is checked before use (indices, addresses, sizes, descriptors); an error ends the
//! connection or is told to the front end, and changes nothing else; a ring that runs is drained before its addresses, size
//! or kick change. A dirty log may come and go while rings run: when that message is answered they use it, or do so no more.
//! Deliberately absent: packed rings, post-copy, device state, GPU and shared objects.

mod taken;

use crate::backend::{Backend, Queue};
use crate::config_space::offered_features;
use crate::dirty_log::{DirtyLog, QueueLog};
use crate::inflight::InflightArea;
use ogee_client::BlockDevice;
use ogee_common::limits::{VHOST_MEMORY_REGIONS_MAX, VHOST_QUEUE_SIZE_MAX};
use std::error::Error as StdError;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vhost_user_backend::VringT;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestRegionMmap};

/// Where a region of guest memory lies for the front end and for the guest.
#[derive(Debug, Clone, Copy)]
struct Mapping {
    user: u64,
    guest: u64,
    len: u64,
}

/// The descriptors of a queue, once more: the crates that use them do not give them out, and a daemon that takes over needs them.
#[derive(Debug, Default)]
struct QueueFiles {
    kick: Option<File>,
    call: Option<File>,
    err: Option<File>,
}

/// The handler of one connection. The channel to the front end is not here: see `channel.rs`.
pub(crate) struct Handler<D> {
    backend: Arc<Backend<D>>,
    owned: bool,
    acked_features: u64,
    /// What the crate acts on; kept for a daemon that takes over.
    protocol_features: u64,
    mappings: Vec<Mapping>,
    inflight: Option<InflightArea>,
    log: Option<Arc<DirtyLog>>,
    /// Where the log has the used ring of each queue, as far as its writes are to be logged.
    used_in_log: Vec<Option<GuestAddress>>,
    files: Vec<QueueFiles>,
}

/// A second descriptor of the same file.
fn copy(file: Option<&File>) -> Result<Option<File>> {
    file.map(File::try_clone).transpose().map_err(Error::ReqHandlerError)
}

/// An error of ours as the crate wants it.
fn refused(error: impl Into<Box<dyn StdError + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

impl<D: BlockDevice> Handler<D> {
    pub(crate) fn new(backend: Arc<Backend<D>>) -> Self {
        let used_in_log = vec![None; backend.queues.len()];
        let files = backend.queues.iter().map(|_| QueueFiles::default()).collect();
        Self {
            backend,
            owned: false,
            acked_features: 0,
            protocol_features: 0,
            mappings: Vec::new(),
            inflight: None,
            log: None,
            used_in_log,
            files,
        }
    }

    fn queue(&self, index: u32) -> Result<(usize, &Queue)> {
        let index = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.backend.queues.get(index).map(|queue| (index, queue)).ok_or(Error::InvalidParam)
    }

    /// The guest-physical address of a front end's address.
    fn translate(&self, user: u64) -> Result<u64> {
        let within = |m: &&Mapping| user >= m.user && user - m.user < m.len;
        let mapping = self.mappings.iter().find(within).ok_or(Error::InvalidParam)?;
        mapping.guest.checked_add(user - mapping.user).ok_or(Error::InvalidParam)
    }

    /// Stops a ring that runs, so that it can be changed.
    fn settle(&self, index: usize, queue: &Queue) -> Result<()> {
        let ready = queue.vring.get_ref().get_queue().ready();
        if ready { self.backend.stop_ring(index, queue).map_err(refused) } else { Ok(()) }
    }

    /// Tells the loop of a queue what to log; it does so when this returns.
    fn apply_log(&self, index: usize, queue: &Queue) {
        let wanted = self.acked_features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
        let log = self.log.as_ref().filter(|_| wanted);
        let used = self.used_in_log.get(index).copied().flatten();
        Backend::<D>::set_log(queue, log.map(|log| QueueLog { log: Arc::clone(log), used }));
    }

    fn apply_logs(&self) {
        self.backend.queues.iter().enumerate().for_each(|(index, queue)| self.apply_log(index, queue));
    }

    /// Whether the ring runs with these addresses.
    fn runs_at(queue: &Queue, addresses: (u64, u64, u64)) -> bool {
        let ring = queue.vring.get_ref();
        let queue = ring.get_queue();
        queue.ready() && (queue.desc_table(), queue.avail_ring(), queue.used_ring()) == addresses
    }

    fn region(region: &VhostUserMemoryRegion, file: File) -> Result<(Arc<GuestRegionMmap>, Mapping)> {
        // Access behind the end of a file raises SIGBUS; other kinds of file have no length.
        let about = file.metadata().map_err(Error::ReqHandlerError)?;
        let end = region.mmap_offset.checked_add(region.memory_size).ok_or(Error::InvalidParam)?;
        if about.is_file() && end > about.len() {
            return Err(Error::InvalidParam);
        }
        let mapped = GuestRegionMmap::new(region.mmap_region(file)?, GuestAddress(region.guest_phys_addr));
        let mapping = Mapping { user: region.user_addr, guest: region.guest_phys_addr, len: region.memory_size };
        Ok((Arc::new(mapped.ok_or(Error::InvalidParam)?), mapping))
    }

    fn replace_memory(&mut self, memory: GuestMemoryMmap) -> Result<()> {
        if let Some(Err(error)) = self.log.as_ref().map(|log| log.check_covers(&memory)) {
            // While rings run the log is made larger first. Rings that stand are about to get another one.
            if self.backend.queues.iter().any(|queue| queue.vring.get_ref().get_queue().ready()) {
                return Err(refused(error));
            }
            self.log = None;
            self.apply_logs();
        }
        // Requests in flight keep the mapping they were parsed with.
        self.backend.memory.lock().map_err(|_| Error::BackendInternalError)?.replace(memory);
        Ok(())
    }
}

impl<D: BlockDevice> VhostUserBackendReqHandlerMut for Handler<D> {
    fn set_owner(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.owned, true) {
            return Err(Error::InvalidOperation("already claimed"));
        }
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.owned = false;
        self.acked_features = 0;
        self.log = None;
        self.apply_logs();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        for (index, queue) in self.backend.queues.iter().enumerate() {
            self.backend.enable_ring(queue, false);
            self.settle(index, queue)?;
        }
        self.acked_features = 0;
        self.log = None;
        self.apply_logs();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(offered_features(&self.backend.device.info()))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !offered_features(&self.backend.device.info()) != 0 {
            return Err(Error::InvalidParam);
        }
        self.acked_features = features;
        // SET_LOG_BASE comes before the feature that starts the log, and the log is over when the feature is taken back.
        if features & VhostUserVirtioFeatures::LOG_ALL.bits() == 0 {
            self.log = None;
        }
        self.apply_logs();
        self.backend.features.store(features, Ordering::Release);
        for queue in &self.backend.queues {
            queue.vring.set_queue_event_idx(features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
            // Without protocol features there is no message that enables rings ("Ring states" of the specification).
            if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
                self.backend.enable_ring(queue, true);
            }
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let pairs = regions.iter().zip(files).map(|(region, file)| Self::region(region, file));
        let (mapped, mappings): (Vec<_>, Vec<_>) = pairs.collect::<Result<Vec<_>>>()?.into_iter().unzip();
        self.replace_memory(GuestMemoryMmap::from_arc_regions(mapped).map_err(refused)?)?;
        self.mappings = mappings;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let (index, queue) = self.queue(index)?;
        let num = u16::try_from(num).ok().filter(|num| num.is_power_of_two() && *num <= VHOST_QUEUE_SIZE_MAX);
        let num = num.ok_or(Error::InvalidParam)?;
        self.settle(index, queue)?;
        queue.vring.set_queue_size(num);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let (position, _) = self.queue(index)?;
        let (descriptor, available, used) =
            (self.translate(descriptor)?, self.translate(available)?, self.translate(used)?);
        let logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        if let Some(used_in_log) = self.used_in_log.get_mut(position) {
            *used_in_log = logged.then_some(GuestAddress(log));
        }
        let (index, queue) = self.queue(index)?;
        // A migration starts and ends the log of a ring that runs by this message; nothing else changes then.
        if Self::runs_at(queue, (descriptor, available, used)) {
            self.apply_log(index, queue);
            return Ok(());
        }
        self.settle(index, queue)?;
        self.apply_log(index, queue);
        queue.vring.set_queue_info(descriptor, available, used).map_err(refused)?;
        // SET_VRING_BASE has only the available index; the used index is where the driver sees it.
        let idx = queue.vring.queue_used_idx().map_err(refused)?;
        queue.vring.set_queue_next_used(idx);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let (index, queue) = self.queue(index)?;
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.settle(index, queue)?;
        queue.vring.set_queue_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (position, queue) = self.queue(index)?;
        self.backend.stop_ring(position, queue).map_err(refused)?;
        let next_avail = queue.vring.queue_next_avail();
        queue.vring.set_kick(None);
        queue.vring.set_call(None);
        (self.files[position].kick, self.files[position].call) = (None, None);
        Ok(VhostUserVringState::new(index, u32::from(next_avail)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (index, queue) = self.queue(u32::from(index))?;
        self.settle(index, queue)?;
        let (starts, again) = (file.is_some(), copy(file.as_ref())?);
        queue.vring.set_kick(file);
        if starts {
            let record = self.inflight.as_ref().and_then(|area| area.record(index));
            self.backend.start_ring(queue, record);
        }
        self.files[index].kick = again;
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (index, queue) = self.queue(u32::from(index))?;
        let again = copy(file.as_ref())?;
        queue.vring.set_call(file);
        // For an answer whose interrupt was lost with a dead back end or sent to the old descriptor.
        if let Err(error) = queue.vring.signal_used_queue() {
            tracing::debug!(target: "controlpath", %error, "interrupt not sent");
        }
        self.files[index].call = again;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (index, queue) = self.queue(u32::from(index))?;
        let again = copy(file.as_ref())?;
        queue.vring.set_err(file);
        self.files[index].err = again;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.backend.queues.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let needed = VhostUserVirtioFeatures::PROTOCOL_FEATURES;
        if self.acked_features & needed.bits() == 0 {
            return Err(Error::InactiveFeature(needed));
        }
        let (_, queue) = self.queue(index)?;
        self.backend.enable_ring(queue, enable);
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        self.backend.is_new.store(true, Ordering::Release);
        Ok(self.backend.config.read(&self.backend.device.info(), offset, size))
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.backend.config.write(offset, buf).map_err(refused)
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        self.backend.is_new.store(true, Ordering::Release);
        InflightArea::create(inflight.num_queues, inflight.queue_size).map_err(refused)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        self.inflight = Some(InflightArea::map(inflight, file).map_err(refused)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(VHOST_MEMORY_REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        if self.mappings.len() >= VHOST_MEMORY_REGIONS_MAX {
            return Err(Error::InvalidParam);
        }
        let (mapped, mapping) = Self::region(region, file)?;
        let memory = self.backend.memory.memory().insert_region(mapped).map_err(refused)?;
        self.replace_memory(memory)?;
        self.mappings.push(mapping);
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let start = GuestAddress(region.guest_phys_addr);
        let (memory, _) = self.backend.memory.memory().remove_region(start, region.memory_size).map_err(refused)?;
        self.replace_memory(memory)?;
        self.mappings.retain(|mapping| mapping.guest != region.guest_phys_addr);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("no GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("no device state"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("no device state"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory regions"))
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::map(log, file).map_err(refused)?;
        log.check_covers(&self.backend.memory.memory()).map_err(refused)?;
        self.log = Some(Arc::new(log));
        self.apply_logs();
        Ok(())
    }
}
