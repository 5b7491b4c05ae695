//! The clock seam: the only place that reads time. A simulation pauses tokio's clock and thereby this one.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A monotonic instant.
pub type Instant = tokio::time::Instant;

/// Monotonic now.
#[must_use]
pub fn now() -> Instant {
    Instant::now()
}

/// Milliseconds since the Unix epoch; for records that people read, never for decisions.
#[must_use]
#[allow(clippy::disallowed_methods)] // this is the seam the lint points to
pub fn unix_ms() -> u64 {
    if let Some(now) = crate::sim::tick_ns() {
        return now / 1_000_000;
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
