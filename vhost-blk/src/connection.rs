//! One connection of a front end: its socket, what answers on it, and the thread that reads it.
//!
//! Made by the server for each front end, and by a daemon that takes one over (`handover/taker.rs`). Invariants: a message that is refused ends the connection and
//! nothing else; the protocol thread stops between two messages when it is asked to (`parking.rs`).

use crate::backend::Backend;
use crate::channel::{Channel, peek_channel};
use crate::handler::Handler;
use crate::parking::{Next, Parking};
use ogee_client::BlockDevice;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use vhost::vhost_user::{BackendReqHandler, Error};

/// What reads and answers messages; it keeps what was negotiated to itself.
pub(crate) type Requests<D> = BackendReqHandler<Mutex<Handler<D>>>;

/// See the module's documentation.
pub(crate) struct Connection<D> {
    /// For waiting, and for closing from another thread.
    pub(crate) stream: UnixStream,
    pub(crate) backend: Arc<Backend<D>>,
    /// The protocol thread's, unless it is parked.
    pub(crate) handler: Arc<Mutex<Handler<D>>>,
    pub(crate) channel: Channel,
    pub(crate) parking: Parking,
}

/// How a conversation ended.
pub(crate) enum Ended {
    /// The connection, for this reason.
    Closed(Error),
    /// Another process goes on with the connection.
    Left,
}

impl<D: BlockDevice> Connection<D> {
    /// A connection on which nothing has been said.
    ///
    /// # Errors
    /// No file descriptors.
    pub(crate) fn new(stream: UnixStream, backend: Arc<Backend<D>>) -> io::Result<(Self, Requests<D>)> {
        let handler = Arc::new(Mutex::new(Handler::new(Arc::clone(&backend))));
        let requests = BackendReqHandler::from_stream(stream.try_clone()?, Arc::clone(&handler));
        let (channel, parking) = (Channel::default(), Parking::new()?);
        Ok((Self { stream, backend, handler, channel, parking }, requests))
    }

    /// Answers the front end's messages until the connection ends or is left.
    pub(crate) fn converse(&self, mut requests: Requests<D>) -> Ended {
        loop {
            match self.parking.next(&self.stream) {
                Ok(Next::Message) => {}
                Ok(Next::Leave) => return Ended::Left,
                Err(error) => return Ended::Closed(Error::ReqHandlerError(error)),
            }
            match peek_channel(&self.stream) {
                Ok(Some(found)) => self.channel.set(found),
                Ok(None) => {}
                // The crate will find the same and say it better.
                Err(error) => tracing::debug!(target: "controlpath", %error, "message not peeked at"),
            }
            if let Err(error) = requests.handle_request() {
                return Ended::Closed(error);
            }
        }
    }
}
