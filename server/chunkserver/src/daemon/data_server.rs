//! The data protocol served: one handler per connection.
//!
//! Invariants: a client's writes are proposed in the order in which they arrived on their connection (the proposal is
//! queued inside [`Handler::handle`], before the next frame is looked at); a payload that does not match its checksums is
//! refused before it reaches the log; nothing is read for a client before the lease barrier.

use super::copysets::{Copysets, Hosted};
use super::sessions::{Session, Sessions};
use crate::copyset::{ReadAnswer, ReadError, ReadOutcome};
use crate::store::SpaceState;
use bytes::Bytes;
use ogee_common::checksum::fragment_crcs;
use ogee_common::id::{CopysetId, Term};
use ogee_proto::data::{
    Command, DecodeError, Frame, HelloHead, Opcode, OpenLayerHead, PageMapHead, PasteHead, ReadHead, ReadReply, Redirect, Role,
    Status, StatusHead, StatusReply, ThinReply, ZeroHead,
};
use ogee_proto::link::{Handler, Responder};
use ogee_raft::{LeaderHint, Proposed, RaftError, RaftProcess};
use std::sync::Arc;

/// What all connections share.
pub(super) struct DataServer {
    pub(super) own: u32,
    pub(super) cluster: [u8; 16],
    pub(super) process: Arc<RaftProcess>,
    pub(super) copysets: Arc<Copysets>,
    pub(super) sessions: Arc<Sessions>,
}

impl DataServer {
    /// Looks at a hello; the handler for the connection, or why not.
    pub(super) fn accept(self: &Arc<Self>, hello: &HelloHead) -> Result<Connection, Status> {
        let wrong_target = hello.target != 0 && hello.target != self.own;
        if hello.cluster != self.cluster || wrong_target {
            return Err(Status::WrongTarget);
        }
        let session = match hello.role {
            Role::Client => {
                let session = self.sessions.hello(hello.session, hello.generation);
                Some(session.ok_or(Status::OldGeneration)?)
            }
            Role::Chunkserver => None,
            Role::Mds => return Err(Status::WrongTarget),
        };
        Ok(Connection { server: self.clone(), session })
    }
}

/// One connection.
pub(super) struct Connection {
    server: Arc<DataServer>,
    /// `None` for another chunkserver.
    session: Option<Session>,
}

impl Handler for Connection {
    fn handle(&self, frame: Frame, responder: Responder) {
        match (&self.session, frame.header.opcode) {
            (None, Opcode::RaftAppend | Opcode::RaftVote | Opcode::RaftPreVote)
            | (None, Opcode::RaftSnapshot | Opcode::RaftTransfer | Opcode::RaftBeat | Opcode::FetchPages) => {
                self.server.process.handle(frame, responder);
            }
            (Some(session), _) if !session.is_current() => responder.status(Status::OldGeneration),
            (Some(_), Opcode::Write) => self.write(&frame, responder),
            (Some(_), Opcode::Zero) => self.zero(&frame, responder),
            (Some(_), Opcode::OpenLayer) => self.open_layer(&frame, responder),
            (Some(_), Opcode::Read) => self.read(&frame, responder),
            (Some(_), Opcode::PageMap) => self.page_map(&frame, responder),
            (Some(_), Opcode::Paste) => self.paste(&frame, responder),
            (Some(_), Opcode::Status) => self.status(&frame, responder),
            (_, opcode) => responder.bad_request(&format_args!("{opcode:?} is not for this connection")),
        }
    }
}

fn redirect(hint: LeaderHint) -> Bytes {
    Redirect { leader: hint.process, term: hint.term }.encode()
}

fn answer_error(error: RaftError, hint: LeaderHint, responder: Responder) {
    match error {
        RaftError::NotLeader(hint) => responder.send(Status::NotLeader, &redirect(hint), Bytes::new()),
        RaftError::Unknown => responder.send(Status::NotLeader, &redirect(hint), Bytes::new()),
        RaftError::NoQuorum => responder.status(Status::NotReady),
        RaftError::TooLong => responder.bad_request(&error),
        RaftError::NoSpace => responder.status(Status::NoSpace),
        RaftError::Overloaded => responder.status(Status::Overloaded),
        RaftError::Stopped => responder.status(Status::DiskFailed),
    }
}

impl Connection {
    fn hosted(&self, copyset: CopysetId, responder: Responder) -> Option<(Hosted, Responder)> {
        match self.server.copysets.get(copyset) {
            Some(hosted) => Some((hosted, responder)),
            None => {
                responder.status(Status::UnknownCopyset);
                None
            }
        }
    }

    fn decoded<T>(decoded: Result<T, DecodeError>, responder: Responder) -> Option<(T, Responder)> {
        match decoded {
            Ok(value) => Some((value, responder)),
            Err(error) => {
                responder.bad_request(&error);
                None
            }
        }
    }

    fn write(&self, frame: &Frame, responder: Responder) {
        let Some((command, responder)) = Self::decoded(Command::decode(&frame.body), responder) else { return };
        let Command::Write(head, data) = command else {
            return responder.bad_request(&"the body is not a write");
        };
        let Some((hosted, responder)) = self.hosted(head.at.copyset, responder) else { return };
        if !fragment_crcs(head.at.offset, &data).eq(head.crcs.iter().copied()) {
            return responder.status(Status::PayloadChecksum);
        }
        if hosted.store.process().space_state() == SpaceState::Full && hosted.store.needs_space(&head.at) {
            return responder.status(Status::NoSpace);
        }
        Self::propose(&hosted, frame.body.clone(), Some(head.at.term), responder);
    }

    fn zero(&self, frame: &Frame, responder: Responder) {
        let Some((head, responder)) = Self::decoded(ZeroHead::decode(frame.head()), responder) else { return };
        let Some((hosted, responder)) = self.hosted(head.at.copyset, responder) else { return };
        Self::propose(&hosted, frame.body.slice(..frame.head().len()), Some(head.at.term), responder);
    }

    fn open_layer(&self, frame: &Frame, responder: Responder) {
        let Some((head, responder)) = Self::decoded(OpenLayerHead::decode(frame.head()), responder) else { return };
        let Some((hosted, responder)) = self.hosted(head.copyset, responder) else { return };
        Self::propose(&hosted, frame.body.slice(..frame.head().len()), Some(head.term), responder);
    }

    /// Queues the proposal now and answers when it is applied.
    fn propose(hosted: &Hosted, command: Bytes, term: Option<Term>, responder: Responder) {
        let proposal = hosted.group.propose(command, term);
        let group = hosted.group.clone();
        tokio::spawn(async move {
            match proposal.await {
                Ok(Proposed { reply, .. }) => answer_applied(&reply, responder),
                Err(error) => answer_error(error, group.leader(), responder),
            }
        });
    }

    fn read(&self, frame: &Frame, responder: Responder) {
        let Some((head, responder)) = Self::decoded(ReadHead::decode(frame.head()), responder) else { return };
        let Some((hosted, responder)) = self.hosted(head.at.copyset, responder) else { return };
        tokio::spawn(read(hosted, head, responder));
    }

    fn page_map(&self, frame: &Frame, responder: Responder) {
        let Some((head, responder)) = Self::decoded(PageMapHead::decode(frame.head()), responder) else { return };
        let Some((hosted, responder)) = self.hosted(head.at.copyset, responder) else { return };
        tokio::spawn(page_map(hosted, head, responder));
    }

    /// No term: a paste may land whenever it likes.
    fn paste(&self, frame: &Frame, responder: Responder) {
        let Some((command, responder)) = Self::decoded(Command::decode(&frame.body), responder) else { return };
        let Command::Paste(PasteHead { copyset, pages, .. }, data) = command else {
            return responder.bad_request(&"the body is not a paste");
        };
        let Some((hosted, responder)) = self.hosted(copyset, responder) else { return };
        if !pages.matches(&data) {
            return responder.status(Status::PayloadChecksum);
        }
        if hosted.store.process().space_state() == SpaceState::Full {
            return responder.status(Status::NoSpace);
        }
        Self::propose(&hosted, frame.body.clone(), None, responder);
    }

    fn status(&self, frame: &Frame, responder: Responder) {
        let Some((head, responder)) = Self::decoded(StatusHead::decode(frame.head()), responder) else { return };
        let Some((hosted, responder)) = self.hosted(head.copyset, responder) else { return };
        let hint = hosted.group.leader();
        let at = Redirect { leader: hint.process, term: hint.term };
        let reply = StatusReply { at, applied: hosted.group.applied_index() };
        responder.send(Status::Ok, &reply.encode(), Bytes::new());
    }
}

/// The state machine's reply is the status (2 bytes) and the head of the reply.
fn answer_applied(reply: &Bytes, responder: Responder) {
    match reply.split_first_chunk::<2>() {
        Some((status, head)) => {
            responder.send(Status::parse(u16::from_le_bytes(*status)), head, Bytes::new());
        }
        None => responder.status(Status::Unknown),
    }
}

async fn read(hosted: Hosted, head: ReadHead, responder: Responder) {
    if let Err(error) = hosted.group.read_barrier().await {
        return answer_error(error, hosted.group.leader(), responder);
    }
    let outcome = match hosted.store.read(&head).await {
        // Boxed: rare, and it would make every read's task larger.
        Err(ReadError::Corrupt { .. }) => Box::pin(hosted.store.read_or_repair(&head, &hosted.group.others())).await,
        other => other,
    };
    match outcome {
        Ok(ReadAnswer { outcome, missing }) => {
            let (crcs, bytes) = match outcome {
                ReadOutcome::AllZero => (vec![], Bytes::new()),
                ReadOutcome::Data { bytes, crcs } => (crcs, bytes),
            };
            let read = ReadReply { crcs };
            let reply = if head.tells_missing { ThinReply { read, missing }.encode() } else { read.encode() };
            responder.send(Status::Ok, &reply, bytes);
        }
        Err(error) => refuse(&hosted, &error, responder),
    }
}

fn refuse(hosted: &Hosted, error: &ReadError, responder: Responder) {
    let what = error as &dyn std::error::Error;
    tracing::debug!(target: "datapath", copyset = %hosted.copyset, error = what, "read refused");
    answer_applied(&Bytes::from(error.reply()), responder);
}

async fn page_map(hosted: Hosted, head: PageMapHead, responder: Responder) {
    if let Err(error) = hosted.group.read_barrier().await {
        return answer_error(error, hosted.group.leader(), responder);
    }
    match hosted.store.page_map(&head).await {
        Ok(map) => responder.send(Status::Ok, &map.encode(), Bytes::new()),
        Err(error) => refuse(&hosted, &error, responder),
    }
}
