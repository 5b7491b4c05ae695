//! [`Pace`]: how fast a rebuild may go, so that it leaves the disk and the network to the guests.
//!
//! One per process, shared by all installs. Invariant: over any time, no more bytes pass than the rate allows, and one
//! portion on top of it. Nothing is dropped and nobody starves: portions go in the order in which they were asked for.

use ogee_common::clock::{self, Instant};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Lets bytes pass at a rate.
#[derive(Debug)]
pub(crate) struct Pace {
    bytes_per_second: u64,
    /// When everything that was let through has had its time.
    free_at: Mutex<Option<Instant>>,
}

impl Pace {
    /// A pace of so many bytes per second; 0: no limit.
    pub(crate) const fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, free_at: Mutex::new(None) }
    }

    /// Accounts for `bytes` that have arrived, and waits until those before them have had their time.
    pub(crate) async fn pass(&self, bytes: usize) {
        if let Some(turn) = self.reserve(bytes) {
            tokio::time::sleep_until(turn).await;
        }
    }

    fn reserve(&self, bytes: usize) -> Option<Instant> {
        if self.bytes_per_second == 0 {
            return None;
        }
        let micros = (bytes as u64).saturating_mul(1_000_000) / self.bytes_per_second;
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = free_at.unwrap_or_else(clock::now).max(clock::now());
        *free_at = Some(turn + Duration::from_micros(micros));
        Some(turn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_kept_over_many_portions_of_two_at_once() {
        let pace = Pace::new(1 << 20);
        let start = clock::now();
        let take = async || {
            for _ in 0..10 {
                pace.pass(64 << 10).await;
            }
        };
        tokio::join!(take(), take());
        // 20 portions of 1/16 s, of which the last is not waited for.
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(1180) && took <= Duration::from_millis(1200), "{took:?}");
        tokio::time::advance(Duration::from_secs(60)).await;
        let start = clock::now();
        pace.pass(1 << 20).await;
        assert_eq!(start.elapsed(), Duration::ZERO, "idle time is no credit, but the first portion waits for nobody");
        pace.pass(1).await;
        assert!(start.elapsed() >= Duration::from_secs(1), "and the minute was not saved up");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_rate_nothing_waits() {
        let (pace, start) = (Pace::new(0), clock::now());
        for _ in 0..100 {
            pace.pass(usize::MAX).await;
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
    }
}
