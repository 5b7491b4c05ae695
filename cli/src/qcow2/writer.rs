//! Writes a qcow2 image (version 3, 64 KiB clusters, 16-bit refcounts) in one pass, front to back.
//!
//! Data clusters and L2 tables are appended in the order in which the data comes; the L1 table, the refcounts and at
//! last the header follow in [`Writer::finish`], so an image that was not finished has no magic and is never taken for
//! a good one. Memory: one L2 table and the L1 table (1 MiB for the largest volume). Clusters of zeros are left out.

use super::error::Qcow2Error;
use super::header::{MAGIC, V3_BYTES};
use super::FLAG_COPIED;
use crate::sparse::{is_zero, nonzero_runs};
use std::fs::File;
use std::os::unix::fs::FileExt;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// The cluster as a length in memory.
const CLUSTER_LEN: usize = 1 << CLUSTER_BITS;
/// Entries of an L2 table, and of a cluster of the refcount table.
const ENTRIES: u64 = CLUSTER / 8;
/// Refcounts in one refcount block (16 bits each).
const REFCOUNTS_PER_BLOCK: u64 = CLUSTER / 2;

/// An image in the making.
#[derive(Debug)]
pub struct Writer {
    file: File,
    virtual_bytes: u64,
    l1: Vec<u64>,
    /// The L2 table that is being filled, and its index.
    l2: Vec<u8>,
    l2_index: u64,
    /// The next free cluster of the file; 0 is the header's.
    next_cluster: u64,
    /// Where the next data may start, bytes of the disk.
    position: u64,
}

impl Writer {
    /// Starts an image of a disk of `virtual_bytes` in an empty file. Writes nothing yet.
    #[must_use]
    pub fn new(file: File, virtual_bytes: u64) -> Self {
        let l1_entries = virtual_bytes.div_ceil(CLUSTER * ENTRIES);
        let l1 = vec![0; usize::try_from(l1_entries).unwrap_or(usize::MAX)];
        Self { file, virtual_bytes, l1, l2: vec![0; CLUSTER_LEN], l2_index: 0, next_cluster: 1, position: 0 }
    }

    /// Adds data at byte `offset` of the disk. Data comes in ascending order, starts at a multiple of 64 KiB and ends
    /// at one or at the end of the disk.
    ///
    /// # Errors
    /// [`Qcow2Error::OutOfRange`] when the order or the bounds are not kept, [`Qcow2Error::Io`].
    pub fn put(&mut self, offset: u64, data: &[u8]) -> Result<(), Qcow2Error> {
        let end = offset.saturating_add(data.len() as u64);
        let bounded = end <= self.virtual_bytes && (end.is_multiple_of(CLUSTER) || end == self.virtual_bytes);
        if !bounded || !offset.is_multiple_of(CLUSTER) || offset < self.position {
            return Err(Qcow2Error::OutOfRange { field: "the offset of new data", value: offset });
        }
        self.position = end;
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let room = usize::try_from(until_next_l2(at)).unwrap_or(usize::MAX);
            let (piece, after) = rest.split_at(room.min(rest.len()));
            self.put_runs(at, piece)?;
            at += piece.len() as u64;
            rest = after;
        }
        Ok(())
    }

    /// Writes the tables and the header and hands the file back. Nothing is synced.
    ///
    /// # Errors
    /// [`Qcow2Error::Io`].
    pub fn finish(mut self) -> Result<File, Qcow2Error> {
        self.flush_l2()?;
        let l1_bytes: Vec<u8> = self.l1.iter().flat_map(|e| e.to_be_bytes()).collect();
        let l1_at = self.append("the L1 table", &l1_bytes)?;
        let (blocks, table_clusters) = refcount_sizes(self.next_cluster);
        let total = self.next_cluster + table_clusters + blocks;
        let first_block = self.next_cluster + table_clusters;
        let table: Vec<u8> = (0..blocks).flat_map(|i| ((first_block + i) * CLUSTER).to_be_bytes()).collect();
        let table_at = self.append("the refcount table", &table)?;
        for block in 0..blocks {
            let used = (total - block * REFCOUNTS_PER_BLOCK).min(REFCOUNTS_PER_BLOCK);
            let bytes: Vec<u8> = (0..used).flat_map(|_| 1u16.to_be_bytes()).collect();
            self.append("a refcount block", &bytes)?;
        }
        let io = |source| Qcow2Error::Io { verb: "write", what: "the file's length", offset: 0, source };
        self.file.set_len(total * CLUSTER).map_err(io)?;
        let header = self.header(l1_at, table_at, table_clusters);
        self.write("the header", 0, &header)?;
        Ok(self.file)
    }

    /// Writes the clusters of `data` that are not all zeros; all of them belong to one L2 table.
    fn put_runs(&mut self, offset: u64, data: &[u8]) -> Result<(), Qcow2Error> {
        for run in nonzero_runs(data, CLUSTER_LEN) {
            let at = offset + run.start as u64;
            if at / (CLUSTER * ENTRIES) != self.l2_index {
                self.flush_l2()?;
                self.l2_index = at / (CLUSTER * ENTRIES);
            }
            let clusters = (run.len() as u64).div_ceil(CLUSTER);
            let host = self.append("data", &data[run])?;
            for i in 0..clusters {
                let slot = usize::try_from((at / CLUSTER + i) % ENTRIES * 8).unwrap_or(usize::MAX);
                self.l2[slot..slot + 8].copy_from_slice(&((host + i * CLUSTER) | FLAG_COPIED).to_be_bytes());
            }
        }
        Ok(())
    }

    /// Writes the current L2 table, unless it maps nothing, and starts an empty one.
    fn flush_l2(&mut self) -> Result<(), Qcow2Error> {
        if is_zero(&self.l2) {
            return Ok(());
        }
        let table = std::mem::replace(&mut self.l2, vec![0; CLUSTER_LEN]);
        let host = self.append("an L2 table", &table)?;
        let index = usize::try_from(self.l2_index).unwrap_or(usize::MAX);
        self.l1[index] = host | FLAG_COPIED;
        Ok(())
    }

    /// Writes `bytes` to new clusters at the end and returns their first byte in the file.
    fn append(&mut self, what: &'static str, bytes: &[u8]) -> Result<u64, Qcow2Error> {
        let at = self.next_cluster * CLUSTER;
        self.next_cluster += (bytes.len() as u64).div_ceil(CLUSTER);
        self.write(what, at, bytes)?;
        Ok(at)
    }

    fn write(&self, what: &'static str, offset: u64, bytes: &[u8]) -> Result<(), Qcow2Error> {
        let io = |source| Qcow2Error::Io { verb: "write", what, offset, source };
        self.file.write_all_at(bytes, offset).map_err(io)
    }

    fn header(&self, l1_at: u64, refcounts_at: u64, refcount_clusters: u64) -> Vec<u8> {
        let word = |n: u64| u32::try_from(n).unwrap_or(u32::MAX).to_be_bytes();
        let mut h = Vec::with_capacity(V3_BYTES + 8);
        h.extend(MAGIC);
        h.extend(3u32.to_be_bytes());
        h.extend([0; 12]); // no backing file
        h.extend(CLUSTER_BITS.to_be_bytes());
        h.extend(self.virtual_bytes.to_be_bytes());
        h.extend([0; 4]); // not encrypted
        h.extend(word(self.l1.len() as u64));
        h.extend(l1_at.to_be_bytes());
        h.extend(refcounts_at.to_be_bytes());
        h.extend(word(refcount_clusters));
        h.extend([0; 12]); // no internal snapshots
        h.extend([0; 24]); // no features
        h.extend(4u32.to_be_bytes()); // refcounts of 2^4 bits
        h.extend(word(V3_BYTES as u64));
        h.extend([0; 8]); // end of the header extensions
        h
    }
}

/// Bytes from byte `offset` of the disk to where the next L2 table takes over.
const fn until_next_l2(offset: u64) -> u64 {
    CLUSTER * ENTRIES - offset % (CLUSTER * ENTRIES)
}

/// Refcount blocks and clusters of the refcount table for a file of `clusters` clusters and these themselves.
fn refcount_sizes(clusters: u64) -> (u64, u64) {
    let (mut blocks, mut table) = (0, 0);
    loop {
        let total = clusters + blocks + table;
        let next = (total.div_ceil(REFCOUNTS_PER_BLOCK), total.div_ceil(REFCOUNTS_PER_BLOCK).div_ceil(ENTRIES));
        if next == (blocks, table) {
            return next;
        }
        (blocks, table) = next;
    }
}
