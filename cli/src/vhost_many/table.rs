//! What is attached, by socket. Pure: whoever holds the table decides, others do.
//!
//! Invariants: a socket is there once, and a volume once for writing, under whatever names, from before it is attached until after it was given back; an
//! entry that is *kept* is one whose attach was answered or stood in the state file, and that nobody detaches. Only kept
//! entries go into the state file and can be detached.

use super::attachment::Attachment;
use super::known::Known;
use super::protocol::{Refusal, Which};
use super::spec::Spec;
use super::state::Kept;
use crate::error::ErrorKind;
use ogee_common::id::VolumeId;
use ogee_common::limits::VHOST_VOLUMES_MAX;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

struct Entry {
    attachment: Arc<Attachment>,
    is_kept: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Table {
    entries: BTreeMap<PathBuf, Entry>,
    is_closed: bool,
}

impl Table {
    /// Adds one that is not kept yet.
    ///
    /// # Errors
    /// The daemon ends ([`ErrorKind::Unavailable`]), the socket or the volume is there already ([`ErrorKind::Conflict`]), or there are
    /// too many ([`ErrorKind::NoSpace`]).
    pub(super) fn add(&mut self, attachment: &Arc<Attachment>) -> Result<(), Refusal> {
        if self.is_closed {
            return Err(Refusal::new(ErrorKind::Unavailable, "the daemon is ending"));
        }
        if self.entries.len() >= VHOST_VOLUMES_MAX {
            return Err(Refusal::new(ErrorKind::NoSpace, format!("{VHOST_VOLUMES_MAX} volumes are attached, which is the limit")));
        }
        let spec = attachment.spec();
        let mut others = self.entries.values().map(|entry| entry.attachment.spec());
        if let Some(other) = others.find(|other| other.conflicts_with(spec)) {
            let text = format!("{} is attached on {}", other.volume, other.socket.display());
            return Err(Refusal::new(ErrorKind::Conflict, text));
        }
        if let Some(known) = attachment.known() {
            self.check_writers(attachment, known.volume_id)?;
        }
        self.entries.insert(spec.socket.clone(), Entry { attachment: Arc::clone(attachment), is_kept: false });
        Ok(())
    }

    /// Makes known which volume it is, of one of which nothing was known.
    ///
    /// # Errors
    /// Another one writes that volume ([`ErrorKind::Conflict`]).
    pub(super) fn identify(&self, attachment: &Attachment, volume_id: VolumeId) -> Result<(), Refusal> {
        self.check_writers(attachment, volume_id)?;
        attachment.learn(Known::unattached(volume_id));
        Ok(())
    }

    /// To the MDS all of a daemon is one client, which may take a volume from itself: it must not come to that.
    fn check_writers(&self, attachment: &Attachment, volume_id: VolumeId) -> Result<(), Refusal> {
        let spec = attachment.spec();
        let mut others = self.entries.values().map(|entry| &entry.attachment);
        match others.find(|other| other.spec().socket != spec.socket && other.writes(volume_id)) {
            Some(other) if !spec.read_only => {
                let (name, socket) = (&other.spec().volume, other.spec().socket.display());
                let text = format!("{} is volume {}, which is attached as {name} on {socket}", spec.volume, volume_id.0);
                Err(Refusal::new(ErrorKind::Conflict, text))
            }
            _ => Ok(()),
        }
    }

    /// From now on it is kept, or not.
    pub(super) fn keep(&mut self, attachment: &Arc<Attachment>, is_kept: bool) {
        if let Some(entry) = self.entries.get_mut(&attachment.spec().socket)
            && Arc::ptr_eq(&entry.attachment, attachment)
        {
            entry.is_kept = is_kept;
        }
    }

    /// Removes it; not another one on the same socket.
    pub(super) fn remove(&mut self, attachment: &Arc<Attachment>) {
        let socket = &attachment.spec().socket;
        if self.entries.get(socket).is_some_and(|entry| Arc::ptr_eq(&entry.attachment, attachment)) {
            self.entries.remove(socket);
        }
    }

    /// The kept one that is meant.
    ///
    /// # Errors
    /// There is none ([`ErrorKind::NotFound`]), there are several ([`ErrorKind::Usage`]), or it is not kept: it is being attached or
    /// detached ([`ErrorKind::Conflict`]).
    pub(super) fn find(&self, which: &Which) -> Result<Arc<Attachment>, Refusal> {
        let is_meant = |spec: &Spec| match which {
            Which::Volume(volume) => spec.volume == volume.trim_start_matches('/'),
            Which::Socket(socket) => spec.socket == *socket,
        };
        let mut found = self.entries.values().filter(|entry| is_meant(entry.attachment.spec()));
        let what = match which {
            Which::Volume(volume) => volume.clone(),
            Which::Socket(socket) => socket.display().to_string(),
        };
        match (found.next(), found.next()) {
            (None, _) => Err(Refusal::new(ErrorKind::NotFound, format!("{what} is not attached here"))),
            (Some(_), Some(_)) => {
                Err(Refusal::new(ErrorKind::Usage, format!("{what} is attached on several sockets; say which one with --socket")))
            }
            (Some(entry), None) if entry.is_kept => Ok(Arc::clone(&entry.attachment)),
            (Some(_), None) => Err(Refusal::new(ErrorKind::Conflict, format!("{what} is being attached or detached"))),
        }
    }

    /// Everything, by socket.
    pub(super) fn all(&self) -> Vec<Arc<Attachment>> {
        self.entries.values().map(|entry| Arc::clone(&entry.attachment)).collect()
    }

    /// What the state file has to have, by socket.
    pub(super) fn kept(&self) -> Vec<Kept> {
        self.entries.values().filter(|entry| entry.is_kept).map(|entry| entry.attachment.kept()).collect()
    }

    /// Nothing can be added any more; gives what is there.
    pub(super) fn close(&mut self) -> Vec<Arc<Attachment>> {
        self.is_closed = true;
        self.all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vhost_many::spec::tests::spec;
    use ogee_common::id::AttachEpoch;

    fn attachment(spec: Spec) -> Arc<Attachment> {
        let name = spec.check().expect("good");
        Arc::new(Attachment::new(Kept { spec, attach: None }, name))
    }

    /// One of which it is known which volume it is.
    fn identified(spec: Spec, volume: u64) -> Arc<Attachment> {
        let attachment = attachment(spec);
        attachment.learn(Known::unattached(VolumeId(volume)));
        attachment
    }

    fn kind(refused: Result<Arc<Attachment>, Refusal>) -> ErrorKind {
        refused.err().expect("refused").kind
    }

    #[test]
    fn what_is_attached_is_there_once_and_found_by_either_name() {
        let mut table = Table::default();
        let volume = |name: &str| Which::Volume(name.to_owned());
        let (a, b) = (attachment(spec("a", "/a")), attachment(spec("team/b", "/b")));
        table.add(&a).expect("room");
        table.add(&b).expect("room");
        assert_eq!(table.add(&attachment(spec("c", "/a"))).expect_err("the socket").kind, ErrorKind::Conflict);
        assert_eq!(table.add(&attachment(spec("a", "/c"))).expect_err("the volume").kind, ErrorKind::Conflict);
        assert_eq!(kind(table.find(&volume("a"))), ErrorKind::Conflict, "its attach is not answered");
        assert!(table.kept().is_empty());
        table.keep(&a, true);
        table.keep(&b, true);
        assert!(Arc::ptr_eq(&table.find(&volume("a")).expect("there"), &a));
        assert!(Arc::ptr_eq(&table.find(&volume("/team/b")).expect("there"), &b));
        assert!(Arc::ptr_eq(&table.find(&Which::Socket("/b".into())).expect("there"), &b));
        assert_eq!(kind(table.find(&volume("c"))), ErrorKind::NotFound);
        let known = Known { volume_id: VolumeId(7), epoch: AttachEpoch(3) };
        b.learn(known);
        let (kept_a, kept_b) = (Kept { spec: spec("a", "/a"), attach: None }, Kept { spec: spec("team/b", "/b"), attach: Some(known) });
        assert_eq!(table.kept(), [kept_a, kept_b.clone()]);
        table.keep(&a, false);
        assert_eq!(table.kept(), [kept_b]);
        table.remove(&attachment(spec("a", "/a")));
        assert_eq!(table.all().len(), 2, "that was another one");
        table.remove(&a);
        table.add(&attachment(spec("a", "/c"))).expect("it is gone");
        assert_eq!(table.close().len(), 2);
        assert_eq!(table.add(&attachment(spec("d", "/d"))).expect_err("closed").kind, ErrorKind::Unavailable);
    }

    #[test]
    fn a_volume_is_written_once_whatever_it_is_called() {
        let mut table = Table::default();
        let reader = |name, socket| Spec { read_only: true, ..spec(name, socket) };
        table.add(&identified(spec("old", "/a"), 1)).expect("room");
        let refused = table.add(&identified(spec("new", "/b"), 1)).expect_err("it was renamed");
        assert_eq!(refused.kind, ErrorKind::Conflict);
        assert!(refused.message.contains("volume 1") && refused.message.contains("old on /a"), "{}", refused.message);
        table.add(&identified(reader("new", "/b"), 1)).expect("it is only read");
        table.add(&identified(spec("other", "/c"), 2)).expect("another volume");
        let unknown = attachment(spec("new", "/d"));
        table.add(&unknown).expect("nothing is known of it");
        assert_eq!(table.identify(&unknown, VolumeId(1)).expect_err("now it is").kind, ErrorKind::Conflict);
        assert_eq!(unknown.known(), None);
        table.identify(&unknown, VolumeId(3)).expect("nobody else has it");
        assert_eq!(unknown.known(), Some(Known::unattached(VolumeId(3))));
    }

    #[test]
    fn readers_of_one_volume_are_told_apart_by_socket() {
        let mut table = Table::default();
        for socket in ["/a", "/b"] {
            let reader = attachment(Spec { read_only: true, ..spec("golden@v1", socket) });
            table.add(&reader).expect("room");
            table.keep(&reader, true);
        }
        assert_eq!(kind(table.find(&Which::Volume("golden@v1".to_owned()))), ErrorKind::Usage);
        assert!(table.find(&Which::Socket("/b".into())).is_ok());
    }

    #[test]
    fn there_is_a_limit() {
        let mut table = Table::default();
        for i in 0..VHOST_VOLUMES_MAX {
            table.add(&attachment(spec(&format!("v{i}"), &format!("/{i}")))).expect("room");
        }
        assert_eq!(table.add(&attachment(spec("last", "/last"))).expect_err("full").kind, ErrorKind::NoSpace);
    }
}
