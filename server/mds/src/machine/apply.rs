//! One command: looked up among repeated requests, carried out, its answer kept.
//!
//! Invariants: applying is a function of the rows and the command only; a refused command changes no row; a repeated
//! request (same id) gets the answer of the first and does nothing, as long as it is among the last
//! [`REQUESTS_KEPT_MAX`]. Refusals are not kept: the request may be tried again.

use super::attach::WantedSegment;
use super::clones::NewClone;
use super::command::{Answer, Command, Envelope, Outcome, decode_answer, encode_answer};
use super::moves::NewMove;
use super::namespace::NewVolume;
use super::row::{Counter, RequestOrderRow, RequestRow, VolumeOptionsRow};
use super::snapshots::NewSnapshot;
use super::tx::{RowError, Tx};
use super::{
    Halt, Step, attach, backups, clones, flatten, groups, moves, namespace, options, schedules, service_tasks, snapshots, tasks, topology,
};
use ogee_common::id::PoolId;

/// Answers kept for repeated requests.
pub(crate) const REQUESTS_KEPT_MAX: u64 = 4096;

/// Carries out a command on `tx`. After a refusal `tx` holds half of the command and must be thrown away.
///
/// # Errors
/// [`RowError`] when the replica cannot go on.
pub(crate) fn apply(tx: &mut Tx<'_>, envelope: &Envelope) -> Result<Answer, RowError> {
    if let Some(request) = envelope.request
        && let Some(kept) = tx.get::<RequestRow>(&request)?
    {
        return Ok(decode_answer(&kept.reply)?);
    }
    match run(tx, &envelope.command, envelope.now_unix_ms) {
        Ok(outcome) => {
            let answer = Ok(outcome);
            if let Some(request) = envelope.request {
                keep(tx, request, &answer)?;
            }
            Ok(answer)
        }
        Err(Halt::Refused(refusal)) => Ok(Err(*refusal)),
        Err(Halt::Rows(error)) => Err(error),
    }
}

fn keep(tx: &mut Tx<'_>, request: [u8; 16], answer: &Answer) -> Result<(), RowError> {
    let order = tx.next_id(Counter::Request)?;
    tx.put(&request, &RequestRow { reply: encode_answer(answer) });
    tx.put(&order, &RequestOrderRow(request));
    if let Some(old) = order.checked_sub(REQUESTS_KEPT_MAX)
        && let Some(RequestOrderRow(request)) = tx.get(&old)?
    {
        tx.delete::<RequestOrderRow>(&old);
        tx.delete::<RequestRow>(&request);
    }
    Ok(())
}

fn run(tx: &mut Tx<'_>, command: &Command, now_unix_ms: u64) -> Step<Outcome> {
    match command {
        Command::FormCluster { cluster } => topology::form(tx, *cluster, now_unix_ms),
        Command::CreateVolume { path, size_bytes, owner, create_parents, pool } => {
            let new = empty_volume(path, *size_bytes, owner, *create_parents, now_unix_ms);
            namespace::create(tx, new, pool)
        }
        Command::CreateVolumeWith { path, size_bytes, owner, create_parents, pool, options } => {
            let (options, create_parents) = (*options, *create_parents);
            let new = NewVolume { options, ..empty_volume(path, *size_bytes, owner, create_parents, now_unix_ms) };
            namespace::create(tx, new, pool)
        }
        Command::CreateLazyVolume { path, size_bytes, owner, create_parents, pool, options, backup, placements } => {
            let (options, create_parents) = (*options, *create_parents);
            let new = NewVolume { options, ..empty_volume(path, *size_bytes, owner, create_parents, now_unix_ms) };
            backups::create(tx, new, pool, backup, placements)
        }
        Command::CompleteBackup { layer } => backups::complete(tx, *layer),
        Command::SetLimits { path, changes } => options::set_limits(tx, path, changes),
        Command::DeleteVolume { path, owner } => namespace::delete(tx, path, owner),
        Command::RenameVolume { path, new_path, create_parents } => {
            namespace::rename(tx, path, new_path, *create_parents)
        }
        Command::ExtendVolume { path, size_bytes } => namespace::extend(tx, path, *size_bytes),
        Command::CreateSnapshot { volume, name, expected, hold } => {
            let (volume, name, expected, hold) = (*volume, name.as_deref(), *expected, *hold);
            snapshots::create(tx, &NewSnapshot { volume, name, expected, hold, now_unix_ms })
        }
        Command::CreateGroup { parts } => groups::create(tx, parts, now_unix_ms),
        Command::ConfirmGroup { group } => groups::confirm(tx, *group),
        Command::DropGroup { group } => groups::drop_group(tx, *group),
        Command::ConfirmSnapshot { snapshot } => snapshots::confirm(tx, *snapshot),
        Command::SealSnapshot { snapshot } => snapshots::seal(tx, *snapshot),
        Command::DeleteSnapshot { path, name } => snapshots::delete(tx, path, name),
        Command::ReapSnapshot { snapshot } => snapshots::reap(tx, *snapshot),
        Command::CloneVolume { snapshot, new_path, owner, create_parents } => {
            let new = NewClone { path: new_path, owner, create_parents: *create_parents, now_unix_ms };
            clones::clone_volume(tx, *snapshot, &new)
        }
        Command::RollbackVolume { path, snapshot, ends } => clones::rollback(tx, path, snapshot, *ends),
        Command::AttachVolume { path, client, description, takes_over } => {
            attach::attach(tx, path, *client, description, *takes_over)
        }
        Command::DetachVolume { volume, epoch } => attach::detach(tx, *volume, *epoch, false),
        Command::DetachUnclean { volume, epoch } => attach::detach(tx, *volume, *epoch, true),
        Command::AllocateSegment { volume, epoch, layer, index, copysets } => {
            let wanted = WantedSegment { volume: *volume, epoch: *epoch, layer: *layer, index: *index };
            attach::allocate(tx, wanted, copysets)
        }
        Command::RegisterChunkserver(new) => topology::register(tx, new, now_unix_ms),
        Command::ReplicasCreated { replicas } => topology::created(tx, replicas),
        Command::TasksDone { done } => {
            for (task, copyset) in done {
                tasks::done(tx, *task, *copyset)?;
            }
            Ok(Outcome::Done)
        }
        Command::CreatePool { name, replicas, copysets } => topology::create_pool(tx, name, *replicas, copysets),
        Command::SetOut { chunkserver, reason } => moves::set_out(tx, *chunkserver, *reason, now_unix_ms),
        Command::StartMove { copyset, conf_epoch, removed, to } => {
            let (copyset, conf_epoch, removed, to) = (*copyset, *conf_epoch, *removed, *to);
            moves::start(tx, &NewMove { copyset, conf_epoch, removed, to, now_unix_ms })
        }
        Command::CancelMove { copyset, added } => moves::cancel(tx, *copyset, *added),
        Command::FinishMove { copyset, added } => moves::finish(tx, *copyset, *added),
        Command::RemoveChunkserver { chunkserver } => moves::remove_chunkserver(tx, *chunkserver),
        Command::FlattenVolume { path, cancels } => flatten::volume(tx, path, *cancels, now_unix_ms),
        Command::Schedule(command) => schedules::run(tx, command, now_unix_ms),
        Command::ServiceTask(command) => service_tasks::run(tx, command, now_unix_ms),
        Command::EndMove { copyset, added } => moves::end_cancelled(tx, *copyset, *added),
    }
}

/// A volume that stands on nothing, with the default options.
fn empty_volume<'a>(path: &'a str, size_bytes: u64, owner: &str, create_parents: bool, now_unix_ms: u64) -> NewVolume<'a> {
    NewVolume {
        path,
        create_parents,
        owner: owner.to_owned(),
        size_bytes,
        pool: PoolId(0),
        parent: String::new(),
        now_unix_ms,
        options: VolumeOptionsRow::default(),
    }
}
