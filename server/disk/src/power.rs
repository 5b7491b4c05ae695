//! Simulated power cuts for data files: remembers what every page held before each write that was not flushed since.
//!
//! Part of a [`crate::FaultPlan`], so tests only. After a cut each page holds what it held after some number of its
//! unflushed writes, none to all, independently of other pages: what a page cache and a disk without order allow.
//! Deliberately absent: names. Creations and removals count as durable at once; log files have torn writes instead.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

const PAGE: u64 = 4096;

/// What pages held before their unflushed writes, oldest first.
#[derive(Debug, Default)]
pub(crate) struct Unflushed {
    pages: BTreeMap<(PathBuf, u64), Vec<Vec<u8>>>,
}

impl Unflushed {
    /// Takes note of the pages that an operation is about to change.
    pub(crate) fn before_change(&mut self, file: &File, path: &Path, offset: u64, len: u64) -> io::Result<()> {
        for page in offset / PAGE..(offset + len).div_ceil(PAGE) {
            let mut old = vec![0u8; usize::try_from(PAGE).unwrap_or(0)];
            let mut filled = 0;
            while filled < old.len() {
                match file.read_at(&mut old[filled..], page * PAGE + filled as u64)? {
                    0 => break,
                    n => filled += n,
                }
            }
            self.pages.entry((path.to_owned(), page)).or_default().push(old);
        }
        Ok(())
    }

    /// The file's content is durable.
    pub(crate) fn flushed(&mut self, path: &Path) {
        self.pages.retain(|(p, _), _| p != path);
    }

    /// Gives every page the content it had after `survive(n)` of its `n` unflushed writes.
    pub(crate) fn cut(&mut self, survive: &mut dyn FnMut(usize) -> usize) -> io::Result<()> {
        for ((path, page), olds) in std::mem::take(&mut self.pages) {
            let kept = survive(olds.len());
            let Some(old) = olds.get(kept) else { continue };
            match OpenOptions::new().write(true).open(&path) {
                Ok(file) => file.write_all_at(old, page * PAGE)?,
                // Removed since; the removal counts as durable.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}
