//! A repository in a local directory: an object is a file.
//!
//! An object is written to a file in `tmp/` and then linked under its name (which fails if the name exists) or renamed
//! over it. Invariants: no object is seen half-written by a process; single objects are flushed when they are replaced,
//! and all of them by [`DirBackend::settle`], so that an index is durable after what it refers to. A block that was
//! created but not settled may be torn by a power cut: no published index refers to it. All file work is done on threads that may block.

use crate::error::{RepoError, RepoErrorKind};
use ogee_common::{clock, rng};
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

/// Where files are written before they have their name.
const TEMPORARY: &str = "tmp";

/// A local directory.
#[derive(Debug, Clone)]
pub(crate) struct DirBackend {
    root: Arc<PathBuf>,
}

impl DirBackend {
    pub(crate) fn new(root: &Path) -> Self {
        Self { root: Arc::new(root.to_owned()) }
    }

    async fn work<T: Send + 'static>(
        &self, work: impl FnOnce(&Path) -> Result<T, RepoError> + Send + 'static,
    ) -> Result<T, RepoError> {
        let root = self.root.clone();
        let done = tokio::task::spawn_blocking(move || work(&root)).await;
        done.map_err(|e| RepoError::new(RepoErrorKind::Failure, "use", "repository", "a thread ended").because(e))?
    }

    pub(crate) async fn create(&self, key: &str, object: Vec<u8>) -> Result<bool, RepoError> {
        let key = key.to_owned();
        self.work(move |root| {
            let (path, temporary) = write_temporary(root, &key, &object)?;
            let linked = fs::hard_link(&temporary, &path);
            // What cannot be deleted here is swept later.
            let _ = fs::remove_file(&temporary);
            match linked {
                Ok(()) => Ok(true),
                Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
                Err(e) => Err(RepoError::file("write", key, e)),
            }
        })
        .await
    }

    pub(crate) async fn replace(&self, key: &str, object: Vec<u8>) -> Result<(), RepoError> {
        let key = key.to_owned();
        self.work(move |root| {
            let (path, temporary) = write_temporary(root, &key, &object)?;
            let flushed = File::open(&temporary).and_then(|file| file.sync_all());
            flushed.and_then(|()| fs::rename(&temporary, &path)).map_err(|e| RepoError::file("write", key, e))
        })
        .await
    }

    pub(crate) async fn settle(&self) -> Result<(), RepoError> {
        self.work(|root| {
            let failed = |e| RepoError::file("flush", root.display().to_string(), e);
            let dir = File::open(root).map_err(failed)?;
            rustix::fs::syncfs(&dir).map_err(|e| failed(e.into()))
        })
        .await
    }

    pub(crate) async fn get(&self, key: &str, max: usize) -> Result<Vec<u8>, RepoError> {
        let key = key.to_owned();
        self.work(move |root| {
            let mut object = Vec::new();
            let limit = u64::try_from(max).unwrap_or(u64::MAX).saturating_add(1);
            let read = File::open(root.join(&key)).and_then(|file| file.take(limit).read_to_end(&mut object));
            read.map_err(|e| RepoError::file("read", key.clone(), e))?;
            if object.len() > max { Err(RepoError::corrupt(&key, "it is too long")) } else { Ok(object) }
        })
        .await
    }

    pub(crate) async fn exists(&self, key: &str) -> Result<bool, RepoError> {
        let key = key.to_owned();
        self.work(move |root| root.join(&key).try_exists().map_err(|e| RepoError::file("look for", key, e))).await
    }

    pub(crate) async fn list<T: Send + 'static>(
        &self, prefix: &str, keep: impl Fn(&str) -> Option<T> + Send + 'static,
    ) -> Result<Vec<T>, RepoError> {
        let prefix = prefix.to_owned();
        self.work(move |root| {
            let (mut found, mut folders) = (vec![], vec![prefix]);
            while let Some(folder) = folders.pop() {
                let failed = |e| RepoError::file("list", folder.clone(), e);
                let entries = match fs::read_dir(root.join(&folder)) {
                    Err(e) if e.kind() == ErrorKind::NotFound => continue,
                    entries => entries.map_err(failed)?,
                };
                for entry in entries {
                    let entry = entry.map_err(failed)?;
                    let name = entry.file_name();
                    // What has a name that is no text is not ours.
                    let Some(name) = name.to_str() else { continue };
                    if entry.file_type().map_err(failed)?.is_dir() {
                        folders.push(format!("{folder}{name}/"));
                    } else if let Some(kept) = keep(&format!("{folder}{name}")) {
                        found.push(kept);
                    }
                }
            }
            Ok(found)
        })
        .await
    }

    pub(crate) async fn delete(&self, key: &str) -> Result<(), RepoError> {
        let key = key.to_owned();
        self.work(move |root| match fs::remove_file(root.join(&key)) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(RepoError::file("delete", key, e)),
            _ => Ok(()),
        })
        .await
    }

    pub(crate) async fn sweep(&self, age: Duration) -> Result<u64, RepoError> {
        let now = Duration::from_millis(clock::unix_ms());
        let names = self.list("tmp/", |key| Some(key.to_owned())).await?;
        self.work(move |root| {
            let mut swept = 0;
            for name in names {
                // Gone meanwhile: its writer lives.
                let Ok(modified) = fs::metadata(root.join(&name)).and_then(|m| m.modified()) else { continue };
                let written = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
                if written + age <= now && fs::remove_file(root.join(&name)).is_ok() {
                    swept += 1;
                }
            }
            Ok(swept)
        })
        .await
    }
}

/// Writes the object to a temporary file; its path to be and where it is.
fn write_temporary(root: &Path, key: &str, object: &[u8]) -> Result<(PathBuf, PathBuf), RepoError> {
    let path = root.join(key);
    let temporary = root.join(TEMPORARY).join(format!("{:016x}", rng::nonzero_u64()));
    let parent = path.parent().unwrap_or(root);
    let written = fs::create_dir_all(root.join(TEMPORARY))
        .and_then(|()| fs::create_dir_all(parent))
        .and_then(|()| File::create_new(&temporary))
        .and_then(|mut file| file.write_all(object));
    match written {
        Ok(()) => Ok((path, temporary)),
        Err(e) => {
            let _ = fs::remove_file(&temporary);
            Err(RepoError::file("write", key, e))
        }
    }
}
