//! The random seam: the only place that draws random numbers outside tests.

use rand::Rng;
use std::time::Duration;

/// 64 random bits, never 0.
#[must_use]
pub fn nonzero_u64() -> u64 {
    rand::rng().random_range(1..=u64::MAX)
}

/// A pause between half of `base` and `base`, so that many clients do not retry in step.
#[must_use]
pub fn jitter(base: Duration) -> Duration {
    base.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// A number from 0 to 1, 1 excluded.
#[must_use]
pub fn share() -> f64 {
    rand::rng().random()
}

/// Shuffles in place.
pub fn shuffle<T>(items: &mut [T]) {
    use rand::seq::SliceRandom;
    items.shuffle(&mut rand::rng());
}
