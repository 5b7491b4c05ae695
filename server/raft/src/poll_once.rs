//! Starting a future at the call that makes it.
//!
//! openraft takes requests through asynchronous sends into a bounded queue. The order of requests matters to us (log
//! entries of one follower, proposals of one client), so the send is polled once where the request is made: the queue
//! then holds it, or its place in the line of waiters, before the caller goes on. Invariant: the first poll is exempt
//! from tokio's budget, so a send into a queue with room is always complete after it.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

/// A future on the heap.
pub(crate) type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Polls `future` once: its result, or the future to go on with.
pub(crate) fn start<T: 'static>(future: impl Future<Output = T> + Send + 'static) -> Result<T, Boxed<T>> {
    let mut future: Boxed<T> = Box::pin(tokio::task::unconstrained(future));
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Ok(result),
        Poll::Pending => Err(future),
    }
}

/// Polls a future once that is of no use unless it is ready then.
pub(crate) fn ready<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(tokio::task::unconstrained(future));
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(result) => Some(result),
        Poll::Pending => None,
    }
}
