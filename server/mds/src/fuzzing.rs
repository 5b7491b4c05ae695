//! Decoders of this crate over hostile bytes, for the fuzz targets of `vm-tests` (`vm-tests/src/fuzz`). Each function panics when a
//! promise of a decoder is broken. Not an interface.

use crate::machine::command::{Envelope, decode_answer, encode_answer};
use crate::machine::row::{
    BackupRow, ChunkserverRow, CopysetRow, DirectoryRow, EntryRow, LayerRow, MoveRow, PoolRow, Row, ScheduleRow, SegmentRow, ServiceTaskRow, SnapshotRow,
    VolumeOptionsRow,
    VolumeRow,
};
use crate::machine::tx::{decode_row, encode_row};

fn row<R: Row>(value: &[u8]) {
    if let Ok(row) = decode_row::<R>(value) {
        let again = encode_row(&row);
        assert_eq!(decode_row::<R>(&again).ok().map(|r| encode_row(&r)), Some(again));
    }
}

/// Log entries, answers and rows: decoded or refused; what decodes keeps its meaning.
pub fn mds_records(data: &[u8]) {
    if let Ok(envelope) = Envelope::decode(data) {
        let again = envelope.encode();
        assert_eq!(Envelope::decode(&again).ok().map(|e| e.encode()), Some(again));
    }
    if let Ok(answer) = decode_answer(data) {
        let again = encode_answer(&answer);
        assert_eq!(decode_answer(&again).ok().map(|a| encode_answer(&a)), Some(again));
    }
    row::<VolumeRow>(data);
    row::<LayerRow>(data);
    row::<SegmentRow>(data);
    row::<SnapshotRow>(data);
    row::<EntryRow>(data);
    row::<DirectoryRow>(data);
    row::<PoolRow>(data);
    row::<ChunkserverRow>(data);
    row::<CopysetRow>(data);
    row::<MoveRow>(data);
    row::<VolumeOptionsRow>(data);
    row::<ServiceTaskRow>(data);
    row::<ScheduleRow>(data);
    row::<BackupRow>(data);
}
