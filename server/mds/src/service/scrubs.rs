//! Orders to scrub, or to verify a volume, and how far each chunkserver is. To verify a volume is to scrub its layer and those it stands on,
//! on the chunkservers that have replicas of it.
//!
//! An order is kept in the leader's memory until the chunkserver's heartbeat says that it was obeyed: a change of the
//! leader may lose one, then it is given again by whoever waits for it. Invariant: ids of orders grow, whatever the clocks of
//! MDS nodes do, so that a chunkserver obeys each once and never an older one after a newer one: an id is a time, or, if a
//! chunkserver knows a later one, the next after that.

use super::status::CallError;
use super::{Core, names};
use crate::liveness::Scrubbing;
use crate::machine::row::{ChunkserverRow, CopysetRow};
use crate::machine::{attach, layers};
use crate::refusal::Refusal;
use ogee_common::clock;
use ogee_common::id::ChunkserverId;
use ogee_proto::mds;
use std::collections::BTreeSet;

impl Core {
    fn chunkservers(&self) -> Result<Vec<(ChunkserverId, ChunkserverRow)>, CallError> {
        self.read(|tx| Ok(tx.scan::<ChunkserverRow>(&(), None, usize::MAX)?))
    }

    pub(crate) async fn order_scrub(&self, r: mds::OrderScrubRequest) -> Result<mds::OrderScrubReply, CallError> {
        self.lead().await?;
        let rows = self.chunkservers()?;
        let mut wanted: BTreeSet<u32> = r.chunkservers.iter().copied().collect();
        for id in &wanted {
            let id = ChunkserverId(names::id("chunkserver", *id)?);
            if rows.iter().all(|(known, _)| *known != id) {
                return Err(Refusal::NoSuchChunkserver(id).into());
            }
        }
        if !r.pool.is_empty() && rows.iter().all(|(_, row)| row.pool != r.pool) {
            return Err(Refusal::NoSuchPool { name: r.pool }.into());
        }
        let mut layers = vec![];
        if !r.volume.is_empty() {
            if !(wanted.is_empty() && r.pool.is_empty()) {
                return Err(CallError::Argument { what: "chunkservers", wanted: "none, nor a pool, beside a volume" });
            }
            (layers, wanted) = self.scope_of(&r.volume, &r.snapshot)?;
            if wanted.is_empty() {
                // Nothing of it was ever written.
                return Ok(mds::OrderScrubReply::default());
            }
        }
        let known = |id: ChunkserverId| {
            let obeyed = self.live.vitals(id).0.map_or(0, |v| v.scrub.order.max(v.verify.order));
            let ordered = [self.live.scrub_order(id), self.live.verify_order(id)];
            ordered.into_iter().flatten().map(|o| o.id).fold(obeyed, u64::max)
        };
        let order = next_order(rows.iter().map(|(id, _)| known(*id)), clock::unix_ms());
        let named = |id: &ChunkserverId| wanted.is_empty() || wanted.contains(&id.0);
        let meant = rows.iter().filter(|(id, row)| named(id) && (r.pool.is_empty() || row.pool == r.pool));
        let chunkservers: Vec<u32> = meant.map(|(id, _)| id.0).collect();
        for id in &chunkservers {
            self.live.order_scrub(ChunkserverId(*id), mds::ScrubOrder { id: order, cancel: r.cancel, layers: layers.clone() });
        }
        tracing::info!(target: "controlpath", order, cancel = r.cancel, volume = r.volume, ?chunkservers, "scrub ordered");
        Ok(mds::OrderScrubReply { order, chunkservers })
    }

    /// The layers that a volume or snapshot reads, and the chunkservers that have replicas of it.
    fn scope_of(&self, volume: &str, snapshot: &str) -> Result<(Vec<u64>, BTreeSet<u32>), CallError> {
        let path = names::path("volume", volume)?;
        let snapshot = if snapshot.is_empty() { None } else { Some(names::snapshot(snapshot)?) };
        self.read(|tx| {
            let grant = attach::read_only(tx, &path, snapshot.as_deref())?;
            let layers = std::iter::once(grant.layer.0).chain(grant.ancestry.iter().map(|(layer, _)| layer.0)).collect();
            let mut chunkservers = BTreeSet::new();
            for copyset in layers::copysets(tx, grant.layer, &tx.expect(&grant.layer)?)? {
                let row: CopysetRow = tx.expect(&copyset)?;
                chunkservers.extend(row.replicas.iter().map(|r| r.chunkserver.0));
            }
            Ok((layers, chunkservers))
        })
    }

    pub(crate) async fn list_scrubs(&self) -> Result<mds::ScrubList, CallError> {
        self.lead().await?;
        let show = |(id, _): (ChunkserverId, ChunkserverRow)| {
            let Scrubbing { scrub, ordered, verify, verify_ordered } = self.live.scrubbing(id);
            mds::Scrub { chunkserver: id.0, report: scrub, ordered, verify, verify_ordered }
        };
        Ok(mds::ScrubList { scrubs: self.chunkservers()?.into_iter().map(show).collect() })
    }
}

/// The id of an order that everybody takes for a new one.
fn next_order(known: impl Iterator<Item = u64>, now_unix_ms: u64) -> u64 {
    known.map(|order| order.saturating_add(1)).max().unwrap_or(0).max(now_unix_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_grow_whatever_the_clock_does() {
        assert_eq!(next_order([0, 0].into_iter(), 1_000), 1_000, "nobody knows one");
        assert_eq!(next_order([900, 0].into_iter(), 1_000), 1_000);
        assert_eq!(next_order([5_000, 900].into_iter(), 1_000), 5_001, "the clock was ahead when the last one was given");
        assert_eq!(next_order([1_000].into_iter(), 1_000), 1_001, "two in one millisecond");
        assert_eq!(next_order(std::iter::empty(), 7), 7);
    }
}
