//! [`AlignedBuf`]: memory that a direct write may use. Used by the log writer and by log reads.
//!
//! Its start lies on a page bound and its capacity is whole pages; it never moves and never grows, so that the kernel
//! may read from it while a write is in flight. Built from a `Vec` with one page of slack, so it needs no unsafe code.

use std::ops::{Deref, DerefMut};

/// Alignment and granularity of direct IO, bytes. A page: devices with 512-byte and with 4 KiB sectors accept it.
pub const ALIGN: usize = 4096;

/// A fixed-capacity byte buffer on page bounds. Dereferences to its filled part.
#[derive(Debug)]
pub struct AlignedBuf {
    raw: Vec<u8>,
    start: usize,
    capacity: usize,
    len: usize,
}

impl AlignedBuf {
    /// A buffer of at least `capacity` bytes, rounded up to pages, empty and zeroed.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Self {
        let capacity = capacity.next_multiple_of(ALIGN).max(ALIGN);
        let raw = vec![0u8; capacity + ALIGN];
        let start = raw.as_ptr().align_offset(ALIGN);
        assert!(start < ALIGN, "one page of slack is enough to align a byte vector");
        Self { raw, start, capacity, len: 0 }
    }

    /// Bytes it can hold.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        self.capacity
    }

    /// Empties it; the memory keeps its old content.
    pub const fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends `bytes`.
    ///
    /// # Panics
    /// When they do not fit: the caller sizes the buffer before it fills it.
    pub fn extend(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= self.capacity - self.len, "aligned buffer overflow");
        let at = self.start + self.len;
        self.raw[at..at + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    /// Fills with zeros up to the next multiple of `granularity` bytes, a divisor of [`ALIGN`].
    pub fn pad_to(&mut self, granularity: usize) {
        debug_assert!(ALIGN.is_multiple_of(granularity));
        let end = self.len.next_multiple_of(granularity);
        self.raw[self.start + self.len..self.start + end].fill(0);
        self.len = end;
    }

    /// Sets the filled length, for a read into the buffer; what was there before shows.
    ///
    /// # Panics
    /// When `len` is above the capacity.
    pub fn set_len(&mut self, len: usize) {
        assert!(len <= self.capacity, "aligned buffer overflow");
        self.len = len;
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.raw[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.raw[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_and_pads() {
        for capacity in [1, 4095, 4096, 4097, 1 << 20] {
            let mut buf = AlignedBuf::with_capacity(capacity);
            assert!(buf.as_ptr().align_offset(ALIGN) == 0 && buf.capacity() >= capacity);
            buf.extend(&[7; 9]);
            buf.set_len(100);
            buf.set_len(9);
            buf.pad_to(8);
            assert_eq!(&buf[..], &[7, 7, 7, 7, 7, 7, 7, 7, 7, 0, 0, 0, 0, 0, 0, 0]);
            buf.pad_to(ALIGN);
            assert_eq!(buf.len(), ALIGN);
        }
    }
}
