//! The state file: what is attached, so that a daemon that starts again serves the same sockets.
//!
//! ```text
//! STATE        {"format": "ogee-vhost-blk-state", "version": 1, "volumes": [ a spec each, and its "attach" ]}     mode 0600, by socket
//! STATE.lock   locked by the daemon that uses it          STATE.new   the next one in the making; means nothing
//! ```
//!
//! Invariants: the file under the name is whole: the next one is written beside it, made durable, given the name, and the name made
//! durable before anybody is told; a file that makes no sense is never written over, and no daemon starts on it. It names no
//! client: who may write is the MDS's to say, at each start anew. Of each volume it has the number and the epoch of the last attach (`known.rs`), so that
//! a guest does not go on with another volume, or with one that another client had; older files have neither. Without `--state` nothing is kept.

use super::known::Known;
use super::spec::Spec;
use crate::error::{CliError, ErrorKind};
use ogee_common::limits::{VHOST_STATE_BYTES_MAX, VHOST_VOLUMES_MAX};
use serde::{Deserialize, Serialize};
use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const FORMAT: &str = "ogee-vhost-blk-state";
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    format: String,
    version: u32,
    volumes: Vec<Kept>,
}

/// What is kept of a volume.
// serde does not promise that unknown fields are denied beside a flattened struct; a test holds it to that.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Kept {
    /// As what it is attached.
    #[serde(flatten)]
    pub spec: Spec,
    /// What is known of it beyond its name; nothing in files of older daemons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attach: Option<Known>,
}

impl Kept {
    fn conflicts_with(&self, other: &Self) -> bool {
        let writes = |kept: &Self| kept.attach.filter(|_| !kept.spec.read_only).map(|known| known.volume_id);
        self.spec.conflicts_with(&other.spec) || (writes(self).is_some() && writes(self) == writes(other))
    }
}

/// A state file that this process alone uses.
#[derive(Debug)]
pub(crate) struct StateFile {
    path: PathBuf,
    /// Holds the lock.
    _lock: File,
}

impl StateFile {
    /// Takes the file, and reads what is in it; nothing if there is none yet. Blocks.
    ///
    /// # Errors
    /// Another daemon uses it ([`ErrorKind::Conflict`]), it makes no sense ([`ErrorKind::Failure`]), or the file system refuses.
    pub(crate) fn open(path: &Path) -> Result<(Self, Vec<Kept>), CliError> {
        let lock_path = beside(path, ".lock");
        let lock = File::options().create(true).append(true).mode(0o600).open(&lock_path);
        let lock = lock.map_err(|e| CliError::file("open", &lock_path, e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(CliError::new(ErrorKind::Conflict, format!("{}: another daemon uses it", path.display())));
            }
            Err(TryLockError::Error(e)) => return Err(CliError::file("lock", &lock_path, e)),
        }
        let volumes = match File::open(path) {
            Ok(file) => read(file, path)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => vec![],
            Err(e) => return Err(CliError::file("open", path, e)),
        };
        Ok((Self { path: path.to_owned(), _lock: lock }, volumes))
    }

    /// Replaces what is in it; durable when this returns. Blocks.
    ///
    /// # Errors
    /// What the file system says; the old content may or may not be there still.
    pub(crate) fn save(&self, volumes: Vec<Kept>) -> Result<(), CliError> {
        let text = text_of(volumes)?;
        let new = beside(&self.path, ".new");
        let mut options = File::options();
        let file = options.write(true).create(true).truncate(true).mode(0o600).open(&new);
        let written = file.and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.map_err(|e| CliError::file("write", &new, e))?;
        std::fs::rename(&new, &self.path).map_err(|e| CliError::file("replace", &self.path, e))?;
        let folder = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let synced = File::open(folder).and_then(|folder| folder.sync_all());
        synced.map_err(|e| CliError::file("sync", folder, e))
    }
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}

fn text_of(volumes: Vec<Kept>) -> Result<String, CliError> {
    let contents = Contents { format: FORMAT.to_owned(), version: VERSION, volumes };
    let text = serde_json::to_string_pretty(&contents);
    text.map(|text| text + "\n").map_err(|e| CliError::caused(ErrorKind::Failure, "write the state as JSON", e))
}

fn read(file: File, path: &Path) -> Result<Vec<Kept>, CliError> {
    let mut text = vec![];
    let limit = u64::try_from(VHOST_STATE_BYTES_MAX).unwrap_or(u64::MAX);
    file.take(limit + 1).read_to_end(&mut text).map_err(|e| CliError::file("read", path, e))?;
    parse(&text).map_err(|why| {
        let text = format!("{}: not a state that can be started with: {why}; mend it, or move it away to start with nothing attached", path.display());
        CliError::new(ErrorKind::Failure, text)
    })
}

/// What is in a state file, or the first thing wrong with it. Pure.
fn parse(text: &[u8]) -> Result<Vec<Kept>, String> {
    if text.len() > VHOST_STATE_BYTES_MAX {
        return Err(format!("longer than {VHOST_STATE_BYTES_MAX} bytes"));
    }
    let contents: Contents = serde_json::from_slice(text).map_err(|e| e.to_string())?;
    if contents.format != FORMAT || contents.version != VERSION {
        return Err(format!("format {:?} version {}, not {FORMAT} version {VERSION}", contents.format, contents.version));
    }
    let volumes = contents.volumes;
    if volumes.len() > VHOST_VOLUMES_MAX {
        return Err(format!("{} volumes, at most {VHOST_VOLUMES_MAX} can be attached", volumes.len()));
    }
    for (i, kept) in volumes.iter().enumerate() {
        kept.spec.check().map_err(|refusal| refusal.message)?;
        if let Some(other) = volumes[..i].iter().find(|other| other.conflicts_with(kept)) {
            let (a, b) = (other.spec.socket.display(), kept.spec.socket.display());
            return Err(format!("{} on {a} and {} on {b} cannot be attached both", other.spec.volume, kept.spec.volume));
        }
    }
    Ok(volumes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_many::spec::tests::spec;
    use ogee_common::id::{AttachEpoch, VolumeId};
    use std::os::unix::fs::PermissionsExt;

    const GOLDEN: &str = r#"{
  "format": "ogee-vhost-blk-state",
  "version": 1,
  "volumes": [
    {
      "volume": "team/a",
      "socket": "/run/ogee/a.sock",
      "read_only": false,
      "queues": 2,
      "attach": {
        "volume_id": 7,
        "epoch": 3
      }
    },
    {
      "volume": "golden@v1",
      "socket": "/run/ogee/g.sock",
      "read_only": true,
      "queues": 2,
      "serial": "SN1",
      "socket_mode": 432,
      "socket_group": 64055
    }
  ]
}
"#;
    /// As daemons wrote it that knew volumes by their names alone.
    const OLD: &str = r#"{
  "format": "ogee-vhost-blk-state",
  "version": 1,
  "volumes": [
    {
      "volume": "team/a",
      "socket": "/run/ogee/a.sock",
      "read_only": false,
      "queues": 2
    }
  ]
}
"#;

    fn both() -> Vec<Kept> {
        let (mode, group) = (Some(0o660), Some(64_055));
        let golden = spec("golden@v1", "/run/ogee/g.sock");
        let golden = Spec { read_only: true, serial: Some("SN1".to_owned()), socket_mode: mode, socket_group: group, ..golden };
        let known = Known { volume_id: VolumeId(7), epoch: AttachEpoch(3) };
        vec![Kept { spec: spec("team/a", "/run/ogee/a.sock"), attach: Some(known) }, Kept { spec: golden, attach: None }]
    }

    #[test]
    fn the_file_is_this() {
        assert_eq!(text_of(both()).expect("text"), GOLDEN);
        assert_eq!(parse(GOLDEN.as_bytes()).expect("read again"), both());
        let old = vec![Kept { spec: spec("team/a", "/run/ogee/a.sock"), attach: None }];
        assert_eq!(parse(OLD.as_bytes()).expect("an older one"), old);
        assert_eq!(text_of(old).expect("text"), OLD);
    }

    #[test]
    fn what_was_saved_is_there_again_and_one_daemon_has_it() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("state");
        let (state, none) = StateFile::open(&path).expect("the first start");
        assert_eq!(none, []);
        state.save(both()).expect("saved");
        assert_eq!(std::fs::metadata(&path).expect("the file").permissions().mode() & 0o777, 0o600);
        assert_eq!(StateFile::open(&path).expect_err("it is in use").kind(), ErrorKind::Conflict);
        drop(state); // as a kill does
        std::fs::write(beside(&path, ".new"), "half").expect("a crash in the middle");
        let (state, found) = StateFile::open(&path).expect("the next start");
        assert_eq!(found, both());
        state.save(vec![]).expect("saved");
        drop(state);
        assert_eq!(StateFile::open(&path).expect("once more").1, []);
        let missing = dir.path().join("none/state");
        assert_eq!(StateFile::open(&missing).expect_err("no folder").kind(), ErrorKind::NotFound);
    }

    #[test]
    fn a_damaged_file_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("state");
        let twice = GOLDEN.replace("/run/ogee/g.sock", "/run/ogee/a.sock");
        let writers = text_of(["a", "b"].map(|name| Kept { spec: spec(name, &format!("/{name}")), ..both().remove(0) }).to_vec()).expect("text");
        for (damaged, word) in [
            (String::new(), "EOF"),
            (GOLDEN[..GOLDEN.len() / 2].to_owned(), "EOF"),
            ("\0".repeat(4096), "expected"),
            (GOLDEN.replace("\"version\": 1", "\"version\": 2"), "version 2"),
            (GOLDEN.replace("ogee-vhost", "other"), "format"),
            (GOLDEN.replace("\"queues\": 2", "\"queues\": 0"), "queues"),
            (GOLDEN.replace("\"queues\": 2", "\"colour\": 2"), "colour"),
            (GOLDEN.replace("\"epoch\": 3", "\"epoch\": 3, \"taste\": 1"), "taste"),
            (GOLDEN.replace("\"volume_id\": 7,", ""), "volume_id"),
            (GOLDEN.replace("/run/ogee/a", "run/ogee/a"), "absolute"),
            (twice, "cannot be attached both"),
            (writers, "cannot be attached both"),
        ] {
            std::fs::write(&path, &damaged).expect("written");
            let refused = StateFile::open(&path).expect_err(word);
            let said = refused.chain();
            assert_eq!(refused.kind(), ErrorKind::Failure, "{said}");
            assert!(said.contains(word) && said.contains("state"), "{word}: {said}");
            assert_eq!(std::fs::read(&path).expect("the file"), damaged.as_bytes());
        }
    }
}
