//! Names that people give: paths of volumes, `volume@snapshot` references, owners. Parsed once, at the edge.

use crate::limits::{NAME_BYTES_MAX, PATH_BYTES_MAX, PATH_DEPTH_MAX};
use std::fmt;

/// Why a name was refused. The message says what to change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NameError {
    /// Nothing between two slashes, or nothing at all.
    Empty,
    /// Longer than [`NAME_BYTES_MAX`] or [`PATH_BYTES_MAX`] bytes.
    TooLong,
    /// Deeper than [`PATH_DEPTH_MAX`].
    TooDeep,
    /// A character outside letters, digits, `.`, `_`, `-`.
    BadCharacter(char),
    /// `.` or `..`.
    Dots,
    /// A snapshot name was given where a volume is wanted, or the reverse.
    UnexpectedSnapshot,
    /// `volume@snapshot` was wanted.
    MissingSnapshot,
}

impl fmt::Display for NameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "a name is empty; write it as name or folder/name"),
            Self::TooLong => write!(f, "longer than {NAME_BYTES_MAX} bytes a name or {PATH_BYTES_MAX} bytes in all"),
            Self::TooDeep => write!(f, "deeper than {PATH_DEPTH_MAX} folders"),
            Self::BadCharacter(c) => write!(f, "{c:?} is not allowed; use letters, digits, '.', '_' and '-'"),
            Self::Dots => write!(f, "'.' and '..' are not names"),
            Self::UnexpectedSnapshot => write!(f, "a volume is wanted here, not volume@snapshot"),
            Self::MissingSnapshot => write!(f, "a snapshot is wanted here, written volume@snapshot"),
        }
    }
}

impl std::error::Error for NameError {}

/// A volume path, without leading slash: `golden` or `tenant-a/web/disk0`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VolumePath(String);

impl VolumePath {
    /// Parses a path; one leading slash is dropped.
    ///
    /// # Errors
    /// [`NameError`] with the first thing wrong.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let text = text.strip_prefix('/').unwrap_or(text);
        if text.len() > PATH_BYTES_MAX {
            return Err(NameError::TooLong);
        }
        if text.contains('@') {
            return Err(NameError::UnexpectedSnapshot);
        }
        if text.split('/').count() > PATH_DEPTH_MAX {
            return Err(NameError::TooDeep);
        }
        for part in text.split('/') {
            check_name(part)?;
        }
        Ok(Self(text.to_owned()))
    }

    /// The names from the root down; the last is the volume's own.
    pub fn parts(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('/')
    }

    /// The path as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VolumePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A reference to a volume or to one of its snapshots: `path` or `path@snapshot`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct VolumeRef {
    /// The volume.
    pub path: VolumePath,
    /// The snapshot's name, if one was given.
    pub snapshot: Option<String>,
}

impl VolumeRef {
    /// Parses `path` or `path@snapshot`.
    ///
    /// # Errors
    /// [`NameError`] with the first thing wrong.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        match text.split_once('@') {
            None => Ok(Self { path: VolumePath::parse(text)?, snapshot: None }),
            Some((path, snapshot)) => {
                check_name(snapshot)?;
                Ok(Self { path: VolumePath::parse(path)?, snapshot: Some(snapshot.to_owned()) })
            }
        }
    }

    /// Parses `path@snapshot` and refuses a bare path.
    ///
    /// # Errors
    /// [`NameError::MissingSnapshot`] and those of [`VolumeRef::parse`].
    pub fn parse_snapshot(text: &str) -> Result<(VolumePath, String), NameError> {
        let r = Self::parse(text)?;
        Ok((r.path, r.snapshot.ok_or(NameError::MissingSnapshot)?))
    }
}

impl fmt::Display for VolumeRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.snapshot {
            None => write!(f, "{}", self.path),
            Some(s) => write!(f, "{}@{s}", self.path),
        }
    }
}

/// Checks one name (of a folder, volume, snapshot, owner, zone or host).
///
/// # Errors
/// [`NameError`] with the first thing wrong.
pub fn check_name(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(NameError::TooLong);
    }
    if name == "." || name == ".." {
        return Err(NameError::Dots);
    }
    match name.chars().find(|c| !c.is_ascii_alphanumeric() && !matches!(c, '.' | '_' | '-')) {
        Some(c) => Err(NameError::BadCharacter(c)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_names_parse() {
        assert_eq!(VolumePath::parse("/a/b-1").map(|p| p.to_string()), Ok("a/b-1".to_owned()));
        let (p, s) = VolumeRef::parse_snapshot("a/b@s1").expect("a valid reference");
        assert_eq!((p.as_str(), s.as_str()), ("a/b", "s1"));
    }

    #[test]
    fn every_kind_of_bad_name_is_refused() {
        assert_eq!(VolumePath::parse(""), Err(NameError::Empty));
        assert_eq!(VolumePath::parse("a//b"), Err(NameError::Empty));
        assert_eq!(VolumePath::parse("a/../b"), Err(NameError::Dots));
        assert_eq!(VolumePath::parse("a b"), Err(NameError::BadCharacter(' ')));
        assert_eq!(VolumePath::parse("a@b"), Err(NameError::UnexpectedSnapshot));
        assert_eq!(VolumePath::parse(&"x".repeat(256)), Err(NameError::TooLong));
        assert_eq!(VolumePath::parse(&vec!["x"; 33].join("/")), Err(NameError::TooDeep));
        assert_eq!(VolumeRef::parse_snapshot("a").map(|_| ()), Err(NameError::MissingSnapshot));
    }
}
