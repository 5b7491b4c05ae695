//! One request on its way: the device call between the parser and the used ring.
//!
//! Called by the queue loop, which owns the futures. Invariants: a failed IO becomes a status byte and nothing else; the
//! answer is only *prepared* here, guest memory is written by [`Finished::write_reply`], which the queue loop calls after
//! it has checked that the ring may still be written; an answer of a wrong length is an error, never shown to the guest.

use crate::dirty_log::QueueLog;
use crate::guest_buffer::ReplyArea;
use crate::request::{ByteRange, ID_BYTES, Operation, Request, Status};
use crate::stats::{RequestKind, VhostBlkStats};
use ogee_client::{BlockDevice, IoError, ReadData};
use std::sync::Arc;
use vm_memory::GuestMemoryMmap;

/// What goes into the data segments of a successful answer.
#[derive(Debug)]
enum ReplyData {
    None,
    Read(ReadData),
    Id([u8; ID_BYTES]),
}

/// A request whose device call is over.
#[derive(Debug)]
pub(crate) struct Finished {
    /// Head of the chain, to be put into the used ring.
    pub(crate) head: u16,
    /// Payload bytes that are free again.
    pub(crate) payload_bytes: usize,
    /// `None`: there is no place for an answer.
    reply: Option<(ReplyArea, Status, ReplyData)>,
    memory: Arc<GuestMemoryMmap>,
}

impl Finished {
    /// A chain that is answered without asking the device.
    pub(crate) fn refused(head: u16, memory: Arc<GuestMemoryMmap>, reply: ReplyArea, status: Status) -> Self {
        Self { head, payload_bytes: 0, reply: Some((reply, status, ReplyData::None)), memory }
    }

    /// A chain that has no place for an answer.
    pub(crate) fn unanswerable(head: u16, memory: Arc<GuestMemoryMmap>) -> Self {
        Self { head, payload_bytes: 0, reply: None, memory }
    }

    /// Writes data and status into guest memory and marks the pages in the dirty log, if there is one; returns the bytes to
    /// report in the used ring (virtio 1.2, 2.7.8.2).
    pub(crate) fn write_reply(&self, log: Option<&QueueLog>) -> u32 {
        let Some((reply, status, data)) = &self.reply else { return 0 };
        let memory = self.memory.as_ref();
        let (written, data_bytes) = match data {
            ReplyData::None => (Ok(()), 0),
            ReplyData::Read(data) => (reply.write_data(memory, data), reply.data.len()),
            ReplyData::Id(id) => (reply.write_bytes(memory, id), reply.data.len().min(ID_BYTES as u64)),
        };
        let status = if written.is_ok() { *status } else { Status::IoError };
        let answered = reply.write_status(memory, status.byte());
        if let Some(QueueLog { log, .. }) = log {
            // Also what failed half-way.
            reply.data.first(data_bytes).for_each(|(at, len)| log.mark(at, len));
            log.mark(reply.status, 1);
        }
        match answered {
            Ok(()) => u32::try_from(data_bytes + 1).unwrap_or(u32::MAX),
            Err(_) => 0,
        }
    }
}

/// Runs a request against the device and counts it.
pub(crate) async fn execute<D: BlockDevice>(
    device: &D,
    stats: &VhostBlkStats,
    head: u16,
    request: Request,
    memory: Arc<GuestMemoryMmap>,
) -> Finished {
    let payload_bytes = request.operation.payload_bytes();
    let kind = kind_of(&request.operation);
    let (status, data) = match call(device, request.operation).await {
        Ok((bytes, data)) => {
            stats.count_success(kind, bytes);
            (Status::Ok, data)
        }
        Err(error) => {
            stats.count_error(kind);
            tracing::debug!(target: "datapath", error = %error, "request failed");
            (Status::IoError, ReplyData::None)
        }
    };
    Finished { head, payload_bytes, reply: Some((request.reply, status, data)), memory }
}

/// Why the device's answer is not passed on.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error(transparent)]
    Io(IoError),
    #[error("read returned {got} bytes of {want}")]
    ReadLen { got: usize, want: u32 },
}

/// The device call; returns the bytes covered and the data to answer with.
async fn call<D: BlockDevice>(device: &D, operation: Operation) -> Result<(u64, ReplyData), CallError> {
    match operation {
        Operation::Read { offset, len } => {
            let data = device.read(offset, len).await.map_err(CallError::Io)?;
            if data.len() != len as usize {
                return Err(CallError::ReadLen { got: data.len(), want: len });
            }
            Ok((u64::from(len), ReplyData::Read(data)))
        }
        Operation::Write { offset, data } => {
            let len = data.len() as u64;
            device.write(offset, data).await.map_err(CallError::Io)?;
            Ok((len, ReplyData::None))
        }
        Operation::Flush => {
            device.flush().await.map_err(CallError::Io)?;
            Ok((0, ReplyData::None))
        }
        Operation::GetId => Ok((0, ReplyData::Id(id_bytes(&device.info().serial)))),
        Operation::Discard(ranges) => {
            for ByteRange { offset, len } in ranges.iter().filter(|range| range.len > 0) {
                device.discard(*offset, *len).await.map_err(CallError::Io)?;
            }
            Ok((ranges.iter().map(|range| range.len).sum(), ReplyData::None))
        }
        Operation::WriteZeroes(ranges) => {
            for ByteRange { offset, len } in ranges.iter().filter(|range| range.len > 0) {
                device.write_zeroes(*offset, *len).await.map_err(CallError::Io)?;
            }
            Ok((ranges.iter().map(|range| range.len).sum(), ReplyData::None))
        }
    }
}

/// The serial, cut to 20 bytes or filled with NUL (virtio 1.2, 5.2.6: no terminator is needed at full length).
fn id_bytes(serial: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    for (to, from) in id.iter_mut().zip(serial.bytes()) {
        *to = from;
    }
    id
}

fn kind_of(operation: &Operation) -> RequestKind {
    match operation {
        Operation::Read { .. } => RequestKind::Read,
        Operation::Write { .. } => RequestKind::Write,
        Operation::Flush => RequestKind::Flush,
        Operation::GetId => RequestKind::GetId,
        Operation::Discard(_) => RequestKind::Discard,
        Operation::WriteZeroes(_) => RequestKind::WriteZeroes,
    }
}

#[cfg(test)]
mod tests {
    use super::id_bytes;

    #[test]
    fn serial_is_cut_and_filled() {
        assert_eq!(&id_bytes("ab"), b"ab\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(&id_bytes("0123456789abcdefghijKL"), b"0123456789abcdefghij");
    }
}
