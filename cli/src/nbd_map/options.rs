//! How a volume is mapped: options of `ogee nbd map`, on the command line and in the table.

use clap::{Args, Parser};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where sockets, records and logs of mappings are.
pub(crate) const DIR_DEFAULT: &str = "/run/ogee/nbd";
/// IO waits "for ever" for its server: the kernel wants a number.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// Options of one mapping.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct MapOptions {
    /// The device; by default the first free one
    #[arg(long, value_name = "/dev/nbdN", value_parser = device_index)]
    pub device: Option<u32>,
    /// Connections of the kernel to the server
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub connections: u16,
    /// Refuse writes; snapshots are read-only anyway
    #[arg(long)]
    pub read_only: bool,
    /// Take the volume from the client that has it attached
    #[arg(long, conflicts_with = "read_only")]
    pub steal: bool,
    /// Block size of the device
    #[arg(long, value_name = "BYTES", default_value = "512", value_parser = block_size)]
    pub block_size: u64,
    /// The kernel sends a request again when it has no answer for so long; so long IO in flight waits when the server dies
    // Far above what a slow cluster takes: what is sent again for nothing makes it slower still, up to a standstill.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub timeout: u64,
    /// Fail IO when there is no server for so long; by default it waits for ever
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub dead_timeout: Option<u64>,
}

#[derive(Debug, Parser)]
struct Alone {
    #[command(flatten)]
    options: MapOptions,
}

impl MapOptions {
    /// Reads options alone, as on the command line.
    ///
    /// # Errors
    /// What clap says, in several lines.
    pub(crate) fn parse(words: impl Iterator<Item = String>) -> Result<Self, clap::Error> {
        Alone::try_parse_from(std::iter::once("options".to_owned()).chain(words)).map(|alone| alone.options)
    }

    /// The arguments that give these options again.
    #[must_use]
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut words = vec![
            format!("--connections={}", self.connections),
            format!("--block-size={}", self.block_size),
            format!("--timeout={}", self.timeout),
        ];
        words.extend(self.device.map(|index| format!("--device=/dev/nbd{index}")));
        words.extend(self.dead_timeout.map(|seconds| format!("--dead-timeout={seconds}")));
        words.extend(self.read_only.then(|| "--read-only".to_owned()));
        words.extend(self.steal.then(|| "--steal".to_owned()));
        words
    }

    /// When the kernel sends a request again.
    #[must_use]
    pub(crate) const fn resend_after(&self) -> Duration {
        Duration::from_secs(self.timeout)
    }

    /// When the kernel gives the device up.
    #[must_use]
    pub(crate) fn dead_limit(&self) -> Duration {
        self.dead_timeout.map_or(FOR_EVER, Duration::from_secs)
    }
}

/// The number of `/dev/nbdN` or `nbdN`.
///
/// # Errors
/// It is something else, said for people.
pub(crate) fn device_index(text: &str) -> Result<u32, String> {
    let number = text.strip_prefix("/dev/").unwrap_or(text).strip_prefix("nbd");
    let index = number.filter(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())).and_then(|n| n.parse().ok());
    // The kernel's limit: 2^20 minors, 16 of them a device at least.
    index.filter(|index| *index < 1 << 16).ok_or_else(|| "write an NBD device, for example /dev/nbd0".to_owned())
}

/// The path of a device.
#[must_use]
pub(crate) fn device_path(index: u32) -> PathBuf {
    Path::new("/dev").join(format!("nbd{index}"))
}

fn block_size(text: &str) -> Result<u64, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("512 or 4096".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<MapOptions, clap::Error> {
        MapOptions::parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn options_come_back_as_arguments() {
        let all = ["--device=/dev/nbd7", "--connections=2", "--block-size=4096", "--timeout=30", "--dead-timeout=60", "--steal"];
        let (none, one): (&[&str], &[&str]) = (&[], &["--read-only"]);
        for words in [none, one, &all] {
            let options = parse(words).expect("good");
            assert_eq!(MapOptions::parse(options.arguments().into_iter()).expect("good"), options);
        }
        assert_eq!(parse(&all).expect("good").device, Some(7));
    }

    #[test]
    fn bad_options_are_refused() {
        for bad in ["--device=sda", "--device=/dev/nbd", "--device=/dev/nbd99999999", "--device=nbd0p1", "--connections=0",
            "--connections=65", "--block-size=1024", "--timeout=0", "--dead-timeout=0", "--colour"]
        {
            assert!(parse(&[bad]).is_err(), "{bad}");
        }
        assert!(parse(&["--read-only", "--steal"]).is_err());
    }
}
