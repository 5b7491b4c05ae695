//! Finding what is not zeros: in memory, and in files with holes.
//!
//! Pure but for [`next_data`], which asks the file system (`lseek` with `SEEK_DATA` and `SEEK_HOLE`). A file system that
//! knows no holes answers that everything is data, so holes are only ever a saving and never decide what is read.

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::fs::File;
use std::ops::Range;

/// A stretch of zeros to compare with: one page is compared at a time, by `memcmp`.
static ZEROS: [u8; 4096] = [0; 4096];

/// Whether all bytes are zero.
#[must_use]
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(ZEROS.len()).all(|c| c == &ZEROS[..c.len()])
}

/// The parts of `bytes` that are not zeros, as few ranges as possible, cut at multiples of `granularity` (at least 1).
pub(crate) fn nonzero_runs(bytes: &[u8], granularity: usize) -> impl Iterator<Item = Range<usize>> + '_ {
    let cell = move |at: usize| at..(at + granularity).min(bytes.len());
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < bytes.len() && is_zero(&bytes[cell(at)]) {
            at = cell(at).end;
        }
        if at >= bytes.len() {
            return None;
        }
        let start = at;
        while at < bytes.len() && !is_zero(&bytes[cell(at)]) {
            at = cell(at).end;
        }
        Some(start..at)
    })
}

/// The first range at or after `from` that may hold data, within a file of `size` bytes; `None` when only a hole
/// follows.
///
/// # Errors
/// What `lseek` says, except that a file which cannot tell (a pipe, an odd file system) is data all over.
pub(crate) fn next_data(file: &File, from: u64, size: u64) -> std::io::Result<Option<Range<u64>>> {
    if from >= size {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(from..size)),
        Err(e) => return Err(e.into()),
    };
    if start >= size {
        return Ok(None);
    }
    let end = seek(file, SeekFrom::Hole(start)).map_err(std::io::Error::from)?;
    Ok(Some(start..end.min(size)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    proptest! {
        #[test]
        fn runs_hold_all_data_and_no_zero_cell(
            cells in proptest::collection::vec(any::<bool>(), 0..40), tail in 0usize..16, granularity in 1usize..64,
        ) {
            let mut bytes: Vec<u8> = cells.iter().flat_map(|c| vec![u8::from(*c); granularity]).collect();
            bytes.extend(vec![1; tail.min(granularity - 1)]);
            let mut covered = vec![false; bytes.len()];
            let mut last_end = None;
            for run in nonzero_runs(&bytes, granularity) {
                prop_assert!(run.start % granularity == 0 && run.end > run.start);
                prop_assert!(last_end.is_none_or(|e| run.start > e), "neighbours are joined");
                last_end = Some(run.end);
                covered[run].fill(true);
            }
            let expected: Vec<bool> = bytes.iter().map(|b| *b != 0).collect();
            prop_assert_eq!(covered, expected);
        }
    }

    #[test]
    fn one_byte_makes_a_cell_data() {
        let mut bytes = vec![0; 10_000];
        bytes[9_999] = 1;
        assert!(!is_zero(&bytes) && is_zero(&bytes[..9_999]) && is_zero(&[]));
        assert_eq!(nonzero_runs(&bytes, 4096).collect::<Vec<_>>(), vec![8192..10_000]);
    }

    #[test]
    fn holes_of_a_file_are_skipped() {
        let file = tempfile::tempfile_in("/var/tmp").expect("a temporary file");
        file.set_len(8 << 20).expect("grow");
        assert_eq!(next_data(&file, 0, 8 << 20).expect("seek"), None);
        file.write_all_at(&[7; 4096], 4 << 20).expect("write");
        let found = next_data(&file, 0, 8 << 20).expect("seek").expect("data is there");
        assert!(found.contains(&(4 << 20)) && found.start > 0, "{found:?}");
        assert_eq!(next_data(&file, found.end, 8 << 20).expect("seek"), None);
        assert_eq!(next_data(&file, 8 << 20, 8 << 20).expect("seek"), None);
    }
}
