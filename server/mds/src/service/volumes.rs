//! Calls about names and volumes. Each is one command or one read.

use super::status::CallError;
use super::{Core, convert, names};
use crate::machine::command::{Command, Outcome, VolumeInfo};
use crate::machine::row::VolumeOptionsRow;
use crate::machine::{flatten, info, namespace, options};
use ogee_common::qos::VolumeLimits;
use ogee_proto::mds;

/// Entries of one page of a listing.
pub(crate) const LIST_MAX: usize = 1000;

type Id = Option<[u8; 16]>;

/// The volume that a command answered with.
///
/// # Errors
/// Never for the commands used here; another answer means that nodes of mixed versions disagree.
pub(crate) fn volume(outcome: Outcome) -> Result<VolumeInfo, CallError> {
    match outcome {
        Outcome::Volume(info) => Ok(*info),
        _ => Err(CallError::Answer(crate::machine::command::DecodeError::Trailing)),
    }
}

impl Core {
    /// What is said of a volume that a command answered with.
    ///
    /// # Errors
    /// Those of the rows only.
    pub(super) fn described(&self, info: VolumeInfo) -> Result<mds::Volume, CallError> {
        let options = self.read(|tx| options::of(tx, info.id))?;
        let backup = self.backup_below(info.layer)?;
        Ok(mds::Volume { backup, ..convert::volume(info, options, flatten::Progress::default()) })
    }

    pub(crate) async fn create_volume(&self, id: Id, r: mds::CreateVolumeRequest) -> Result<mds::Volume, CallError> {
        let path = names::path("path", &r.path)?;
        let (size_bytes, owner, create_parents) = (r.size_bytes, names::owner(&r.owner)?, r.create_parents);
        let pool = if r.pool.is_empty() { String::new() } else { names::name("pool", &r.pool)? };
        let limits = names::limit_changes(r.limits.as_ref())?.apply(VolumeLimits::NONE);
        let options = VolumeOptionsRow { sector_bytes: names::sector_bytes(r.sector_bytes)?, limits };
        // The older command wherever it says enough: nodes of older builds know it.
        let command = if options == VolumeOptionsRow::default() {
            Command::CreateVolume { path, size_bytes, owner, create_parents, pool }
        } else {
            Command::CreateVolumeWith { path, size_bytes, owner, create_parents, pool, options }
        };
        self.described(volume(self.propose(id, command).await?)?)
    }

    pub(crate) async fn set_volume_limits(
        &self,
        id: Id,
        r: mds::SetVolumeLimitsRequest,
    ) -> Result<mds::Volume, CallError> {
        let (path, changes) = (names::path("path", &r.path)?, names::limit_changes(r.limits.as_ref())?);
        self.lead().await?;
        let info = volume(self.propose(id, Command::SetLimits { path, changes }).await?)?;
        self.hub.refresh(info.id, || self.current(info.id));
        self.described(info)
    }

    pub(crate) async fn delete_volume(&self, id: Id, r: mds::DeleteVolumeRequest) -> Result<mds::Empty, CallError> {
        let (path, owner) = (names::path("path", &r.path)?, names::owner(&r.owner)?);
        self.propose(id, Command::DeleteVolume { path, owner }).await?;
        Ok(mds::Empty {})
    }

    pub(crate) async fn rename_volume(&self, id: Id, r: mds::RenameVolumeRequest) -> Result<mds::Volume, CallError> {
        let command = Command::RenameVolume {
            path: names::path("path", &r.path)?,
            new_path: names::path("new path", &r.new_path)?,
            create_parents: r.create_parents,
        };
        self.described(volume(self.propose(id, command).await?)?)
    }

    pub(crate) async fn stat_volume(&self, r: mds::StatVolumeRequest) -> Result<mds::Volume, CallError> {
        let path = names::path("path", &r.path)?;
        self.lead().await?;
        let (layer, volume) = self.read(|tx| {
            let (id, row) = namespace::volume(tx, &path)?;
            Ok((row.layer, convert::volume(info::volume(tx, id, &row)?, options::of(tx, id)?, flatten::progress(tx, id)?)))
        })?;
        Ok(mds::Volume { backup: self.backup_below(layer)?, ..volume })
    }

    /// Starts to flatten a volume, or stops it; repeating either is no error.
    pub(crate) async fn flatten_volume(&self, r: mds::FlattenVolumeRequest) -> Result<mds::Volume, CallError> {
        let command = Command::FlattenVolume { path: names::path("path", &r.path)?, cancels: r.cancel };
        self.lead().await?;
        let info = volume(self.propose(None, command).await?)?;
        let (options, progress) = self.read(|tx| Ok((options::of(tx, info.id)?, flatten::progress(tx, info.id)?)))?;
        Ok(convert::volume(info, options, progress))
    }

    pub(crate) async fn list_volumes(&self, r: mds::ListVolumesRequest) -> Result<mds::ListVolumesReply, CallError> {
        let (directory, start_after) = (names::folder(&r.directory)?, names::folder(&r.start_after)?);
        let limit = match r.limit as usize {
            0 => LIST_MAX,
            n => n.min(LIST_MAX),
        };
        let listing =
            info::Listing { directory: &directory, recursive: r.recursive, start_after: &start_after, limit };
        self.lead().await?;
        let (volumes, more) = self.read(|tx| info::list(tx, &listing))?;
        Ok(mds::ListVolumesReply { volumes: volumes.into_iter().map(Into::into).collect(), more })
    }

    pub(crate) async fn extend_volume(&self, id: Id, r: mds::ExtendVolumeRequest) -> Result<mds::Volume, CallError> {
        let command = Command::ExtendVolume { path: names::path("path", &r.path)?, size_bytes: r.size_bytes };
        self.lead().await?;
        let info = volume(self.propose(id, command).await?)?;
        self.hub.refresh(info.id, || self.current(info.id));
        self.described(info)
    }
}
