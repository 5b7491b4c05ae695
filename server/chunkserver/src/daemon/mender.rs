//! Mends in the background what was found damaged while entries were applied: a page that could not be read for a partial write is
//! marked damaged, and nobody may read it for a long time, least of all on a follower.
//!
//! Invariants: pages are mended by [`crate::copyset::repair`] alone, with its proofs, and only on a replica that has caught up; what
//! cannot be mended now (the others lag, or do not answer) stays in the bounded list of its copyset and is tried again. The list is
//! in memory: what a restart forgets, the next reader or scrub finds.

use super::copysets::Copysets;
use std::sync::Arc;
use std::time::Duration;

/// The pause between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// Runs until dropped.
pub(super) async fn run(copysets: Arc<Copysets>) {
    loop {
        tokio::time::sleep(LOOK).await;
        for hosted in copysets.all() {
            if !hosted.store.has_found_damage() || hosted.has_failed() || !hosted.group.has_caught_up().await {
                continue;
            }
            hosted.store.caught_up();
            if let Err(error) = hosted.store.mend_found(&hosted.group.others()).await {
                tracing::error!(copyset = %hosted.copyset, error = &error as &dyn std::error::Error, "mend damaged pages");
            }
        }
    }
}
