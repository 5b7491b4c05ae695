//! What people write: configuration files, sizes, names.

use ogee_chunkserver::ChunkserverConfig;
use ogee_common::name::{VolumePath, VolumeRef};
use ogee_mds::MdsConfig;

/// The target.
pub(super) fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(config) = toml::from_str::<ChunkserverConfig>(&text) {
        let _ = config.validate();
    }
    if let Ok(config) = toml::from_str::<MdsConfig>(&text) {
        let _ = config.validate();
    }
    let _ = ogee_common::size::parse_bytes(&text);
    if let Ok(path) = VolumePath::parse(&text) {
        assert_eq!(VolumePath::parse(&path.to_string()).ok(), Some(path), "a path that was read is a path");
    }
    if let Ok(name) = VolumeRef::parse(&text) {
        assert_eq!(VolumeRef::parse(&name.to_string()).ok(), Some(name), "a name that was read is a name");
    }
    let _ = ogee_disk::fault_file::parse(&text);
}
