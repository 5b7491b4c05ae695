//! A small durable state machine: a list of commands. What it applied can be looked at while it runs.

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use ogee_common::id::Term;
use ogee_raft::{
    Applied, ApplyEntry, EntryKind, FetchHandler, LogPos, RaftSnapshot, SnapshotSource, StateMachine, StateMachineError,
};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::watch;

/// Commands in one part of a snapshot.
const PART: usize = 16;

/// What is applied.
#[derive(Debug, Default, Clone)]
pub struct State {
    pub applied: Applied,
    pub commands: Vec<(LogPos, Bytes)>,
}

/// What tests may see and do.
#[derive(Debug, Default)]
pub struct Watched {
    state: Mutex<State>,
    checkpoint: Mutex<State>,
    /// Parts that were served to others.
    pub fetches: AtomicU64,
    /// Calls of apply.
    pub batches: AtomicU64,
    pub installs: AtomicU64,
    /// Makes the next apply fail.
    pub broken: AtomicBool,
    /// Makes fetches fail.
    pub withhold: AtomicBool,
    /// Makes apply wait while it is true.
    pub held: watch::Sender<bool>,
}

impl Watched {
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics while it holds the state")
    }

    fn saved(&self) -> MutexGuard<'_, State> {
        self.checkpoint.lock().expect("no test panics while it holds the state")
    }

    pub fn commands(&self) -> Vec<Bytes> {
        self.state().commands.iter().map(|(_, c)| c.clone()).collect()
    }
}

/// The state machine; its checkpoint is one file.
pub struct Machine {
    pub watched: Arc<Watched>,
    pub file: PathBuf,
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Broken(&'static str);

fn failed(why: &'static str) -> StateMachineError {
    StateMachineError { verb: "use test machine", source: Box::new(Broken(why)) }
}

fn put(out: &mut BytesMut, bytes: &[u8]) {
    out.extend_from_slice(&u32::try_from(bytes.len()).expect("short").to_le_bytes());
    out.extend_from_slice(bytes);
}

fn take<'a>(from: &mut &'a [u8]) -> &'a [u8] {
    let (len, rest) = from.split_at(4);
    let len = u32::from_le_bytes(len.try_into().expect("four bytes")) as usize;
    let (now, rest) = rest.split_at(len);
    *from = rest;
    now
}

fn put_pos(out: &mut BytesMut, pos: Option<LogPos>) {
    let (term, index) = pos.map_or((u64::MAX, 0), |p| (p.term.0, p.index));
    put(out, &[term.to_le_bytes(), index.to_le_bytes()].concat());
}

fn take_pos(from: &mut &[u8]) -> Option<LogPos> {
    let bytes = take(from);
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    (word(0) != u64::MAX).then(|| LogPos { term: Term(word(0)), index: word(8) })
}

fn put_commands(out: &mut BytesMut, commands: &[(LogPos, Bytes)]) {
    for (pos, command) in commands {
        put_pos(out, Some(*pos));
        put(out, command);
    }
}

fn take_commands(mut from: &[u8]) -> Vec<(LogPos, Bytes)> {
    let mut out = Vec::new();
    while !from.is_empty() {
        let pos = take_pos(&mut from).expect("a command has a position");
        out.push((pos, Bytes::copy_from_slice(take(&mut from))));
    }
    out
}

impl Machine {
    fn save(&self, state: &State) {
        let mut out = BytesMut::new();
        put_pos(&mut out, state.applied.pos);
        put(&mut out, &state.applied.membership);
        put_commands(&mut out, &state.commands);
        let fresh = self.file.with_extension("new");
        std::fs::write(&fresh, &out).expect("write checkpoint");
        #[allow(clippy::disallowed_methods)]
        std::fs::rename(&fresh, &self.file).expect("rename checkpoint");
        *self.watched.saved() = state.clone();
    }
}

impl StateMachine for Machine {
    async fn load(&mut self) -> Result<Applied, StateMachineError> {
        if let Ok(bytes) = std::fs::read(&self.file) {
            let mut from = &bytes[..];
            let applied = Applied { pos: take_pos(&mut from), membership: Bytes::copy_from_slice(take(&mut from)) };
            let state = State { applied, commands: take_commands(from) };
            *self.watched.saved() = state.clone();
            *self.watched.state() = state;
        }
        Ok(self.watched.state().applied.clone())
    }

    async fn apply(&mut self, entries: Vec<ApplyEntry>) -> Result<Vec<Bytes>, StateMachineError> {
        if self.watched.broken.load(Ordering::Relaxed) {
            return Err(failed("told to break"));
        }
        let mut held = self.watched.held.subscribe();
        // An error cannot be: the sender lives in `watched`.
        let _ = held.wait_for(|held| !*held).await;
        self.watched.batches.fetch_add(1, Ordering::Relaxed);
        let mut state = self.watched.state();
        let mut replies = Vec::with_capacity(entries.len());
        for entry in entries {
            let next = state.applied.pos.map_or(0, |p| p.index + 1);
            assert_eq!(entry.pos.index, next, "an entry is missing or comes twice");
            state.applied.pos = Some(entry.pos);
            replies.push(match entry.kind {
                EntryKind::Blank => Bytes::new(),
                EntryKind::Membership(m) => {
                    state.applied.membership = m;
                    Bytes::new()
                }
                EntryKind::Command(command) => {
                    state.commands.push((entry.pos, command));
                    Bytes::copy_from_slice(&(state.commands.len() as u64).to_le_bytes())
                }
            });
        }
        Ok(replies)
    }

    async fn checkpoint(&mut self) -> Result<Applied, StateMachineError> {
        let state = self.watched.state().clone();
        self.save(&state);
        Ok(state.applied)
    }

    async fn snapshot(&mut self) -> Result<RaftSnapshot, StateMachineError> {
        let state = self.watched.saved().clone();
        let parts = state.commands.chunks(PART).count() as u64;
        Ok(RaftSnapshot { applied: state.applied, manifest: Bytes::copy_from_slice(&parts.to_le_bytes()) })
    }

    async fn install(
        &mut self,
        snapshot: RaftSnapshot,
        source: &(impl SnapshotSource + 'static),
    ) -> Result<(), StateMachineError> {
        let parts = u64::from_le_bytes(snapshot.manifest[..].try_into().map_err(|_| failed("bad manifest"))?);
        let mut commands = Vec::new();
        for part in 0..parts {
            commands.extend(take_commands(&source.fetch(Bytes::copy_from_slice(&part.to_le_bytes())).await?));
        }
        let state = State { applied: snapshot.applied, commands };
        self.save(&state);
        *self.watched.state() = state;
        self.watched.installs.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Serves parts of the last checkpoint.
pub struct Parts(pub Arc<Watched>);

impl FetchHandler for Parts {
    fn fetch(&self, request: Bytes) -> BoxFuture<'_, Result<Bytes, StateMachineError>> {
        Box::pin(async move {
            if self.0.withhold.load(Ordering::Relaxed) {
                return Err(failed("told to withhold"));
            }
            let part = u64::from_le_bytes(request[..].try_into().map_err(|_| failed("bad request"))?);
            let part = usize::try_from(part).map_err(|_| failed("bad part"))?;
            self.0.fetches.fetch_add(1, Ordering::Relaxed);
            let mut out = BytesMut::new();
            put_commands(&mut out, self.0.saved().commands.chunks(PART).nth(part).ok_or_else(|| failed("no part"))?);
            Ok(out.freeze())
        })
    }
}
