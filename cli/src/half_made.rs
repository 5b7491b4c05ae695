//! A volume that is being filled: it has another name until all its data is flushed, so that it never looks complete
//! when it is not, not even after `kill -9`.
//!
//! Used by `image import` and `restore`. Invariant: nothing is left after an error but, at worst, the volume under its
//! temporary name, and then the message says so.

use crate::error::{CliError, ErrorKind};
use crate::open::take_and_release;
use crate::sdk_error::call_failed;
use ogee_client::{Cluster, MdsCallError};
use ogee_common::name::VolumePath;
use ogee_proto::MdsErrorKind;
use ogee_proto::mds as m;

/// The volume that is wanted in the end.
#[derive(Debug)]
pub(crate) struct Wish<'a> {
    /// Its name.
    pub path: &'a VolumePath,
    /// What its name ends in until it is complete.
    pub suffix: &'a str,
    /// Its size.
    pub size_bytes: u64,
    /// Who may delete it.
    pub owner: Option<&'a str>,
    /// The pool of chunkservers that holds it.
    pub pool: &'a str,
    /// Bytes of its logical sectors.
    pub sector_bytes: u32,
}

/// Says early that the name is taken, before gigabytes are copied; the rename at the end decides.
///
/// # Errors
/// It is taken, or the MDS does not answer.
pub(crate) async fn refuse_taken(cluster: &Cluster, path: &VolumePath) -> Result<(), CliError> {
    match cluster.mds().stat_volume(m::StatVolumeRequest { path: path.to_string() }).await {
        Ok(_) => {
            let text = format!("{path} exists; choose another name or delete it first: ogee volume rm {path}");
            Err(CliError::new(ErrorKind::Conflict, text).with_reason(MdsErrorKind::AlreadyExists.as_str()))
        }
        Err(e) if e.kind == MdsErrorKind::NotFound => Ok(()),
        Err(e) => Err(call_failed("look for the volume", &e)),
    }
}

/// Makes the volume under its temporary name.
///
/// # Errors
/// What the MDS refused.
pub(crate) async fn create(cluster: &Cluster, wish: &Wish<'_>) -> Result<VolumePath, CliError> {
    let (path, request) = wish.request()?;
    let made = cluster.mds().create_volume(request).await;
    made.map_err(|e| not_created(&path, &e))?;
    Ok(path)
}

/// Makes the volume under its temporary name, standing on a backup; what the MDS says of it.
///
/// # Errors
/// What the MDS refused.
pub(crate) async fn create_on(cluster: &Cluster, wish: &Wish<'_>, backup: m::BackupParent) -> Result<(VolumePath, m::Volume), CliError> {
    let (path, request) = wish.request()?;
    let made = cluster.mds().create_lazy_volume(m::CreateLazyVolumeRequest { volume: Some(request), backup: Some(backup) }).await;
    Ok((path.clone(), made.map_err(|e| not_created(&path, &e))?))
}

fn not_created(path: &VolumePath, error: &MdsCallError) -> CliError {
    let failed = call_failed(&format!("create volume {path}"), error);
    if error.kind == MdsErrorKind::AlreadyExists {
        failed.with_advice(&format!("the same command runs already, or one was killed; then: ogee volume rm {path} --force"))
    } else {
        failed
    }
}

impl Wish<'_> {
    /// The temporary name, and the wish under it.
    fn request(&self) -> Result<(VolumePath, m::CreateVolumeRequest), CliError> {
        let name = format!("{}{}", self.path, self.suffix);
        let path = VolumePath::parse(&name).map_err(|e| CliError::caused(ErrorKind::Usage, name.clone(), e))?;
        let request = m::CreateVolumeRequest {
            path: name,
            size_bytes: self.size_bytes,
            owner: self.owner.unwrap_or_default().to_owned(),
            create_parents: true,
            pool: self.pool.to_owned(),
            sector_bytes: self.sector_bytes,
            limits: None,
        };
        Ok((path, request))
    }
}

/// Gives the volume its own name.
///
/// # Errors
/// The name was taken meanwhile.
pub(crate) async fn rename(cluster: &Cluster, from: &VolumePath, to: &VolumePath) -> Result<(), CliError> {
    let (path, new_path) = (from.to_string(), to.to_string());
    let done = cluster.mds().rename_volume(m::RenameVolumeRequest { path, new_path, create_parents: false }).await;
    done.map(drop).map_err(|e| call_failed(&format!("rename {from} to {to}"), &e))
}

/// Deletes the half-made volume and gives back why; if that fails too, the message names what is left.
pub(crate) async fn take_back(cluster: &Cluster, path: &VolumePath, why: CliError) -> CliError {
    // An interrupted copy still holds the attach; attaching again takes it over and ends it.
    // A failure shows in the deletion.
    let _ = take_and_release(cluster, path).await;
    let request = m::DeleteVolumeRequest { path: path.to_string(), owner: String::new() };
    match cluster.mds().delete_volume(request).await {
        Ok(()) => why,
        Err(_) => why.with_advice(&format!("the half-made volume is left; delete it: ogee volume rm {path} --force")),
    }
}
