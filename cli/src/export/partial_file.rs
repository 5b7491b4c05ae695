//! A file that appears under its name only when it is complete and durable.
//!
//! It is written as `NAME.partial` beside its place. Invariants: a crash or an error leaves nothing under the name
//! (at most a `.partial`, which the next try replaces); two processes never write the same `.partial` (it is locked).

use crate::error::{CliError, ErrorKind};
use std::fs::{File, OpenOptions, TryLockError};
use std::path::{Path, PathBuf};

/// The file in the making. Dropped without [`PartialFile::commit`], it is removed.
#[derive(Debug)]
pub(crate) struct PartialFile {
    file: File,
    partial: PathBuf,
    target: PathBuf,
    committed: bool,
}

impl PartialFile {
    /// Starts `target`; an existing one is only replaced when `replace` says so, and not before the commit.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] when it exists or is being written by another process, or what the system says.
    pub(crate) fn create(target: &Path, replace: Replace) -> Result<Self, CliError> {
        let exists = target.symlink_metadata().is_ok();
        if exists && replace == Replace::No {
            let text = format!("{} exists; give another name or --force", target.display());
            return Err(CliError::new(ErrorKind::Conflict, text));
        }
        if exists && !target.is_file() {
            let text = format!("{} is not a regular file", target.display());
            return Err(CliError::new(ErrorKind::Usage, text));
        }
        let mut name = target.as_os_str().to_owned();
        name.push(".partial");
        let partial = PathBuf::from(name);
        let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&partial);
        let file = open.map_err(|e| CliError::file("create", &partial, e))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let text = format!("{} is being written by another process", partial.display());
                return Err(CliError::new(ErrorKind::Conflict, text));
            }
            Err(TryLockError::Error(e)) => return Err(CliError::file("lock", &partial, e)),
        }
        let this = Self { file, partial, target: target.to_owned(), committed: false };
        // What an earlier try left must not show through the holes.
        this.file.set_len(0).map_err(|e| CliError::file("empty", &this.partial, e))?;
        Ok(this)
    }

    /// Another handle of the file, to write to.
    ///
    /// # Errors
    /// No file descriptor.
    pub(crate) fn handle(&self) -> Result<File, CliError> {
        self.file.try_clone().map_err(|e| CliError::file("open", &self.partial, e))
    }

    /// Makes the content durable and gives it its name. Blocks.
    ///
    /// # Errors
    /// The disk failed or is full; then nothing is left under the name.
    pub(crate) fn commit(mut self) -> Result<(), CliError> {
        self.file.sync_all().map_err(|e| CliError::file("sync", &self.partial, e))?;
        std::fs::rename(&self.partial, &self.target).map_err(|e| CliError::file("rename to", &self.target, e))?;
        self.committed = true;
        let parent = match self.target.parent() {
            Some(p) if !p.as_os_str().is_empty() => p,
            _ => Path::new("."),
        };
        let synced = File::open(parent).and_then(|d| d.sync_all());
        synced.map_err(|e| CliError::file("sync", parent, e))
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if !self.committed {
            // Best effort: what stays is named .partial and is replaced by the next try.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

/// Whether an existing file may be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Replace {
    /// It is left alone and the command fails.
    No,
    /// It is replaced when the new one is complete.
    Yes,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn nothing_stays_without_a_commit() {
        let dir = tempfile::tempdir().expect("a folder");
        let target = dir.path().join("a.raw");
        let partial = PartialFile::create(&target, Replace::No).expect("created");
        partial.handle().expect("a handle").write_all_at(b"half", 0).expect("written");
        assert!(!target.exists());
        let second = PartialFile::create(&target, Replace::No).expect_err("two writers");
        assert_eq!(second.kind(), ErrorKind::Conflict);
        drop(partial);
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
    }

    #[test]
    fn an_existing_file_is_kept_until_the_commit() {
        let dir = tempfile::tempdir().expect("a folder");
        let target = dir.path().join("a.raw");
        std::fs::write(&target, b"old").expect("written");
        assert_eq!(PartialFile::create(&target, Replace::No).expect_err("kept").kind(), ErrorKind::Conflict);
        let partial = PartialFile::create(&target, Replace::Yes).expect("created");
        partial.handle().expect("a handle").write_all_at(b"new", 0).expect("written");
        assert_eq!(std::fs::read(&target).expect("read"), b"old");
        partial.commit().expect("committed");
        assert_eq!(std::fs::read(&target).expect("read"), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 1);
    }

    #[test]
    fn a_failed_second_try_does_not_remove_the_first_ones_file() {
        let dir = tempfile::tempdir().expect("a folder");
        let target = dir.path().join("a.raw");
        let first = PartialFile::create(&target, Replace::No).expect("created");
        drop(PartialFile::create(&target, Replace::No).expect_err("locked"));
        first.handle().expect("a handle").write_all_at(b"x", 0).expect("written");
        first.commit().expect("committed");
        assert_eq!(std::fs::read(&target).expect("read"), b"x");
    }
}
