//! Golden bytes of everything the chunk store keeps or sends (`docs/formats/chunkserver.md`). A change here is a change of
//! format: it needs a new version byte and a reader for the old one.

use bytes::Bytes;
use ogee_chunkserver::copyset::fetch::{
    Column, DigestsAnswer, FetchRequest, FetchedRow, ListAnswer, RowDigest, RowsAnswer, decode_manifest, encode_manifest,
};
use ogee_chunkserver::store::key::{KIND_APPLIED, KIND_RECOVERY, copyset_key, layer_key};
use ogee_chunkserver::store::record::{Recovery, VersionRecord, decode_applied, encode_applied};
use ogee_chunkserver::store::row::Row;
use ogee_chunkserver::store::{LayerInfo, LayerTable, VersionKey};
use ogee_common::checksum::{ZERO_PAGE_CRC, crc32c};
use ogee_common::id::{AttachEpoch, ChunkIndex, CopysetId, LayerId, Term, VolumeSeq};
use ogee_proto::data::Ancestor;
use ogee_raft::api::{Applied, LogPos};
use std::collections::BTreeMap;

const COPYSET: CopysetId = CopysetId(9);
const VERSION: VersionKey = VersionKey::new(LayerId(0x1122), ChunkIndex(0x33), VolumeSeq(0x44));

/// Compares with golden hex (spaces and line ends are for the eye). The last four bytes are the CRC32C of key and body.
fn golden(key: &[u8], found: &[u8], hex: &str) {
    let hex: String = hex.split_whitespace().collect();
    let found_hex: String = found.iter().map(|b| format!("{b:02x}")).collect();
    let (body, crc) = found.split_last_chunk::<4>().expect("a checksum");
    assert_eq!(found_hex[..found_hex.len() - 8], hex, "golden bytes");
    assert_eq!(u32::from_le_bytes(*crc), crc32c(&[key, body].concat()));
}

/// Every flipped bit, every cut and another key are found.
fn is_guarded<T>(key: &[u8], record: &[u8], decode: impl Fn(&[u8], &[u8]) -> Result<T, ogee_chunkserver::store::ChunkStoreError>) {
    assert!(decode(key, record).is_ok());
    for i in 0..record.len() {
        let mut bad = record.to_vec();
        bad[i] ^= 0x10;
        assert!(decode(key, &bad).is_err(), "flip at {i}");
        assert!(decode(key, &record[..i]).is_err(), "cut at {i}");
    }
    assert!(decode(&[key, &[0]].concat(), record).is_err(), "another key");
    // A record of a later format, with a right checksum.
    let mut later = record[..record.len() - 4].to_vec();
    later[0] = 2;
    let crc = crc32c(&[key, &later[..]].concat());
    later.extend_from_slice(&crc.to_le_bytes());
    assert!(decode(key, &later).is_err(), "an unknown version");
}

#[test]
fn applied() {
    let key = copyset_key(COPYSET, KIND_APPLIED);
    let pos = LogPos { term: Term(0x0102), index: 0x0304 };
    let applied = Applied { pos: Some(pos), membership: Bytes::from_static(b"abc") };
    let record = encode_applied(&key, &applied);
    golden(&key, &record, "01 01 0000 0201000000000000 0403000000000000 03000000 616263");
    assert_eq!(decode_applied(&key, &record).expect("decode"), applied);
    is_guarded(&key, &record, decode_applied);
    let none = encode_applied(&key, &Applied::default());
    golden(&key, &none, "01 00 0000 0000000000000000 0000000000000000 00000000");
    assert_eq!(decode_applied(&key, &none).expect("decode"), Applied::default());
}

#[test]
fn recovery() {
    let key = copyset_key(COPYSET, KIND_RECOVERY);
    let recovery = Recovery { horizon: 0x0506, install_high: 0x0708, installing: true };
    let record = recovery.encode(&key);
    golden(&key, &record, "01 01 0000 0605000000000000 0807000000000000");
    assert_eq!(Recovery::decode(&key, &record).expect("decode"), recovery);
    is_guarded(&key, &record, Recovery::decode);
}

fn layer() -> LayerInfo {
    let chain = vec![Ancestor { layer: LayerId(3), seq: VolumeSeq(4) }];
    LayerInfo { fence: AttachEpoch(1), min_seq: VolumeSeq(2), chain: chain.into(), gone: true }
}

#[test]
fn layers() {
    let key = layer_key(COPYSET, LayerId(5));
    let record = layer().encode(&key);
    golden(&key, &record, "01 01 0100 0100000000000000 0200000000000000 0300000000000000 0400000000000000");
    assert_eq!(LayerInfo::decode(&key, &record).expect("decode"), layer());
    is_guarded(&key, &record, LayerInfo::decode);
}

#[test]
fn versions() {
    let key = VERSION.encode(COPYSET);
    let version = VersionRecord { rows: 0x8001, last_index: 0x0a0b };
    let record = version.encode(&key);
    golden(&key, &record, "01 00 0180 0b0a000000000000");
    assert_eq!(VersionRecord::decode(&key, &record).expect("decode"), version);
    is_guarded(&key, &record, VersionRecord::decode);
}

fn row() -> Row {
    let mut row = Row::default();
    row.changed_by(0x1234);
    row.set_data(0, 0xAABB_CCDD);
    row.set_data(255, ZERO_PAGE_CRC);
    row.set_zero(8);
    row
}

const DATA_SET: &str = "01000000000000000000000000000000000000000000000000000000000000 80";
const ZERO_SET: &str = "00010000000000000000000000000000000000000000000000000000000000 00";

#[test]
fn rows() {
    let key = VERSION.row(15).encode(COPYSET);
    let record = row().encode(&key);
    golden(&key, &record, &format!("01 00 0000 3412000000000000 {DATA_SET} {ZERO_SET} ddccbbaa 8941f998"));
    assert_eq!(Row::decode(&key, &record).expect("decode"), row().untouched());
    is_guarded(&key, &record, Row::decode);
    let mut damaged = row();
    damaged.set_damaged(255);
    let record = damaged.encode(&key);
    let set = "00000000000000000000000000000000000000000000000000000000000000 80";
    golden(&key, &record, &format!("01 01 0000 3412000000000000 {DATA_SET} {ZERO_SET} {set} ddccbbaa 00000000"));
    assert_eq!(Row::decode(&key, &record).expect("decode"), damaged.untouched());
}

#[test]
fn manifest() {
    let mut layers = LayerTable::default();
    layers.restore(LayerId(5), layer());
    let manifest = encode_manifest(&layers);
    let info = "01 0100 0100000000000000 0200000000000000 0300000000000000 0400000000000000";
    golden(&[], &manifest, &format!("01 01000000 0500000000000000 {info}"));
    assert_eq!(decode_manifest(&manifest).expect("decode"), layers);
    is_guarded(&[], &manifest, |key, m| decode_manifest(if key.is_empty() { m } else { key }));
}

#[test]
fn requests() {
    let list = FetchRequest::List { from: ChunkIndex(1), to: ChunkIndex(0xFFFF_FFFF) };
    golden(&[], &list.encode(), "01 01 01000000 ffffffff");
    assert_eq!(FetchRequest::decode(&list.encode()).expect("decode"), list);
    let rows = FetchRequest::Rows { version: VERSION, from_index: 0x0c0d, from_row: 3 };
    golden(&[], &rows.encode(), "01 02 03 2211000000000000 33000000 4400000000000000 0d0c000000000000");
    assert_eq!(FetchRequest::decode(&rows.encode()).expect("decode"), rows);
    let row = FetchRequest::Row { version: VERSION, row: 3 };
    golden(&[], &row.encode(), "01 03 03 2211000000000000 33000000 4400000000000000");
    assert_eq!(FetchRequest::decode(&row.encode()).expect("decode"), row);
    let digests = FetchRequest::Digests { after: None, to: Some(VERSION.row(3)) };
    let none = "00 0000000000000000 00000000 0000000000000000 00";
    golden(&[], &digests.encode(), &format!("01 04 {none} 01 2211000000000000 33000000 4400000000000000 03"));
    assert_eq!(FetchRequest::decode(&digests.encode()).expect("decode"), digests);
}

#[test]
fn answers() {
    let columns = BTreeMap::from([(ChunkIndex(0x33), Column { versions: vec![(VERSION, 0x1234)] })]);
    let list = ListAnswer { applied: 0x2000, next: Some(ChunkIndex(0x34)), columns };
    let column = "33000000 01000000 2211000000000000 4400000000000000 3412000000000000";
    golden(&[], &list.encode(), &format!("01 01 0020000000000000 34000000 01000000 {column}"));
    assert_eq!(ListAnswer::decode(&list.encode()).expect("decode"), list);

    let mut meta = Row::default();
    meta.changed_by(0x1234);
    meta.set_data(0, ZERO_PAGE_CRC);
    meta.set_data(255, ZERO_PAGE_CRC);
    meta.set_zero(8);
    meta.set_damaged(255);
    let meta = meta.untouched();
    let fetched = FetchedRow { row: 7, meta, data: vec![0; 4096].into() };
    let rows = RowsAnswer { applied: 0x2000, gone: false, next_row: 16, rows: vec![fetched] };
    let damaged = "00000000000000000000000000000000000000000000000000000000000000 80";
    let page = "00".repeat(4096);
    let row = format!("07 01 0000 3412000000000000 {DATA_SET} {ZERO_SET} {damaged} 8941f998 00000000 {page}");
    golden(&[], &rows.encode(), &format!("01 00 10 01 0020000000000000 {row}"));
    assert_eq!(RowsAnswer::decode(&rows.encode()).expect("decode"), rows);

    let digest = |row, crc| RowDigest { key: VERSION.row(row), last_index: 0x1234, crc };
    let digests = DigestsAnswer { before: 0x2000, after: 0x2001, complete: true, rows: vec![digest(3, Some(0xAABB_CCDD)), digest(4, None)] };
    let key = "2211000000000000 33000000 4400000000000000";
    let rows = format!("{key} 03 3412000000000000 01 ddccbbaa {key} 04 3412000000000000 00 00000000");
    golden(&[], &digests.encode(), &format!("01 01 0020000000000000 0120000000000000 02000000 {rows}"));
    assert_eq!(DigestsAnswer::decode(&digests.encode()).expect("decode"), digests);
    is_guarded(&[], &digests.encode(), |key, m| DigestsAnswer::decode(if key.is_empty() { m } else { key }));
}
