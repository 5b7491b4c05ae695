//! A limit of bytes per second, shared by all transfers of one command.
//!
//! Invariant: over any time the bytes let through are at most the rate times that time and one second's worth.

use ogee_common::clock::{self, Instant};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A limit of bytes per second; none by default.
#[derive(Debug, Default)]
pub struct Throttle {
    /// Bytes per second; 0 is no limit.
    rate: u64,
    /// When the bytes let through so far are paid for.
    paid: Mutex<Option<Instant>>,
}

impl Throttle {
    /// At most `rate` bytes per second; 0 is no limit.
    #[must_use]
    pub fn new(rate: u64) -> Self {
        Self { rate, paid: Mutex::default() }
    }

    /// Waits until `bytes` more may pass.
    pub async fn pass(&self, bytes: u64) {
        if self.rate == 0 || bytes == 0 {
            return;
        }
        let micros = u64::try_from(u128::from(bytes) * 1_000_000 / u128::from(self.rate)).unwrap_or(u64::MAX);
        let cost = Duration::from_micros(micros);
        let until = {
            let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
            let from = paid.unwrap_or_else(clock::now).max(clock::now());
            *paid = Some(from + cost);
            from
        };
        tokio::time::sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_kept() {
        let throttle = Throttle::new(1000);
        let start = clock::now();
        for _ in 0..11 {
            throttle.pass(500).await;
        }
        let spent = (clock::now() - start).as_millis();
        assert!((5000..5100).contains(&spent), "{spent}");
        Throttle::default().pass(u64::MAX).await;
    }
}
