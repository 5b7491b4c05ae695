//! A connection of an NBD client without its socket: requests in flight, bytes to send, bytes that came.
//!
//! ```text
//!            submit                last byte sent               reply                  take
//!   Free ───────────────> Queued ────────────────> Sent ──────────────────> Answered ────────> Free
//! ```
//!
//! Source: proto.md of the NBD project, "Request message" and "Simple reply message". Invariants: pure; data is sent from and
//! received into the memory that came with the request, but for what was received in one piece with the head of its reply;
//! nothing a server says is trusted: a reply has to name a request that was sent and is not answered. Absent: bounds of
//! their own; there are as many requests as the load has in flight.

use ogee_nbd::wire::{Fields, REQUEST_BYTES, REQUEST_MAGIC, SIMPLE_REPLY_MAGIC, command};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::task::Waker;

/// Bytes of a simple reply without its data.
const REPLY_BYTES: usize = 16;
/// Buffers given to one vectored write: of as many requests with data as half of it.
const SLICES_MAX: usize = 64;

/// What is asked for. The data of a write, or room for that of a read, goes beside it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    /// Of [`command`].
    pub(super) kind: u16,
    /// Byte of the export.
    pub(super) offset: u64,
    /// Bytes.
    pub(super) len: u32,
}

impl Request {
    /// The end of a connection; it has no reply.
    pub(super) const DISCONNECT: Self = Self { kind: command::DISC, offset: 0, len: 0 };

    /// The request as it is sent, without flags.
    pub(super) fn head(&self, cookie: u64) -> [u8; REQUEST_BYTES] {
        let mut head = [0; REQUEST_BYTES];
        head[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        head[6..8].copy_from_slice(&self.kind.to_be_bytes());
        head[8..16].copy_from_slice(&cookie.to_be_bytes());
        head[16..24].copy_from_slice(&self.offset.to_be_bytes());
        head[24..].copy_from_slice(&self.len.to_be_bytes());
        head
    }

    /// Bytes of data that a server sends if all is well.
    const fn reply_len(&self) -> usize {
        if self.kind == command::READ { self.len as usize } else { 0 }
    }
}

/// The server does not speak NBD as it should.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum ProtocolError {
    /// The stream is out of step.
    #[error("a reply begins with {magic:#010x}")]
    Magic {
        /// As sent.
        magic: u32,
    },
    /// A reply to nothing.
    #[error("a reply to a request {cookie:#x} that waits for none")]
    Cookie {
        /// As sent.
        cookie: u64,
    },
}

/// See the module's documentation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Progress {
    #[default]
    Free,
    Queued,
    Sent,
    Answered {
        errno: u32,
    },
}

/// The place of a request; its number is the cookie.
#[derive(Debug)]
struct Place {
    request: Request,
    progress: Progress,
    data: Vec<u8>,
    waker: Option<Waker>,
}

/// A request on its way out.
#[derive(Debug)]
struct Outgoing {
    place: usize,
    head: [u8; REQUEST_BYTES],
}

/// Data of a reply that is not complete.
#[derive(Debug, Clone, Copy)]
struct Body {
    place: usize,
    /// Bytes that are there.
    have: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Link {
    places: Vec<Place>,
    free: Vec<usize>,
    outgoing: VecDeque<Outgoing>,
    /// Bytes of the first of them that were sent.
    sent: usize,
    input: Vec<u8>,
    /// Bytes of the input that hold something: less than the head of a reply, and nothing while there is a body.
    held: usize,
    body: Option<Body>,
}

impl Link {
    /// A fresh connection that receives so many bytes at once besides data, at least 4 KiB.
    pub(super) fn new(input_bytes: usize) -> Self {
        Self {
            places: vec![],
            free: vec![],
            outgoing: VecDeque::new(),
            sent: 0,
            input: vec![0; input_bytes.max(4096)],
            held: 0,
            body: None,
        }
    }

    /// Queues a request; gives its place.
    pub(super) fn submit(&mut self, request: Request, data: Vec<u8>) -> usize {
        let carries = matches!(request.kind, command::READ | command::WRITE);
        assert!(!carries || data.len() >= request.len as usize, "a request came with too little memory");
        let place = Place { request, progress: Progress::Queued, data, waker: None };
        let number = match self.free.pop() {
            Some(number) => {
                self.places[number] = place;
                number
            }
            None => {
                self.places.push(place);
                self.places.len() - 1
            }
        };
        self.outgoing.push_back(Outgoing { place: number, head: request.head(number as u64) });
        number
    }

    /// Whether there is something to send.
    pub(super) fn has_output(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether nothing is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.free.len() == self.places.len()
    }

    fn payload(&self, outgoing: &Outgoing) -> &[u8] {
        let place = &self.places[outgoing.place];
        if place.request.kind == command::WRITE { &place.data[..place.request.len as usize] } else { &[] }
    }

    /// What is sent next.
    pub(super) fn output(&self) -> SmallVec<[IoSlice<'_>; SLICES_MAX]> {
        let mut skipped = self.sent;
        let mut slices = SmallVec::new();
        for outgoing in self.outgoing.iter().take(SLICES_MAX / 2) {
            for part in [&outgoing.head[..], self.payload(outgoing)] {
                let from = skipped.min(part.len());
                skipped -= from;
                if from < part.len() {
                    slices.push(IoSlice::new(&part[from..]));
                }
            }
        }
        slices
    }

    /// So many bytes of it were sent.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        while let Some(first) = self.outgoing.front() {
            let (place, whole) = (first.place, REQUEST_BYTES + self.payload(first).len());
            if self.sent < whole {
                return;
            }
            self.sent -= whole;
            self.places[place].progress = Progress::Sent;
            self.outgoing.pop_front();
        }
    }

    /// Where what comes next has to go, in this order. Never without room.
    pub(super) fn space(&mut self) -> [IoSliceMut<'_>; 2] {
        let rest: &mut [u8] = match self.body {
            Some(Body { place, have }) => {
                let place = &mut self.places[place];
                let len = place.request.reply_len();
                &mut place.data[have..len]
            }
            None => &mut [],
        };
        [IoSliceMut::new(rest), IoSliceMut::new(&mut self.input[self.held..])]
    }

    /// So many bytes came there.
    ///
    /// # Errors
    /// They are no replies; the connection is of no use any more.
    pub(super) fn received(&mut self, bytes: usize) -> Result<(), ProtocolError> {
        let mut more = bytes;
        if let Some(Body { place, have }) = self.body {
            let part = more.min(self.places[place].request.reply_len() - have);
            more -= part;
            self.data_came(place, have + part);
        }
        self.held += more;
        let mut from = 0;
        while self.body.is_none() && self.held - from >= REPLY_BYTES {
            let place = self.reply(from)?;
            from += REPLY_BYTES;
            if self.places[place].progress == (Progress::Answered { errno: 0 }) {
                let part = (self.held - from).min(self.places[place].request.reply_len());
                self.places[place].data[..part].copy_from_slice(&self.input[from..from + part]);
                from += part;
                self.data_came(place, part);
            } else {
                self.wake(place);
            }
        }
        self.input.copy_within(from..self.held, 0);
        self.held -= from;
        Ok(())
    }

    /// The head of a reply at this place of the input.
    fn reply(&mut self, at: usize) -> Result<usize, ProtocolError> {
        let mut fields = Fields(&self.input[at..at + REPLY_BYTES]);
        let magic = fields.u32().unwrap_or_default();
        let errno = fields.u32().unwrap_or_default();
        let cookie = fields.u64().unwrap_or_default();
        if magic != SIMPLE_REPLY_MAGIC {
            return Err(ProtocolError::Magic { magic });
        }
        let number = usize::try_from(cookie).unwrap_or(usize::MAX);
        let place = self.places.get_mut(number).filter(|place| place.progress == Progress::Sent);
        place.ok_or(ProtocolError::Cookie { cookie })?.progress = Progress::Answered { errno };
        Ok(number)
    }

    /// So many bytes of the data of a reply are there.
    fn data_came(&mut self, place: usize, have: usize) {
        let is_whole = have == self.places[place].request.reply_len();
        self.body = (!is_whole).then_some(Body { place, have });
        if is_whole {
            self.wake(place);
        }
    }

    fn wake(&mut self, place: usize) {
        if let Some(waker) = self.places[place].waker.take() {
            waker.wake();
        }
    }

    /// Wakes everybody who waits.
    pub(super) fn wake_all(&mut self) {
        self.places.iter_mut().filter_map(|place| place.waker.take()).for_each(Waker::wake);
    }

    /// Who waits for the answer in a place.
    pub(super) fn wait(&mut self, place: usize, waker: &Waker) {
        let waits = &mut self.places[place].waker;
        if !waits.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *waits = Some(waker.clone());
        }
    }

    /// The answer in a place and the memory that went with the request, once all of it is there; the place is free then.
    pub(super) fn take(&mut self, number: usize) -> Option<(u32, Vec<u8>)> {
        let is_coming = self.body.is_some_and(|body| body.place == number);
        let place = &mut self.places[number];
        let Progress::Answered { errno } = place.progress else { return None };
        if is_coming {
            return None;
        }
        place.progress = Progress::Free;
        self.free.push(number);
        Some((errno, std::mem::take(&mut place.data)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(cookie: u64, errno: u32, data: &[u8]) -> Vec<u8> {
        [&SIMPLE_REPLY_MAGIC.to_be_bytes()[..], &errno.to_be_bytes(), &cookie.to_be_bytes(), data].concat()
    }

    /// What the link wants to send, in steps of so many bytes.
    fn send_all(link: &mut Link, step: usize) -> Vec<u8> {
        let mut all = vec![];
        while link.has_output() {
            let next: Vec<u8> = link.output().iter().flat_map(|slice| slice.to_vec()).take(step).collect();
            assert!(!next.is_empty());
            link.sent(next.len());
            all.extend(next);
        }
        assert!(link.output().is_empty());
        all
    }

    /// Gives the link these bytes, at most so many at once.
    fn receive_all(link: &mut Link, mut bytes: &[u8], step: usize) -> Result<(), ProtocolError> {
        while !bytes.is_empty() {
            let mut done = 0;
            for slice in &mut link.space() {
                let part = slice.len().min(bytes.len()).min(step - done);
                slice[..part].copy_from_slice(&bytes[..part]);
                bytes = &bytes[part..];
                done += part;
            }
            link.received(done)?;
        }
        Ok(())
    }

    const READ: Request = Request { kind: command::READ, offset: 8192, len: 3 };
    const WRITE: Request = Request { kind: command::WRITE, offset: 512, len: 2 };

    #[test]
    fn the_transcript_is_golden() {
        for step in [1, 7, 1000] {
            let mut link = Link::new(0);
            assert_eq!((link.submit(READ, vec![0; 3]), link.submit(WRITE, vec![b'a', b'b', b'c'])), (0, 1));
            let read = b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x20\0\0\0\0\x03";
            let write = b"\x25\x60\x95\x13\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\x02\0\0\0\0\x02ab";
            assert_eq!(send_all(&mut link, step), [&read[..], write].concat());
        }
    }

    #[test]
    fn replies_come_in_any_order_and_in_any_pieces() {
        for step in [1, 2, 15, 16, 17, 18, 19, 1000] {
            let mut link = Link::new(0);
            let (read, write) = (link.submit(READ, vec![0; 5]), link.submit(WRITE, vec![7; 2]));
            let other = link.submit(READ, vec![0; 3]);
            send_all(&mut link, 1000);
            assert!(link.take(read).is_none() && !link.is_idle());
            let replies = [reply(2, 0, b"xyz"), reply(1, 28, b""), reply(0, 0, b"abc")].concat();
            receive_all(&mut link, &replies, step).expect("replies");
            assert_eq!(link.take(write), Some((28, vec![7; 2])));
            assert_eq!(link.take(read), Some((0, b"abc\0\0".to_vec())));
            assert_eq!(link.take(other), Some((0, b"xyz".to_vec())));
            assert!(link.is_idle());
            assert_eq!(link.submit(WRITE, vec![0; 2]), other, "places are used again");
        }
    }

    #[test]
    fn data_that_is_not_whole_is_not_given_out_and_a_failed_read_has_none() {
        let mut link = Link::new(0);
        let (one, two) = (link.submit(READ, vec![0; 3]), link.submit(READ, vec![0; 3]));
        send_all(&mut link, 1000);
        receive_all(&mut link, &reply(0, 0, b"ab"), 1000).expect("a part of a reply");
        assert_eq!(link.take(one), None);
        receive_all(&mut link, &[b"c".to_vec(), reply(1, 5, b"")].concat(), 1000).expect("the rest");
        assert_eq!((link.take(one), link.take(two)), (Some((0, b"abc".to_vec())), Some((5, vec![0; 3]))));
    }

    #[test]
    fn what_is_no_reply_to_us_is_refused() {
        let broken = |bytes: &[u8]| {
            let mut link = Link::new(0);
            link.submit(WRITE, vec![0; 2]);
            send_all(&mut link, 1000);
            link.submit(WRITE, vec![0; 2]);
            receive_all(&mut link, bytes, 1000).expect_err("refused")
        };
        assert_eq!(broken(&[0xff; 16]), ProtocolError::Magic { magic: u32::MAX });
        assert_eq!(broken(&reply(1, 0, b"")), ProtocolError::Cookie { cookie: 1 }, "not sent yet");
        assert_eq!(broken(&reply(2, 0, b"")), ProtocolError::Cookie { cookie: 2 }, "never made");
        assert_eq!(broken(&reply(u64::MAX, 0, b"")), ProtocolError::Cookie { cookie: u64::MAX });
        let twice = [reply(0, 0, b""), reply(0, 0, b"")].concat();
        assert_eq!(broken(&twice), ProtocolError::Cookie { cookie: 0 }, "answered already");
    }
}
