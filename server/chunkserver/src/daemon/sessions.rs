//! Connection generations: a newer connection of a session retires the older ones.
//!
//! Invariant: once `hello` returned for generation `g`, [`Session::is_current`] is false for every lower generation,
//! as long as any connection of the session lives. Together with the term in each write this is why a retried write is
//! never applied after a later write of the same session (ARCHITECTURE section 6).

use ogee_common::id::{ConnectionGeneration, SessionId};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Entry {
    newest: u64,
    connections: usize,
}

/// All sessions of the process.
#[derive(Debug, Default)]
pub(super) struct Sessions(Mutex<HashMap<SessionId, Entry>>);

fn lock(m: &Mutex<HashMap<SessionId, Entry>>) -> MutexGuard<'_, HashMap<SessionId, Entry>> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection of a session; leaving is by drop.
#[derive(Debug)]
pub(super) struct Session {
    all: Arc<Sessions>,
    id: SessionId,
    generation: u64,
}

impl Sessions {
    /// Sessions and their connections that live now.
    pub(super) fn count(&self) -> (usize, usize) {
        let all = lock(&self.0);
        (all.len(), all.values().map(|entry| entry.connections).sum())
    }

    /// A connection says hello. `None`: a newer one exists already.
    pub(super) fn hello(self: &Arc<Self>, id: SessionId, generation: ConnectionGeneration) -> Option<Session> {
        let mut all = lock(&self.0);
        let entry = all.entry(id).or_default();
        if generation.0 == 0 || generation.0 <= entry.newest {
            if entry.connections == 0 {
                all.remove(&id);
            }
            return None;
        }
        entry.newest = generation.0;
        entry.connections += 1;
        Some(Session { all: self.clone(), id, generation: generation.0 })
    }
}

impl Session {
    /// Whether no newer connection of the session said hello.
    pub(super) fn is_current(&self) -> bool {
        lock(&self.all.0).get(&self.id).is_some_and(|e| e.newest == self.generation)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut all = lock(&self.all.0);
        if let Some(entry) = all.get_mut(&self.id) {
            entry.connections -= 1;
            if entry.connections == 0 {
                all.remove(&self.id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_connection_retires_older_ones() {
        let sessions = Arc::new(Sessions::default());
        let generation = ConnectionGeneration;
        let first = sessions.hello(SessionId(1), generation(1)).expect("first");
        let other = sessions.hello(SessionId(2), generation(1)).expect("another session");
        assert!(first.is_current());
        let second = sessions.hello(SessionId(1), generation(2)).expect("second");
        assert!(!first.is_current() && second.is_current() && other.is_current());
        drop(second);
        assert!(!first.is_current(), "the newest generation is remembered while an old connection lives");
        assert!(sessions.hello(SessionId(1), generation(2)).is_none(), "the same generation cannot come twice");
        drop(first);
        drop(other);
        assert!(lock(&sessions.0).is_empty(), "nothing is kept for sessions without connections");
    }
}
