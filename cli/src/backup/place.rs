//! Which repository a command means, and how its failures are told.

use crate::error::{CliError, ErrorKind};
use crate::sdk_error::io_failed;
use clap::Args;
use ogee_snapclone::{Backend, KeyFile, OpenOptions, RepoError, RepoErrorKind, Repository, S3Options, TransferError};
use std::path::{Path, PathBuf};

/// Options that name a repository.
#[derive(Debug, Clone, Args)]
pub(crate) struct RepoArgs {
    /// file:///folder or s3://bucket/prefix
    #[arg(long, env = "OGEE_REPO", value_name = "URL", help_heading = "Repository")]
    repo: String,
    /// Key file of an encrypted repository: 64 hexadecimal digits, as from openssl rand -hex 32
    #[arg(long, env = "OGEE_REPO_KEY_FILE", value_name = "FILE", help_heading = "Repository")]
    key_file: Option<PathBuf>,
    /// S3 server, http(s)://host:port; default: Amazon's
    #[arg(long, env = "OGEE_S3_ENDPOINT", value_name = "URL", help_heading = "Repository")]
    endpoint: Option<String>,
    /// S3 region [default: AWS_REGION or us-east-1]
    #[arg(long, value_name = "NAME", help_heading = "Repository")]
    region: Option<String>,
    /// Put the bucket's name into the host name, not into the path
    #[arg(long, help_heading = "Repository")]
    virtual_hosts: bool,
    /// Certificates (PEM) that the S3 server is checked by, instead of the system's
    #[arg(long, env = "OGEE_S3_CA", value_name = "FILE", help_heading = "Repository")]
    ca: Option<PathBuf>,
    /// Credentials file [default: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials]
    #[arg(long, value_name = "FILE", help_heading = "Repository")]
    credentials: Option<PathBuf>,
    /// Profile in the credentials file
    #[arg(long, value_name = "NAME", help_heading = "Repository")]
    profile: Option<String>,
}

/// Whether a repository is made if there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IfMissing {
    /// Make it.
    Make,
    /// That is an error.
    Fail,
}

impl RepoArgs {
    /// Opens the repository.
    ///
    /// # Errors
    /// The place or its options make no sense, or it cannot be opened.
    pub(crate) async fn open(&self, if_missing: IfMissing) -> Result<Repository, CliError> {
        let key = self.key_file.as_deref().map(KeyFile::read).transpose().map_err(repo_failed)?;
        let options = OpenOptions { key, create: if_missing == IfMissing::Make, block_bytes: None };
        let opened = Repository::open(self.backend()?, options).await;
        opened.map_err(|e| {
            let is_missing = e.kind == RepoErrorKind::NotFound;
            let error = repo_failed(e).within(format!("open repository {}", self.repo));
            if is_missing { error.with_advice("ogee backup create makes a repository") } else { error }
        })
    }

    fn backend(&self) -> Result<Backend, CliError> {
        let bad = |why: &str| CliError::new(ErrorKind::Usage, format!("--repo {}: {why}", self.repo));
        if let Some(path) = self.repo.strip_prefix("file://") {
            return if Path::new(path).is_absolute() {
                Ok(Backend::directory(Path::new(path)))
            } else {
                Err(bad("the path must be absolute: file:///folder"))
            };
        }
        let wanted = "write file:///folder or s3://bucket/prefix";
        let rest = self.repo.strip_prefix("s3://").ok_or_else(|| bad(wanted))?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(bad(wanted));
        }
        if let Some(e) = self.endpoint.as_ref().filter(|e| !e.starts_with("http://") && !e.starts_with("https://")) {
            return Err(CliError::new(ErrorKind::Usage, format!("--endpoint {e}: write http://host:port or https://host:port")));
        }
        let options = S3Options {
            bucket: bucket.to_owned(),
            prefix: prefix.trim_matches('/').to_owned(),
            endpoint: self.endpoint.clone(),
            region: self.region.clone(),
            virtual_hosts: self.virtual_hosts || self.endpoint.is_none(),
            ca: self.ca.clone(),
            credentials: self.credentials.clone(),
            profile: self.profile.clone(),
        };
        Backend::s3(&options).map_err(repo_failed)
    }
}

/// A failed operation on a repository.
pub(crate) fn repo_failed(error: RepoError) -> CliError {
    let kind = match error.kind {
        RepoErrorKind::NotFound => ErrorKind::NotFound,
        RepoErrorKind::Unavailable => ErrorKind::Unavailable,
        RepoErrorKind::NoSpace | RepoErrorKind::Limit => ErrorKind::NoSpace,
        RepoErrorKind::WrongKey | RepoErrorKind::Unusable => ErrorKind::Usage,
        RepoErrorKind::Abandoned => ErrorKind::Conflict,
        RepoErrorKind::Corrupt | RepoErrorKind::Denied | RepoErrorKind::Failure => ErrorKind::Failure,
    };
    let what = error.to_string();
    match error.source {
        // The client of S3 tells half of it in the sources of its sources; the top prints them all.
        Some(source) => CliError::caused(kind, what, Cause(source)),
        None => CliError::new(kind, what),
    }
}

/// A boxed cause, as an error of its own.
#[derive(Debug)]
struct Cause(Box<dyn std::error::Error + Send + Sync>);

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for Cause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

/// A failed copy.
pub(crate) fn transfer_failed(error: TransferError) -> CliError {
    match error {
        TransferError::Repo(e) => repo_failed(e),
        TransferError::Volume(e) => io_failed(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(repo: &str) -> RepoArgs {
        RepoArgs {
            repo: repo.to_owned(),
            key_file: None,
            endpoint: Some("ftp://x".to_owned()),
            region: None,
            virtual_hosts: false,
            ca: None,
            credentials: None,
            profile: None,
        }
    }

    #[test]
    fn a_place_that_makes_no_sense_is_refused() {
        assert!(args("file:///srv/backup").backend().is_ok());
        for bad in ["", "/srv", "file://srv", "s3://", "s3:///a", "s3://bucket"] {
            assert_eq!(args(bad).backend().map(drop).expect_err(bad).kind(), ErrorKind::Usage, "{bad}");
        }
    }
}
