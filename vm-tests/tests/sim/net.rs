//! The simulated network: connections between hosts, with delays, one-way holds, cuts, and hosts that go away with or without a word.
//!
//! Invariants, those of TCP: bytes of one direction arrive in order, once, or the connection ends; nothing is promised between
//! connections. A held link delays what is on it until it is let go, as retransmission does; a cut loses what is under way. Time
//! passes only by [`Net::step`]. Absent: bandwidth.

use bytes::{Buf, Bytes};
use ogee_proto::net::{Connecting, Pipe, Port, Wire};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Number of a host: the last byte of its address.
pub(crate) type Host = u8;

/// Bytes under way in one direction before a writer waits.
const WINDOW: usize = 1 << 20;
/// A connection attempt through a held link looks again after so long.
const RETRY: Duration = Duration::from_millis(20);

/// The address of a host.
pub(crate) fn addr(host: Host) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, host], 7000))
}

fn host_of(addr: SocketAddr) -> Host {
    match addr.ip() {
        IpAddr::V4(ip) => ip.octets()[3],
        IpAddr::V6(_) => 0,
    }
}

#[derive(Debug, Default)]
struct Direction {
    /// With the time of arrival; `None` is the end.
    flying: VecDeque<(u64, Option<Bytes>)>,
    arrived: VecDeque<Bytes>,
    bytes: usize,
    /// Bytes that arrived so far.
    carried: u64,
    ended: bool,
    reset: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

#[derive(Debug)]
struct Connection {
    ends: [Host; 2],
    /// From the first end, and from the second.
    ways: [Direction; 2],
    open: [bool; 2],
}

#[derive(Debug, Default)]
struct Listening {
    waiting: VecDeque<(End, SocketAddr)>,
    waker: Option<Waker>,
}

#[derive(Debug)]
struct State {
    now: u64,
    rng: StdRng,
    connections: BTreeMap<u64, Connection>,
    ports: BTreeMap<SocketAddr, Listening>,
    held: BTreeSet<(Host, Host)>,
    /// Hosts without power: they say nothing, not even that they went.
    dark: BTreeSet<Host>,
    next: u64,
    trace: u64,
    spikes: f64,
}

impl State {
    fn arrival(&mut self) -> u64 {
        let spike = self.spikes;
        let us = if self.rng.random_bool(spike) { self.rng.random_range(2_000..60_000) } else { self.rng.random_range(50..1_500) };
        self.now + us * 1_000
    }

    fn send(&mut self, id: u64, side: usize, bytes: Option<Bytes>) {
        let at = self.arrival();
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let way = &mut connection.ways[side];
        let at = way.flying.back().map_or(at, |(before, _)| at.max(*before));
        way.bytes += bytes.as_ref().map_or(0, Bytes::len);
        way.flying.push_back((at, bytes));
    }

    fn note(&mut self, parts: [u64; 4]) {
        for part in parts {
            self.trace = (self.trace ^ part).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
    }
}

/// The network. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Net(Arc<Mutex<State>>);

impl Net {
    /// A network whose delays follow from a seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let spikes = if rng.random_bool(0.5) { 0.0 } else { 0.02 };
        Self(Arc::new(Mutex::new(State {
            now: 0,
            rng,
            connections: BTreeMap::new(),
            ports: BTreeMap::new(),
            held: BTreeSet::new(),
            dark: BTreeSet::new(),
            next: 1,
            trace: 0xcbf2_9ce4_8422_2325,
            spikes,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What makes connections from and to a host.
    pub(crate) fn wire(&self, host: Host) -> Arc<dyn Wire> {
        Arc::new(HostWire { net: self.clone(), host })
    }

    /// A hash of everything that was delivered, and when.
    pub(crate) fn trace(&self) -> u64 {
        self.lock().trace
    }

    /// Puts something else into the trace.
    pub(crate) fn note(&self, parts: [u64; 4]) {
        self.lock().note(parts);
    }

    /// Time passes: what is due arrives.
    pub(crate) fn step(&self, now: u64) {
        let mut state = self.lock();
        state.now = now;
        let state = &mut *state;
        let mut notes = vec![];
        for (id, connection) in &mut state.connections {
            for side in 0..2 {
                let link = (connection.ends[side], connection.ends[1 - side]);
                let way = &mut connection.ways[side];
                if state.held.contains(&link) || state.dark.contains(&link.1) {
                    continue;
                }
                let mut news = false;
                while way.flying.front().is_some_and(|(at, _)| *at <= now) {
                    let Some((_, bytes)) = way.flying.pop_front() else { break };
                    news = true;
                    notes.push([now, *id, side as u64, bytes.as_ref().map_or(u64::MAX, |b| b.len() as u64)]);
                    match bytes {
                        Some(bytes) => {
                            way.carried += bytes.len() as u64;
                            way.arrived.push_back(bytes);
                        }
                        None => way.ended = true,
                    }
                }
                if news && let Some(reader) = way.reader.take() {
                    reader.wake();
                }
            }
        }
        state.connections.retain(|_, c| c.open != [false; 2]);
        notes.into_iter().for_each(|n| state.note(n));
    }

    /// Nothing gets from one host to another until [`Net::heal`].
    pub(crate) fn hold(&self, from: Host, to: Host) {
        self.lock().held.insert((from, to));
    }

    /// Bytes that got from one host to another on the connections that are open.
    pub(crate) fn carried(&self, from: Host, to: Host) -> u64 {
        let state = self.lock();
        let ways = state.connections.values().flat_map(|c| [(c.ends, &c.ways[0]), ([c.ends[1], c.ends[0]], &c.ways[1])]);
        ways.filter(|(ends, _)| *ends == [from, to]).map(|(_, way)| way.carried).sum()
    }

    /// Lets one link go.
    pub(crate) fn let_go(&self, from: Host, to: Host) {
        self.lock().held.remove(&(from, to));
    }

    /// Breaks the connections between two hosts; what is under way is lost.
    pub(crate) fn cut(&self, a: Host, b: Host) {
        let mut state = self.lock();
        for connection in state.connections.values_mut().filter(|c| c.ends == [a, b] || c.ends == [b, a]) {
            connection.ways.iter_mut().for_each(Direction::break_off);
        }
    }

    /// The host loses power, or has it again; then whoever still speaks to it learns that it had gone.
    pub(crate) fn power(&self, host: Host, on: bool) {
        let mut state = self.lock();
        if !on {
            state.dark.insert(host);
        } else if state.dark.remove(&host) {
            for connection in state.connections.values_mut().filter(|c| c.ends.contains(&host)) {
                connection.ways.iter_mut().for_each(Direction::break_off);
            }
        }
    }
}

impl Direction {
    fn break_off(&mut self) {
        (self.reset, self.bytes) = (true, 0);
        self.flying.clear();
        self.arrived.clear();
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

#[derive(Debug)]
struct HostWire {
    net: Net,
    host: Host,
}

impl Wire for HostWire {
    fn connect(&self, to: SocketAddr) -> Connecting {
        let (net, from) = (self.net.clone(), self.host);
        Box::pin(async move {
            let other = host_of(to);
            let delay = loop {
                {
                    let mut state = net.lock();
                    let blocked = state.held.contains(&(from, other)) || state.held.contains(&(other, from));
                    if !blocked && !state.dark.contains(&other) {
                        break state.arrival() - state.now;
                    }
                }
                tokio::time::sleep(RETRY).await;
            };
            tokio::time::sleep(Duration::from_nanos(2 * delay)).await;
            let mut state = net.lock();
            let id = state.next;
            let Some(port) = state.ports.get_mut(&to) else { return Err(io::ErrorKind::ConnectionRefused.into()) };
            port.waiting.push_back((End { net: net.clone(), id, side: 1 }, addr(from)));
            if let Some(waker) = port.waker.take() {
                waker.wake();
            }
            state.next += 1;
            state.connections.insert(id, Connection { ends: [from, other], ways: Default::default(), open: [true; 2] });
            Ok(Box::new(End { net: net.clone(), id, side: 0 }) as Box<dyn Pipe>)
        })
    }

    fn listen(&self, at: SocketAddr) -> io::Result<Box<dyn Port>> {
        if self.net.lock().ports.insert(at, Listening::default()).is_some() {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        Ok(Box::new(HostPort { net: self.net.clone(), at }))
    }
}

#[derive(Debug)]
struct HostPort {
    net: Net,
    at: SocketAddr,
}

impl Port for HostPort {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(Box<dyn Pipe>, SocketAddr)>> {
        let mut state = self.net.lock();
        let Some(port) = state.ports.get_mut(&self.at) else { return Poll::Ready(Err(io::ErrorKind::NotConnected.into())) };
        if let Some((end, from)) = port.waiting.pop_front() {
            return Poll::Ready(Ok((Box::new(end), from)));
        }
        port.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for HostPort {
    fn drop(&mut self) {
        let gone = self.net.lock().ports.remove(&self.at);
        // Its waiting connections lock the network when they end.
        drop(gone);
    }
}

/// One end of a connection.
#[derive(Debug)]
struct End {
    net: Net,
    id: u64,
    side: usize,
}

impl Drop for End {
    fn drop(&mut self) {
        let mut state = self.net.lock();
        let Some(connection) = state.connections.get_mut(&self.id) else { return };
        connection.open[self.side] = false;
        let host = connection.ends[self.side];
        if !state.dark.contains(&host) {
            state.send(self.id, self.side, None);
        }
    }
}

impl Pipe for End {
    fn poll_first(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<u8>>> {
        let mut state = self.net.lock();
        let Some(connection) = state.connections.get_mut(&self.id) else { return Poll::Ready(Ok(None)) };
        let way = &mut connection.ways[1 - self.side];
        match way.arrived.front() {
            Some(bytes) => Poll::Ready(Ok(bytes.first().copied())),
            None if way.reset => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
            None if way.ended => Poll::Ready(Ok(None)),
            None => {
                way.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl AsyncRead for End {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.net.lock();
        let Some(connection) = state.connections.get_mut(&self.id) else { return Poll::Ready(Ok(())) };
        let way = &mut connection.ways[1 - self.side];
        let Some(bytes) = way.arrived.front_mut() else {
            if way.reset {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            if way.ended {
                return Poll::Ready(Ok(()));
            }
            way.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let len = bytes.len().min(buf.remaining());
        buf.put_slice(&bytes[..len]);
        bytes.advance(len);
        if bytes.is_empty() {
            way.arrived.pop_front();
        }
        way.bytes = way.bytes.saturating_sub(len);
        if let Some(writer) = way.writer.take() {
            writer.wake();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.net.lock();
        let Some(connection) = state.connections.get_mut(&self.id) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        let way = &mut connection.ways[self.side];
        if way.reset {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if way.bytes >= WINDOW {
            way.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let len = buf.len().min(WINDOW);
        state.send(self.id, self.side, Some(Bytes::copy_from_slice(&buf[..len])));
        Poll::Ready(Ok(len))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.net.lock().send(self.id, self.side, None);
        Poll::Ready(Ok(()))
    }
}
