//! A place between two messages of the front end, where the protocol thread can be held.
//!
//! Used by a hand-over: while the thread is parked no message of the front end is begun, none is half read, and the handler belongs to whoever parked it.
//!
//! ```text
//!             ask                  seen by the thread              release
//!   Driving ───────► Asked ──────────────────────────► Parked ───────────────► Driving
//!      ▲               │ not in time                     │ leave
//!      └───────────────┘                                 └───────► Left
//! ```
//!
//! Invariants: only one thread parks; a thread that has ended is never parked; what the front end sends meanwhile waits in the socket.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::poll::PollContext;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Driving,
    Asked,
    Parked,
    Left,
}

/// What the thread does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// There is a message, or the end of the connection.
    Message,
    /// The connection is another process's now.
    Leave,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Parking {
    state: Mutex<State>,
    changed: Condvar,
    wish: (EventConsumer, EventNotifier),
}

const STREAM: u32 = 0;
const WISH: u32 = 1;

impl Parking {
    /// A thread that drives.
    ///
    /// # Errors
    /// No file descriptor.
    pub(crate) fn new() -> io::Result<Self> {
        let wish = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)?;
        Ok(Self { state: Mutex::new(State::Driving), changed: Condvar::new(), wish })
    }

    /// The thread's part: waits for the next message on `stream`, and parks when it is asked to.
    ///
    /// # Errors
    /// The wait fails.
    pub(crate) fn next(&self, stream: &UnixStream) -> io::Result<Next> {
        let poll = PollContext::new().map_err(io::Error::from)?;
        poll.add(stream, STREAM).map_err(io::Error::from)?;
        poll.add(&self.wish.0, WISH).map_err(io::Error::from)?;
        loop {
            let (mut message, mut asked) = (false, false);
            match poll.wait() {
                Ok(events) => events.iter().for_each(|event| match event.token() {
                    WISH => asked = true,
                    _ => message = true,
                }),
                Err(error) if error.errno() == rustix::io::Errno::INTR.raw_os_error() => continue,
                Err(error) => return Err(error.into()),
            }
            if asked && self.park_here() == State::Left {
                return Ok(Next::Leave);
            }
            if message {
                return Ok(Next::Message);
            }
        }
    }

    /// Parks if that is still wanted, and says how it ended.
    fn park_here(&self) -> State {
        // An event that is gone already has done its work.
        let _ = self.wish.0.consume();
        let mut state = self.lock();
        if *state == State::Asked {
            *state = State::Parked;
            self.changed.notify_all();
        }
        let parked = |state: &mut State| *state == State::Parked;
        *self.changed.wait_while(state, parked).unwrap_or_else(PoisonError::into_inner)
    }

    /// Parks the thread; false if it did not come between two messages within `limit`.
    pub(crate) fn park(&self, limit: Duration) -> bool {
        *self.lock() = State::Asked;
        if self.wish.1.notify().is_err() {
            *self.lock() = State::Driving;
            return false;
        }
        let asked = |state: &mut State| *state == State::Asked;
        let waited = self.changed.wait_timeout_while(self.lock(), limit, asked);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if *state == State::Parked {
            return true;
        }
        *state = State::Driving;
        false
    }

    /// A parked thread drives on.
    pub(crate) fn release(&self) {
        self.end_parking(State::Driving);
    }

    /// A parked thread leaves the connection without closing it.
    pub(crate) fn leave(&self) {
        self.end_parking(State::Left);
    }

    fn end_parking(&self, state: State) {
        *self.lock() = state;
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn a_parked_thread_begins_no_message_until_it_is_released() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let parking = Parking::new().unwrap();
        assert!(!parking.park(Duration::from_millis(1)), "there is no thread");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| (parking.next(&ours).unwrap(), parking.next(&ours).unwrap()));
            assert!(parking.park(LIMIT));
            theirs.write_all(b"message").unwrap();
            assert!(!thread.is_finished());
            parking.release();
            // The message was not read, so the second wait ends too, unless it is parked first.
            assert_eq!(thread.join().unwrap(), (Next::Message, Next::Message));
        });
    }

    #[test]
    fn a_parked_thread_may_be_sent_away() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let parking = Parking::new().unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| parking.next(&ours).unwrap());
            assert!(parking.park(LIMIT));
            parking.leave();
            assert_eq!(thread.join().unwrap(), Next::Leave);
        });
        assert!(!parking.park(Duration::from_millis(1)), "it is gone");
    }
}
