//! Waiting with an end: every wait of the harness goes through here. A wait looks at a level (is it so now?), never at an edge,
//! so that nothing is missed between two looks.

use anyhow::{Result, bail};
use ogee_common::clock::{self, Instant};
use std::time::Duration;

/// Pause between two looks at something that cannot wake us.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The moment at which a wait gives up.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Instant);

impl Deadline {
    /// The moment `limit` from now.
    #[must_use]
    pub fn after(limit: Duration) -> Self {
        Self(clock::now() + limit)
    }

    /// Time left; zero once it has passed.
    #[must_use]
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(clock::now())
    }

    /// Whether it has passed.
    #[must_use]
    pub fn passed(self) -> bool {
        self.left().is_zero()
    }
}

/// Looks until `look` gives a value, at most for `limit`.
///
/// # Errors
/// What `look` fails with, at once; or, after `limit`, that `what` did not happen.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Deadline::after(limit);
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if deadline.passed() {
            bail!("{what}: not within {limit:?}");
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_the_value_the_error_or_the_deadline() {
        let mut looks = 0;
        let third = wait_for("third look", Duration::from_secs(5), || {
            looks += 1;
            Ok((looks == 3).then_some(looks))
        });
        assert_eq!(third.unwrap(), 3);
        let never = wait_for::<()>("pigs fly", Duration::from_millis(30), || Ok(None));
        assert!(never.unwrap_err().to_string().contains("pigs fly"));
        let broken = wait_for::<()>("x", Duration::from_secs(5), || bail!("broken"));
        assert_eq!(broken.unwrap_err().to_string(), "broken");
    }
}
