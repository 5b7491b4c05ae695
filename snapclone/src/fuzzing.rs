//! Decoders of this crate over hostile bytes, for the fuzz targets of `vm-tests` (`vm-tests/src/fuzz`). Each function panics when a
//! promise of a decoder is broken. Not an interface.

use crate::index::{leaf_content, open_index, parse_leaf, seal_index};
use crate::profile::BootProfile;
use crate::seal::Sealer;

/// Content of an object that may be opened here.
const CONTENT_MAX: usize = 1 << 16;

/// Objects of a backup repository: sealed objects as they come, and indexes and leaves with a right seal around them.
pub fn backup_objects(data: &[u8]) {
    let sealer = Sealer::default();
    if let Ok(content) = sealer.open("name", data, CONTENT_MAX) {
        assert!(content.len() <= CONTENT_MAX);
    }
    let sealed = sealer.seal("name", data);
    assert_eq!(sealer.open("name", &sealed, data.len()).ok().as_deref(), Some(data), "what was sealed opens");
    if let Ok(Some(index)) = open_index(&sealer, "name", &sealed, CONTENT_MAX) {
        let again = seal_index(&sealer, "name", Some(&index));
        assert!(open_index(&sealer, "name", &again, 2 * CONTENT_MAX).is_ok_and(|i| i.is_some()), "an index that was read is sound");
    }
    if let Ok(profile) = BootProfile::parse("name", data) {
        assert_eq!(BootProfile::parse("name", &profile.json()).ok().as_ref(), Some(&profile), "a profile that was read is sound");
        assert!(profile.blocks(256 << 10, 1 << 20).len() <= 1 << 20);
    }
    let blocks = data.len() / 40;
    if let Some(leaf) = parse_leaf(data, blocks) {
        assert_eq!(leaf.len(), blocks);
        assert_eq!(parse_leaf(&leaf_content(&leaf), blocks).map(|l| leaf_content(&l)), Some(leaf_content(&leaf)));
    }
}
