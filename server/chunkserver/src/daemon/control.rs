//! What this process tells the MDS and what it is told: registration, heartbeats, layer tasks.
//!
//! Invariants: a heartbeat goes out every [`HEARTBEAT_INTERVAL`], and at once when a layer task was done; a task is
//! reported as done only after its command was applied by a leader here; a report that got lost is repeated, because
//! the MDS hands the task out again.

use super::copysets::{Copysets, Hosted};
use super::flatten::{Ended, Flattens, order_of};
use super::mds_channel::MdsChannel;
use super::moves::Moves;
use super::scrub::Scrub;
use crate::store::{ChunkStore, FlattenOrder};
use ogee_common::id::{CopysetId, LayerId, ReplicaId, VolumeSeq};
use ogee_common::limits::HEARTBEAT_INTERVAL;
use ogee_disk::DataDir;
use ogee_proto::data::{Command, DropVersionHead, PROTOCOL_MAX, SealHead};
use ogee_proto::mds;
use ogee_proto::mds::layer_task::Kind;
use ogee_raft::AddressBook;
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use tokio::sync::Notify;

/// Addresses of the other chunkservers, as the MDS told last.
#[derive(Debug, Default)]
pub(super) struct PeerBook(RwLock<HashMap<u32, SocketAddr>>);

impl AddressBook for PeerBook {
    fn addr(&self, process: u32) -> Option<SocketAddr> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&process).copied()
    }
}

impl PeerBook {
    fn replace(&self, peers: &[mds::Peer]) {
        let known = peers.iter().filter_map(|p| Some((p.chunkserver, p.addr.parse().ok()?))).collect();
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = known;
    }

    /// Addresses as a map, to be kept over a restart without MDS.
    pub(super) fn all(&self) -> Vec<(u32, SocketAddr)> {
        let mut all: Vec<_> =
            self.0.read().unwrap_or_else(PoisonError::into_inner).iter().map(|(k, v)| (*k, *v)).collect();
        all.sort_unstable();
        all
    }

    /// Takes over what was kept.
    pub(super) fn restore(&self, peers: Vec<(u32, SocketAddr)>) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = peers.into_iter().collect();
    }
}

#[derive(Debug, Default)]
struct Tasks {
    /// Under way or done but not yet acknowledged by a heartbeat.
    known: HashSet<(u64, u32)>,
    done: Vec<mds::TaskDone>,
}

/// The control side of the process.
pub(super) struct Control {
    pub(super) own: u32,
    pub(super) uuid: [u8; 16],
    pub(super) addr: SocketAddr,
    pub(super) capacity_bytes: Option<u64>,
    pub(super) dir: DataDir,
    pub(super) mds: Arc<MdsChannel>,
    pub(super) copysets: Arc<Copysets>,
    pub(super) store: Arc<ChunkStore>,
    pub(super) book: Arc<PeerBook>,
    pub(super) wake: Arc<Notify>,
    scrub: Arc<Scrub>,
    verify: Arc<Scrub>,
    flattens: Flattens,
    moves: Arc<Moves>,
    tasks: Mutex<Tasks>,
}

/// What a [`Control`] is made of.
pub(super) struct ControlParts {
    pub(super) own: u32,
    pub(super) uuid: [u8; 16],
    pub(super) addr: SocketAddr,
    pub(super) capacity_bytes: Option<u64>,
    pub(super) dir: DataDir,
    pub(super) mds: Arc<MdsChannel>,
    pub(super) copysets: Arc<Copysets>,
    pub(super) store: Arc<ChunkStore>,
    pub(super) book: Arc<PeerBook>,
    pub(super) scrub: Arc<Scrub>,
    pub(super) verify: Arc<Scrub>,
    pub(super) flattens: Flattens,
}

impl Control {
    pub(super) fn new(parts: ControlParts) -> Arc<Self> {
        let ControlParts { own, uuid, addr, capacity_bytes, dir, mds, copysets, store, book, scrub, verify, flattens } = parts;
        let wake = Arc::new(Notify::new());
        let tasks = Mutex::default();
        let moves = Arc::default();
        Arc::new(Self { own, uuid, addr, capacity_bytes, dir, mds, copysets, store, book, wake, scrub, verify, flattens, moves, tasks })
    }

    fn tasks(&self) -> std::sync::MutexGuard<'_, Tasks> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends heartbeats until it is dropped.
    pub(super) async fn run(self: Arc<Self>) {
        let mut silent = false;
        loop {
            match self.beat().await {
                Ok(()) if silent => {
                    silent = false;
                    tracing::info!("the MDS answers again");
                }
                Ok(()) => {}
                Err(status) if !silent => {
                    silent = true;
                    tracing::warn!(%status, "no heartbeat reached the MDS; IO goes on");
                }
                Err(_) => {}
            }
            tokio::select! {
                () = tokio::time::sleep(HEARTBEAT_INTERVAL) => {}
                () = self.wake.notified() => {}
            }
        }
    }

    async fn beat(self: &Arc<Self>) -> Result<(), tonic::Status> {
        let request = self.request();
        let sent = request.done.clone();
        let reply = self
            .mds
            .call(|mut client| {
                let request = request.clone();
                async move { client.heartbeat(request).await }
            })
            .await;
        let reply = match reply {
            Ok(reply) => reply,
            Err(status) => {
                self.tasks().done.extend(sent);
                return Err(status);
            }
        };
        {
            let mut tasks = self.tasks();
            for done in &sent {
                tasks.known.remove(&(done.task, done.copyset));
            }
        }
        self.book.replace(&reply.peers);
        if let Err(error) = self.copysets.follow(self.own, &reply).await {
            tracing::error!(error = &error as &dyn std::error::Error, "make copyset replicas");
        }
        for nobodys in &reply.drop {
            let (copyset, replica) = (CopysetId(nobodys.copyset), ReplicaId(nobodys.replica));
            tokio::spawn(self.copysets.clone().drop_replica(copyset, replica));
        }
        if let Err(error) = self.copysets.join(&reply.join).await {
            tracing::error!(error = &error as &dyn std::error::Error, "make replicas that join");
        }
        for order in &reply.hand_over {
            let (copyset, heir) = (CopysetId(order.copyset), ReplicaId(order.replica));
            if let Some(hosted) = self.copysets.get(copyset).filter(|h| h.group.is_leader()) {
                tracing::info!(%copyset, to = %heir, "the lead is handed over");
                tokio::spawn(async move { hosted.group.transfer_leader(heir).await });
            }
        }
        for order in &reply.moves {
            if let Some(hosted) = self.copysets.get(CopysetId(order.copyset)) {
                self.moves.follow(hosted, order);
            }
        }
        if let Some(order) = &reply.scrub {
            self.scrub.obey(order);
        }
        if let Some(order) = &reply.verify {
            self.verify.obey(order);
        }
        self.flattens.follow(&reply.tasks);
        for task in reply.tasks {
            self.start(&task);
        }
        Ok(())
    }

    fn request(&self) -> mds::HeartbeatRequest {
        let usage = self.dir.usage();
        let (total, free) = usage.as_ref().map_or((0, 0), |u| (u.total_bytes, u.free_bytes));
        let capacity = self.capacity_bytes.unwrap_or(total);
        let disk_error = match (&usage, self.copysets.stopped()) {
            (Err(e), _) => e.to_string(),
            (_, n) if n > 0 => format!("{n} copyset replicas stopped"),
            _ => String::new(),
        };
        mds::HeartbeatRequest {
            chunkserver: self.own,
            uuid: bytes::Bytes::copy_from_slice(&self.uuid),
            addr: self.addr.to_string(),
            capacity_bytes: capacity,
            free_bytes: free.min(capacity),
            copysets: self.copysets.reports(),
            done: std::mem::take(&mut self.tasks().done),
            disk_error,
            held: self.copysets.held(),
            failed: self.copysets.damaged(),
            scrub: Some(self.scrub.report()),
            verify: Some(self.verify.report()),
            protocol: u32::from(PROTOCOL_MAX),
        }
    }

    /// Starts a task in every copyset that is led here.
    fn start(self: &Arc<Self>, task: &mds::LayerTask) {
        if let Some(order) = order_of(task) {
            let order = Arc::new(order);
            for (hosted, done) in self.to_start(task) {
                tokio::spawn(self.clone().flatten(hosted, order.clone(), done));
            }
            return;
        }
        let Some(command) = command_of(task) else {
            tracing::error!(task = task.id, "a layer task of an unknown kind; this version is too old");
            return;
        };
        let encoded = command.encode();
        for (hosted, done) in self.to_start(task) {
            tokio::spawn(self.clone().carry_out(hosted, encoded.clone(), done));
        }
    }

    /// The copysets of a task that are led here and do not work on it yet; from now on they do.
    fn to_start(&self, task: &mds::LayerTask) -> Vec<(Hosted, mds::TaskDone)> {
        let mut found = vec![];
        for copyset in &task.copysets {
            let Some(hosted) = self.copysets.get(CopysetId(*copyset)) else { continue };
            if hosted.group.is_leader() && self.tasks().known.insert((task.id, *copyset)) {
                found.push((hosted, mds::TaskDone { task: task.id, copyset: *copyset }));
            }
        }
        found
    }

    async fn flatten(self: Arc<Self>, hosted: Hosted, order: Arc<FlattenOrder>, done: mds::TaskDone) {
        match self.flattens.run(&hosted, done.task, &order).await {
            Ended::Done => {
                self.tasks().done.push(done);
                self.wake.notify_one();
            }
            Ended::Broken => drop(self.tasks().known.remove(&(done.task, done.copyset))),
        }
    }

    async fn carry_out(self: Arc<Self>, hosted: Hosted, command: bytes::Bytes, done: mds::TaskDone) {
        match hosted.group.propose(command, None).await {
            Ok(_) => {
                self.tasks().done.push(done);
                self.wake.notify_one();
            }
            Err(error) => {
                tracing::debug!(copyset = %hosted.copyset, %error, "layer task is tried again with the next heartbeat");
                self.tasks().known.remove(&(done.task, done.copyset));
            }
        }
    }

    /// Bytes that are free, for the space watch.
    pub(super) fn refresh_space(&self) {
        if let Err(error) = self.store.refresh_space() {
            tracing::warn!(error = &error as &dyn std::error::Error, "read free space");
        }
    }
}

fn command_of(task: &mds::LayerTask) -> Option<Command> {
    let layer = LayerId(task.layer);
    Some(match task.kind.as_ref()? {
        Kind::Seal(seq) => Command::Seal(SealHead { layer, seq: VolumeSeq(*seq) }),
        Kind::DropLayer(_) => Command::DropLayer(layer),
        Kind::DropVersion(d) => Command::DropVersion(DropVersionHead {
            layer,
            after: VolumeSeq(d.after),
            seq: VolumeSeq(d.seq),
            next: VolumeSeq(d.next),
        }),
        // One without sense; the others have no single command.
        Kind::Flatten(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_task_has_its_command() {
        let task = |kind| mds::LayerTask { id: 1, layer: 2, copysets: vec![], kind };
        let layer = LayerId(2);
        assert_eq!(command_of(&task(None)), None);
        let seal = Command::Seal(SealHead { layer, seq: VolumeSeq(5) });
        assert_eq!(command_of(&task(Some(Kind::Seal(5)))), Some(seal));
        assert_eq!(command_of(&task(Some(Kind::DropLayer(mds::Empty {})))), Some(Command::DropLayer(layer)));
        let merge = DropVersionHead { layer, after: VolumeSeq(1), seq: VolumeSeq(2), next: VolumeSeq(3) };
        let wire = mds::DropVersion { after: 1, seq: 2, next: 3 };
        assert_eq!(command_of(&task(Some(Kind::DropVersion(wire)))), Some(Command::DropVersion(merge)));
    }

    #[test]
    fn the_address_book_keeps_what_the_mds_told() {
        let book = PeerBook::default();
        let good = mds::Peer { chunkserver: 2, addr: "127.0.0.1:7".to_owned() };
        let bad = mds::Peer { chunkserver: 3, addr: "nonsense".to_owned() };
        book.replace(&[good, bad]);
        assert_eq!(book.addr(2), "127.0.0.1:7".parse().ok());
        assert_eq!(book.addr(3), None);
    }
}
