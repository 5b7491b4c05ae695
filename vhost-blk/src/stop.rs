//! The wish that a server ends, and waiting for it among other things.
//!
//! Used by the server's thread and by those that take visitors for it. Invariant: a stop that was asked for is never forgotten; its event stays readable.

use crate::server::{ServeError, io_error};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};
use vmm_sys_util::poll::PollContext;

/// Ends a server from another thread. Clones stop the same server.
#[derive(Debug, Clone)]
pub struct StopHandle(Arc<Stop>);

#[derive(Debug)]
struct Stop {
    requested: AtomicBool,
    event: (EventConsumer, EventNotifier),
}

impl StopHandle {
    /// A handle to give to [`crate::VhostBlkServer::bind`] or [`crate::serve`].
    ///
    /// # Errors
    /// [`ServeError::Io`]: no file descriptor.
    pub fn new() -> Result<Self, ServeError> {
        let event = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC);
        let event = event.map_err(io_error("make stop event"))?;
        Ok(Self(Arc::new(Stop { requested: AtomicBool::new(false), event })))
    }

    /// Asks the server to end; returns at once. Any number of times, before or while it serves.
    pub fn stop(&self) {
        if !self.0.requested.swap(true, Ordering::AcqRel)
            && let Err(error) = self.0.event.1.notify()
        {
            tracing::error!(target: "controlpath", %error, "stop event not sent");
        }
    }

    /// Readable from the stop on.
    pub(crate) fn event(&self) -> &dyn AsRawFd {
        &self.0.event.0
    }

    /// Whether a stop was asked for.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.requested.load(Ordering::Acquire)
    }
}

/// What a wait came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    /// This one is readable, the first of those that are.
    For(usize),
    /// Nothing in time.
    TimedOut,
}

/// Waits until one of `wanted` is readable.
///
/// # Errors
/// The wait itself fails.
pub(crate) fn wait_for_one(wanted: &[&dyn AsRawFd], limit: Option<Duration>) -> Result<Waited, ServeError> {
    let failed = |source: vmm_sys_util::errno::Error| ServeError::Io { verb: "wait for events", source: source.into() };
    let poll = PollContext::new().map_err(failed)?;
    for (token, one) in (0_u32..).zip(wanted) {
        poll.add(*one, token).map_err(failed)?;
    }
    loop {
        let waited = limit.map_or_else(|| poll.wait(), |limit| poll.wait_timeout(limit));
        match waited {
            Ok(events) => match events.iter().map(|event| event.token()).min() {
                Some(token) => return Ok(usize::try_from(token).map_or(Waited::TimedOut, Waited::For)),
                None if limit.is_some() => return Ok(Waited::TimedOut),
                None => {}
            },
            Err(error) if error.errno() == EINTR => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// `EINTR` of Linux.
const EINTR: i32 = 4;
