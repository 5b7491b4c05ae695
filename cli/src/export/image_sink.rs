//! Writes the bytes of a device to an image file; zeros become holes.

use crate::copy_out::Sink;
use crate::error::{CliError, ErrorKind};
use crate::qcow2::{Qcow2Error, Writer};
use crate::sparse::{is_zero, nonzero_runs};
use bytes::Bytes;
use clap::ValueEnum;
use ogee_client::{ReadData, ReadPiece};
use ogee_common::limits::PAGE_BYTES;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// How an image file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportFormat {
    /// The bytes of the disk, with holes.
    Raw,
    /// QEMU copy-on-write, version 3.
    Qcow2,
}

/// An image file in the making.
#[derive(Debug)]
pub(crate) struct ImageSink {
    path: PathBuf,
    data_bytes: u64,
    layout: Layout,
}

#[derive(Debug)]
enum Layout {
    Raw(File),
    Qcow2(Box<Writer>),
}

impl ImageSink {
    /// Starts an image of `size_bytes` in an empty file. `path` is for messages.
    ///
    /// # Errors
    /// The file cannot have that length.
    pub(crate) fn new(file: File, path: &Path, size_bytes: u64, format: ExportFormat) -> Result<Self, CliError> {
        let layout = match format {
            ExportFormat::Raw => {
                file.set_len(size_bytes).map_err(|e| CliError::file("set the length of", path, e))?;
                Layout::Raw(file)
            }
            ExportFormat::Qcow2 => Layout::Qcow2(Box::new(Writer::new(file, size_bytes))),
        };
        Ok(Self { path: path.to_owned(), data_bytes: 0, layout })
    }

    /// Completes the image and returns the bytes of data in it.
    ///
    /// # Errors
    /// The tables of a qcow2 image cannot be written.
    pub(crate) fn finish(self) -> Result<u64, CliError> {
        match self.layout {
            Layout::Raw(_) => Ok(self.data_bytes),
            Layout::Qcow2(writer) => {
                writer.finish().map_err(|e| write_failed(&self.path, e))?;
                Ok(self.data_bytes)
            }
        }
    }
}

impl Sink for ImageSink {
    fn put(&mut self, offset: u64, data: &ReadData) -> Result<(), CliError> {
        let Some(bytes) = contiguous(data) else { return Ok(()) };
        match &mut self.layout {
            Layout::Raw(file) => {
                for run in nonzero_runs(&bytes, PAGE_BYTES as usize) {
                    self.data_bytes += run.len() as u64;
                    let at = offset + run.start as u64;
                    file.write_all_at(&bytes[run], at).map_err(|e| CliError::file("write", &self.path, e))?;
                }
            }
            Layout::Qcow2(writer) => {
                self.data_bytes += bytes.len() as u64;
                writer.put(offset, &bytes).map_err(|e| write_failed(&self.path, e))?;
            }
        }
        Ok(())
    }
}

/// The bytes in one piece; `None` when all are zeros. Copies only when there are several pieces.
fn contiguous(data: &ReadData) -> Option<Bytes> {
    let zeros = |piece: &ReadPiece| match piece {
        ReadPiece::Data(bytes) => is_zero(bytes),
        ReadPiece::Zeros(_) => true,
    };
    if data.pieces.iter().all(zeros) {
        return None;
    }
    match data.pieces.as_slice() {
        [ReadPiece::Data(bytes)] => Some(bytes.clone()),
        _ => Some(data.to_vec().into()),
    }
}

fn write_failed(path: &Path, error: Qcow2Error) -> CliError {
    let full = matches!(&error, Qcow2Error::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull);
    let kind = if full { ErrorKind::NoSpace } else { ErrorKind::Failure };
    CliError::caused(kind, format!("write {}", path.display()), error)
}

#[cfg(test)]
mod tests;
