//! What is known of a volume beyond its name: which one it is, and its last attach by this daemon. Pure.
//!
//! Used by the volume's keeper (`attachment.rs`), the table and the state file. A name says little: volumes are renamed while they are
//! attached, and another one may get the name; and while a daemon is dead another client may attach the volume, write it and give it back. A guest
//! that waits for its socket has requests in flight and pages in its cache that belong to the volume as it left it. Invariants: a volume that was served here
//! is attached again, without being asked for, only if it is the same one and no attach but ours came between; who asks for a volume
//! gets it in whatever state it is. Absent: look and attach in one step. Between them, a moment, somebody could attach, write and give back; the MDS has
//! no attach that names the epoch it follows on a volume that nobody has.

use super::protocol::Refusal;
use super::spec::Spec;
use crate::error::ErrorKind;
use ogee_client::{AttachInfo, OpenMode};
use ogee_common::id::{AttachEpoch, VolumeId};
use ogee_proto::mds;
use serde::{Deserialize, Serialize};

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Known {
    /// The volume's number, which it has for good.
    pub volume_id: VolumeId,
    /// The last attach for writing; 0 if there was none.
    pub epoch: AttachEpoch,
}

impl Known {
    /// A volume that was not attached yet.
    pub(super) const fn unattached(volume_id: VolumeId) -> Self {
        Self { volume_id, epoch: AttachEpoch(0) }
    }
}

impl From<&AttachInfo> for Known {
    fn from(info: &AttachInfo) -> Self {
        Self { volume_id: info.volume, epoch: info.epoch }
    }
}

/// What the MDS has under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// The volume's number.
    pub(super) volume_id: VolumeId,
    /// Its last attach for writing, by anybody.
    pub(super) epoch: AttachEpoch,
    /// Whether that attach has not been given back.
    pub(super) is_attached: bool,
}

impl From<&mds::Volume> for Found {
    fn from(volume: &mds::Volume) -> Self {
        Self { volume_id: VolumeId(volume.id), epoch: AttachEpoch(volume.attach_epoch), is_attached: volume.attached }
    }
}

/// How a volume is to be opened of which so much is known; nothing is known of one from the state file of an older daemon.
///
/// # Errors
/// [`ErrorKind::Conflict`]: the name means another volume, or another client had the volume since.
pub(super) fn mode(spec: &Spec, known: Option<Known>, found: Found) -> Result<OpenMode, Refusal> {
    let again = OpenMode::ReadWrite { steal: false };
    match known {
        Some(Known { volume_id, .. }) if volume_id != found.volume_id => {
            let (now, was) = (found.volume_id.0, volume_id.0);
            let text = format!("{} is another volume now ({now}, was {was}): detach it and attach it again", spec.volume);
            Err(Refusal::new(ErrorKind::Conflict, text))
        }
        _ if spec.read_only => Ok(OpenMode::ReadOnly),
        Some(Known { epoch, .. }) if epoch.0 != 0 && epoch != found.epoch => {
            // Ours, if it was granted and nobody lived to write it down: then this very client has it still.
            if found.is_attached { Ok(OpenMode::Resume) } else { Err(taken(spec)) }
        }
        _ => Ok(again),
    }
}

/// Another client had the volume since it was served here.
pub(super) fn taken(spec: &Spec) -> Refusal {
    let why = "was attached by another client, or taken back to a snapshot, since it was served here: detach it and attach it again";
    Refusal::new(ErrorKind::Conflict, format!("{} {why}", spec.volume))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_many::spec::tests::spec;

    #[test]
    fn a_volume_is_opened_again_if_it_is_the_same_and_nobody_had_it_since() {
        let known = |volume, epoch| Some(Known { volume_id: VolumeId(volume), epoch: AttachEpoch(epoch) });
        let found = |epoch, is_attached| Found { volume_id: VolumeId(7), epoch: AttachEpoch(epoch), is_attached };
        let again = Ok(OpenMode::ReadWrite { steal: false });
        let writer = spec("a", "/a");
        assert_eq!(mode(&writer, None, found(3, true)), again, "an older daemon wrote nothing down");
        assert_eq!(mode(&writer, known(7, 0), found(3, false)), again, "it was asked for");
        assert_eq!(mode(&writer, known(7, 3), found(3, true)), again, "we, or our predecessor, have it");
        assert_eq!(mode(&writer, known(7, 3), found(3, false)), again, "we gave it back");
        assert_eq!(mode(&writer, known(7, 3), found(4, true)), Ok(OpenMode::Resume), "that may be ours");
        let refused = mode(&writer, known(7, 3), found(4, false)).expect_err("another had it");
        assert_eq!((refused.kind, refused.message.contains("another client")), (ErrorKind::Conflict, true));
        let refused = mode(&writer, known(6, 3), found(3, true)).expect_err("another volume");
        assert_eq!((refused.kind, refused.message.contains("another volume now (7, was 6)")), (ErrorKind::Conflict, true));

        let reader = Spec { read_only: true, ..spec("a@s", "/a") };
        assert_eq!(mode(&reader, known(7, 0), found(4, true)), Ok(OpenMode::ReadOnly));
        assert!(mode(&reader, known(6, 0), found(4, true)).is_err(), "its guest has pages of another one");
    }
}
