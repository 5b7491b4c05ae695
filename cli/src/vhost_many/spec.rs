//! What one volume of the daemon is attached as: what `attach` asks for, the state file keeps and `ls` shows. Pure.
//!
//! Invariants: a [`Spec`] that passed [`Spec::check`] has a name that parses, an absolute socket path that fits into an address, and
//! numbers that the server takes. That nobody else has the socket or the volume is not known here, nor which volume the name means. Absent: `steal`, which is
//! said once and never kept: a daemon that starts again must not take a volume from who took it meanwhile.

use super::protocol::Refusal;
use crate::error::ErrorKind;
use crate::vhost::serial;
use ogee_common::limits::VHOST_QUEUES_MAX;
use ogee_common::name::VolumeRef;
use ogee_vhost_blk::SOCKET_PATH_BYTES_MAX;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// One volume and its socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Spec {
    /// The volume, or with `read_only` also a snapshot: `path` or `path@snapshot`.
    pub volume: String,
    /// The UNIX socket: absolute, at most 107 bytes.
    pub socket: PathBuf,
    /// Whether writes are refused.
    #[serde(default)]
    pub read_only: bool,
    /// Queues offered, 1 to 64.
    #[serde(default = "queues_default")]
    pub queues: u16,
    /// What the guest sees as the disk's serial, 1 to 20 printable characters; none: the volume's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Permission bits of the socket; none: the daemon's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_mode: Option<u32>,
    /// Id of the socket's group; none: the daemon's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket_group: Option<u32>,
}

const fn queues_default() -> u16 {
    ogee_vhost_blk::NUM_QUEUES_DEFAULT
}

impl Spec {
    /// Checks what can be checked without looking at anything; gives the volume's name.
    ///
    /// # Errors
    /// The first thing wrong, [`ErrorKind::Usage`].
    pub(crate) fn check(&self) -> Result<VolumeRef, Refusal> {
        let wrong = |text: String| Refusal::new(ErrorKind::Usage, text);
        let name = VolumeRef::parse(&self.volume).map_err(|e| wrong(format!("volume {:?}: {e}", self.volume)))?;
        if name.snapshot.is_some() && !self.read_only {
            return Err(wrong(format!("{name} is a snapshot; attach it read-only or clone it")));
        }
        let path = self.socket.as_os_str();
        let is_path = self.socket.is_absolute() && self.socket.file_name().is_some() && !path.as_encoded_bytes().contains(&0);
        if !is_path {
            return Err(wrong(format!("socket {path:?}: must be an absolute path of a file")));
        }
        if path.len() > SOCKET_PATH_BYTES_MAX {
            let text = format!("socket {path:?}: {} bytes, a socket path has at most {SOCKET_PATH_BYTES_MAX}", path.len());
            return Err(wrong(text));
        }
        if !(1..=VHOST_QUEUES_MAX).contains(&self.queues) {
            return Err(wrong(format!("{} queues: 1 to {VHOST_QUEUES_MAX} can be served", self.queues)));
        }
        if let Some(text) = &self.serial {
            serial(text).map_err(wrong)?;
        }
        if self.socket_mode.is_some_and(|mode| mode > 0o777) || self.socket_group == Some(u32::MAX) {
            return Err(wrong("socket mode or group: out of range".to_owned()));
        }
        Ok(name)
    }

    /// Whether both cannot be there at once: one socket, or two that write the volume of one name. The same volume may have had another name.
    #[must_use]
    pub(crate) fn conflicts_with(&self, other: &Self) -> bool {
        // A leading slash names the same volume.
        let is_same_name = || self.volume.trim_start_matches('/') == other.volume.trim_start_matches('/');
        self.socket == other.socket || (!self.read_only && !other.read_only && is_same_name())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A good one.
    pub(in crate::vhost_many) fn spec(volume: &str, socket: &str) -> Spec {
        Spec {
            volume: volume.to_owned(),
            socket: socket.into(),
            read_only: false,
            queues: 2,
            serial: None,
            socket_mode: None,
            socket_group: None,
        }
    }

    #[test]
    fn good_ones_pass_and_each_wrong_field_is_named() {
        assert_eq!(spec("team/a", "/s").check().expect("good").to_string(), "team/a");
        assert!(Spec { read_only: true, ..spec("a@s", "/s") }.check().is_ok());
        let long = format!("/{}", "x".repeat(SOCKET_PATH_BYTES_MAX));
        for (bad, word) in [
            (spec("", "/s"), "volume"),
            (spec("a\n", "/s"), "volume"),
            (spec("a@s", "/s"), "snapshot"),
            (spec("a", "s"), "absolute"),
            (spec("a", "/"), "absolute"),
            (spec("a", "/s\0"), "absolute"),
            (spec("a", &long), "at most 107"),
            (Spec { queues: 0, ..spec("a", "/s") }, "queues"),
            (Spec { queues: 65, ..spec("a", "/s") }, "queues"),
            (Spec { serial: Some("a b".to_owned()), ..spec("a", "/s") }, "serial"),
            (Spec { socket_mode: Some(0o1777), ..spec("a", "/s") }, "mode"),
            (Spec { socket_group: Some(u32::MAX), ..spec("a", "/s") }, "group"),
        ] {
            let refusal = bad.check().expect_err(word);
            assert_eq!(refusal.kind, ErrorKind::Usage);
            assert!(refusal.message.contains(word), "{word}: {}", refusal.message);
        }
    }

    #[test]
    fn a_socket_and_a_writer_are_there_once() {
        let reader = |volume, socket| Spec { read_only: true, ..spec(volume, socket) };
        assert!(spec("a", "/s").conflicts_with(&spec("b", "/s")));
        assert!(spec("a", "/s").conflicts_with(&spec("/a", "/t")));
        assert!(!spec("a", "/s").conflicts_with(&reader("a", "/t")));
        assert!(!reader("a", "/s").conflicts_with(&reader("a", "/t")));
        assert!(reader("a", "/s").conflicts_with(&reader("b", "/s")));
    }
}
