//! Little-endian reading with bounds checks. Pure; never panics, never allocates by an unchecked length.

use bytes::BufMut;

/// Why bytes are not a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Fewer bytes than the fields need.
    #[error("message cut short while reading {0}")]
    Short(&'static str),
    /// More bytes than the fields need.
    #[error("{0} bytes too many at the end of the message")]
    Trailing(usize),
    /// A field has a value that is not allowed.
    #[error("field {0} is out of range")]
    OutOfRange(&'static str),
    /// Not the start of a frame.
    #[error("bad magic: not an Ogee data connection")]
    Magic,
    /// A protocol version that this build does not speak.
    #[error("protocol version {0} is not supported")]
    Version(u8),
    /// An operation that this build does not know.
    #[error("unknown operation {0:#04x}")]
    Opcode(u8),
    /// A checksum does not match.
    #[error("checksum of {0} does not match")]
    Checksum(&'static str),
}

/// A cursor over received bytes.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, n: usize, field: &'static str) -> Result<&'a [u8], DecodeError> {
        let (now, rest) = self.0.split_at_checked(n).ok_or(DecodeError::Short(field))?;
        self.0 = rest;
        Ok(now)
    }

    pub(super) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], DecodeError> {
        self.take(N, field)?.try_into().map_err(|_| DecodeError::Short(field))
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        Ok(self.array::<1>(field)?[0])
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array(field)?))
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    pub(super) fn finish(self) -> Result<(), DecodeError> {
        if self.0.is_empty() { Ok(()) } else { Err(DecodeError::Trailing(self.0.len())) }
    }
}

/// Appends a count as `u16`; callers keep lists below 65,536 by the limits.
pub(super) fn put_count(out: &mut impl BufMut, n: usize) {
    out.put_u16_le(u16::try_from(n).expect("lists on the wire are bounded far below 65,536"));
}
