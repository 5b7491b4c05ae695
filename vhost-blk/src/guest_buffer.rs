//! Buffers in guest memory: the segments of a descriptor chain, read once and written once.
//!
//! Called by the request parser (copy out) and by the queue loop (reply). Invariants: every segment was checked against
//! guest memory before it is used, so no length of the guest's leads to an allocation that guest memory does not back
//! (segments may overlap, therefore the parser bounds the sum as well); the status byte lies outside the data segments.
//!
//! **The one copy** (decision record). Write data is copied once from guest memory into an owned buffer. Guest memory is
//! shared with running vCPUs, so a checksum computed over it in place could differ from the bytes that are sent a moment
//! later, and a retry could send other bytes than the first attempt: the copy pins what the guest asked to write. The SDK
//! computes its CRC over this buffer while it is in the cache and sends it from there. Read data is copied once from the
//! SDK's verified buffer into guest memory. There is no `unsafe` here: vm-memory does the volatile copies.

use ogee_client::{ReadData, ReadPiece};
use smallvec::SmallVec;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError};

/// Zeros to copy from for [`ReadPiece::Zeros`]: 4 KiB, so it stays in the first-level cache.
static ZEROS: [u8; 4096] = [0; 4096];

/// A contiguous piece of guest memory that was checked to exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Bytes; never 0.
    pub len: u32,
}

/// A list of segments in the order of the chain.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Segments {
    list: SmallVec<[Segment; 4]>,
    len: u64,
}

impl Segments {
    /// Appends a segment; one of no bytes is left out.
    pub fn push(&mut self, segment: Segment) {
        if segment.len > 0 {
            self.len += u64::from(segment.len);
            self.list.push(segment);
        }
    }

    /// Bytes in all.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Takes the last byte off, the place of the status.
    pub fn pop_last_byte(&mut self) -> Option<GuestAddress> {
        let last = self.list.last_mut()?;
        last.len -= 1;
        let address = GuestAddress(last.address.0.checked_add(u64::from(last.len))?);
        if last.len == 0 {
            self.list.pop();
        }
        self.len -= 1;
        Some(address)
    }

    /// Appends `len` bytes from byte `skip` on to `out`. Fewer if the segments end before.
    ///
    /// # Errors
    /// Guest memory that cannot be read; part of the bytes may have been appended.
    pub fn copy_out<M>(&self, memory: &M, skip: u64, len: usize, out: &mut Vec<u8>) -> Result<(), GuestMemoryError>
    where
        M: GuestMemory + ?Sized,
    {
        out.reserve_exact(len);
        let mut left = len;
        for (address, count) in self.after(skip) {
            let count = count.min(left);
            if count == 0 {
                break;
            }
            memory.write_all_volatile_to(address, out, count)?;
            left -= count;
        }
        Ok(())
    }

    /// Fills `out` from byte `skip` on; the caller has checked that there are so many bytes.
    ///
    /// # Errors
    /// Guest memory that cannot be read.
    pub fn read_into<M>(&self, memory: &M, skip: u64, out: &mut [u8]) -> Result<(), GuestMemoryError>
    where
        M: GuestMemory + ?Sized,
    {
        let mut rest = out;
        for (address, count) in self.after(skip) {
            let (now, later) = rest.split_at_mut(count.min(rest.len()));
            memory.read_slice(now, address)?;
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        Ok(())
    }

    /// Address and bytes of each piece of the first `limit` bytes.
    pub(crate) fn first(&self, limit: u64) -> impl Iterator<Item = (GuestAddress, u64)> {
        let mut left = limit;
        self.list.iter().map_while(move |segment| {
            let len = u64::from(segment.len).min(left);
            left -= len;
            (len > 0).then_some((segment.address, len))
        })
    }

    /// Address and bytes of each segment after the first `skip` bytes.
    fn after(&self, skip: u64) -> impl Iterator<Item = (GuestAddress, usize)> {
        let mut skip = skip;
        self.list.iter().filter_map(move |segment| {
            let len = u64::from(segment.len);
            let gone = skip.min(len);
            skip -= gone;
            let rest = usize::try_from(len - gone).ok().filter(|rest| *rest > 0)?;
            Some((GuestAddress(segment.address.0 + gone), rest))
        })
    }
}

/// Where the answer of a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplyArea {
    /// Device-writable bytes before the status.
    pub data: Segments,
    /// The status byte, the last device-writable byte of the chain.
    pub status: GuestAddress,
}

impl ReplyArea {
    /// Writes the status byte.
    ///
    /// # Errors
    /// Guest memory that cannot be written.
    pub fn write_status<M>(&self, memory: &M, status: u8) -> Result<(), GuestMemoryError>
    where
        M: GuestMemory + ?Sized,
    {
        memory.write_slice(&[status], self.status)
    }

    /// Writes bytes from the start of the data segments; what does not fit is left out.
    ///
    /// # Errors
    /// Guest memory that cannot be written.
    pub fn write_bytes<M>(&self, memory: &M, bytes: &[u8]) -> Result<(), GuestMemoryError>
    where
        M: GuestMemory + ?Sized,
    {
        ReplyWriter::new(&self.data).write(memory, bytes)
    }

    /// Writes the pieces of a read one after the other, without a buffer of their size in between.
    ///
    /// # Errors
    /// Guest memory that cannot be written.
    pub fn write_data<M>(&self, memory: &M, data: &ReadData) -> Result<(), GuestMemoryError>
    where
        M: GuestMemory + ?Sized,
    {
        let mut writer = ReplyWriter::new(&self.data);
        for piece in &data.pieces {
            match piece {
                ReadPiece::Data(bytes) => writer.write(memory, bytes)?,
                ReadPiece::Zeros(count) => {
                    let mut left = *count as usize;
                    while left > 0 {
                        let now = left.min(ZEROS.len());
                        writer.write(memory, &ZEROS[..now])?;
                        left -= now;
                    }
                }
            }
        }
        Ok(())
    }
}

/// A position in the data segments of a reply.
struct ReplyWriter<'a> {
    list: &'a [Segment],
    used_of_first: u32,
}

impl<'a> ReplyWriter<'a> {
    fn new(segments: &'a Segments) -> Self {
        Self { list: &segments.list, used_of_first: 0 }
    }

    fn write<M>(&mut self, memory: &M, bytes: &[u8]) -> Result<(), GuestMemoryError>
    where
        M: GuestMemory + ?Sized,
    {
        let mut rest = bytes;
        while let (Some(first), false) = (self.list.first(), rest.is_empty()) {
            let room = first.len - self.used_of_first;
            let count = u32::try_from(rest.len()).unwrap_or(u32::MAX).min(room);
            let (now, later) = rest.split_at(count as usize);
            memory.write_slice(now, GuestAddress(first.address.0 + u64::from(self.used_of_first)))?;
            self.used_of_first += count;
            if self.used_of_first == first.len {
                self.list = &self.list[1..];
                self.used_of_first = 0;
            }
            rest = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes as Buffer;
    use vm_memory::GuestMemoryMmap;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("64 KiB of memory")
    }

    fn segments(list: &[(u64, u32)]) -> Segments {
        let mut out = Segments::default();
        for (address, len) in list {
            out.push(Segment { address: GuestAddress(*address), len: *len });
        }
        out
    }

    #[test]
    fn copies_across_segments_from_any_byte() {
        let memory = memory();
        memory.write_slice(b"abcd", GuestAddress(0x100)).unwrap();
        memory.write_slice(b"efg", GuestAddress(0x50)).unwrap();
        let area = segments(&[(0x100, 4), (0x900, 0), (0x50, 3)]);
        assert_eq!(area.len(), 7);
        for skip in 0..7_u64 {
            let mut out = Vec::new();
            area.copy_out(&memory, skip, 7, &mut out).unwrap();
            assert_eq!(out, b"abcdefg"[usize::try_from(skip).unwrap()..]);
        }
        let pieces: Vec<_> = area.first(5).map(|(at, len)| (at.0, len)).collect();
        assert_eq!(pieces, [(0x100, 4), (0x50, 1)]);
        assert_eq!((area.first(0).count(), area.first(u64::MAX).count()), (0, 2));
        let mut two = [0; 2];
        area.read_into(&memory, 3, &mut two).unwrap();
        assert_eq!(&two, b"de");
    }

    #[test]
    fn the_last_byte_is_taken_across_a_segment_of_one_byte() {
        let mut area = segments(&[(0x100, 2), (0x200, 1)]);
        assert_eq!(area.pop_last_byte(), Some(GuestAddress(0x200)));
        assert_eq!(area.pop_last_byte(), Some(GuestAddress(0x101)));
        assert_eq!(area.pop_last_byte(), Some(GuestAddress(0x100)));
        assert_eq!(area.pop_last_byte(), None);
        assert!(area.is_empty());
    }

    #[test]
    fn pieces_and_zeros_cross_segment_borders() {
        let memory = memory();
        memory.write_slice(&[0xff; 0x4000], GuestAddress(0)).unwrap();
        let reply = ReplyArea { data: segments(&[(0x10, 3), (0x1000, 0x1800)]), status: GuestAddress(0x3000) };
        let data = ReadData {
            pieces: smallvec::smallvec![
                ReadPiece::Data(Buffer::from_static(b"hello")),
                ReadPiece::Zeros(5000),
                ReadPiece::Data(Buffer::from_static(b"end")),
            ],
        };
        reply.write_data(&memory, &data).unwrap();
        reply.write_status(&memory, 7).unwrap();
        let mut out = Vec::new();
        reply.data.copy_out(&memory, 0, 5008, &mut out).unwrap();
        assert_eq!(out, data.to_vec());
        let mut after = [0; 1];
        memory.read_slice(&mut after, GuestAddress(0x1000 + 5005)).unwrap();
        assert_eq!(after, [0xff], "nothing beyond the data is touched");
        memory.read_slice(&mut after, reply.status).unwrap();
        assert_eq!(after, [7]);
    }

    #[test]
    fn too_much_data_stays_inside_the_segments() {
        let memory = memory();
        let reply = ReplyArea { data: segments(&[(0x10, 4)]), status: GuestAddress(0x20) };
        reply.write_bytes(&memory, b"123456").unwrap();
        let mut out = [0; 6];
        memory.read_slice(&mut out, GuestAddress(0x10)).unwrap();
        assert_eq!(&out, b"1234\0\0");
    }
}
