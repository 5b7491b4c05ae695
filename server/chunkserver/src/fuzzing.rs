//! Decoders of this crate over hostile bytes, for the fuzz targets of `vm-tests` (`vm-tests/src/fuzz`). Each function panics when a
//! promise of a decoder is broken. Not an interface.

use crate::copyset::fetch::{FetchRequest, ListAnswer, RowsAnswer, decode_manifest, encode_manifest};
use crate::daemon::superblock_fuzz;
use crate::store::record::{Recovery, VersionRecord, decode_applied, encode_applied, seal};
use crate::store::row::Row;
use crate::store::{LayerInfo, VersionKey};
use bytes::Bytes;

/// The superblock: what decodes encodes to itself.
pub fn superblock(data: &[u8]) {
    superblock_fuzz(data);
}

/// Keys and records of the metadata store, as they come and with a right checksum.
pub fn checkpoint_rows(data: &[u8]) {
    if let Some(version) = VersionKey::decode(data) {
        assert_eq!(version.encode(ogee_common::id::CopysetId(0))[4..], data[4..]);
    }
    let (key, body) = data.split_at(data.len().min(8));
    for record in [body.to_vec(), seal(key, body.to_vec())] {
        if let Ok(row) = Row::decode(key, &record) {
            assert_eq!(Row::decode(key, &row.encode(key)).ok(), Some(row));
        }
        if let Ok(record) = VersionRecord::decode(key, &record) {
            assert_eq!(VersionRecord::decode(key, &record.encode(key)).ok(), Some(record));
        }
        if let Ok(recovery) = Recovery::decode(key, &record) {
            assert_eq!(Recovery::decode(key, &recovery.encode(key)).ok(), Some(recovery));
        }
        if let Ok(applied) = decode_applied(key, &record) {
            assert_eq!(decode_applied(key, &encode_applied(key, &applied)).ok(), Some(applied));
        }
        if let Ok(layer) = LayerInfo::decode(key, &record) {
            assert_eq!(LayerInfo::decode(key, &layer.encode(key)).ok(), Some(layer));
        }
    }
}

/// Raft manifests and what is fetched to install them, as they come and with a right checksum.
pub fn manifests(data: &[u8]) {
    for message in [data.to_vec(), seal(&[], data.to_vec())] {
        if let Ok(layers) = decode_manifest(&message) {
            assert_eq!(decode_manifest(&encode_manifest(&layers)).ok().map(|l| encode_manifest(&l)), Some(encode_manifest(&layers)));
        }
        if let Ok(request) = FetchRequest::decode(&message) {
            assert_eq!(FetchRequest::decode(&request.encode()).ok().map(|r| r.encode()), Some(request.encode()));
        }
        if let Ok(answer) = ListAnswer::decode(&message) {
            assert_eq!(ListAnswer::decode(&answer.encode()).ok().map(|a| a.encode()), Some(answer.encode()));
        }
        let _ = RowsAnswer::decode(&Bytes::from(message));
    }
}
