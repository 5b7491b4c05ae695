//! Flattens: what the leader of a copyset does for a layer task of kind Flatten. See `crate::store::flatten`.
//!
//! Invariants: one copyset is flattened at a time in this process, at the configured pace, and not while the disk is full; it goes on
//! only while heartbeats repeat the order and this replica leads; it is reported done only when nothing was left to copy
//! after the ancestors were sealed by an entry that was applied here. It keeps no state: whoever leads next looks at what is there
//! and goes on behind it.

use super::config::ChunkserverConfig;
use super::copysets::Hosted;
use crate::store::error::{ChunkStoreError, ChunkStoreErrorKind};
use crate::store::pace::Pace;
use crate::store::pages::PageSet;
use crate::store::FlattenOrder;
use ogee_common::id::{ChunkIndex, LayerId, VolumeSeq};
use ogee_common::limits::PAGE_BYTES;
use ogee_proto::data::{Ancestor, Command, Status};
use ogee_proto::mds;
use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Pause before a replica that is not in order, or has no space, is asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// The flattens of this process.
#[derive(Debug)]
pub(super) struct Flattens {
    pace: Pace,
    /// One at a time.
    turn: tokio::sync::Mutex<()>,
    /// (task, copyset) of the last heartbeat.
    ordered: Mutex<HashSet<(u64, u32)>>,
}

/// How a flatten of a copyset ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// Nothing is left to copy.
    Done,
    /// It is to be tried again if it is still ordered.
    Broken,
}

/// What is to be flattened, from the wire; `None` when it makes no sense.
pub(super) fn order_of(task: &mds::LayerTask) -> Option<FlattenOrder> {
    let Some(mds::layer_task::Kind::Flatten(order)) = &task.kind else { return None };
    let ancestor = |a: &mds::Ancestor| Ancestor { layer: LayerId(a.layer), seq: VolumeSeq(a.seq) };
    let chain: Vec<Ancestor> = order.chain.iter().map(ancestor).collect();
    let sound = !chain.is_empty() && chain.len() <= ogee_common::limits::ANCESTRY_DEPTH_MAX && task.layer != 0;
    sound.then(|| FlattenOrder { layer: LayerId(task.layer), needed: VolumeSeq(order.needed), chain: chain.into() })
}

impl Flattens {
    pub(super) fn of_config(config: &ChunkserverConfig) -> Self {
        let pace = Pace::new(u64::from(config.flatten_mib_per_second) << 20);
        Self { pace, turn: tokio::sync::Mutex::default(), ordered: Mutex::default() }
    }

    /// What the MDS wants now; everything else stops.
    pub(super) fn follow(&self, tasks: &[mds::LayerTask]) {
        let wanted = tasks.iter().filter(|task| order_of(task).is_some());
        let wanted = wanted.flat_map(|task| task.copysets.iter().map(|copyset| (task.id, *copyset))).collect();
        *self.ordered.lock().unwrap_or_else(PoisonError::into_inner) = wanted;
    }

    fn is_ordered(&self, task: u64, copyset: u32) -> bool {
        self.ordered.lock().unwrap_or_else(PoisonError::into_inner).contains(&(task, copyset))
    }

    /// Flattens a layer in a copyset that is led here.
    pub(super) async fn run(&self, hosted: &Hosted, task: u64, order: &FlattenOrder) -> Ended {
        let _turn = self.turn.lock().await;
        let goes_on = || self.is_ordered(task, hosted.copyset.0) && hosted.group.is_leader();
        // Everything below it in the log is applied here when this has been, and the ancestors change no more.
        if !goes_on() || !propose(hosted, order, (ChunkIndex(0), 0), PageSet::EMPTY).await {
            return Ended::Broken;
        }
        for at in hosted.store.flatten_rows(order) {
            while !hosted.store.may_flatten() && goes_on() {
                tokio::time::sleep(PAUSE).await;
            }
            let Some(pages) = self.pages(hosted, order, at, &goes_on).await else { return Ended::Broken };
            if pages.is_empty() {
                tokio::task::yield_now().await;
                continue;
            }
            if !goes_on() || !propose(hosted, order, at, pages).await {
                return Ended::Broken;
            }
            self.pace.pass(pages.len() * PAGE_BYTES as usize).await;
        }
        tracing::info!(copyset = %hosted.copyset, layer = order.layer.0, "layer flattened");
        Ended::Done
    }

    async fn pages(
        &self,
        hosted: &Hosted,
        order: &FlattenOrder,
        at: (ChunkIndex, u8),
        goes_on: &impl Fn() -> bool,
    ) -> Option<PageSet> {
        while goes_on() {
            match hosted.store.flatten_pages(order, at, &hosted.group.others()).await {
                Ok(pages) => return Some(pages),
                Err(error) if is_passing(&error) => tokio::time::sleep(PAUSE).await,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(copyset = %hosted.copyset, error, "look for pages to flatten");
                    return None;
                }
            }
        }
        None
    }
}

fn is_passing(error: &ChunkStoreError) -> bool {
    error.kind() == ChunkStoreErrorKind::Busy
}

/// Whether the entry was applied. A layer that is gone has nothing to copy: the MDS takes the order back.
async fn propose(hosted: &Hosted, order: &FlattenOrder, (chunk, row): (ChunkIndex, u8), pages: PageSet) -> bool {
    let command = Command::Flatten(order.head(chunk, row, pages)).encode();
    match hosted.group.propose(command, None).await {
        Ok(done) => done.reply.first_chunk().is_some_and(|code| Status::parse(u16::from_le_bytes(*code)) == Status::Ok),
        Err(error) => {
            tracing::debug!(copyset = %hosted.copyset, %error, "a flatten is tried again with the next heartbeat");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_proto::mds::layer_task::Kind;

    fn task(id: u64, kind: Kind) -> mds::LayerTask {
        mds::LayerTask { id, layer: 2, copysets: vec![5, 6], kind: Some(kind) }
    }

    #[test]
    fn only_what_the_last_heartbeat_repeats_is_ordered() {
        let flattens = Flattens { pace: Pace::new(0), turn: tokio::sync::Mutex::default(), ordered: Mutex::default() };
        let chain = vec![mds::Ancestor { layer: 1, seq: 3 }];
        let flatten = task(7, Kind::Flatten(mds::Flatten { needed: 4, chain }));
        let order = order_of(&flatten).expect("an order");
        assert_eq!((order.layer, order.needed, order.chain.len()), (LayerId(2), VolumeSeq(4), 1));
        assert!(order_of(&task(7, Kind::Flatten(mds::Flatten::default()))).is_none(), "no ancestors");
        let many = vec![mds::Ancestor { layer: 1, seq: 3 }; ogee_common::limits::ANCESTRY_DEPTH_MAX + 1];
        assert!(order_of(&task(7, Kind::Flatten(mds::Flatten { needed: 4, chain: many }))).is_none(), "too many");
        flattens.follow(&[flatten, task(8, Kind::Seal(1))]);
        assert!(flattens.is_ordered(7, 5) && flattens.is_ordered(7, 6));
        assert!(!flattens.is_ordered(8, 5) && !flattens.is_ordered(7, 4));
        flattens.follow(&[]);
        assert!(!flattens.is_ordered(7, 5));
    }
}
