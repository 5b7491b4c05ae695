//! `ogee export`: a volume or a snapshot becomes an image file.
//!
//! | file | what |
//! | --- | --- |
//! | `export.rs` | the command |
//! | `image_sink.rs` | raw or qcow2: what is not zeros is written |
//! | `partial_file.rs` | the file appears under its name only when it is complete and on disk |

#[allow(clippy::module_inception)] // the command of the group, as in the other groups
mod export;
mod image_sink;
mod partial_file;

pub(crate) use export::{ExportArgs, run};
