//! Reads the disk in a qcow2 image. All IO is positional and blocking, so that several threads may read at once.

use super::error::Qcow2Error;
use super::header::Header;
use super::table_cache::TableCache;
use super::{FLAG_COMPRESSED, FLAG_COPIED, FLAG_ZERO, OFFSET_MASK};
use flate2::{Decompress, FlushDecompress};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of the file that the header may need: the fixed fields and a backing file's name in the usual place.
const HEADER_READ_BYTES: u64 = 4096;
/// Bits 1 to 8 of a standard L2 entry: reserved.
const RESERVED_L2: u64 = 0x1fe;

/// An open image. Reading takes `&self`.
#[derive(Debug)]
pub struct Reader {
    file: File,
    file_bytes: u64,
    header: Header,
    l1: Vec<u64>,
    l2: Mutex<TableCache>,
}

/// Where a cluster of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mapping {
    /// Reads as zeros.
    Zeros,
    /// Plain, at this byte of the file.
    Plain(u64),
    /// Compressed, at this byte of the file, at most so many bytes.
    Compressed(u64, u64),
}

impl Reader {
    /// Reads the header and the L1 table.
    ///
    /// # Errors
    /// [`Qcow2Error`] when the image is damaged, unsupported or unreadable.
    pub fn open(file: File) -> Result<Self, Qcow2Error> {
        let io = |source| Qcow2Error::Io { verb: "read", what: "the file's length", offset: 0, source };
        let file_bytes = file.metadata().map_err(io)?.len();
        let head = read_exact(&file, file_bytes, "the header", 0, HEADER_READ_BYTES.min(file_bytes))?;
        let header = Header::parse(&head)?;
        // l1_entries is at most 4 Mi, and the bytes must be in the file before room is made for them.
        let bytes = read_exact(&file, file_bytes, "the L1 table", header.l1_offset, header.l1_entries * 8)?;
        let l1 = entries(&bytes).collect();
        Ok(Self { file, file_bytes, header, l1, l2: Mutex::default() })
    }

    /// The header.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn virtual_bytes(&self) -> u64 {
        self.header.virtual_bytes
    }

    /// The first range at or after byte `from` of the disk that may hold data, at most `max_bytes` long; `None` when
    /// only zeros follow.
    ///
    /// # Errors
    /// [`Qcow2Error`] when a table is damaged or unreadable.
    pub fn next_data(&self, from: u64, max_bytes: u64) -> Result<Option<Range<u64>>, Qcow2Error> {
        let (cluster_bytes, size) = (self.header.cluster_bytes(), self.virtual_bytes());
        let mut at = from;
        while at < size {
            if self.l1_entry(at)? == 0 {
                at = (at / self.header.l2_covers_bytes() + 1) * self.header.l2_covers_bytes();
            } else if self.mapping(at)? == Mapping::Zeros {
                at = (at / cluster_bytes + 1) * cluster_bytes;
            } else {
                break;
            }
        }
        if at >= size {
            return Ok(None);
        }
        let limit = at.saturating_add(max_bytes.max(1)).min(size);
        let mut end = at;
        while end < limit && self.mapping(end)? != Mapping::Zeros {
            end = (end / cluster_bytes + 1) * cluster_bytes;
        }
        Ok(Some(at..end.min(limit)))
    }

    /// Reads `buffer.len()` bytes of the disk at `offset`.
    ///
    /// # Errors
    /// [`Qcow2Error`]: also when the range is not within the disk.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Qcow2Error> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.virtual_bytes()) {
            return Err(Qcow2Error::OutOfRange { field: "the end of the read", value: end.unwrap_or(u64::MAX) });
        }
        let cluster_bytes = self.header.cluster_bytes();
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let inside = at % cluster_bytes;
            let room = usize::try_from(cluster_bytes - inside).unwrap_or(usize::MAX);
            let (piece, after) = rest.split_at_mut(room.min(rest.len()));
            match self.mapping(at)? {
                Mapping::Zeros => piece.fill(0),
                Mapping::Plain(host) => self.fill("a data cluster", host + inside, piece)?,
                Mapping::Compressed(host, len) => {
                    let whole = self.inflate(host, len)?;
                    let start = usize::try_from(inside).unwrap_or(usize::MAX);
                    piece.copy_from_slice(&whole[start..start + piece.len()]);
                }
            }
            at += piece.len() as u64;
            rest = after;
        }
        Ok(())
    }

    fn l1_entry(&self, at: u64) -> Result<u64, Qcow2Error> {
        let index = usize::try_from(at / self.header.l2_covers_bytes()).unwrap_or(usize::MAX);
        let entry = self.l1.get(index).copied().unwrap_or(0);
        self.aligned("an L1 entry", entry & !FLAG_COPIED)
    }

    /// A host offset without flags, or an error when it has other bits than an offset may have.
    fn aligned(&self, field: &'static str, offset: u64) -> Result<u64, Qcow2Error> {
        if offset & !OFFSET_MASK != 0 || !offset.is_multiple_of(self.header.cluster_bytes()) {
            return Err(Qcow2Error::OutOfRange { field, value: offset });
        }
        Ok(offset)
    }

    fn mapping(&self, at: u64) -> Result<Mapping, Qcow2Error> {
        let table_offset = self.l1_entry(at)?;
        if table_offset == 0 {
            return Ok(Mapping::Zeros);
        }
        let table = self.l2_table(table_offset)?;
        let index = (at / self.header.cluster_bytes()) % self.header.l2_entries();
        let entry = usize::try_from(index).ok().and_then(|i| table.get(i).copied()).unwrap_or(0);
        if entry & FLAG_COMPRESSED != 0 {
            return Ok(self.compressed(entry));
        }
        let zero = entry & FLAG_ZERO != 0;
        if entry & RESERVED_L2 != 0 || (zero && self.header.version < 3) {
            return Err(Qcow2Error::OutOfRange { field: "an L2 entry", value: entry });
        }
        let host = self.aligned("an L2 entry", entry & !(FLAG_COPIED | FLAG_ZERO))?;
        Ok(if zero || host == 0 { Mapping::Zeros } else { Mapping::Plain(host) })
    }

    /// "Compressed Clusters Descriptor": with x = 62 - (cluster_bits - 8), bits 0 to x-1 are the host offset and bits
    /// x to 61 the number of further 512-byte sectors.
    fn compressed(&self, entry: u64) -> Mapping {
        let x = 62 - (self.header.cluster_bits - 8);
        let host = entry & ((1 << x) - 1);
        let sectors = (entry & (FLAG_COMPRESSED - 1)) >> x;
        Mapping::Compressed(host, (sectors + 1) * 512 - host % 512)
    }

    fn l2_table(&self, offset: u64) -> Result<Arc<[u64]>, Qcow2Error> {
        if let Some(table) = self.l2.lock().unwrap_or_else(PoisonError::into_inner).get(offset) {
            return Ok(table);
        }
        let bytes = read_exact(&self.file, self.file_bytes, "an L2 table", offset, self.header.cluster_bytes())?;
        let table: Arc<[u64]> = entries(&bytes).collect();
        self.l2.lock().unwrap_or_else(PoisonError::into_inner).put(offset, Arc::clone(&table));
        Ok(table)
    }

    fn inflate(&self, host: u64, len: u64) -> Result<Vec<u8>, Qcow2Error> {
        // The last sector of compressed data need not be whole, so the file may end inside it.
        let len = len.min(self.file_bytes.saturating_sub(host));
        let packed = read_exact(&self.file, self.file_bytes, "a compressed cluster", host, len)?;
        let size = usize::try_from(self.header.cluster_bytes()).unwrap_or(usize::MAX);
        let mut whole = vec![0; size];
        let mut stream = Decompress::new(false);
        let done = stream.decompress(&packed, &mut whole, FlushDecompress::Finish);
        match done {
            Ok(_) if stream.total_out() == self.header.cluster_bytes() => Ok(whole),
            Ok(_) => Err(Qcow2Error::Inflate { offset: host, source: None }),
            Err(source) => Err(Qcow2Error::Inflate { offset: host, source: Some(source) }),
        }
    }

    fn fill(&self, what: &'static str, offset: u64, buffer: &mut [u8]) -> Result<(), Qcow2Error> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.file_bytes) {
            return Err(Qcow2Error::Truncated { what, offset, file_bytes: self.file_bytes });
        }
        let io = |source| Qcow2Error::Io { verb: "read", what, offset, source };
        self.file.read_exact_at(buffer, offset).map_err(io)
    }
}

/// Reads `len` bytes at `offset`; makes room for them only when the file has them.
fn read_exact(file: &File, file_bytes: u64, what: &'static str, offset: u64, len: u64) -> Result<Vec<u8>, Qcow2Error> {
    let short = Qcow2Error::Truncated { what, offset, file_bytes };
    if offset.checked_add(len).is_none_or(|end| end > file_bytes) {
        return Err(short);
    }
    let Ok(len) = usize::try_from(len) else { return Err(short) };
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset).map_err(|source| Qcow2Error::Io { verb: "read", what, offset, source })?;
    Ok(bytes)
}

fn entries(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|b| u64::from_be_bytes(b.try_into().unwrap_or_default()))
}
