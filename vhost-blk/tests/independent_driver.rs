//! The crate `virtio-driver`, somebody else's driver and somebody else's vhost-user front end, against the server.

#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "test code")]
#![allow(dead_code, reason = "each test file uses a part of the support module")]

mod support;

use ogee_client::MemoryDevice;
use std::fs::File;
use std::os::fd::AsRawFd;
use support::{PATIENCE, TestServer};
use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::poll::PollContext;

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;

/// A buffer that is shared with the device.
struct Buffer {
    memory: GuestMemoryMmap,
    file: File,
    base: *mut u8,
}

impl Buffer {
    fn new(len: usize) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len as u64).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), len, Some(offset))]).unwrap();
        let base = memory.iter().next().unwrap().as_ptr();
        Self { memory, file, base }
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at as u64)).unwrap();
    }

    fn get(&self, at: usize, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.memory.read_slice(&mut out, GuestAddress(at as u64)).unwrap();
        out
    }
}

enum Io {
    Read(u64, usize),
    Write(u64, usize),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64),
}

/// Submits a batch on a queue and waits for all of it; returns the results by position.
fn run(
    transport: &VirtioBlkTransport,
    queue: &mut VirtioBlkQueue<'_, usize>,
    index: usize,
    buffer: &Buffer,
    batch: &[Io],
) -> Vec<i32> {
    for (context, io) in batch.iter().enumerate() {
        // SAFETY: the buffer is mapped for the whole test, `at + BLOCK` lies inside of it by the choice of the callers,
        // and each position is used by one request of a batch.
        #[allow(unsafe_code)]
        let submitted = unsafe {
            match io {
                Io::Read(offset, at) => queue.read_raw(*offset, buffer.base.add(*at), BLOCK, context),
                Io::Write(offset, at) => queue.write_raw(*offset, buffer.base.add(*at), BLOCK, context),
                Io::Flush => queue.flush(context),
                Io::Discard(offset, len) => queue.discard(*offset, *len, context),
                Io::WriteZeroes(offset, len) => queue.write_zeroes(*offset, *len, true, context),
            }
        };
        submitted.unwrap();
    }
    if queue.avail_notif_needed() {
        transport.get_submission_notifier(index).notify().unwrap();
    }
    let mut results = vec![i32::MIN; batch.len()];
    let mut left = batch.len();
    let deadline = ogee_common::clock::now() + PATIENCE;
    let poll = PollContext::<u32>::new().unwrap();
    poll.add(transport.get_completion_fd(index).as_ref(), 0).unwrap();
    while left > 0 {
        let patience = deadline.saturating_duration_since(ogee_common::clock::now());
        assert!(poll.wait_timeout(patience).unwrap().iter().next().is_some(), "{left} requests not answered in time");
        transport.get_completion_fd(index).read().unwrap();
        for done in queue.completions() {
            results[done.context] = done.ret;
            left -= 1;
        }
    }
    results
}

fn drive(features: VirtioFeatureFlags, num_queues: usize) {
    let server = TestServer::start(MemoryDevice::new(4 * MIB), 4);
    let path = server.path().to_str().unwrap();
    // Bits of virtio-blk: segments, block size, flush, topology, write cache, queues, discard, write-zeroes.
    let block_bits = 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14;
    let vhost = VhostUser::new(path, features.bits() | block_bits).unwrap();
    let mut transport: Box<VirtioBlkTransport> = Box::new(vhost);
    assert_eq!(transport.get_features() & features.bits(), features.bits(), "all of it is offered");
    let config = transport.get_config().unwrap();
    assert_eq!(u64::from(config.capacity), 8192);
    assert_eq!(u32::from(config.blk_size), 512);
    let buffers: Vec<Buffer> = (0..num_queues).map(|_| Buffer::new(MIB)).collect();
    let mut queues = VirtioBlkQueue::<usize>::setup_queues(transport.as_mut(), num_queues, 64).unwrap();
    for buffer in &buffers {
        transport.map_mem_region(buffer.base as usize, MIB, buffer.file.as_raw_fd(), 0).unwrap();
    }
    for (index, (queue, buffer)) in queues.iter_mut().zip(&buffers).enumerate() {
        // Off by default; with the event index no interrupt comes without it.
        queue.set_used_notif_enabled(true);
        let part = (index * MIB) as u64;
        let blocks = 16;
        for block in 0..blocks {
            buffer.put(block * BLOCK, &[u8::try_from(index * 16 + block + 1).unwrap(); BLOCK]);
        }
        let writes: Vec<Io> = (0..blocks).map(|b| Io::Write(part + (b * BLOCK) as u64, b * BLOCK)).collect();
        assert_eq!(run(transport.as_ref(), queue, index, buffer, &writes), vec![0; blocks]);
        let rest = [Io::Flush, Io::Discard(part, 4096), Io::WriteZeroes(part + 8192, 4096)];
        assert_eq!(run(transport.as_ref(), queue, index, buffer, &rest), [0; 3]);
        let half = MIB / 2;
        let reads: Vec<Io> = (0..blocks).map(|b| Io::Read(part + (b * BLOCK) as u64, half + b * BLOCK)).collect();
        assert_eq!(run(transport.as_ref(), queue, index, buffer, &reads), vec![0; blocks]);
        for block in 0..blocks {
            let value = if block == 0 || block == 2 { 0 } else { u8::try_from(index * 16 + block + 1).unwrap() };
            assert_eq!(buffer.get(half + block * BLOCK, BLOCK), vec![value; BLOCK], "queue {index} block {block}");
        }
        let beyond = [Io::Read(4 << 20, 0)];
        assert_eq!(run(transport.as_ref(), queue, index, buffer, &beyond), [-5]);
    }
}

#[test]
fn plain_rings() {
    drive(VirtioFeatureFlags::VERSION_1, 1);
}

#[test]
fn rings_with_event_index_on_four_queues() {
    drive(VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX, 4);
}
