//! Opening the log: finds the segments, verifies them and rebuilds the state. Blocks; runs once, before the writer.
//!
//! There is one write in flight at a time, so whatever was acknowledged lies in front of the first batch that is not
//! whole. The rules, and nothing is ever guessed:
//! - segment files are numbered without a gap, and batches without a gap over all of them;
//! - a segment that has a successor must be whole up to the number the successor's head continues from (behind that lie
//!   torn batches of a crash that was recovered before);
//! - in the last segment everything behind the first batch that is not whole is a torn tail, but a whole batch of this
//!   segment further on means that the log was damaged, and it is refused;
//! - a mark (a batch without records that is not the first of its segment) ends what is read, and is not counted: it was not flushed, so a
//!   power cut may take it after a successor was begun. The successor's head has its sequence;
//! - a group whose live entries are not contiguous is refused.
//!
//! After recovery nothing is written into a segment that was written before, so torn bytes are never reinterpreted.

use super::core::Core;
use super::error::{WalError, WalErrorKind};
use super::format::{BATCH_HEADER, BATCH_MAGIC, Batch, BatchFault, decode_batch};
use super::group::Location;
use super::segments::{IDENTITY_NAME, Identity, TEMP_NAME, segment_name, segment_number};
use ogee_disk::{ALIGN, DataDir, LogFile};
use std::sync::Arc;

/// What recovery found, besides the state in the [`Core`].
pub(super) struct Recovered {
    pub(super) core: Core,
    pub(super) identity: Identity,
    /// Number of the next segment to be written.
    pub(super) next_number: u64,
    /// A file of that number which holds nothing of value.
    pub(super) empty: Option<Arc<LogFile>>,
}

struct Found {
    number: u64,
    file: Arc<LogFile>,
    /// Sequence of the first batch; `None` when there is no whole first batch.
    head: Option<u64>,
}

fn corrupt(op: &'static str, segment: u64, offset: u64) -> WalError {
    WalError::at(WalErrorKind::Corrupt, op, segment, offset)
}

fn disk(e: ogee_disk::DiskError) -> WalError {
    WalError::disk("open log", e)
}

/// Opens or creates the log in `sub` of the data directory.
pub(super) fn recover(dir: &DataDir, sub: &str, new_core: impl Fn(u64) -> Core) -> Result<Recovered, WalError> {
    dir.create_dir(sub).map_err(disk)?;
    let path = |name: &str| format!("{sub}/{name}");
    dir.unlink(&path(TEMP_NAME)).map_err(disk)?;
    let names = dir.list(sub).map_err(disk)?;
    let mut numbers: Vec<u64> = names.iter().filter_map(|n| segment_number(n)).collect();
    numbers.sort_unstable();
    let identity = match Identity::read(dir, &path(IDENTITY_NAME))? {
        Some(identity) => identity,
        None if numbers.is_empty() => Identity::create(dir, &path(IDENTITY_NAME))?,
        None => return Err(corrupt("open log without identity", numbers[0], 0)),
    };
    let mut found = vec![];
    for number in numbers {
        let file = Arc::new(LogFile::open(dir, &path(&segment_name(number))).map_err(disk)?);
        let head = head_of(&file, identity.log, number)?;
        found.push(Found { number, file, head });
    }
    check_order(&found, identity)?;
    let mut core = new_core(identity.log);
    let used = found.iter().take_while(|f| f.head.is_some()).count();
    let empties = found.split_off(used);
    for spare in empties.iter().skip(1).rev() {
        dir.unlink(&path(&segment_name(spare.number))).map_err(disk)?;
    }
    for (i, segment) in found.iter().enumerate() {
        let next_head = found.get(i + 1).and_then(|f| f.head);
        replay(&mut core, identity.log, segment, next_head)?;
    }
    let next_number = found.last().map_or(1, |f| f.number + 1);
    for f in found {
        core.segments.push_back(super::core::Segment { number: f.number, file: f.file, live: 0 });
    }
    core.recovered().map_err(|group| {
        tracing::error!(target: "controlpath", group, "log has a hole");
        corrupt("recover group", 0, 0)
    })?;
    Ok(Recovered { core, identity, next_number, empty: empties.into_iter().next().map(|f| f.file) })
}

/// Segments without a head may only be the last ones, which a crash left prepared or with a torn first batch.
fn check_order(found: &[Found], identity: Identity) -> Result<(), WalError> {
    for pair in found.windows(2) {
        if pair[1].number != pair[0].number + 1 {
            return Err(corrupt("find segment", pair[0].number + 1, 0));
        }
        if pair[0].head.is_none() && pair[1].head.is_some() {
            return Err(corrupt("read head of segment", pair[0].number, 0));
        }
    }
    if identity.used && found.iter().all(|f| f.head.is_none()) {
        return Err(corrupt("find first segment", 0, 0));
    }
    Ok(())
}

/// Bytes of a file that direct reads reach.
fn whole_bytes(file: &LogFile) -> usize {
    usize::try_from(file.bytes()).unwrap_or(usize::MAX) / ALIGN * ALIGN
}

fn head_of(file: &LogFile, log: u64, number: u64) -> Result<Option<u64>, WalError> {
    if whole_bytes(file) == 0 {
        return Ok(None);
    }
    let first = file.read(0, ALIGN).map_err(disk)?;
    let body = u32::from_le_bytes(first[32..36].try_into().expect("four bytes"));
    let bytes = (u64::from(body) + BATCH_HEADER as u64).next_multiple_of(ALIGN as u64).min(file.bytes());
    let whole = file.read(0, usize::try_from(bytes).unwrap_or(ALIGN).min(whole_bytes(file))).map_err(disk)?;
    match decode_batch(&whole, log, number) {
        Ok(batch) => Ok(Some(batch.sequence)),
        Err(BatchFault::Unsupported) => Err(WalError::at(WalErrorKind::Unsupported, "read segment", number, 0)),
        Err(BatchFault::Invalid) => {
            // Nothing was acknowledged from a segment whose first batch is not whole; a whole one behind it says else.
            let all = file.read(0, whole_bytes(file)).map_err(disk)?;
            refuse_later_batches(&all, ALIGN, log, number, 0)?;
            Ok(None)
        }
    }
}

/// Replays one segment up to the batch its successor continues from, or up to its torn tail.
fn replay(core: &mut Core, log: u64, segment: &Found, next_head: Option<u64>) -> Result<(), WalError> {
    let number = segment.number;
    let bytes = segment.file.read(0, whole_bytes(&segment.file)).map_err(disk)?;
    let mut at = 0usize;
    if core.sequence == 0 {
        core.sequence = segment.head.unwrap_or(1).saturating_sub(1);
    }
    loop {
        if next_head == Some(core.sequence + 1) {
            return Ok(());
        }
        let batch = match decode_batch(&bytes[at.min(bytes.len())..], log, number) {
            Ok(batch) if batch.sequence == core.sequence + 1 => batch,
            Err(BatchFault::Unsupported) => {
                return Err(WalError::at(WalErrorKind::Unsupported, "read batch", number, at as u64));
            }
            // With a successor, the batches up to its head were acknowledged.
            _ if next_head.is_some() => return Err(corrupt("read batch", number, at as u64)),
            _ => return refuse_later_batches(&bytes, at + ALIGN, log, number, core.sequence),
        };
        if batch.records.is_empty() && at > 0 {
            if next_head.is_some() {
                return Err(corrupt("read mark before a segment's end", number, at as u64));
            }
            return refuse_later_batches(&bytes, at + batch.bytes, log, number, core.sequence);
        }
        apply(core, number, at, &batch);
        core.sequence = batch.sequence;
        at += batch.bytes;
    }
}

fn apply(core: &mut Core, segment: u64, at: usize, batch: &Batch) {
    for found in &batch.records {
        let location = Location { segment, offset: (at + found.at) as u64 };
        core.replay(found.group, found.record, found.payload, location);
    }
}

/// Fails if a whole batch of this segment, newer than `sequence`, starts at `from` or behind.
fn refuse_later_batches(bytes: &[u8], from: usize, log: u64, number: u64, sequence: u64) -> Result<(), WalError> {
    let magic = BATCH_MAGIC.to_le_bytes();
    for at in (from..bytes.len()).step_by(ALIGN) {
        let rest = &bytes[at..];
        if rest.starts_with(&magic) && decode_batch(rest, log, number).is_ok_and(|b| b.sequence > sequence) {
            return Err(corrupt("read batch before a whole one", number, at as u64));
        }
    }
    Ok(())
}
