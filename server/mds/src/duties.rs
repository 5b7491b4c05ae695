//! What a leader does unasked: it gives the cluster its identity, finishes snapshots that another leader left half-made, makes the tasks of schedules that are due,
//! and ends every client's stream when it does not lead any more. One task per node, owned by [`crate::run()`].
//!
//! Invariant: each duty is a command that changes nothing when it is not needed, so it does no harm if two nodes believe
//! to lead or a duty is repeated.

use crate::log::Lead;
use crate::machine::command::Command;
use crate::machine::row::ClusterRow;
use crate::service::Core;
use crate::service::status::CallError;
use ogee_common::rng;
use std::sync::Arc;
use std::time::Duration;

/// A leader looks after half-made snapshots this often.
const DUTY_INTERVAL: Duration = Duration::from_secs(1);

/// Follows the lead until the node's replica stops.
pub(crate) async fn run(core: Arc<Core>) {
    let mut lead = core.log.lead();
    loop {
        let Lead { here, stopped, .. } = *lead.borrow_and_update();
        if !here {
            core.hub.leave();
        }
        if stopped {
            return;
        }
        let changed = if here {
            if let Err(error) = duty(&core).await {
                tracing::debug!(target: "controlpath", error = &error as &dyn std::error::Error, "a duty is left for later");
            }
            tokio::time::timeout(DUTY_INTERVAL, lead.changed()).await
        } else {
            Ok(lead.changed().await)
        };
        if matches!(changed, Ok(Err(_))) {
            return;
        }
    }
}

async fn duty(core: &Core) -> Result<(), CallError> {
    core.lead().await?;
    if core.read(|tx| Ok(tx.get::<ClusterRow>(&())?))?.is_none() {
        let (high, low) = (rng::nonzero_u64(), rng::nonzero_u64());
        let cluster = ((u128::from(high) << 64) | u128::from(low)).to_be_bytes();
        core.propose(None, Command::FormCluster { cluster }).await?;
        tracing::info!(target: "controlpath", "the cluster was given its identity");
    }
    core.look_after_replicas().await?;
    core.balance_leads()?;
    core.settle_snapshots().await?;
    core.run_schedules().await
}
