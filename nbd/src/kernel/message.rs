//! Bytes of generic netlink messages, without IO.
//!
//! ```text
//! nlmsghdr    len u32 | type u16 | flags u16 | sequence u32 | port u32      of the whole message
//! genlmsghdr  command u8 | version u8 | 0 u16
//! nlattr      len u16 | type u16 | payload, padded to 4 bytes               any number of them; a nest's payload is nlattrs
//! ```
//!
//! Source: `linux/netlink.h`, `linux/genetlink.h`. Numbers are in the machine's own order. Written here because the crates for it bring more
//! than these four messages need, and the attributes of NBD would have to be written anyway. Invariants: decoding never reads
//! behind the end and never panics; a message that lies about its length is refused whole.

/// Flags of a request: it is one, and its end is to be said (`NLM_F_REQUEST`, `NLM_F_ACK`).
const REQUEST_WITH_ACK: u16 = 1 | 4;
/// Message types: an error or acknowledgement, the end of a list, nothing.
const TYPE_NOOP: u16 = 1;
const TYPE_ERROR: u16 = 2;
const TYPE_DONE: u16 = 3;
/// Bit of an attribute's type: its payload is attributes (`NLA_F_NESTED`).
const NESTED: u16 = 1 << 15;
/// Bits of an attribute's type without the flags (`NLA_TYPE_MASK`).
const TYPE_MASK: u16 = 0x3fff;

const HEADER_BYTES: usize = 16;
const GENERIC_HEADER_BYTES: usize = 4;
const ATTRIBUTE_HEADER_BYTES: usize = 4;
const ALIGN: usize = 4;

/// A request that is being written.
#[derive(Debug, Clone)]
pub(super) struct Request(Vec<u8>);

impl Request {
    /// A request to a family.
    pub(super) fn new(family: u16, command: u8, version: u8) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(family.to_ne_bytes());
        bytes.extend(REQUEST_WITH_ACK.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend([command, version, 0, 0]);
        Self(bytes)
    }

    pub(super) fn u32(&mut self, kind: u16, value: u32) {
        self.nest_as(kind, |request| request.0.extend(value.to_ne_bytes()));
    }

    pub(super) fn u64(&mut self, kind: u16, value: u64) {
        self.nest_as(kind, |request| request.0.extend(value.to_ne_bytes()));
    }

    /// Text with a NUL at its end.
    pub(super) fn string(&mut self, kind: u16, value: &str) {
        self.nest_as(kind, |request| {
            request.0.extend(value.as_bytes());
            request.0.push(0);
        });
    }

    /// An attribute of attributes.
    pub(super) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        self.nest_as(kind | NESTED, fill);
    }

    /// The attribute's head, what `fill` appends, and the padding.
    fn nest_as(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.0.extend([0; 2]);
        self.0.extend(kind.to_ne_bytes());
        fill(self);
        let len = u16::try_from(self.0.len() - start).expect("attributes are short: names and at most 64 sockets");
        self.0[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self.0.resize(self.0.len().next_multiple_of(ALIGN), 0);
    }

    /// The message.
    pub(super) fn finish(mut self, sequence: u32) -> Vec<u8> {
        let len = u32::try_from(self.0.len()).expect("a few attributes of less than 64 KiB each");
        self.0[..4].copy_from_slice(&len.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// A message from the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Response {
    /// Of the request it belongs to.
    pub(super) sequence: u32,
    /// The attributes of an answer; nothing: all is done; or an errno.
    pub(super) outcome: Result<Option<Vec<u8>>, i32>,
}

impl Response {
    /// All messages of a datagram; `None` if one is malformed.
    pub(super) fn decode_all(mut bytes: &[u8]) -> Option<Vec<Self>> {
        let mut responses = vec![];
        while !bytes.is_empty() {
            let len = usize::try_from(u32_at(bytes, 0)?).ok()?;
            let message = bytes.get(..len)?;
            responses.extend(Self::decode(message)?);
            bytes = bytes.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
        }
        Some(responses)
    }

    fn decode(message: &[u8]) -> Option<Option<Self>> {
        let (kind, sequence) = (u16_at(message, 4)?, u32_at(message, 8)?);
        let payload = message.get(HEADER_BYTES..)?;
        let outcome = match kind {
            TYPE_NOOP => return Some(None),
            TYPE_DONE => Ok(None),
            TYPE_ERROR => match i32::from_ne_bytes(payload.get(..4)?.try_into().ok()?) {
                0 => Ok(None),
                errno => Err(errno.saturating_neg()),
            },
            _ => Ok(Some(payload.get(GENERIC_HEADER_BYTES..)?.to_vec())),
        };
        Some(Some(Self { sequence, outcome }))
    }
}

/// Attributes one after the other. Iterating gives `None` once for a malformed one, and then ends.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes<'a>(pub(super) &'a [u8]);

impl<'a> Attributes<'a> {
    /// The first of this type.
    pub(super) fn find(self, kind: u16) -> Option<Attribute<'a>> {
        self.map_while(|attribute| attribute).find(|attribute| attribute.kind == kind)
    }

    fn next_attribute(&mut self) -> Option<Attribute<'a>> {
        let len = usize::from(u16_at(self.0, 0)?);
        let kind = u16_at(self.0, 2)? & TYPE_MASK;
        let payload = self.0.get(..len)?.get(ATTRIBUTE_HEADER_BYTES..)?;
        self.0 = self.0.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some(Attribute { kind, payload })
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = Option<Attribute<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let attribute = self.next_attribute();
        if attribute.is_none() {
            self.0 = &[];
        }
        Some(attribute)
    }
}

/// One attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Attribute<'a> {
    /// Its type, without flags.
    pub(super) kind: u16,
    payload: &'a [u8],
}

impl<'a> Attribute<'a> {
    pub(super) fn u8(self) -> Option<u8> {
        self.payload.first().copied()
    }

    pub(super) fn u16(self) -> Option<u16> {
        u16_at(self.payload, 0)
    }

    pub(super) fn u32(self) -> Option<u32> {
        u32_at(self.payload, 0)
    }

    /// The attributes in it.
    pub(super) fn nested(self) -> Attributes<'a> {
        Attributes(self.payload)
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
