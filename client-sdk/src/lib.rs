//! Client SDK of Ogee.

mod block_device;
mod memory;

pub use block_device::{BlockDevice, DeviceInfo, IoError, IoErrorKind, ReadData, ReadPiece};
pub use memory::MemoryDevice;
