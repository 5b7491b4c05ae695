//! An image file to read from: raw or qcow2.
//!
//! All methods block and may be called by several threads at once. Invariants: exactly the bytes of the image are
//! returned; a file that changes its length meanwhile gives an error, not zeros.

use crate::error::{CliError, ErrorKind};
use crate::qcow2::{MAGIC, Reader};
use crate::sparse;
use clap::ValueEnum;
use rustix::fs::{SeekFrom, seek};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

/// How an image file is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImageFormat {
    /// By its first bytes: qcow2 if they say so, else raw. A raw disk can be made to look like qcow2 by who writes it,
    /// so name the format of images that are not yours.
    Auto,
    /// The bytes of the disk.
    Raw,
    /// QEMU copy-on-write, version 2 or 3.
    Qcow2,
}

/// An open image.
#[derive(Debug)]
pub(crate) struct ImageSource {
    path: PathBuf,
    size_bytes: u64,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Raw(File),
    Qcow2(Box<Reader>),
}

impl ImageSource {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// The file cannot be read, or is no image of that format ([`ErrorKind::Usage`]).
    pub(crate) fn open(path: &Path, format: ImageFormat) -> Result<Self, CliError> {
        let file = File::open(path).map_err(|e| CliError::file("open", path, e))?;
        let size_bytes = raw_size(&file, path)?;
        let qcow2 = match format {
            ImageFormat::Raw => false,
            ImageFormat::Qcow2 => true,
            ImageFormat::Auto => {
                let mut first = [0; 4];
                size_bytes >= 4 && file.read_exact_at(&mut first, 0).is_ok() && first == MAGIC
            }
        };
        let path = path.to_owned();
        if !qcow2 {
            return Ok(Self { path, size_bytes, content: Content::Raw(file) });
        }
        match Reader::open(file) {
            Ok(reader) => {
                Ok(Self { path, size_bytes: reader.virtual_bytes(), content: Content::Qcow2(Box::new(reader)) })
            }
            Err(e) => Err(CliError::caused(ErrorKind::Usage, format!("read qcow2 image {}", path.display()), e)),
        }
    }

    /// Bytes of the disk.
    #[must_use]
    pub(crate) const fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// The format that was found, as people write it.
    #[must_use]
    pub(crate) const fn format_name(&self) -> &'static str {
        match self.content {
            Content::Raw(_) => "raw",
            Content::Qcow2(_) => "qcow2",
        }
    }

    /// The first range at or after `from` that may hold data, at most `max_bytes` long.
    ///
    /// # Errors
    /// The file or a table in it cannot be read.
    pub(crate) fn next_data(&self, from: u64, max_bytes: u64) -> Result<Option<Range<u64>>, CliError> {
        match &self.content {
            Content::Raw(file) => {
                let range = sparse::next_data(file, from, self.size_bytes);
                let range = range.map_err(|e| CliError::file("find data in", &self.path, e))?;
                Ok(range.map(|r| r.start..r.end.min(r.start.saturating_add(max_bytes))))
            }
            Content::Qcow2(reader) => reader.next_data(from, max_bytes).map_err(|e| self.damaged(e)),
        }
    }

    /// Reads `len` bytes at `offset`; what lies beyond the end of the image is zeros.
    ///
    /// # Errors
    /// The file cannot be read, or became shorter.
    pub(crate) fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, CliError> {
        let mut buffer = vec![0; len];
        let inside = usize::try_from(self.size_bytes.saturating_sub(offset)).unwrap_or(usize::MAX).min(len);
        let part = &mut buffer[..inside];
        match &self.content {
            Content::Raw(file) => {
                file.read_exact_at(part, offset).map_err(|e| CliError::file("read", &self.path, e))?;
            }
            Content::Qcow2(reader) => reader.read_at(offset, part).map_err(|e| self.damaged(e))?,
        }
        Ok(buffer)
    }

    fn damaged(&self, source: crate::qcow2::Qcow2Error) -> CliError {
        CliError::caused(ErrorKind::Failure, format!("read qcow2 image {}", self.path.display()), source)
    }
}

/// The length of a regular file or of a block device.
fn raw_size(file: &File, path: &Path) -> Result<u64, CliError> {
    let meta = file.metadata().map_err(|e| CliError::file("stat", path, e))?;
    if meta.is_file() {
        return Ok(meta.len());
    }
    if meta.file_type().is_block_device() {
        return seek(file, SeekFrom::End(0)).map_err(|e| CliError::file("measure", path, e.into()));
    }
    let text = format!("{} is neither a regular file nor a block device", path.display());
    Err(CliError::new(ErrorKind::Usage, text))
}
