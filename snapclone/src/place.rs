//! Where a repository is and how it is opened, as people write it: on the command line, and in the service's configuration.
//!
//! Invariant: what makes no sense is said before anything is asked of a server.

use crate::backend::Backend;
use crate::error::{RepoError, RepoErrorKind};
use crate::key_file::KeyFile;
use crate::repository::{OpenOptions, Repository};
use crate::s3::S3Options;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// A place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// `file:///folder` or `s3://bucket/prefix`.
    pub url: String,
    /// Key file of an encrypted repository: 64 hexadecimal digits.
    #[serde(default)]
    pub key_file: Option<PathBuf>,
    /// S3 server, `http(s)://host:port`; by default Amazon's.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// S3 region; by default `AWS_REGION` or `us-east-1`.
    #[serde(default)]
    pub region: Option<String>,
    /// The bucket's name goes into the host name, not into the path. Amazon's server wants it so and gets it.
    #[serde(default)]
    pub virtual_hosts: bool,
    /// Certificates (PEM) that the S3 server is checked by, instead of the system's.
    #[serde(default)]
    pub ca: Option<PathBuf>,
    /// Credentials file; by default the environment's keys, or `~/.aws/credentials`.
    #[serde(default)]
    pub credentials: Option<PathBuf>,
    /// Profile in the credentials file.
    #[serde(default)]
    pub profile: Option<String>,
}

impl Place {
    /// Opens the repository that is there; with `make` it is made if there is none.
    ///
    /// # Errors
    /// [`RepoErrorKind::Unusable`] if the place makes no sense; what [`Repository::open`] says.
    pub async fn open(&self, make: bool) -> Result<Repository, RepoError> {
        let key = self.key_file.as_deref().map(KeyFile::read).transpose()?;
        Repository::open(self.backend()?, OpenOptions { key, create: make, block_bytes: None }).await
    }

    /// Where the objects lie. Nothing is asked of a server yet.
    ///
    /// # Errors
    /// [`RepoErrorKind::Unusable`] if the place makes no sense; no credentials.
    pub fn backend(&self) -> Result<Backend, RepoError> {
        let bad = |what: &str, why| RepoError::new(RepoErrorKind::Unusable, "use", what, why);
        if let Some(path) = self.url.strip_prefix("file://") {
            let absolute = Path::new(path).is_absolute();
            let path = absolute.then(|| Backend::directory(Path::new(path)));
            return path.ok_or_else(|| bad(&self.url, "the path must be absolute: file:///folder"));
        }
        let wanted = "write file:///folder or s3://bucket/prefix";
        let rest = self.url.strip_prefix("s3://").ok_or_else(|| bad(&self.url, wanted))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(bad(&self.url, wanted));
        }
        if let Some(e) = self.endpoint.as_ref().filter(|e| !e.starts_with("http://") && !e.starts_with("https://")) {
            return Err(bad(e, "write http://host:port or https://host:port"));
        }
        Backend::s3(&S3Options {
            bucket: bucket.to_owned(),
            prefix: prefix.trim_matches('/').to_owned(),
            endpoint: self.endpoint.clone(),
            region: self.region.clone(),
            virtual_hosts: self.virtual_hosts || self.endpoint.is_none(),
            ca: self.ca.clone(),
            credentials: self.credentials.clone(),
            profile: self.profile.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_that_makes_no_sense_is_refused() {
        let place = |url: &str| Place { url: url.to_owned(), endpoint: Some("ftp://x".to_owned()), ..Place::default() };
        assert!(place("file:///srv/backup").backend().is_ok());
        for bad in ["", "/srv", "file://srv", "s3://", "s3:///a", "s3://bucket", "main"] {
            assert_eq!(place(bad).backend().map(drop).expect_err(bad).kind, RepoErrorKind::Unusable, "{bad}");
        }
    }
}
