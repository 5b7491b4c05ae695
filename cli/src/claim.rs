//! The claim of a daemon on its socket: a locked file beside it that names the client by which the daemon attached its volume.
//!
//! A daemon that was killed is still attached at the MDS, which gives it up after some seconds; so long the guest would wait. The
//! daemon that follows on the same socket finds the lock free, so its predecessor is dead, and attaches as the same client:
//! the MDS lets that pass at once. The attach epoch rises all the same, so what the dead one sent is fenced.
//!
//! ```text
//! PATH.sock.client, mode 0600:   ogee-client 1 / volume / id / volume's number     (one line each; both 16 hexadecimal digits)
//! ```
//!
//! The number tells that the name means the same volume still: the guest of a dead daemon has requests in flight for that one. It is there if the
//! daemon serves one volume (`vhost.rs`), and not in files of older daemons, which read no further than the id.
//!
//! Invariants: the id in the file is used only under its lock and for the volume it was written for; a file that is not ours is
//! not touched; the file goes when the volume is given back, and stays while it is or may be attached.

use crate::error::{CliError, ErrorKind};
use ogee_common::id::VolumeId;
use ogee_common::rng;
use rustix::fs::OFlags;
use std::fs::{self, File, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// First line of the file.
const MAGIC: &str = "ogee-client 1";
/// More than any file of ours has.
const FILE_BYTES_MAX: u64 = 8192;
/// The file may be removed by a daemon that ends, between our opening and locking it.
const ATTEMPTS: u32 = 5;

/// A held claim.
#[derive(Debug)]
pub(crate) struct Claim {
    path: PathBuf,
    /// Holds the lock.
    file: File,
    client: u64,
    /// The predecessor's volume, if it said which.
    before: Option<VolumeId>,
    is_new: bool,
}

/// What a predecessor wrote.
struct Found {
    volume: String,
    client: u64,
    volume_id: Option<VolumeId>,
}

impl Claim {
    /// Claims `socket` for a daemon that will attach `volume`.
    ///
    /// # Errors
    /// Another process serves the socket ([`ErrorKind::Conflict`]), there is a file that is not ours, or the file system refuses.
    pub(crate) fn take(socket: &Path, volume: &str) -> Result<Self, CliError> {
        let path = Self::path_beside(socket);
        let file = Self::lock(&path, socket)?;
        let found = Self::read(&file, &path)?;
        let is_new = found.is_none();
        let same = found.filter(|found| found.volume == volume);
        let client = same.as_ref().map_or_else(rng::nonzero_u64, |found| found.client);
        let claim = Self { client, path, file, before: same.as_ref().and_then(|found| found.volume_id), is_new };
        if same.is_none() {
            claim.write(volume)?;
        }
        Ok(claim)
    }

    /// Says which volume is meant, by its number at the MDS.
    ///
    /// # Errors
    /// The dead predecessor served another one under this name ([`ErrorKind::Conflict`]), or the file cannot be written.
    pub(crate) fn identify(&self, volume: &str, volume_id: VolumeId) -> Result<(), CliError> {
        match self.before {
            Some(before) if before != volume_id => {
                let (now, was, path) = (volume_id.0, before.0, self.path.display());
                let text = format!(
                    "{volume} is another volume now ({now}, was {was}), and a guest may wait here for the one that was served: end it, then remove {path}"
                );
                Err(CliError::new(ErrorKind::Conflict, text))
            }
            Some(_) => Ok(()),
            None => {
                let failed = |e| CliError::file("write", &self.path, e);
                // What is there is the beginning of what is written: a death on the way loses nothing.
                (&self.file).rewind().map_err(failed)?;
                let text = format!("{}{:016x}\n", self.text(volume), volume_id.0);
                (&self.file).write_all(text.as_bytes()).map_err(failed)
            }
        }
    }

    /// The claim of a daemon that has handed its work and this file over: its lock is held as long as any process has the file open.
    pub(crate) fn handed_over(socket: &Path, file: File, client: u64) -> Self {
        Self { path: Self::path_beside(socket), file, client, before: None, is_new: false }
    }

    /// The locked file once more, for a daemon that takes over.
    ///
    /// # Errors
    /// No file descriptor.
    pub(crate) fn file(&self) -> Result<File, CliError> {
        self.file.try_clone().map_err(|e| CliError::caused(ErrorKind::Failure, "duplicate the claim", e))
    }

    fn path_beside(socket: &Path) -> PathBuf {
        let mut name = socket.as_os_str().to_owned();
        name.push(".client");
        PathBuf::from(name)
    }

    /// The client to attach as.
    pub(crate) fn client(&self) -> u64 {
        self.client
    }

    /// The volume could not be attached. The id of a predecessor, which may still be, is kept.
    pub(crate) fn not_attached(self) {
        if self.is_new {
            self.given_back();
        }
    }

    /// The volume is given back: nobody needs the id.
    pub(crate) fn given_back(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(target: "controlpath", file = %self.path.display(), %error, "claim not removed");
        }
    }

    fn lock(path: &Path, socket: &Path) -> Result<File, CliError> {
        let in_use = || CliError::new(ErrorKind::Conflict, format!("{}: another process serves this socket", socket.display()));
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        if !directory.is_dir() {
            let text = format!("listen on {}: there is no such directory", socket.display());
            return Err(CliError::new(ErrorKind::NotFound, text));
        }
        let flags = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or_default();
        for _ in 0..ATTEMPTS {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(flags);
            let file = options.open(path).map_err(|e| CliError::file("open", path, e))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(in_use()),
                Err(TryLockError::Error(e)) => return Err(CliError::file("lock", path, e)),
            }
            let ours = file.metadata().map_err(|e| CliError::file("look at", path, e))?;
            if fs::symlink_metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (ours.dev(), ours.ino())) {
                return Ok(file);
            }
        }
        Err(in_use())
    }

    /// What a predecessor wrote; `None` if the file is empty.
    fn read(mut file: &File, path: &Path) -> Result<Option<Found>, CliError> {
        let mut text = String::new();
        file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(|e| CliError::file("read", path, e))?;
        file.rewind().map_err(|e| CliError::file("read", path, e))?;
        if text.is_empty() {
            return Ok(None);
        }
        let mut lines = text.lines();
        let (magic, volume, client, number) = (lines.next(), lines.next(), lines.next(), lines.next());
        let client = client.and_then(|hex| u64::from_str_radix(hex, 16).ok()).filter(|client| *client != 0);
        match (magic, volume, client) {
            (Some(MAGIC), Some(volume), Some(client)) => {
                // Not one that was cut short.
                let number = number.filter(|hex| hex.len() == 16).and_then(|hex| u64::from_str_radix(hex, 16).ok());
                Ok(Some(Found { volume: volume.to_owned(), client, volume_id: number.map(VolumeId) }))
            }
            // Cut short: its writer died before it attached.
            (Some(MAGIC), _, _) => Ok(None),
            _ => {
                let text = format!("{}: not a file of ogee; remove it, or use another socket path", path.display());
                Err(CliError::new(ErrorKind::Conflict, text))
            }
        }
    }

    fn write(&self, volume: &str) -> Result<(), CliError> {
        let failed = |e| CliError::file("write", &self.path, e);
        self.file.set_len(0).map_err(failed)?;
        (&self.file).write_all(self.text(volume).as_bytes()).map_err(failed)
    }

    fn text(&self, volume: &str) -> String {
        format!("{MAGIC}\n{volume}\n{:016x}\n", self.client)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_daemon_is_followed_as_the_same_client_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let socket = dir.path().join("s");
        let live = Claim::take(&socket, "vm1").expect("nobody else");
        let refused = Claim::take(&socket, "vm1").expect_err("the first one lives");
        assert_eq!(refused.kind(), ErrorKind::Conflict);
        let client = live.client();
        drop(live); // as a kill does: the file stays, the lock goes
        let next = Claim::take(&socket, "vm1").expect("the first one is dead");
        assert_eq!(next.client(), client);
        next.not_attached();
        let next = Claim::take(&socket, "vm1").expect("nobody else");
        assert_eq!(next.client(), client, "a failed start does not forget the dead one");
        drop(next);
        let other = Claim::take(&socket, "vm2").expect("nobody else");
        assert_ne!(other.client(), client, "another volume, another client");
        other.given_back();
        assert_eq!(fs::read_dir(dir.path()).expect("the folder").count(), 0);
        Claim::take(&socket, "vm1").expect("nobody else").not_attached();
        assert_eq!(fs::read_dir(dir.path()).expect("the folder").count(), 0, "nothing is left of a failed first start");
    }

    #[test]
    fn a_name_that_means_another_volume_is_not_followed() {
        let dir = tempfile::tempdir().expect("a folder");
        let socket = dir.path().join("s");
        let path = dir.path().join("s.client");
        fs::write(&path, "ogee-client 1\nvm1\n12").expect("an older daemon's file");
        let next = Claim::take(&socket, "vm1").expect("nobody else");
        next.identify("vm1", VolumeId(7)).expect("it did not say which volume");
        next.identify("vm1", VolumeId(7)).expect("once more");
        drop(next); // as a kill does
        assert_eq!(fs::read_to_string(&path).expect("the file"), "ogee-client 1\nvm1\n0000000000000012\n0000000000000007\n");
        let next = Claim::take(&socket, "vm1").expect("the first one is dead");
        assert_eq!(next.client(), 0x12);
        next.identify("vm1", VolumeId(7)).expect("the same volume");
        let refused = next.identify("vm1", VolumeId(8)).expect_err("another one has the name");
        assert_eq!(refused.kind(), ErrorKind::Conflict);
        assert!(refused.chain().contains("(8, was 7)"), "{}", refused.chain());
        next.not_attached();
        let other = Claim::take(&socket, "vm2").expect("nobody else");
        other.identify("vm2", VolumeId(7)).expect("it was renamed");
        other.given_back();
        assert!(!path.exists());
    }

    #[test]
    fn a_claim_that_is_handed_over_is_held_without_a_gap() {
        let dir = tempfile::tempdir().expect("a folder");
        let socket = dir.path().join("s");
        let old = Claim::take(&socket, "vm1").expect("nobody else");
        let new = Claim::handed_over(&socket, old.file().expect("a descriptor"), old.client());
        drop(old);
        assert_eq!(Claim::take(&socket, "vm1").expect_err("it is held").kind(), ErrorKind::Conflict);
        let client = new.client();
        drop(new); // as a kill does
        assert_eq!(Claim::take(&socket, "vm1").expect("nobody holds it").client(), client);
    }

    #[test]
    fn foreign_files_and_links_are_left_alone() {
        let dir = tempfile::tempdir().expect("a folder");
        let socket = dir.path().join("s");
        let path = dir.path().join("s.client");
        fs::write(&path, "my notes\n").expect("a file");
        assert_eq!(Claim::take(&socket, "vm1").expect_err("not ours").kind(), ErrorKind::Conflict);
        assert_eq!(fs::read_to_string(&path).expect("the file"), "my notes\n");
        fs::remove_file(&path).expect("the file");
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), &path).expect("a link");
        Claim::take(&socket, "vm1").expect_err("a link");
        assert!(!dir.path().join("elsewhere").exists());
        fs::remove_file(&path).expect("the link");
        fs::write(&path, "ogee-client 1\nvm1\n12").expect("a file");
        assert_eq!(Claim::take(&socket, "vm1").expect("ours").client(), 0x12);
        fs::write(&path, "ogee-client 1\nvm").expect("a file");
        assert_ne!(Claim::take(&socket, "vm1").expect("cut short").client(), 0);
    }
}
