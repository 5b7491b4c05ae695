//! What one daemon hands to the next: its listening sockets, the claim on them, and the state of its front end; as bytes and descriptors.
//!
//! Used by both sides of a hand-over. Numbers are little-endian; a descriptor travels beside the bytes, in the order of its field. `?` is a byte, 1 if the field
//! follows and 0 if there is none.
//!
//! | field | bytes |
//! | --- | --- |
//! | listening socket, listening socket for the next hand-over | 2 descriptors |
//! | claim | ?, descriptor |
//! | front end | ?, then all that follows |
//! | connection | descriptor |
//! | features, protocol features, size of the device | 8, 8, 8 |
//! | owned, write cache, arrival (0 unknown, 1 new, 2 used) | 1, 1, 1 |
//! | number of memory regions; each: guest address, front end's address, length, offset in its file | 2; 32, descriptor |
//! | in-flight memory: length, offset, queues, entries | ?, 8, 8, 2, 2, descriptor |
//! | dirty log: length, offset | ?, 8, 8, descriptor |
//! | channel for our own requests | ?, descriptor |
//! | number of queues; each: size, next available index, descriptor table, available ring, used ring (guest addresses) | 2; 2, 2, 8, 8, 8 |
//! | used ring in the dirty log | ?, 8 |
//! | started, enabled | 1, 1 |
//! | kick, call, error | each ?, descriptor |
//!
//! Invariants: what is decoded has at most as many regions and queues as a front end may have, every byte and descriptor of it is used, and nothing else is
//! believed: the handler checks it (`handler/taken.rs`). A change of this layout is a new version of the protocol (`wire.rs`).

use crate::backend::KnownArrival;
use ogee_common::limits::{VHOST_MEMORY_REGIONS_MAX, VHOST_QUEUES_MAX};
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

/// Shared memory: a part of a file.
#[derive(Debug)]
pub(crate) struct SharedMemory {
    pub(crate) size: u64,
    pub(crate) offset: u64,
    pub(crate) file: File,
}

/// A region of guest memory, by the guest's and by the front end's address.
#[derive(Debug)]
pub(crate) struct RegionState {
    pub(crate) guest: u64,
    pub(crate) user: u64,
    pub(crate) memory: SharedMemory,
}

/// In-flight memory.
#[derive(Debug)]
pub(crate) struct InflightState {
    pub(crate) memory: SharedMemory,
    pub(crate) num_queues: u16,
    pub(crate) queue_size: u16,
}

/// One virtqueue that stands still.
#[derive(Debug)]
pub(crate) struct QueueState {
    pub(crate) size: u16,
    pub(crate) next_avail: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    pub(crate) used_in_log: Option<u64>,
    pub(crate) ready: bool,
    pub(crate) enabled: bool,
    pub(crate) kick: Option<File>,
    pub(crate) call: Option<File>,
    pub(crate) err: Option<File>,
}

/// What a front end has said, and where its rings stand.
#[derive(Debug)]
pub(crate) struct FrontEndState {
    pub(crate) features: u64,
    pub(crate) protocol_features: u64,
    pub(crate) size_bytes: u64,
    pub(crate) owned: bool,
    pub(crate) writeback: bool,
    pub(crate) arrival: KnownArrival,
    pub(crate) regions: Vec<RegionState>,
    pub(crate) inflight: Option<InflightState>,
    pub(crate) log: Option<SharedMemory>,
    pub(crate) channel: Option<UnixStream>,
    pub(crate) queues: Vec<QueueState>,
}

/// Everything.
#[derive(Debug)]
pub(crate) struct Estate {
    pub(crate) listener: UnixListener,
    pub(crate) upgrades: UnixListener,
    pub(crate) claim: Option<File>,
    pub(crate) front_end: Option<(UnixStream, FrontEndState)>,
}

/// Why bytes are no estate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EstateError {
    /// They end too early.
    #[error("the state of the running daemon is cut short")]
    Short,
    /// A descriptor is missing.
    #[error("the state of the running daemon lacks a descriptor")]
    NoDescriptor,
    /// A number out of range.
    #[error("the state of the running daemon has a bad {field}")]
    Value {
        /// Which.
        field: &'static str,
    },
    /// Something is left over.
    #[error("the state of the running daemon has more than it should")]
    Trailing,
}

/// Bytes and descriptors being written.
#[derive(Debug, Default)]
pub(crate) struct Encoded<'a> {
    pub(crate) bytes: Vec<u8>,
    pub(crate) files: Vec<BorrowedFd<'a>>,
}

impl<'a> Encoded<'a> {
    fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    fn u16(&mut self, value: u16) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    fn file(&mut self, file: &'a impl AsFd) {
        self.files.push(file.as_fd());
    }

    fn option<T>(&mut self, value: Option<T>, put: impl FnOnce(&mut Self, T)) {
        self.u8(u8::from(value.is_some()));
        if let Some(value) = value {
            put(self, value);
        }
    }

    fn count(&mut self, items: usize) {
        // A front end may not have more of anything that is counted, and what is cut off makes the other side refuse.
        self.u16(u16::try_from(items).unwrap_or(u16::MAX));
    }

    fn memory(&mut self, memory: &'a SharedMemory) {
        self.u64(memory.size);
        self.u64(memory.offset);
        self.file(&memory.file);
    }

    fn front_end(&mut self, state: &'a FrontEndState) {
        [state.features, state.protocol_features, state.size_bytes].into_iter().for_each(|value| self.u64(value));
        let arrival = match state.arrival {
            KnownArrival::Unknown => 0,
            KnownArrival::New => 1,
            KnownArrival::Used => 2,
        };
        [u8::from(state.owned), u8::from(state.writeback), arrival].into_iter().for_each(|value| self.u8(value));
        self.count(state.regions.len());
        for region in &state.regions {
            self.u64(region.guest);
            self.u64(region.user);
            self.memory(&region.memory);
        }
        self.option(state.inflight.as_ref(), |out, inflight| {
            out.memory(&inflight.memory);
            out.u16(inflight.num_queues);
            out.u16(inflight.queue_size);
        });
        self.option(state.log.as_ref(), Self::memory);
        self.option(state.channel.as_ref(), Self::file);
        self.count(state.queues.len());
        for queue in &state.queues {
            self.u16(queue.size);
            self.u16(queue.next_avail);
            [queue.descriptors, queue.available, queue.used].into_iter().for_each(|value| self.u64(value));
            self.option(queue.used_in_log, Self::u64);
            self.u8(u8::from(queue.ready));
            self.u8(u8::from(queue.enabled));
            for file in [&queue.kick, &queue.call, &queue.err] {
                self.option(file.as_ref(), Self::file);
            }
        }
    }
}

/// Bytes and descriptors being read.
struct Decoder<'a> {
    bytes: &'a [u8],
    files: VecDeque<OwnedFd>,
}

impl Decoder<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], EstateError> {
        let (array, rest) = self.bytes.split_first_chunk().ok_or(EstateError::Short)?;
        self.bytes = rest;
        Ok(*array)
    }

    fn u16(&mut self) -> Result<u16, EstateError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, EstateError> {
        self.array().map(u64::from_le_bytes)
    }

    fn flag(&mut self, field: &'static str) -> Result<bool, EstateError> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(EstateError::Value { field }),
        }
    }

    fn file<T: From<OwnedFd>>(&mut self) -> Result<T, EstateError> {
        self.files.pop_front().map(T::from).ok_or(EstateError::NoDescriptor)
    }

    fn option<T>(
        &mut self,
        field: &'static str,
        get: impl FnOnce(&mut Self) -> Result<T, EstateError>,
    ) -> Result<Option<T>, EstateError> {
        if self.flag(field)? { get(self).map(Some) } else { Ok(None) }
    }

    fn list<T>(
        &mut self,
        (field, max): (&'static str, usize),
        get: impl Fn(&mut Self) -> Result<T, EstateError>,
    ) -> Result<Vec<T>, EstateError> {
        let count = usize::from(self.u16()?);
        if count > max {
            return Err(EstateError::Value { field });
        }
        (0..count).map(|_| get(self)).collect()
    }

    fn memory(&mut self) -> Result<SharedMemory, EstateError> {
        Ok(SharedMemory { size: self.u64()?, offset: self.u64()?, file: self.file()? })
    }

    fn queue(&mut self) -> Result<QueueState, EstateError> {
        Ok(QueueState {
            size: self.u16()?,
            next_avail: self.u16()?,
            descriptors: self.u64()?,
            available: self.u64()?,
            used: self.u64()?,
            used_in_log: self.option("place of a used ring in the log", Self::u64)?,
            ready: self.flag("started")?,
            enabled: self.flag("enabled")?,
            kick: self.option("kick", Self::file)?,
            call: self.option("call", Self::file)?,
            err: self.option("error descriptor", Self::file)?,
        })
    }

    fn front_end(&mut self) -> Result<FrontEndState, EstateError> {
        Ok(FrontEndState {
            features: self.u64()?,
            protocol_features: self.u64()?,
            size_bytes: self.u64()?,
            owned: self.flag("owned")?,
            writeback: self.flag("write cache")?,
            arrival: match self.array()? {
                [0] => KnownArrival::Unknown,
                [1] => KnownArrival::New,
                [2] => KnownArrival::Used,
                _ => return Err(EstateError::Value { field: "arrival" }),
            },
            regions: self.list(("number of memory regions", VHOST_MEMORY_REGIONS_MAX), |from| {
                Ok(RegionState { guest: from.u64()?, user: from.u64()?, memory: from.memory()? })
            })?,
            inflight: self.option("in-flight memory", |from| {
                Ok(InflightState { memory: from.memory()?, num_queues: from.u16()?, queue_size: from.u16()? })
            })?,
            log: self.option("dirty log", Self::memory)?,
            channel: self.option("channel", Self::file)?,
            queues: self.list(("number of queues", usize::from(VHOST_QUEUES_MAX)), Self::queue)?,
        })
    }
}

impl Estate {
    /// As bytes and descriptors.
    pub(crate) fn encode(&self) -> Encoded<'_> {
        let mut out = Encoded::default();
        out.file(&self.listener);
        out.file(&self.upgrades);
        out.option(self.claim.as_ref(), Encoded::file);
        out.option(self.front_end.as_ref(), |out, (connection, state)| {
            out.file(connection);
            out.front_end(state);
        });
        out
    }

    /// From bytes and descriptors.
    ///
    /// # Errors
    /// [`EstateError`].
    pub(crate) fn decode(bytes: &[u8], files: Vec<OwnedFd>) -> Result<Self, EstateError> {
        let mut from = Decoder { bytes, files: files.into() };
        let estate = Self {
            listener: from.file()?,
            upgrades: from.file()?,
            claim: from.option("claim", Decoder::file)?,
            front_end: from.option("front end", |from| Ok((from.file()?, from.front_end()?)))?,
        };
        let nothing_left = from.bytes.is_empty() && from.files.is_empty();
        if nothing_left { Ok(estate) } else { Err(EstateError::Trailing) }
    }
}

#[cfg(test)]
mod tests;
