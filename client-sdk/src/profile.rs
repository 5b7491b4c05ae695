//! Which pages of a volume are read first, in which order: what a boot from it needs soonest.
//!
//! Off until [`crate::Volume::record`]; then each read costs a lock until enough pages are known, and an atomic load afterwards. Invariant: memory is
//! bounded by the limit: at most as many pages are remembered. A page counts once, when it is first read. Absent: where a record is kept.

use ogee_common::limits::PAGE_BYTES;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// Pages that were first read one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// The first page, counted from the start of the volume.
    pub first: u64,
    /// How many, not 0.
    pub pages: u32,
}

#[derive(Debug, Default)]
struct Seen {
    pages: HashSet<u64>,
    runs: Vec<PageRun>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Recorder {
    limit_pages: usize,
    is_full: AtomicBool,
    seen: Mutex<Seen>,
}

impl Recorder {
    /// Remembers so many bytes' worth of pages.
    pub(crate) fn new(limit_bytes: u64) -> Self {
        let limit_pages = usize::try_from(limit_bytes / u64::from(PAGE_BYTES)).unwrap_or(usize::MAX);
        Self { limit_pages, is_full: AtomicBool::new(limit_pages == 0), seen: Mutex::default() }
    }

    /// A range is read.
    pub(crate) fn touch(&self, offset: u64, len: u32) {
        if self.is_full.load(Ordering::Relaxed) {
            return;
        }
        let page = u64::from(PAGE_BYTES);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for page in offset / page..(offset + u64::from(len)).div_ceil(page) {
            if seen.pages.len() >= self.limit_pages {
                self.is_full.store(true, Ordering::Relaxed);
                return;
            }
            if seen.pages.insert(page) {
                match seen.runs.last_mut().filter(|run| run.first + u64::from(run.pages) == page) {
                    Some(run) => run.pages += 1,
                    None => seen.runs.push(PageRun { first: page, pages: 1 }),
                }
            }
        }
    }

    /// What was read so far, in order.
    pub(crate) fn runs(&self) -> Vec<PageRun> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).runs.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, pages: u32) -> PageRun {
        PageRun { first, pages }
    }

    #[test]
    fn pages_count_once_in_the_order_of_their_first_read() {
        let recorder = Recorder::new(1 << 20);
        for (offset, len) in [(8192, 4096), (12288, 512), (0, 1024), (512, 16384), (1 << 30, 4096)] {
            recorder.touch(offset, len);
        }
        assert_eq!(recorder.runs(), [run(2, 2), run(0, 2), run(4, 1), run(1 << 18, 1)]);
    }

    #[test]
    fn no_more_than_the_limit_is_remembered() {
        let recorder = Recorder::new(3 * 4096);
        recorder.touch(0, 4096);
        recorder.touch(1 << 20, 1 << 20);
        recorder.touch(0, 4096);
        assert_eq!(recorder.runs(), [run(0, 1), run(256, 2)]);
        let none = Recorder::new(0);
        none.touch(0, 4096);
        assert!(none.runs().is_empty());
    }
}
