//! Fake chunkservers on real sockets: one in-memory state machine for all of them, and scripted misbehaviour.
//!
//! The rules of the state machine are those of the real one: fence, minimum seq, term, ancestry, checksums. What a
//! connection has not executed is dropped when its session says hello again with a newer generation.

use bytes::Bytes;
use ogee_common::checksum::{PAGE, fragment_crcs};
use ogee_common::geometry::page_fragments;
use ogee_common::id::Term;
use ogee_proto::data::{
    Ancestor, ChunkPages, Command, Frame, HelloHead, LayerHead, OpenLayerHead, Opcode, PROTOCOL_MAX, PageMapHead, PageMapReply, ReadHead,
    ReadReply, Redirect, Status, StatusHead, StatusReply, ThinReply, WriteHead, ZeroHead,
};
use ogee_proto::link::{Handler, Responder, serve_up_to};
use ogee_proto::net;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{Shutdown, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::Notify;

/// What a rule does to a request.
#[derive(Clone)]
pub(crate) enum Reaction {
    /// Refuses it.
    Reply(Status, Bytes),
    /// Closes the connection without executing it.
    Close,
    /// Executes it and closes the connection.
    CloseAfter,
    /// Executes it and says nothing.
    SilentAfter,
    /// The connection executes nothing more until `release_stalls`.
    Stall,
    /// Executes it when notified.
    Wait(Arc<Notify>),
    /// Executes it and damages the payload of the reply.
    Damage,
}

struct Rule {
    opcode: Opcode,
    times: usize,
    reaction: Reaction,
}

/// Something a chunkserver saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Seen {
    Hello { chunkserver: u32, session: u64, generation: u64 },
    /// A request arrived, whatever became of it.
    Arrived { chunkserver: u32, opcode: Opcode, copyset: u32, seq: u64, term: u64 },
    /// A request was executed.
    Executed { chunkserver: u32, opcode: Opcode, status: Status, seq: u64 },
    Mark(&'static str),
}

type Page = Option<Box<[u8; PAGE]>>;

#[derive(Default)]
struct Layer {
    fence: u64,
    min_seq: u64,
    chain: Vec<Ancestor>,
    gone: bool,
    /// (chunk, page) -> seq -> content; `None` is a zero page.
    pages: HashMap<(u32, u32), BTreeMap<u64, Page>>,
}

pub(crate) struct Copyset {
    pub(crate) leader: u32,
    pub(crate) term: u64,
    layers: HashMap<u64, Layer>,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) copysets: HashMap<u32, Copyset>,
    rules: Vec<Rule>,
    pub(crate) log: Vec<Seen>,
    generations: HashMap<(u64, u32), u64>,
    /// The version of the protocol that they speak, if it is an older one.
    pub(crate) version: Option<u16>,
    /// A fault: what older connections hold back is not dropped.
    pub(crate) ignores_generations: bool,
    /// Never forgotten, so that what a connection holds back outlives its socket.
    connections: Vec<Arc<Conn>>,
}

/// All chunkservers.
pub(crate) struct Chunkservers {
    state: Mutex<State>,
    addrs: Mutex<BTreeMap<u32, SocketAddr>>,
}

struct Conn {
    all: Arc<Chunkservers>,
    chunkserver: u32,
    session: u64,
    socket: std::net::TcpStream,
    stalled: Mutex<Option<VecDeque<(Frame, Responder)>>>,
}

struct ConnHandler(Arc<Conn>);

impl Handler for ConnHandler {
    fn handle(&self, frame: Frame, responder: Responder) {
        Conn::handle(&self.0, frame, responder);
    }
}

impl Chunkservers {
    /// Starts `count` chunkservers and makes copysets 1 to 4, all of them on each.
    pub(crate) async fn start(count: u32) -> Arc<Self> {
        let this = Arc::new(Self { state: Mutex::default(), addrs: Mutex::default() });
        for id in 1..=count {
            this.listen(id).await;
        }
        let copyset = |id: u32| Copyset { leader: id % count + 1, term: 5, layers: HashMap::new() };
        this.state().copysets = (1..=4).map(|id| (id, copyset(id))).collect();
        this
    }

    /// Listens for chunkserver `id` on a new address.
    pub(crate) async fn listen(self: &Arc<Self>, id: u32) {
        let listener = net::listen(([127, 0, 0, 1], 0).into()).await.expect("listen");
        self.addrs.lock().expect("no test panics under the lock").insert(id, listener.local_addr().expect("an address"));
        let all = self.clone();
        tokio::spawn(async move {
            while let Ok(accepted) = net::accept(&listener).await {
                let all = all.clone();
                tokio::spawn(async move {
                    let socket = accepted.second_descriptor().expect("a second descriptor");
                    let stream = net::Network::default().admit(accepted).await.expect("a plain connection");
                    let version = all.state().version.unwrap_or(PROTOCOL_MAX);
                    let _ = serve_up_to(version, stream, id, |hello| all.accept(id, hello, socket)).await;
                });
            }
        });
    }

    fn accept(self: &Arc<Self>, id: u32, hello: &HelloHead, socket: std::net::TcpStream) -> Result<ConnHandler, Status> {
        let mut state = self.state();
        let (session, generation) = (hello.session.0, hello.generation.0);
        state.log.push(Seen::Hello { chunkserver: id, session, generation });
        if hello.target != id {
            return Err(Status::WrongTarget);
        }
        let newest = state.generations.entry((session, id)).or_default();
        if generation <= *newest {
            return Err(Status::OldGeneration);
        }
        *newest = generation;
        let keep = state.ignores_generations;
        let older = state.connections.iter().filter(|_| !keep);
        for conn in older.filter(|c| (c.session, c.chunkserver) == (session, id)) {
            if let Some(queue) = conn.stalled.lock().expect("no test panics under the lock").as_mut() {
                queue.clear();
            }
        }
        let stalled = Mutex::new(None);
        let conn = Arc::new(Conn { all: self.clone(), chunkserver: id, session, socket, stalled });
        state.connections.push(conn.clone());
        Ok(ConnHandler(conn))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test panics under the lock")
    }

    pub(crate) fn addrs(&self) -> BTreeMap<u32, SocketAddr> {
        self.addrs.lock().expect("no test panics under the lock").clone()
    }

    /// The next `times` requests of a kind get `reaction`.
    pub(crate) fn script(&self, opcode: Opcode, times: usize, reaction: Reaction) {
        self.state().rules.push(Rule { opcode, times, reaction });
    }

    pub(crate) fn clear_rules(&self) {
        self.state().rules.clear();
    }

    pub(crate) fn mark(&self, text: &'static str) {
        self.state().log.push(Seen::Mark(text));
    }

    pub(crate) fn log(&self) -> Vec<Seen> {
        self.state().log.clone()
    }

    /// How many requests of a kind arrived.
    pub(crate) fn arrived(&self, wanted: Opcode) -> usize {
        let is = |s: &&Seen| matches!(s, Seen::Arrived { opcode, .. } if *opcode == wanted);
        self.state().log.iter().filter(is).count()
    }

    /// Another chunkserver leads all copysets, in a new term.
    pub(crate) fn move_leaders(&self) {
        for copyset in self.state().copysets.values_mut() {
            copyset.leader = copyset.leader % 3 + 1;
            copyset.term += 1;
        }
    }

    /// Nobody leads any copyset.
    pub(crate) fn depose_leaders(&self) {
        self.state().copysets.values_mut().for_each(|c| c.leader = 0);
    }

    /// What stalled connections held back is executed now, unless it was dropped.
    pub(crate) fn release_stalls(&self) {
        let conns: Vec<_> = self.state().connections.clone();
        for conn in conns {
            for (frame, responder) in conn.stalled.lock().expect("no test panics under the lock").take().unwrap_or_default() {
                conn.execute_and_reply(&frame, Some(responder), false);
            }
        }
    }

    /// The MDS's seal: refuse seqs below `seq` in every copyset.
    pub(crate) fn seal(&self, layer: u64, seq: u64) {
        for copyset in self.state().copysets.values_mut() {
            let layer = copyset.layers.entry(layer).or_default();
            layer.min_seq = layer.min_seq.max(seq);
        }
    }

    /// Another client opened the layer with this epoch.
    pub(crate) fn fence(&self, layer: u64, epoch: u64) {
        for copyset in self.state().copysets.values_mut() {
            copyset.layers.entry(layer).or_default().fence = epoch;
        }
    }

    /// The copysets forget that the layer was opened.
    pub(crate) fn forget_fences(&self) {
        self.state().copysets.values_mut().flat_map(|c| c.layers.values_mut()).for_each(|l| l.fence = 0);
    }

    pub(crate) fn drop_layer(&self, layer: u64) {
        for copyset in self.state().copysets.values_mut() {
            copyset.layers.entry(layer).or_default().gone = true;
        }
    }
}

impl Conn {
    fn handle(self: &Arc<Self>, frame: Frame, responder: Responder) {
        let reaction = {
            let mut state = self.all.state();
            let (copyset, seq, term) = summary(&frame);
            let (chunkserver, opcode) = (self.chunkserver, frame.header.opcode);
            state.log.push(Seen::Arrived { chunkserver, opcode, copyset, seq, term });
            if let Some(queue) = self.stalled.lock().expect("no test panics under the lock").as_mut() {
                queue.push_back((frame, responder));
                return;
            }
            let matches = |r: &Rule| r.opcode == opcode && r.times > 0;
            state.rules.iter_mut().find(|r| matches(r)).map(|rule| {
                rule.times -= 1;
                rule.reaction.clone()
            })
        };
        match reaction {
            None => self.execute_and_reply(&frame, Some(responder), false),
            Some(Reaction::Damage) => self.execute_and_reply(&frame, Some(responder), true),
            Some(Reaction::Reply(status, head)) => responder.send(status, &head, Bytes::new()),
            Some(Reaction::Close) => self.close(),
            Some(Reaction::CloseAfter) => {
                self.execute_and_reply(&frame, None, false);
                self.close();
            }
            Some(Reaction::SilentAfter) => self.execute_and_reply(&frame, None, false),
            Some(Reaction::Stall) => {
                *self.stalled.lock().expect("no test panics under the lock") = Some(VecDeque::from([(frame, responder)]));
            }
            Some(Reaction::Wait(notify)) => {
                let this = self.clone();
                tokio::spawn(async move {
                    notify.notified().await;
                    this.execute_and_reply(&frame, Some(responder), false);
                });
            }
        }
    }

    fn close(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn execute_and_reply(&self, frame: &Frame, responder: Option<Responder>, damage: bool) {
        let (status, head, mut payload) = {
            let mut state = self.all.state();
            let reply = execute(&mut state, self.chunkserver, frame);
            let (_, seq, _) = summary(frame);
            let (chunkserver, opcode, status) = (self.chunkserver, frame.header.opcode, reply.0);
            state.log.push(Seen::Executed { chunkserver, opcode, status, seq });
            reply
        };
        if damage {
            payload[0] ^= 1;
        }
        if let Some(responder) = responder {
            responder.send(status, &head, Bytes::from(payload));
        }
    }
}

fn summary(frame: &Frame) -> (u32, u64, u64) {
    let of = |at: LayerHead| (at.copyset.0, at.seq.0, at.term.0);
    match frame.header.opcode {
        Opcode::Write => of(WriteHead::decode(frame.head()).expect("a write head").at),
        Opcode::Zero => of(ZeroHead::decode(frame.head()).expect("a zero head").at),
        Opcode::Read => of(ReadHead::decode(frame.head()).expect("a read head").at),
        Opcode::PageMap => of(PageMapHead::decode(frame.head()).expect("a page map head").at),
        Opcode::Paste => match Command::decode(&frame.body) {
            Ok(Command::Paste(head, _)) => (head.copyset.0, 0, 0),
            other => panic!("{other:?}"),
        },
        Opcode::OpenLayer => {
            let h = OpenLayerHead::decode(frame.head()).expect("an open head");
            (h.copyset.0, h.seq.0, h.term.0)
        }
        _ => (0, 0, 0),
    }
}

type Reply = (Status, Bytes, Vec<u8>);

fn bare(status: Status) -> Reply {
    (status, Bytes::new(), Vec::new())
}

fn execute(state: &mut State, me: u32, frame: &Frame) -> Reply {
    if frame.header.opcode == Opcode::Status {
        let head = StatusHead::decode(frame.head()).expect("a status head");
        let Some(c) = state.copysets.get(&head.copyset.0) else { return bare(Status::UnknownCopyset) };
        let at = Redirect { leader: c.leader, term: Term(c.term) };
        return (Status::Ok, StatusReply { at, applied: 0 }.encode(), Vec::new());
    }
    let (copyset, seq, term) = summary(frame);
    let Some(c) = state.copysets.get_mut(&copyset) else { return bare(Status::UnknownCopyset) };
    let is_write = !matches!(frame.header.opcode, Opcode::Read | Opcode::PageMap | Opcode::Paste);
    if c.leader != me || (is_write && c.term != term) {
        let redirect = Redirect { leader: c.leader, term: Term(c.term) };
        return (Status::NotLeader, redirect.encode(), Vec::new());
    }
    match frame.header.opcode {
        Opcode::OpenLayer => {
            let head = OpenLayerHead::decode(frame.head()).expect("an open head");
            let layer = c.layers.entry(head.layer.0).or_default();
            if layer.gone {
                return bare(Status::LayerGone);
            }
            if head.epoch.0 < layer.fence {
                return bare(Status::Fenced);
            }
            (layer.fence, layer.min_seq, layer.chain) = (head.epoch.0, layer.min_seq.max(seq), head.chain);
            bare(Status::Ok)
        }
        Opcode::Read => {
            let head = ReadHead::decode(frame.head()).expect("a read head");
            read(c, &head)
        }
        Opcode::PageMap => page_map(c, &PageMapHead::decode(frame.head()).expect("a page map head")),
        Opcode::Paste => paste(c, frame),
        _ => change(c, frame),
    }
}

fn check(c: &Copyset, at: &LayerHead) -> Result<(), Reply> {
    match c.layers.get(&at.layer.0) {
        Some(l) if l.gone => Err(bare(Status::LayerGone)),
        Some(l) if at.epoch.0 < l.fence => Err(bare(Status::Fenced)),
        Some(l) if at.epoch.0 == l.fence => Ok(()),
        _ => Err(bare(Status::LayerNotOpen)),
    }
}

/// Fills what no version with seq 0 has.
fn paste(c: &mut Copyset, frame: &Frame) -> Reply {
    let Ok(Command::Paste(head, data)) = Command::decode(&frame.body) else { return bare(Status::BadRequest) };
    if !head.pages.matches(&data) {
        return bare(Status::PayloadChecksum);
    }
    let layer = c.layers.entry(head.layer.0).or_default();
    if layer.gone {
        return bare(Status::LayerGone);
    }
    let mut carried = data.chunks_exact(PAGE);
    for page in 0..256u32 {
        let is_in = |set: &[u8; 32]| set[page as usize / 8] >> (page % 8) & 1 == 1;
        let key = (head.chunk.0, u32::from(head.pages.row) * 256 + page);
        if is_in(&head.pages.data) {
            let content = carried.next().expect("a page for each").try_into().expect("a whole page");
            layer.pages.entry(key).or_default().entry(0).or_insert(Some(Box::new(content)));
        } else if is_in(&head.pages.zero) {
            layer.pages.entry(key).or_default().entry(0).or_insert(None);
        }
    }
    bare(Status::Ok)
}

/// Whether no version has a page.
fn is_missing(c: &Copyset, layer: u64, seq: u64, chain: &[Ancestor], at: (u32, u32)) -> bool {
    let mut own = std::iter::once((layer, seq)).chain(chain.iter().map(|a| (a.layer.0, a.seq.0)));
    !own.any(|(layer, seq)| c.layers.get(&layer).and_then(|l| l.pages.get(&at)).is_some_and(|p| p.range(..=seq).next().is_some()))
}

fn page_at(c: &Copyset, layer: u64, seq: u64, chain: &[Ancestor], at: (u32, u32)) -> Option<[u8; PAGE]> {
    let own = std::iter::once((layer, seq)).chain(chain.iter().map(|a| (a.layer.0, a.seq.0)));
    own.filter_map(|(layer, seq)| c.layers.get(&layer)?.pages.get(&at)?.range(..=seq).next_back())
        .next()
        .and_then(|(_, page)| page.as_ref().map(|p| **p))
}

fn read(c: &Copyset, head: &ReadHead) -> Reply {
    let at = &head.at;
    let mut chain = head.chain.clone();
    if at.epoch.0 != 0 {
        if let Err(reply) = check(c, at) {
            return reply;
        }
        chain.clone_from(&c.layers[&at.layer.0].chain);
    }
    let mut data = vec![0; at.len as usize];
    let mut found = false;
    for f in page_fragments(at.offset, data.len()) {
        if let Some(page) = page_at(c, at.layer.0, at.seq.0, &chain, (at.chunk.0, f.page)) {
            found = true;
            let len = f.range.len();
            data[f.range].copy_from_slice(&page[f.offset..f.offset + len]);
        }
    }
    if !found {
        data.clear();
    }
    let read = ReadReply { crcs: fragment_crcs(at.offset, &data).collect() };
    if !head.tells_missing {
        return (Status::Ok, read.encode(), data);
    }
    let pages = page_fragments(at.offset, at.len as usize).map(|f| (at.chunk.0, f.page));
    let missing = pages.map(|page| is_missing(c, at.layer.0, at.seq.0, &chain, page)).collect();
    (Status::Ok, ThinReply { read, missing }.encode(), data)
}

/// Page by page: the first version from above says what it is; a version of the moment's layer above it, or of a layer in
/// front of that one, says that it changed.
fn page_map(c: &Copyset, head: &PageMapHead) -> Reply {
    let at = &head.at;
    let mut chain = head.chain.clone();
    if at.epoch.0 != 0 {
        if let Err(reply) = check(c, at) {
            return reply;
        }
        chain.clone_from(&c.layers[&at.layer.0].chain);
    }
    let levels: Vec<(u64, u64)> =
        std::iter::once((at.layer.0, at.seq.0)).chain(chain.iter().map(|a| (a.layer.0, a.seq.0))).collect();
    let mut rows = [[[0u8; 32]; 3]; 16];
    for page in 0..4096u32 {
        let held = levels.iter().enumerate().flat_map(|(depth, (layer, seq))| {
            let pages = c.layers.get(layer).and_then(|l| l.pages.get(&(at.chunk.0, page)));
            pages.into_iter().flat_map(move |p| p.range(..=*seq).rev().map(move |(s, page)| (depth, *s, page.is_some())))
        });
        let held: Vec<_> = held.collect();
        let moment = head.since.and_then(|m| Some((levels.iter().position(|(l, _)| *l == m.layer.0)?, m.seq.0)));
        let is_newer = |(depth, seq, _): &(usize, u64, bool)| moment.is_none_or(|(d, s)| *depth < d || (*depth == d && *seq > s));
        let bits = [
            held.first().is_some_and(|(_, _, data)| *data),
            held.first().is_some_and(|(_, _, data)| !*data),
            held.iter().any(is_newer),
        ];
        for (set, bit) in rows[page as usize / 256].iter_mut().zip(bits) {
            set[page as usize % 256 / 8] |= u8::from(bit) << (page % 8);
        }
    }
    let mut sets = [ChunkPages::none(), ChunkPages::none(), ChunkPages::none()];
    for (row, of_row) in (0..16u8).zip(&rows) {
        sets.iter_mut().zip(of_row).for_each(|(set, pages)| set.set_row(row, pages));
    }
    let [data, zero, changed] = sets;
    (Status::Ok, PageMapReply { data, zero, changed: head.since.map(|_| changed) }.encode(), Vec::new())
}

fn change(c: &mut Copyset, frame: &Frame) -> Reply {
    let (at, data, masks) = match frame.header.opcode {
        Opcode::Write => {
            let head = WriteHead::decode(frame.head()).expect("a write head");
            let data = frame.payload();
            if !fragment_crcs(head.at.offset, &data).eq(head.crcs.iter().copied()) {
                return bare(Status::PayloadChecksum);
            }
            (head.at, Some(data), true)
        }
        _ => {
            let head = ZeroHead::decode(frame.head()).expect("a zero head");
            (head.at, None, head.masks)
        }
    };
    if let Err(reply) = check(c, &at) {
        return reply;
    }
    let min_seq = c.layers[&at.layer.0].min_seq;
    if at.seq.0 < min_seq {
        return (Status::StaleSeq, Bytes::copy_from_slice(&min_seq.to_le_bytes()), Vec::new());
    }
    let chain = c.layers[&at.layer.0].chain.clone();
    let masks = masks || !chain.is_empty() || c.layers[&at.layer.0].pages.keys().any(|(chunk, _)| *chunk == at.chunk.0);
    for f in page_fragments(at.offset, at.len as usize).filter(|_| masks) {
        let key = (at.chunk.0, f.page);
        let page = if f.is_whole_page() && data.is_none() {
            None
        } else {
            let mut page = page_at(c, at.layer.0, at.seq.0, &chain, key).unwrap_or([0; PAGE]);
            let part = &mut page[f.offset..f.offset + f.range.len()];
            match &data {
                Some(data) => part.copy_from_slice(&data[f.range.clone()]),
                None => part.fill(0),
            }
            Some(Box::new(page))
        };
        let layer = c.layers.get_mut(&at.layer.0).expect("checked above");
        layer.pages.entry(key).or_default().insert(at.seq.0, page);
    }
    let layer = c.layers.get_mut(&at.layer.0).expect("checked above");
    layer.min_seq = layer.min_seq.max(at.seq.0);
    bare(Status::Ok)
}
