//! What can be wrong with a qcow2 image. Each message says what was found, and what a person can do about it.

/// Why an image was refused or could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// The first four bytes are not `QFI\xfb`.
    #[error("not a qcow2 image (the first bytes are not QFI\\xfb)")]
    BadMagic,
    /// A version other than 2 and 3.
    #[error("qcow2 version {0} is not understood (2 and 3 are)")]
    Version(u32),
    /// The image needs another file below it.
    #[error("the image has the backing file {name:?}; flatten it first: qemu-img convert -O qcow2 IMAGE FLAT.qcow2")]
    BackingFile {
        /// The name as written in the image, shortened.
        name: String,
    },
    /// The image is encrypted.
    #[error("the image is encrypted (method {0}); decrypt it first with qemu-img convert")]
    Encrypted(u32),
    /// A feature that must be understood and is not.
    #[error("the image uses {0}, which is not supported; convert it first: qemu-img convert -O qcow2 IMAGE PLAIN.qcow2")]
    Unsupported(Feature),
    /// A field of the header or an entry of a table is outside its range.
    #[error("{field} is {value:#x}, which is out of range: the image is damaged")]
    OutOfRange {
        /// The field, in the words of the specification.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// Something lies beyond the end of the file.
    #[error("{what} at byte {offset} lies beyond the end of the file ({file_bytes} bytes): the image is cut short")]
    Truncated {
        /// What was to be read.
        what: &'static str,
        /// Where, bytes from the start of the file.
        offset: u64,
        /// The length of the file.
        file_bytes: u64,
    },
    /// A compressed cluster does not unpack to one cluster.
    #[error("the compressed cluster at byte {offset} does not unpack: the image is damaged")]
    Inflate {
        /// Where, bytes from the start of the file.
        offset: u64,
        /// What the decompressor said, if anything.
        #[source]
        source: Option<flate2::DecompressError>,
    },
    /// The file could not be read or written.
    #[error("{verb} {what} at byte {offset}")]
    Io {
        /// `read` or `write`.
        verb: &'static str,
        /// What.
        what: &'static str,
        /// Where, bytes from the start of the file.
        offset: u64,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
}

/// A feature this reader does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Feature {
    /// Incompatible bit 2.
    ExternalDataFile,
    /// Incompatible bit 4.
    ExtendedL2,
    /// Compression type 1.
    Zstd,
    /// Another compression type.
    Compression(u8),
    /// Incompatible bits nobody had defined.
    Bits(u64),
}

impl std::fmt::Display for Feature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ExternalDataFile => write!(f, "an external data file"),
            Self::ExtendedL2 => write!(f, "extended L2 entries (subclusters)"),
            Self::Zstd => write!(f, "zstd compression"),
            Self::Compression(n) => write!(f, "compression type {n}"),
            Self::Bits(bits) => write!(f, "unknown incompatible features ({bits:#x})"),
        }
    }
}
