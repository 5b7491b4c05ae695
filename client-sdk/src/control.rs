//! The control thread: one background thread per [`crate::Cluster`] with a current-thread runtime named `ogee-control`.
//!
//! Everything that talks to the MDS runs here, so that gRPC never runs on a thread that serves a virtqueue and the
//! caller's runtimes may come and go. Invariant: the thread ends, and is joined, when its owner is dropped (except when
//! the last owner is a task of the thread itself, which cannot join itself). Absent: any knowledge of what runs here.

use std::io;
use std::thread::{self, JoinHandle};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// Owner of the control thread.
#[derive(Debug)]
pub(crate) struct ControlThread {
    handle: Handle,
    /// Dropping it tells the thread to end.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ControlThread {
    /// Starts the thread. In a simulation there is none: control work shares the caller's runtime.
    pub(crate) fn start() -> io::Result<Self> {
        if ogee_common::sim::running() {
            return Ok(Self { handle: Handle::current(), stop: None, thread: None });
        }
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = thread::Builder::new().name("ogee-control".to_owned()).spawn(move || {
            // An error means that the sender was dropped, which is the signal.
            let _ = runtime.block_on(stopped);
        })?;
        Ok(Self { handle, stop: Some(stop), thread: Some(thread) })
    }

    /// Where to spawn control work.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for ControlThread {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!(target: "controlpath", "the control thread panicked");
        }
    }
}
