//! Arguments that name things, parsed once at the edge.

use ogee_common::name::{NameError, VolumePath, VolumeRef};

/// A snapshot, written `volume@snapshot`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SnapshotRef {
    /// The volume.
    pub volume: VolumePath,
    /// The snapshot's own name.
    pub name: String,
}

impl std::fmt::Display for SnapshotRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.volume, self.name)
    }
}

/// Parses `volume@snapshot`, for clap.
///
/// # Errors
/// [`NameError`] with the first thing wrong.
pub(crate) fn snapshot(text: &str) -> Result<SnapshotRef, NameError> {
    let (volume, name) = VolumeRef::parse_snapshot(text)?;
    Ok(SnapshotRef { volume, name })
}

/// Parses a name of an owner or a pool, for clap.
///
/// # Errors
/// [`NameError`] with the first thing wrong.
pub(crate) fn plain(text: &str) -> Result<String, NameError> {
    ogee_common::name::check_name(text)?;
    Ok(text.to_owned())
}

/// Parses a folder, for clap: a path, or nothing or `/` for the root.
///
/// # Errors
/// [`NameError`] with the first thing wrong.
pub(crate) fn folder(text: &str) -> Result<String, NameError> {
    let trimmed = text.trim_matches('/');
    if trimmed.is_empty() { Ok(String::new()) } else { VolumePath::parse(trimmed).map(|p| p.to_string()) }
}
