//! Every limit of the system, with its unit and reason. Relations between limits are asserted at compile time.

use std::time::Duration;

/// Bytes of a sector, the unit of guest addressing (virtio-blk 1.2, 5.2.4).
pub const SECTOR_BYTES: u32 = 512;
/// Bytes of a page, the unit of bitmaps and checksums. Equal to the file-system block, so that a hole can be punched.
pub const PAGE_BYTES: u32 = 4096;
/// Bytes of a chunk, the unit of routing (16 MiB).
pub const CHUNK_BYTES: u32 = 16 << 20;
/// Pages of a chunk.
pub const PAGES_PER_CHUNK: u32 = CHUNK_BYTES / PAGE_BYTES;
/// Chunks of a segment.
pub const CHUNKS_PER_SEGMENT: u32 = 64;
/// Bytes of a segment, the unit of placement (1 GiB).
pub const SEGMENT_BYTES: u64 = CHUNK_BYTES as u64 * CHUNKS_PER_SEGMENT as u64;
/// Pages of a metadata row: 256 pages = 1 MiB of data, about 1.1 KiB of bitmaps and checksums.
pub const PAGES_PER_ROW: u32 = 256;
/// Metadata rows of one chunk version.
pub const ROWS_PER_CHUNK: u32 = PAGES_PER_CHUNK / PAGES_PER_ROW;

/// Largest volume: 64 TiB keeps a [`crate::id::ChunkIndex`] below 2^22 and a full layout below 4 M entries.
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;
/// Smallest volume: 1 MiB, so that test images fit.
pub const VOLUME_BYTES_MIN: u64 = 1 << 20;

/// Payload bytes of one data request: 1 MiB. The SDK splits larger IO; a bigger frame would hold up small ones.
pub const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Bytes that one WriteZeroes or Discard request may cover: a chunk.
pub const ZERO_BYTES_MAX: u32 = CHUNK_BYTES;
/// Body bytes of one frame: one request payload plus 64 KiB for headers, or a batch of Raft entries of that size.
pub const FRAME_BODY_BYTES_MAX: u32 = 8 << 20;
/// Bytes of one IO given to the SDK: 64 MiB. Larger ones are refused, not split without bound.
pub const IO_BYTES_MAX: u32 = 64 << 20;
/// Longest ancestry of a layer. Clones beyond this depth are refused: flatten one of the volumes below.
pub const ANCESTRY_DEPTH_MAX: usize = 64;

/// Bytes of one name in a path.
pub const NAME_BYTES_MAX: usize = 255;
/// Bytes of a whole path.
pub const PATH_BYTES_MAX: usize = 4096;
/// Depth of a path.
pub const PATH_DEPTH_MAX: usize = 32;
/// Bytes of an owner.
pub const OWNER_BYTES_MAX: usize = 255;

/// Replicas of a copyset.
pub const REPLICAS_DEFAULT: u32 = 3;
/// Copyset replicas on one chunkserver that placement may not exceed (ARCHITECTURE section 3).
pub const COPYSETS_PER_CHUNKSERVER_MAX: u32 = 50;

/// Requests in flight of one SDK session; more wait in the SDK.
pub const INFLIGHT_REQUESTS_MAX: usize = 1024;
/// Payload bytes in flight of one SDK session; more wait in the SDK.
pub const INFLIGHT_BYTES_MAX: usize = 64 << 20;
/// Requests of one connection that a chunkserver holds unanswered; more stay in the socket.
pub const CONNECTION_REQUESTS_MAX: usize = 2048;

/// One attempt of a data request; then the SDK asks again, maybe elsewhere.
pub const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(1500);
/// First pause of a retry.
pub const RETRY_BACKOFF_MIN: Duration = Duration::from_millis(5);
/// Longest pause between retries.
pub const RETRY_BACKOFF_MAX: Duration = Duration::from_millis(500);

/// A chunkserver reports to the MDS this often.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
/// A chunkserver that was silent this long is shown as down.
pub const HEARTBEAT_DOWN_AFTER: Duration = Duration::from_secs(5);
/// The MDS waits this long for an attached client to hold its writes, then bypasses it.
pub const HOLD_TIMEOUT: Duration = Duration::from_secs(2);
/// A client that was told to hold and did not acknowledge lets go by itself after this time, so a dead MDS cannot stop
/// it: without the acknowledgement the snapshot is sealed. An acknowledged hold is ended by the MDS only; after this
/// time the client asks another node.
pub const HOLD_RELEASE_AFTER: Duration = Duration::from_secs(5);

/// Volumes of which one group snapshot may be taken: all their clients hold while the slowest of them drains.
pub const SNAPSHOT_GROUP_VOLUMES_MAX: usize = 64;

/// IOs a second that a volume may be limited to: more than any client does.
pub const QOS_IOPS_MAX: u64 = 100_000_000;
/// Fewest bytes a second that a volume may be limited to: 64 KiB, so that a request of 4 MiB takes a minute and not days.
pub const QOS_BYTES_PER_SECOND_MIN: u64 = 64 << 10;
/// Most bytes a second that a volume may be limited to: 1 TiB, more than any client does.
pub const QOS_BYTES_PER_SECOND_MAX: u64 = 1 << 40;
/// Seconds that a burst may last: an hour.
pub const QOS_BURST_SECONDS_MAX: u32 = 3600;

const _: () = assert!(CHUNK_BYTES.is_multiple_of(PAGE_BYTES));
const _: () = assert!(PAGE_BYTES.is_multiple_of(SECTOR_BYTES));
const _: () = assert!(PAGES_PER_CHUNK.is_multiple_of(PAGES_PER_ROW));
const _: () = assert!(REQUEST_BYTES_MAX <= CHUNK_BYTES);
const _: () = assert!(FRAME_BODY_BYTES_MAX >= 4 * REQUEST_BYTES_MAX);
const _: () = assert!(IO_BYTES_MAX as usize <= INFLIGHT_BYTES_MAX);
const _: () = assert!(VOLUME_BYTES_MAX / (CHUNK_BYTES as u64) <= u32::MAX as u64);
const _: () = assert!(HOLD_TIMEOUT.as_millis() < HOLD_RELEASE_AFTER.as_millis());

/// Virtqueues of one vhost-user-blk device: the back end assigns queues to threads by a 64-bit mask.
pub const VHOST_QUEUES_MAX: u16 = 64;
/// Entries of one virtqueue: the longest ring QEMU builds (VIRTQUEUE_MAX_SIZE).
pub const VHOST_QUEUE_SIZE_MAX: u16 = 1024;
/// Regions of guest memory that a front end may share with a vhost-user-blk daemon; QEMU asks for at most 509 (vhost in
/// the kernel had that limit).
pub const VHOST_MEMORY_REGIONS_MAX: usize = 509;
/// Bytes of the dirty log that a front end shares for a live migration: a bit for each 4 KiB up to guest-physical address 32 TiB.
pub const VHOST_LOG_BYTES_MAX: u64 = 1 << 30;
/// Descriptors of one request; a longer chain is refused (virtio 1.2, 2.7.5: not longer than the queue).
pub const VHOST_CHAIN_DESCRIPTORS_MAX: usize = VHOST_QUEUE_SIZE_MAX as usize;
/// Payload bytes in flight of one virtqueue before further requests wait in the ring; one request may exceed it.
pub const VHOST_QUEUE_BYTES_MAX: usize = 64 << 20;
/// Ranges of one discard or write-zeroes request.
pub const VHOST_ZERO_RANGES_MAX: u32 = 16;
/// Sectors of one range of a discard or write-zeroes request: 1 GiB.
pub const VHOST_ZERO_SECTORS_MAX: u32 = (1 << 30) / SECTOR_BYTES;
/// A stopping vhost-user-blk daemon waits this long for requests in flight, then leaves them unanswered.
pub const VHOST_STOP_DRAIN: Duration = Duration::from_secs(5);
/// A running vhost-user-blk daemon waits this long for the one that is to take over to have made everything ready. The guest runs meanwhile.
pub const VHOST_UPGRADE_PREPARE: Duration = Duration::from_secs(60);
/// At a hand-over, a step that takes well under a millisecond (a message answered, a turn of a loop ended) is given up after this.
pub const VHOST_UPGRADE_STEP: Duration = Duration::from_millis(100);
/// At a hand-over, requests in flight are waited for this long; what is not answered then is run again by the new daemon.
/// Longer than a write takes on a healthy cluster, and a fifth of the pause that is allowed.
pub const VHOST_UPGRADE_DRAIN: Duration = Duration::from_millis(10);
/// The same where the front end keeps no in-flight memory, so that the new daemon could not run them again.
pub const VHOST_UPGRADE_DRAIN_UNRECORDED: Duration = Duration::from_millis(500);
/// With its rings stopped, the old daemon waits this long for the new one to accept them, then goes on.
pub const VHOST_UPGRADE_ACCEPT: Duration = Duration::from_secs(1);
/// A new daemon opens connections this long before it takes over without those that are missing.
pub const VHOST_UPGRADE_WARM_UP: Duration = Duration::from_secs(5);

/// Volumes of one `ogee vhost-blk serve`: each has a socket, and while a front end is connected a thread for each queue.
pub const VHOST_VOLUMES_MAX: usize = 1024;
/// Attaches of one `ogee vhost-blk serve` under way at once; more wait, so that a start with many volumes does not flood the MDS.
pub const VHOST_ATTACHES_PARALLEL: usize = 16;
/// A volume that could not be attached at the start, or whose server ended, is tried again after this pause.
pub const VHOST_REATTACH_PAUSE: Duration = Duration::from_secs(1);
/// Bytes of one request line on a control socket, without its end; far above a path of 107 bytes and a volume's name.
pub const VHOST_CONTROL_LINE_BYTES_MAX: usize = 64 << 10;
/// Bytes of one reply line: the figures of [`VHOST_VOLUMES_MAX`] volumes, five kinds of IO with a histogram each.
pub const VHOST_CONTROL_REPLY_BYTES_MAX: usize = 16 << 20;
/// Connections of a control socket at the same time; more are told so and closed.
pub const VHOST_CONTROL_CONNECTIONS_MAX: usize = 32;
/// A control connection that sends no whole line for so long, or takes no reply, is closed.
pub const VHOST_CONTROL_IDLE: Duration = Duration::from_secs(30);
/// A command waits so long for the answer on a control socket: an attach or detach while the MDS has no leader is the longest.
pub const VHOST_CONTROL_REPLY_LIMIT: Duration = Duration::from_secs(60);
/// Bytes of the file in which `ogee vhost-blk serve` keeps what is attached.
pub const VHOST_STATE_BYTES_MAX: usize = 8 << 20;
/// Pause after a failed accept (no descriptors left) on a control socket.
pub const VHOST_CONTROL_ACCEPT_PAUSE: Duration = Duration::from_millis(100);

// A name of 4,351 bytes, a path of 107 that is escaped, options.
const _: () = assert!(VHOST_VOLUMES_MAX * 8192 <= VHOST_STATE_BYTES_MAX);
const _: () = assert!(VHOST_VOLUMES_MAX * 16_384 <= VHOST_CONTROL_REPLY_BYTES_MAX);
const _: () = assert!(VHOST_QUEUE_BYTES_MAX >= IO_BYTES_MAX as usize);
const _: () = assert!(VHOST_UPGRADE_WARM_UP.as_millis() < VHOST_UPGRADE_PREPARE.as_millis());

/// Exports of one NBD server: each costs a handle per thread, and all are named in one answer to LIST.
pub const NBD_EXPORTS_MAX: usize = 64;
/// Bytes of an NBD string: export names, contexts, messages (proto.md, "Conventions").
pub const NBD_STRING_BYTES_MAX: usize = 4096;
/// Bytes of one option of an NBD handshake: a name and more queries than there are contexts. A longer one ends the connection.
pub const NBD_OPTION_BYTES_MAX: u32 = 64 << 10;
/// Options of one NBD handshake; clients need about ten.
pub const NBD_OPTIONS_MAX: u32 = 1024;
/// An NBD handshake must be over within this time, so that a silent client does not hold a connection.
pub const NBD_HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);
/// Payload bytes of one NBD request or of the data of one reply: what proto.md, "Size constraints", wants at least (32 MiB).
pub const NBD_PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Requests of one NBD connection that are not answered; more stay in the socket. Above the kernel's 128 tags, so that
/// no request of a well-behaved client waits in the socket.
pub const NBD_CONNECTION_REQUESTS_MAX: usize = 256;
/// Payload bytes of one NBD connection in requests and unsent replies before further requests stay in the socket.
pub const NBD_CONNECTION_BYTES_MAX: usize = 64 << 20;
/// Bytes that one read from an NBD connection asks for at least, unless a payload needs more.
pub const NBD_READ_BYTES: usize = 64 << 10;
/// Bytes that one read from an NBD connection asks for at most while its writes are large, so that few payloads lie across two buffers and are
/// copied. A buffer stays as long as one payload of it is in use: with [`NBD_CONNECTION_REQUESTS_MAX`] this bounds what a connection holds.
pub const NBD_READ_BYTES_MAX: usize = 512 << 10;
/// What the kernel may hold of replies on a UNIX socket, so that a large one goes with one call. The kernel's default holds one of 128 KiB.
pub const NBD_UNIX_SEND_BYTES: usize = 2 << 20;
/// Connections of one NBD server unless configured.
pub const NBD_CONNECTIONS_DEFAULT: usize = 64;
/// Connections of one NBD server: with [`NBD_CONNECTION_BYTES_MAX`] this bounds its memory.
pub const NBD_CONNECTIONS_MAX: usize = 1024;
/// Threads of one NBD server.
pub const NBD_THREADS_MAX: usize = 64;
/// Bytes that one NBD cache request reads; the rest of its range is not read ahead.
pub const NBD_CACHE_BYTES_MAX: u64 = 32 << 20;
/// Contexts for changes of one NBD export: a set of contexts is a word.
pub const NBD_CHANGED_CONTEXTS_MAX: usize = 63;
/// Extents that one NBD reply tells in one context: 32 KiB with extended headers.
pub const NBD_EXTENTS_MAX: usize = 2048;
/// Times that a device is asked on for one NBD block status while all of it is of one kind.
pub const NBD_STATUS_QUESTIONS_MAX: usize = 16;
/// Writes of real zeros that one NBD request with NO_HOLE has under way; each is [`REQUEST_BYTES_MAX`].
pub const NBD_ZERO_WRITES_PARALLEL: usize = 8;
/// A stopping NBD server waits this long for requests in flight, then leaves them unanswered.
pub const NBD_STOP_DRAIN: Duration = Duration::from_secs(10);
/// After its last reply a stopping NBD server waits this long for the client to close, so that the reply is not lost.
pub const NBD_LINGER: Duration = Duration::from_secs(1);
/// A TCP connection of an NBD client that was silent this long is probed, so that a dead machine does not hold it.
pub const NBD_KEEPALIVE: Duration = Duration::from_secs(60);
/// Time between two probes; after nine (the kernel's default) the connection ends.
pub const NBD_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// Pause after a failed accept (no descriptors left) of an NBD server.
pub const NBD_ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const _: () = assert!(NBD_PAYLOAD_BYTES_MAX <= IO_BYTES_MAX);
const _: () = assert!(NBD_CONNECTION_BYTES_MAX >= 2 * NBD_PAYLOAD_BYTES_MAX as usize);
const _: () = assert!(NBD_OPTION_BYTES_MAX as usize >= 4 * NBD_STRING_BYTES_MAX);

/// Bytes of one Raft command: a write of [`REQUEST_BYTES_MAX`] with its head, or a metadata batch of 4 MiB.
pub const RAFT_COMMAND_BYTES_MAX: usize = 4 << 20;
/// Entry payload bytes of one AppendEntries frame; 512 KiB of the frame remain for headers.
pub const RAFT_APPEND_BYTES_MAX: usize = FRAME_BODY_BYTES_MAX as usize - (512 << 10);
/// Entries of one AppendEntries frame: their headers (16 B each) stay below 128 KiB.
pub const RAFT_APPEND_ENTRIES_MAX: usize = 8192;
/// AppendEntries frames under way to one follower of one group; more wait in the log.
pub const RAFT_PIPELINE_FRAMES_MAX: usize = 16;
/// Entry payload bytes under way to one follower of one group before further frames wait; one frame may exceed it.
pub const RAFT_PIPELINE_BYTES_MAX: usize = 16 << 20;
/// Proposals of one group that are not yet applied; more are refused as overloaded.
pub const RAFT_PROPOSALS_MAX: usize = 4096;
/// Command bytes of one group that are not yet applied; more are refused as overloaded.
pub const RAFT_PROPOSAL_BYTES_MAX: usize = 64 << 20;
/// Entries given to a state machine at once.
pub const RAFT_APPLY_ENTRIES_MAX: usize = 256;
/// Bytes of one request that a replica sends while it installs a Raft snapshot.
pub const RAFT_FETCH_REQUEST_BYTES_MAX: usize = 64 << 10;
/// One part of a Raft snapshot (a few MiB at most) must arrive within this time. A sender that hangs holds up the replica, and with a second
/// one lost the copyset, for as long.
pub const RAFT_FETCH_TIMEOUT: Duration = Duration::from_secs(5);
/// First pause before a lost Raft connection is made again.
pub const RAFT_RECONNECT_MIN: Duration = Duration::from_millis(20);
/// Longest pause between two attempts to make a Raft connection.
pub const RAFT_RECONNECT_MAX: Duration = Duration::from_millis(500);
/// A Raft connection on which something was asked and nothing was answered for this long is replaced.
pub const RAFT_LINK_STALL: Duration = Duration::from_secs(3);

const _: () = assert!(RAFT_COMMAND_BYTES_MAX <= RAFT_APPEND_BYTES_MAX);
const _: () = assert!(RAFT_APPEND_ENTRIES_MAX * 16 <= 128 << 10);
const _: () = assert!(RAFT_COMMAND_BYTES_MAX <= RAFT_PROPOSAL_BYTES_MAX);

/// One attempt of a call to the MDS; then the SDK asks another node.
pub const MDS_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
/// One attempt of a call that may hold an attached client or build a pool.
pub const MDS_SLOW_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(8);
/// A call to the MDS with all its attempts.
pub const MDS_CALL_TIMEOUT: Duration = Duration::from_secs(15);
/// Addresses of MDS nodes that a client remembers, redirects included.
pub const MDS_NODES_MAX: usize = 16;
/// A chunkserver that is asked who leads a copyset is waited for this long.
pub const STATUS_TIMEOUT: Duration = Duration::from_millis(500);
/// Segments asked for in one GetLayout call: 64 GiB of a volume, an answer of about 20 KiB.
pub const LAYOUT_PREFETCH_SEGMENTS: u32 = 64;
/// A read-only client of a live volume believes for this long that a segment has no placement.
pub const LIVE_LAYOUT_TTL: Duration = Duration::from_secs(1);
/// Segments without a placement of which one call of the SDK says that they are holes: 4 TiB, at most 64 questions to the MDS.
pub const EXTENT_SEGMENTS_MAX: usize = 4096;
/// Chunks that one call of the SDK says the extents of: 1 GiB, 64 questions to chunkservers. The last eight of them may have an
/// extent for each of their pages, so an answer has at most 32,769.
pub const EXTENT_CHUNKS_MAX: usize = 64;
/// Questions of them that are under way at once.
pub const EXTENT_CHUNKS_PARALLEL: usize = 8;
/// Chunks that one discard or write-zeroes of the SDK works on at once.
pub const ZERO_SPANS_PARALLEL: usize = 32;
/// Times that a request is sent again because data and checksums did not match, before it fails.
pub const CORRUPT_RETRIES_MAX: u32 = 4;

const _: () = assert!(MDS_SLOW_ATTEMPT_TIMEOUT.as_millis() > HOLD_TIMEOUT.as_millis());
const _: () = assert!(MDS_CALL_TIMEOUT.as_millis() > MDS_SLOW_ATTEMPT_TIMEOUT.as_millis());

/// Metadata rows of chunk versions kept clean in memory per chunkserver: about 80 MiB, they describe 64 GiB of data.
pub const ROW_CACHE_ROWS: usize = 65_536;
/// Changed metadata rows that one chunkserver holds before its copysets checkpoint by themselves (about 160 MiB).
pub const DIRTY_ROWS_MAX: usize = 131_072;
/// Data files with unflushed writes of one chunkserver before its copysets checkpoint by themselves; each is open.
pub const DIRTY_FILES_MAX: usize = 16_384;
/// Clean data files that one chunkserver keeps open.
pub const OPEN_DATA_FILES_MAX: usize = 4_096;
/// Bytes written to data files of a copyset before their write-back is started: few enough that a checkpoint is short.
pub const WRITEBACK_BYTES: u64 = 8 << 20;
/// Times [`WRITEBACK_BYTES`] that a copyset may write while its last write-back is still being handed to the device; then
/// the next entry waits. This caps the dirty bytes of data files.
pub const WRITEBACK_LAG_MAX: u64 = 8;
/// Free bytes below which a chunkserver takes no write that would allocate: room for logs, checkpoints and entries that
/// were already proposed (1 GiB).
pub const SPACE_RESERVE_BYTES: u64 = 1 << 30;
/// Log entries by which a copyset's recovery horizon runs ahead of its checkpoint; one more flush per so many entries.
pub const HORIZON_ENTRIES: u64 = 16_384;
/// Bytes of one answer to a replica that installs a Raft snapshot (4 MiB): three to four full metadata rows.
pub const FETCH_BYTES_MAX: usize = 4 << 20;
/// Bytes per second that all rebuilds of a chunkserver fetch from others, unless configured otherwise.
pub const INSTALL_BYTES_PER_SECOND: u64 = 128 << 20;
/// Pause before a write of a committed entry that met a full disk is tried again.
pub const NO_SPACE_PAUSE: Duration = Duration::from_millis(500);
/// A read waits this long for a write to the same pages that cannot finish, then is answered "not ready".
pub const BUSY_READ_WAIT: Duration = Duration::from_secs(1);
/// Rows that one read of a client may have repaired from other replicas before it is answered "corrupt".
pub const READ_REPAIRS_MAX: usize = 16;
/// Times that a repair asks every other replica.
pub const READ_REPAIR_ROUNDS: usize = 5;
/// Pause between them: a follower learns of a commit with the next entries, or with a heartbeat.
pub const READ_REPAIR_PAUSE: Duration = Duration::from_millis(50);
/// Rows whose digests travel in one answer.
pub const COMPARE_ROWS_MAX: usize = 512;
/// Rows of a copyset that wait to be mended; what is found beyond is left to readers and the scrub.
pub const FOUND_ROWS_MAX: usize = 1024;
/// Of these, those that are tried before the next copyset's turn: another replica that hangs costs seconds for each.
pub const MEND_ROWS: usize = 4;
/// Times that a column is fetched anew because a version of it went during the fetch, before the install fails.
pub const COLUMN_FETCH_ATTEMPTS: usize = 8;

const _: () = assert!(FETCH_BYTES_MAX >= 2 * (PAGES_PER_ROW * PAGE_BYTES) as usize);
const _: () = assert!(FETCH_BYTES_MAX < FRAME_BODY_BYTES_MAX as usize);

/// Bytes of one segment of the write-ahead log (32 MiB): written once when created, overwritten ever after.
pub const WAL_SEGMENT_BYTES: u64 = 32 << 20;
/// Payload bytes of one log entry. Above the largest command of a copyset (1 MiB and its head) and of the MDS.
pub const WAL_ENTRY_BYTES_MAX: usize = 4 << 20;
/// Record bytes after which a batch of the log takes no more; one flush of this size is about 10 ms.
pub const WAL_BATCH_BYTES_MAX: usize = 4 << 20;
/// Payload bytes that wait for the log's writer; above it appends wait.
pub const WAL_QUEUE_BYTES_MAX: usize = 64 << 20;
/// Payload bytes of recent entries that the log keeps in memory for replication and apply.
pub const WAL_CACHE_BYTES: usize = 64 << 20;
/// Payload bytes that one read of the log returns at most (and at least one entry).
pub const WAL_READ_BYTES_MAX: usize = 4 << 20;
/// Raft groups of one log: their states head every segment, 104 bytes each.
pub const WAL_GROUPS_MAX: usize = 4096;
/// Freed segments that are kept for reuse; more are deleted.
pub const WAL_SPARE_SEGMENTS: usize = 16;
/// A log that found the disk full looks again after this time.
pub const WAL_NO_SPACE_RETRY: Duration = Duration::from_millis(500);
/// A log that was idle this long marks its end.
pub const WAL_MARK_AFTER: Duration = Duration::from_millis(200);

const _: () = assert!(RAFT_COMMAND_BYTES_MAX <= WAL_ENTRY_BYTES_MAX);
const _: () = assert!(WAL_SEGMENT_BYTES >= 2 * (WAL_ENTRY_BYTES_MAX + WAL_GROUPS_MAX * 104 + 8192) as u64);

/// Smallest block of a backup repository: smaller ones cost more requests than they save bytes.
pub const BACKUP_BLOCK_BYTES_MIN: u32 = 256 << 10;
/// Largest block of a backup repository: one read of a volume.
pub const BACKUP_BLOCK_BYTES_MAX: u32 = 1 << 20;
/// Blocks listed in one leaf of a backup's index: 40 KiB for 256 MiB of blocks of 256 KiB.
pub const BACKUP_LEAF_BLOCKS: usize = 1024;
/// Bytes of an index's content: a volume of 64 TiB has 262,144 leaves of 90 bytes of text.
pub const BACKUP_INDEX_BYTES_MAX: usize = 32 << 20;
/// Bytes of a run's record or of a repository's description.
pub const BACKUP_RECORD_BYTES_MAX: usize = 64 << 10;
/// Bytes that an object may be longer than its content: header, salt, tag.
pub const BACKUP_OBJECT_OVERHEAD: usize = 64;
/// Blocks of one backup or restore that are read, packed or stored at once: with its copies below 64 MiB.
pub const BACKUP_BLOCKS_PARALLEL: usize = 16;
/// Blocks of other backups that a backup knows, to refer to them instead of storing them again: about 200 MiB.
pub const BACKUP_KNOWN_BLOCKS_MAX: usize = 2 << 20;
/// Other backups that one backup refers to.
pub const BACKUP_BASES_MAX: usize = 64;
/// Runs that died and whose blocks one backup takes over.
pub const BACKUP_ADOPTED_MAX: usize = 16;
/// A run says this often that it lives.
pub const BACKUP_RUN_REFRESH: Duration = Duration::from_secs(30);
/// Objects that garbage collection deletes at once.
pub const BACKUP_DELETES_PARALLEL: usize = 16;
/// One attempt of a request to S3; then it is tried again.
pub const S3_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);
/// A request to S3 with all its attempts.
pub const S3_CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// Attempts of a request to S3.
pub const S3_ATTEMPTS: u32 = 6;

const _: () = assert!(BACKUP_BLOCK_BYTES_MAX <= REQUEST_BYTES_MAX);
const _: () = assert!(BACKUP_LEAF_BLOCKS * 40 <= BACKUP_BLOCK_BYTES_MIN as usize);

/// Content of backups that an open volume which stands on one keeps in memory: what a boot reads again within seconds.
pub const LAZY_CACHE_BYTES: usize = 64 << 20;
/// Blocks that wait to be pasted by an open volume; more are left to the hydrator.
pub const LAZY_OFFERS_MAX: usize = 256;
/// Blocks of which an open volume knows that it has offered them; then it forgets them all, and may paste some twice.
pub const LAZY_OFFERS_REMEMBERED: usize = 65_536;
/// Blocks that an open volume pastes at once, beside the IO of its guest.
pub const LAZY_PASTES_PARALLEL: usize = 4;
/// A block that was offered must be pasted within this time.
pub const LAZY_PASTE_TIMEOUT: Duration = Duration::from_secs(30);
/// First pause before a backup that was not read is asked again, while IO waits.
pub const LAZY_RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest such pause: a repository that is back is noticed within it.
pub const LAZY_RETRY_MAX: Duration = Duration::from_secs(3);
/// While a backup is not read, the MDS is asked this often whether the volume still stands on it.
pub const LAZY_ASK_EVERY: Duration = Duration::from_secs(2);
/// An answer to that is waited for this long before the backup is tried again.
pub const LAZY_ASK_TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes of a boot profile: text of 65,536 runs of pages.
pub const BACKUP_PROFILE_BYTES_MAX: usize = 2 << 20;
/// Pages that are recorded for a boot profile: 256 MiB, more than an image needs to its prompt.
pub const BOOT_PROFILE_RECORD_BYTES: u64 = 256 << 20;
/// Blocks that a hydrator reads and pastes at once.
pub const HYDRATE_BLOCKS_PARALLEL: usize = 8;
/// A lazy restore waits this long for a removal of its backup that is under way: for as long as a remover waits for its cluster's word, and some more.
pub const REMOVAL_WAIT: Duration = Duration::from_secs(20);
/// How often it looks meanwhile.
pub const REMOVAL_ASK_EVERY: Duration = Duration::from_millis(500);
/// Leaves of a backup that an open volume keeps in memory: 40 KiB each, for 256 MiB of blocks of 256 KiB.
pub const LAZY_LEAVES_MAX: usize = 256;

const _: () = assert!(LAZY_CACHE_BYTES >= 16 * BACKUP_BLOCK_BYTES_MAX as usize);
const _: () = assert!(BACKUP_BLOCK_BYTES_MAX <= PAGES_PER_ROW * PAGE_BYTES);

/// Service tasks that have not ended; more are refused. A taker looks at all of them.
pub const SERVICE_TASKS_OPEN_MAX: usize = 1024;
/// Service tasks that have ended and are still shown, and whose keys are still known; the oldest are forgotten.
pub const SERVICE_TASKS_KEPT_MAX: usize = 1024;
/// Bytes of the arguments, the note or the result of a service task: a few names and numbers as JSON.
pub const SERVICE_TASK_TEXT_BYTES_MAX: usize = 4096;
/// Service tasks of one page of a listing: three texts each, so that an answer stays below gRPC's 4 MiB.
pub const SERVICE_TASKS_LISTED_MAX: usize = 256;
/// Kinds, and repositories, that one taker of service tasks knows.
pub const SERVICE_TASK_CHOICES_MAX: usize = 64;
/// An owner of a service task says this often that it is at it.
pub const SERVICE_TASK_RENEW: Duration = Duration::from_secs(1);
/// An owner that heard nothing of the MDS for this long stops by itself, before another may take the task.
pub const SERVICE_TASK_GIVE_UP: Duration = Duration::from_secs(5);
/// A service task whose owner was silent for this long may be taken by another. With a look of takers every second it is gone on with within 10 s.
pub const SERVICE_TASK_LEASE: Duration = Duration::from_secs(6);
/// Schedules of service tasks: the leader looks at all of them every second.
pub const SCHEDULES_MAX: usize = 1024;
/// Shortest time between two tasks of a schedule.
pub const SCHEDULE_EVERY_MIN: Duration = Duration::from_secs(10);
/// Longest time between two tasks of a schedule: a year.
pub const SCHEDULE_EVERY_MAX: Duration = Duration::from_secs(366 * 86_400);
/// Times that a service task is taken: one that kills whoever does it ends as failed.
pub const SERVICE_TASK_TAKES_MAX: u64 = 30;
/// Times that an owner tries what failed for a while only (a repository or a cluster that does not answer), before the task ends as failed.
pub const SERVICE_TASK_ATTEMPTS: u32 = 5;
/// Pause before it tries again.
pub const SERVICE_TASK_RETRY_PAUSE: Duration = Duration::from_secs(3);
/// Tasks that one snapclone does at once, at most: each has 16 blocks in memory.
pub const SNAPCLONE_TASKS_MAX: usize = 64;

/// Bytes of the body of a request to snapclone's API: a few names and numbers as JSON.
pub const API_BODY_BYTES_MAX: usize = 64 << 10;
/// Bytes of the head of a request to snapclone's API: a path of `PATH_BYTES_MAX` bytes, percent-encoded, and a token.
pub const API_HEAD_BYTES_MAX: usize = 32 << 10;
/// Connections that one listener of snapclone's API serves at once; more wait in the kernel's queue.
pub const API_CONNECTIONS_MAX: usize = 256;
/// A client of the API has sent the head of its request by then.
pub const API_HEAD_TIMEOUT: Duration = Duration::from_secs(15);
/// A request to the API is answered by then. Longer than a call of the MDS with all its attempts.
pub const API_REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// Requests that are under way when a snapclone ends are waited for this long.
pub const API_SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);
/// Entries of one page of the API.
pub const API_PAGE_MAX: usize = 256;
/// Entries of one page of the API unless asked otherwise.
pub const API_PAGE_DEFAULT: usize = 64;
/// Tokens that a tokens file of the API may have.
pub const API_TOKENS_MAX: usize = 256;
/// Volumes whose paths an instance remembers for Curve's identities.
pub const CURVE_PATHS_MAX: usize = 4096;

const _: () = assert!(API_REQUEST_TIMEOUT.as_millis() > MDS_CALL_TIMEOUT.as_millis());
const _: () = assert!(API_PAGE_DEFAULT <= API_PAGE_MAX && API_PAGE_MAX <= SERVICE_TASKS_LISTED_MAX);
const _: () = assert!(SERVICE_TASK_RENEW.as_millis() * 3 <= SERVICE_TASK_GIVE_UP.as_millis());
const _: () = assert!(SERVICE_TASK_GIVE_UP.as_millis() < SERVICE_TASK_LEASE.as_millis());
const _: () = assert!(SERVICE_TASKS_LISTED_MAX * (3 * SERVICE_TASK_TEXT_BYTES_MAX + 1024) < 4 << 20);
