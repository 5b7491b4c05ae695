//! Byte sizes as people write and read them: `64GiB`, `512M`, `4096`. Units are powers of two.

use std::fmt;

/// A number of bytes that prints as people read it (`1.5 GiB`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteLen(pub u64);

const UNITS: [(&str, u64); 5] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

impl fmt::Display for ByteLen {
    #[allow(clippy::cast_precision_loss)] // shown with one decimal
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, size) = UNITS.iter().find(|(_, size)| self.0 >= *size).unwrap_or(&UNITS[4]);
        if self.0.is_multiple_of(*size) {
            write!(f, "{} {unit}", self.0 / size)
        } else {
            write!(f, "{:.1} {unit}", self.0 as f64 / *size as f64)
        }
    }
}

/// Parses `10G`, `10GiB`, `10g`, `512`, `1.5T`. Units are powers of two.
///
/// # Errors
/// A sentence that names the text and shows what is understood.
pub fn parse_bytes(text: &str) -> Result<u64, ParseBytesError> {
    let bad = || ParseBytesError(text.to_owned());
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let unit: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        _ => return Err(bad()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(unit).ok_or_else(bad);
    }
    let (whole, fraction) = number.split_once('.').ok_or_else(bad)?;
    if fraction.is_empty() || fraction.len() > 6 || fraction.contains('.') {
        return Err(bad());
    }
    let whole: u64 = whole.parse().map_err(|_| bad())?;
    let digits: u64 = fraction.parse().map_err(|_| bad())?;
    let scale = 10u64.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
    let part = u128::from(digits) * u128::from(unit) / u128::from(scale);
    let part = u64::try_from(part).map_err(|_| bad())?;
    whole.checked_mul(unit).and_then(|w| w.checked_add(part)).ok_or_else(bad)
}

/// A size that could not be understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseBytesError(String);

impl fmt::Display for ParseBytesError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not a size; write for example 10G, 512MiB or 4096", self.0)
    }
}

impl std::error::Error for ParseBytesError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_round_trip() {
        assert_eq!(parse_bytes("10G"), Ok(10 << 30));
        assert_eq!(parse_bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes(" 4096 "), Ok(4096));
        assert_eq!(ByteLen(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(ByteLen(64 << 30).to_string(), "64 GiB");
        for bad in ["", "x", "1.G", "1Q", "99999999999999T", "-1"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
