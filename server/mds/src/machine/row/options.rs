//! What is chosen for a volume besides its name and size. See [`crate::machine::options`]; invariants and format as in [`super`].

use ogee_common::limits::SECTOR_BYTES;
use ogee_common::qos::VolumeLimits;
use serde::{Deserialize, Serialize};

/// The options of the volume of the key. A volume without a row, as every one of an older build, has the default ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VolumeOptionsRow {
    /// Bytes of a logical sector: 512 or 4,096. Never changes.
    pub(crate) sector_bytes: u32,
    /// What its clients may do in a second.
    pub(crate) limits: VolumeLimits,
}

impl Default for VolumeOptionsRow {
    fn default() -> Self {
        Self { sector_bytes: SECTOR_BYTES, limits: VolumeLimits::NONE }
    }
}
