//! `ogee image import`: an image file becomes a volume.
//!
//! | file | what |
//! | --- | --- |
//! | `source.rs` | raw or qcow2: size, where data may be, read |
//! | `upload.rs` | copies what is not zeros to a device, many blocks at once |
//! | `import.rs` | the command: make the volume, copy, flush, or take it back |

mod import;
mod source;
mod upload;

pub(crate) use import::{ImageCommand, run};
