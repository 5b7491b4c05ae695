//! Points in time for people: `2026-03-01 12:00:05Z`. Programs get milliseconds.

use ogee_common::clock::{Instant, now};
use std::fmt::Write as _;

/// A Unix time in milliseconds as a date in UTC; `-` for 0.
#[must_use]
pub(crate) fn date(unix_ms: u64) -> String {
    if unix_ms == 0 {
        return "-".to_owned();
    }
    let seconds = unix_ms / 1000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write!(text, "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60);
    text
}

/// Year, month and day of a day since 1970-01-01 (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms",
/// `civil_from_days`, for days at or after the epoch).
const fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let january = if month <= 2 { 1 } else { 0 };
    (year_of_era + era * 400 + january, month, day)
}

/// Milliseconds since `start`, with microseconds behind the point.
#[must_use]
pub(crate) fn elapsed_ms(start: Instant) -> f64 {
    let micros = now().duration_since(start).as_micros();
    f64::from(u32::try_from(micros).unwrap_or(u32::MAX)) / 1000.0
}

/// Bytes a second; 0 when no time has passed.
#[must_use]
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a rate, shown rounded
pub(crate) fn bytes_per_second(bytes: u64, seconds: f64) -> u64 {
    if seconds > 0.0 { (bytes as f64 / seconds) as u64 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_at_leap_days_and_turns_of_the_year() {
        assert_eq!(date(0), "-");
        assert_eq!(date(1), "1970-01-01 00:00:00Z");
        assert_eq!(date(951_782_400_000), "2000-02-29 00:00:00Z");
        assert_eq!(date(1_709_251_199_000), "2024-02-29 23:59:59Z");
        assert_eq!(date(1_767_225_599_999), "2025-12-31 23:59:59Z");
        assert_eq!(date(4_107_542_400_000), "2100-03-01 00:00:00Z");
    }

    #[test]
    fn rates_do_not_divide_by_zero() {
        assert_eq!(bytes_per_second(10, 0.0), 0);
        assert_eq!(bytes_per_second(3000, 1.5), 2000);
    }
}
