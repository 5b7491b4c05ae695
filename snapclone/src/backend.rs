//! Where objects lie. Two kinds, the same format: a local directory and S3.
//!
//! Invariants: [`Backend::create`] never replaces an object, and of several at once for one key exactly one makes it;
//! whatever was created or deleted shows in every later read and listing. Retries are the kinds' own and are bounded.

use crate::dir::DirBackend;
use crate::error::RepoError;
use crate::s3::{S3Backend, S3Options};
use std::path::Path;
use std::time::Duration;

/// Where objects lie.
#[derive(Debug, Clone)]
pub struct Backend(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Dir(DirBackend),
    S3(S3Backend),
}

impl Backend {
    /// A local directory; it is made when the repository is.
    #[must_use]
    pub fn directory(path: &Path) -> Self {
        Self(Kind::Dir(DirBackend::new(path)))
    }

    /// A bucket, or a part of one. Nothing is asked of the server yet.
    ///
    /// # Errors
    /// Options that make no sense, no credentials, a certificate that cannot be read.
    pub fn s3(options: &S3Options) -> Result<Self, RepoError> {
        Ok(Self(Kind::S3(S3Backend::new(options)?)))
    }

    /// Makes an object; `false` if there is one already.
    pub(crate) async fn create(&self, key: &str, object: Vec<u8>) -> Result<bool, RepoError> {
        match &self.0 {
            Kind::Dir(dir) => dir.create(key, object).await,
            Kind::S3(s3) => s3.create(key, object).await,
        }
    }

    /// Makes or replaces an object.
    pub(crate) async fn replace(&self, key: &str, object: Vec<u8>) -> Result<(), RepoError> {
        match &self.0 {
            Kind::Dir(dir) => dir.replace(key, object).await,
            Kind::S3(s3) => s3.replace(key, object).await,
        }
    }

    /// Everything created before survives a power cut after.
    pub(crate) async fn settle(&self) -> Result<(), RepoError> {
        match &self.0 {
            Kind::Dir(dir) => dir.settle().await,
            Kind::S3(_) => Ok(()),
        }
    }

    /// Reads an object of at most `max` bytes.
    pub(crate) async fn get(&self, key: &str, max: usize) -> Result<Vec<u8>, RepoError> {
        match &self.0 {
            Kind::Dir(dir) => dir.get(key, max).await,
            Kind::S3(s3) => s3.get(key, max).await,
        }
    }

    /// Whether there is an object.
    pub(crate) async fn exists(&self, key: &str) -> Result<bool, RepoError> {
        match &self.0 {
            Kind::Dir(dir) => dir.exists(key).await,
            Kind::S3(s3) => s3.exists(key).await,
        }
    }

    /// The keys that start with `prefix` (which ends in `/`), in no order, that `keep` makes something of.
    pub(crate) async fn list<T: Send + 'static>(
        &self, prefix: &str, keep: impl Fn(&str) -> Option<T> + Send + 'static,
    ) -> Result<Vec<T>, RepoError> {
        match &self.0 {
            Kind::Dir(dir) => dir.list(prefix, keep).await,
            Kind::S3(s3) => s3.list(prefix, keep).await,
        }
    }

    /// Deletes an object; it is no error if there is none.
    pub(crate) async fn delete(&self, key: &str) -> Result<(), RepoError> {
        match &self.0 {
            Kind::Dir(dir) => dir.delete(key).await,
            Kind::S3(s3) => s3.delete(key).await,
        }
    }

    /// Deletes what writers left that died before their object had a name, if it is older than `age`; how many there
    /// were. A living writer of that age fails.
    pub(crate) async fn sweep(&self, age: Duration) -> Result<u64, RepoError> {
        match &self.0 {
            Kind::Dir(dir) => dir.sweep(age).await,
            Kind::S3(_) => Ok(0),
        }
    }
}
