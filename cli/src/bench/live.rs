//! What is seen while the load runs: counters, a line on a terminal, and the wish to stop.
//!
//! Invariant: the load only adds to counters, with relaxed atomics; whoever looks at them never holds it up.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ogee_common::clock::{Instant, now};
use ogee_common::size::ByteLen;
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// How often the line changes.
pub(crate) const TICK: Duration = Duration::from_millis(500);

/// Counters that all threads of a load share.
#[derive(Debug, Default)]
pub(crate) struct Live {
    ios: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    stop: AtomicBool,
}

impl Live {
    /// An IO of so many bytes ended well.
    pub(crate) fn done(&self, bytes: u64) {
        self.ios.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// An IO failed.
    pub(crate) fn error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// No IO begins from now on.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether the load was told to stop.
    #[must_use]
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// The line on standard error; nothing if that is no terminal or programs read the output.
#[derive(Debug)]
pub(crate) struct Line {
    bar: ProgressBar,
    seen: (u64, u64, Instant),
}

impl Line {
    /// A line that starts with `what`.
    #[must_use]
    pub(crate) fn new(what: &'static str, quiet: bool) -> Self {
        let visible = !quiet && std::io::stderr().is_terminal();
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {elapsed} {msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(what);
        Self { bar, seen: (0, 0, now()) }
    }

    /// Shows the rates since the last call.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // shown rounded
    pub(crate) fn show(&mut self, live: &Live) {
        let get = |a: &AtomicU64| a.load(Ordering::Relaxed);
        let (ios, bytes, at) = (get(&live.ios), get(&live.bytes), now());
        let seconds = at.duration_since(self.seen.2).as_secs_f64().max(0.001);
        let rate = |new: u64, old: u64| (new.saturating_sub(old) as f64 / seconds) as u64;
        let (iops, speed) = (rate(ios, self.seen.0), ByteLen(rate(bytes, self.seen.1)));
        let errors = match get(&live.errors) {
            0 => String::new(),
            n => format!(", {n} failed"),
        };
        self.bar.set_message(format!("{iops} IOPS, {speed}/s{errors}"));
        self.bar.tick();
        self.seen = (ios, bytes, at);
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
