//! What a load's IOs came to: counts and latencies.
//!
//! Invariants: a latency is counted to the nanosecond in sum and maximum and to 0.1 % in its percentiles; an IO counts
//! for the rate if it ended inside the window, and for the latencies if it ended inside or behind it: one that hangs
//! over the end of the window is not forgotten.

use super::plan::Verb;
use hdrhistogram::Histogram;
use ogee_common::clock::Instant;
use serde::Serialize;
use std::time::Duration;

/// Significant digits of a percentile.
const DIGITS: u8 = 3;
/// Longest latency that is told apart from longer ones: an hour.
const LONGEST_NS: u64 = 3_600_000_000_000;

/// The time in which IOs count.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    /// Its begin, behind the ramp.
    pub(crate) from: Instant,
    /// Its end; no IO begins later.
    pub(crate) to: Instant,
}

/// Latencies of one kind of IO.
#[derive(Debug)]
pub(crate) struct Latencies {
    histogram: Histogram<u64>,
    sum_ns: u128,
    max_ns: u64,
    /// IOs that ended inside the window.
    in_window: u64,
}

impl Latencies {
    /// Nothing yet. Costs about 300 KiB.
    #[must_use]
    pub(crate) fn new() -> Self {
        let histogram = Histogram::new_with_bounds(1, LONGEST_NS, DIGITS).expect("the bounds are constant and sound");
        Self { histogram, sum_ns: 0, max_ns: 0, in_window: 0 }
    }

    /// Counts an IO. One that ended before the window does not count at all.
    pub(crate) fn record(&mut self, start: Instant, end: Instant, window: &Window) {
        if end < window.from {
            return;
        }
        let took = u64::try_from(end.duration_since(start).as_nanos()).unwrap_or(LONGEST_NS);
        self.histogram.saturating_record(took);
        self.sum_ns += u128::from(took);
        self.max_ns = self.max_ns.max(took);
        self.in_window += u64::from(end <= window.to);
    }

    /// Adds what another thread counted.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.histogram.add(&other.histogram).expect("all histograms have the same bounds");
        self.sum_ns += other.sum_ns;
        self.max_ns = self.max_ns.max(other.max_ns);
        self.in_window += other.in_window;
    }

    /// The figures over so many seconds.
    #[must_use]
    #[allow(clippy::cast_precision_loss)] // figures for people
    pub(crate) fn row(&self, seconds: f64) -> Row {
        let us = |ns: u64| ns as f64 / 1000.0;
        let quantile = |q| us(self.histogram.value_at_quantile(q).min(self.max_ns));
        let n = self.histogram.len();
        Row {
            ios: self.in_window,
            iops: if seconds > 0.0 { self.in_window as f64 / seconds } else { 0.0 },
            mean_us: if n > 0 { self.sum_ns as f64 / n as f64 / 1000.0 } else { 0.0 },
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
            p999_us: quantile(0.999),
            max_us: us(self.max_ns),
        }
    }
}

/// Figures of one kind of IO.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Row {
    /// IOs that ended inside the window.
    pub(crate) ios: u64,
    /// The same per second.
    pub(crate) iops: f64,
    /// Mean latency, microseconds.
    pub(crate) mean_us: f64,
    /// Median latency, microseconds.
    pub(crate) p50_us: f64,
    /// 99 % took at most this, microseconds.
    pub(crate) p99_us: f64,
    /// 99.9 % took at most this, microseconds.
    pub(crate) p999_us: f64,
    /// The longest, microseconds.
    pub(crate) max_us: f64,
}

/// What the IOs of some jobs came to.
#[derive(Debug)]
pub(crate) struct Tally {
    kinds: [Latencies; 4],
    /// IOs that failed inside or behind the window.
    pub(crate) errors: u64,
    /// The first of them, as a person reads it.
    pub(crate) first_error: Option<String>,
}

impl Tally {
    /// Nothing yet.
    #[must_use]
    pub(crate) fn new() -> Self {
        Self { kinds: std::array::from_fn(|_| Latencies::new()), errors: 0, first_error: None }
    }

    /// The counts of one kind of IO.
    #[must_use]
    pub(crate) fn of(&mut self, verb: Verb) -> &mut Latencies {
        &mut self.kinds[verb as usize]
    }

    /// Counts an IO that failed.
    pub(crate) fn failed(&mut self, error: &dyn std::error::Error) {
        self.errors += 1;
        self.first_error.get_or_insert_with(|| {
            let chain = std::iter::successors(Some(error), |e| e.source());
            let mut texts: Vec<String> = chain.map(ToString::to_string).collect();
            texts.dedup();
            texts.join(": ")
        });
    }

    /// Adds what another job or thread counted.
    pub(crate) fn merge(&mut self, other: Self) {
        for (mine, theirs) in self.kinds.iter_mut().zip(&other.kinds) {
            mine.merge(theirs);
        }
        self.errors += other.errors;
        self.first_error = self.first_error.take().or(other.first_error);
    }

    /// Reads, writes and discards together; flushes are not IOs of the load.
    #[must_use]
    pub(crate) fn all(&self) -> Latencies {
        let mut all = Latencies::new();
        for verb in [Verb::Read, Verb::Write, Verb::Discard] {
            all.merge(&self.kinds[verb as usize]);
        }
        all
    }

    /// The figures of one kind; `None` if there were none.
    #[must_use]
    pub(crate) fn row(&self, verb: Verb, seconds: f64) -> Option<Row> {
        let row = self.kinds[verb as usize].row(seconds);
        (row.ios > 0).then_some(row)
    }
}

impl Window {
    /// Its length in seconds, or less if the load ended before.
    #[must_use]
    pub(crate) fn seconds(&self, ended: Instant) -> f64 {
        ended.min(self.to).saturating_duration_since(self.from).max(Duration::ZERO).as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ogee_common::clock::now;

    fn window() -> Window {
        let from = now();
        Window { from, to: from + Duration::from_secs(10) }
    }

    #[test]
    fn figures_are_those_of_the_recorded_latencies() {
        let (w, mut l) = (window(), Latencies::new());
        for us in 1..=1000u64 {
            let start = w.from + Duration::from_millis(us);
            l.record(start, start + Duration::from_micros(us), &w);
        }
        let row = l.row(10.0);
        let near = |a: f64, b: f64| (a - b).abs() / b < 0.002;
        assert_eq!((row.ios, row.iops, row.max_us), (1000, 100.0, 1000.0));
        assert!(near(row.mean_us, 500.5) && near(row.p50_us, 500.0), "{row:?}");
        assert!(near(row.p99_us, 990.0) && near(row.p999_us, 999.0), "{row:?}");
    }

    #[test]
    fn the_ramp_does_not_count_and_what_hangs_over_the_end_is_seen() {
        let (w, mut l) = (window(), Latencies::new());
        let ms = Duration::from_millis;
        l.record(w.from - ms(5), w.from - ms(1), &w);
        assert_eq!(l.row(10.0).ios, 0);
        l.record(w.from - ms(5), w.from + ms(1), &w);
        l.record(w.to - ms(1), w.to + ms(3000), &w);
        let row = l.row(10.0);
        assert_eq!((row.ios, row.max_us), (1, 3_001_000.0));
        assert_eq!(Latencies::new().row(0.0).mean_us, 0.0);
    }

    #[test]
    fn threads_add_up_and_flushes_stand_apart() {
        let w = window();
        let tally = |verb, us| {
            let mut t = Tally::new();
            t.of(verb).record(w.from, w.from + Duration::from_micros(us), &w);
            t
        };
        let mut sum = tally(Verb::Read, 10);
        sum.merge(tally(Verb::Write, 30));
        let mut failed = tally(Verb::Flush, 500);
        failed.failed(&std::io::Error::other("gone"));
        sum.merge(failed);
        let row = sum.all().row(1.0);
        assert_eq!((row.ios, row.max_us, row.mean_us), (2, 30.0, 20.0));
        assert_eq!((sum.errors, sum.first_error.as_deref()), (1, Some("gone")));
        assert_eq!(sum.row(Verb::Flush, 1.0).expect("a flush").max_us, 500.0);
        assert_eq!(sum.row(Verb::Discard, 1.0), None);
    }
}
