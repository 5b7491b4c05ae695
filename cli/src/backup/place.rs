//! Which repository a command means, and how its failures are told.

use crate::error::{CliError, ErrorKind};
use crate::sdk_error::io_failed;
use clap::Args;
use ogee_common::name::check_name;
use ogee_snapclone::{Place, RepoError, RepoErrorKind, Repository, TransferError};
use std::path::PathBuf;

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
        let opened = self.place().open(if_missing == IfMissing::Make).await;
        opened.map_err(|e| {
            let is_missing = e.kind == RepoErrorKind::NotFound;
            let error = repo_failed(e).within(format!("open repository {}", self.repo));
            if is_missing { error.with_advice("ogee backup create makes a repository") } else { error }
        })
    }

    fn place(&self) -> Place {
        Place {
            url: self.repo.clone(),
            key_file: self.key_file.clone(),
            endpoint: self.endpoint.clone(),
            region: self.region.clone(),
            virtual_hosts: self.virtual_hosts,
            ca: self.ca.clone(),
            credentials: self.credentials.clone(),
            profile: self.profile.clone(),
        }
    }

    /// The name of a repository in the configuration of those who do tasks.
    ///
    /// # Errors
    /// It is a place, or options of a place are given.
    pub(crate) fn name(&self) -> Result<String, CliError> {
        let plain = Place { url: self.repo.clone(), ..Place::default() };
        if self.place() != plain || check_name(&self.repo).is_err() {
            let text = "with --detach or --lazy --repo is the name of a repository in snapclone's configuration, and says how to reach it by itself";
            return Err(CliError::new(ErrorKind::Usage, text));
        }
        Ok(self.repo.clone())
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
        e @ TransferError::Withdrawn => CliError::new(ErrorKind::Conflict, e.to_string()),
    }
}
