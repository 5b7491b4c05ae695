//! The data of handshake options, parsed, and what is said of an export.
//!
//! Called by `handshake.rs`. Invariants: pure and total; a parse takes the data to its last byte or fails. Absent: the
//! order of options.

use crate::handshake::{ExportInfo, Framing};
use crate::wire::{Fields, info, transmission_flag as flag};
use bytes::BufMut;
use ogee_common::limits::{NBD_PAYLOAD_BYTES_MAX, PAGE_BYTES};

/// The data of INFO and GO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InfoRequest<'a> {
    /// Name of the export.
    pub(crate) name: &'a str,
    wants: Vec<u16>,
}

impl<'a> InfoRequest<'a> {
    /// `None`: lengths do not add up, or the name is no string of the protocol.
    pub(crate) fn parse(data: &'a [u8]) -> Option<Self> {
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u16()?;
        let wants = (0..count).map(|_| fields.u16()).collect::<Option<Vec<u16>>>()?;
        fields.is_empty().then_some(Self { name, wants })
    }

    fn wants(&self, kind: u16) -> bool {
        self.wants.contains(&kind)
    }
}

/// The payloads of the INFO replies for an export: size and flags always, the rest if it was asked for.
pub(crate) fn export_infos(export: &ExportInfo, framing: Framing, wanted: &InfoRequest<'_>) -> Vec<Vec<u8>> {
    let mut size = Vec::with_capacity(12);
    size.put_u16(info::EXPORT);
    size.put_u64(export.size_bytes);
    size.put_u16(transmission_flags(export, framing));
    let mut all = vec![size];
    for (kind, text) in [(info::NAME, &export.name), (info::DESCRIPTION, &export.description)] {
        if wanted.wants(kind) {
            let mut payload = Vec::with_capacity(2 + text.len());
            payload.put_u16(kind);
            payload.put_slice(text.as_bytes());
            all.push(payload);
        }
    }
    if wanted.wants(info::BLOCK_SIZE) {
        let mut payload = Vec::with_capacity(14);
        payload.put_u16(info::BLOCK_SIZE);
        payload.put_u32(export.sector_bytes);
        payload.put_u32(PAGE_BYTES);
        payload.put_u32(NBD_PAYLOAD_BYTES_MAX);
        all.push(payload);
    }
    all
}

/// What may be done with an export. Every write is durable and visible to all connections when it is answered, so
/// FUA, FLUSH and CAN_MULTI_CONN hold by themselves.
pub(crate) fn transmission_flags(export: &ExportInfo, framing: Framing) -> u16 {
    let mut flags =
        flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN | flag::SEND_CACHE;
    if framing != Framing::Simple {
        flags |= flag::SEND_DF;
    }
    if export.read_only {
        flags | flag::READ_ONLY
    } else {
        flags | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
    }
}

/// Export name and queries of LIST_META_CONTEXT and SET_META_CONTEXT.
pub(crate) fn parse_context_queries(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let mut fields = Fields(data);
    let name = fields.string()?;
    let count = fields.u32()?;
    let mut queries = vec![];
    for _ in 0..count {
        // Ends at the latest with the data: every query takes four bytes.
        queries.push(fields.string()?);
    }
    fields.is_empty().then_some((name, queries))
}
