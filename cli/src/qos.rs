//! Limits of volumes on the command line: `--iops 500`, `--write-mib 100:400:30`, `--read-iops none`.
//!
//! Used by `ogee volume create`, `set`, `info` and `ls`. Invariant: what parses is within what a volume may have, so that
//! a mistake is a usage error and the MDS is not asked.

use crate::error::{CliError, ErrorKind};
use crate::sdk_error::call_failed;
use clap::Args;
use ogee_client::MdsClient;
use ogee_common::name::VolumePath;
use ogee_common::qos::{LimitChanges, LimitKind, RateLimit, VolumeLimits};
use ogee_common::size::ByteLen;
use ogee_proto::mds as m;
use serde::Serialize;
use std::collections::BTreeMap;

/// Bytes of the unit of bandwidth.
const MIB: u64 = 1 << 20;

/// The limits that an option names.
#[derive(Debug, Clone, Copy, Default, Args)]
#[command(next_help_heading = "Limits (each RATE, or RATE:BURST:SECONDS, or none)")]
pub(crate) struct LimitArgs {
    /// IOs a second; with a burst: after a rest so many for so long
    #[arg(long, value_name = "LIMIT", value_parser = |text: &str| parse(LimitKind::Iops, text))]
    iops: Option<RateLimit>,
    /// Reads a second
    #[arg(long, value_name = "LIMIT", value_parser = |text: &str| parse(LimitKind::ReadIops, text))]
    read_iops: Option<RateLimit>,
    /// Writes, discards and write-zeroes a second
    #[arg(long, value_name = "LIMIT", value_parser = |text: &str| parse(LimitKind::WriteIops, text))]
    write_iops: Option<RateLimit>,
    /// MiB read and written a second
    #[arg(long, value_name = "LIMIT", value_parser = |text: &str| parse(LimitKind::Bytes, text))]
    mib: Option<RateLimit>,
    /// MiB read a second
    #[arg(long, value_name = "LIMIT", value_parser = |text: &str| parse(LimitKind::ReadBytes, text))]
    read_mib: Option<RateLimit>,
    /// MiB written a second
    #[arg(long, value_name = "LIMIT", value_parser = |text: &str| parse(LimitKind::WriteBytes, text))]
    write_mib: Option<RateLimit>,
}

impl LimitArgs {
    /// What is to change.
    #[must_use]
    pub(crate) fn changes(&self) -> LimitChanges {
        let given = [
            (LimitKind::Iops, self.iops),
            (LimitKind::ReadIops, self.read_iops),
            (LimitKind::WriteIops, self.write_iops),
            (LimitKind::Bytes, self.mib),
            (LimitKind::ReadBytes, self.read_mib),
            (LimitKind::WriteBytes, self.write_mib),
        ];
        given.into_iter().fold(LimitChanges::default(), |changes, (kind, limit)| {
            limit.map_or(changes, |limit| changes.with(kind, limit))
        })
    }
}

/// Arguments of `volume set`.
#[derive(Debug, Clone, Args)]
pub(crate) struct SetArgs {
    /// The volume
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Sets the limits that are named.
///
/// # Errors
/// None is named ([`ErrorKind::Usage`]), or what the MDS refused.
pub(crate) async fn set(mds: &MdsClient, args: &SetArgs) -> Result<m::Volume, CliError> {
    let (path, changes) = (args.volume.to_string(), args.limits.changes());
    if changes.is_empty() {
        let text = format!("set volume {path}: name at least one limit, for example --iops 500 or --iops none");
        return Err(CliError::new(ErrorKind::Usage, text));
    }
    let request = m::SetVolumeLimitsRequest { path: path.clone(), limits: Some(changes.into()) };
    let reply = mds.set_volume_limits(request).await;
    reply.map_err(|e| call_failed(&format!("set volume {path}"), &e))
}

/// Parses one limit, for clap.
fn parse(kind: LimitKind, text: &str) -> Result<RateLimit, String> {
    if text == "none" {
        return Ok(RateLimit::NONE);
    }
    let wanted = || "write RATE or RATE:BURST:SECONDS in whole numbers, or none".to_owned();
    let numbers: Option<Vec<u64>> = text.split(':').map(|part| part.parse().ok()).collect();
    let unit = if kind.counts_bytes() { MIB } else { 1 };
    // Too much for 64 bits is too much for a limit.
    let rate = |n: u64| n.saturating_mul(unit);
    let limit = match numbers.as_deref() {
        Some([only]) => RateLimit { rate: rate(*only), ..RateLimit::NONE },
        Some([sustained, burst, seconds]) => {
            let burst_seconds = u32::try_from(*seconds).unwrap_or(u32::MAX);
            RateLimit { rate: rate(*sustained), burst: rate(*burst), burst_seconds }
        }
        _ => return Err(wanted()),
    };
    if limit.is_none() {
        return Err("a limit of 0 would stop the volume; to lift the limit write none".to_owned());
    }
    limit.check(kind).map_err(|problem| problem.wanted().to_owned())?;
    Ok(limit)
}

/// A limit as programs see it: IOs or bytes a second.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct LimitView {
    rate: u64,
    #[serde(skip_serializing_if = "is_zero")]
    burst: u64,
    #[serde(skip_serializing_if = "is_zero")]
    burst_seconds: u64,
}

const fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// The limits of a volume as programs see them: by kind, none of those that are not set.
pub(crate) type LimitsView = BTreeMap<&'static str, LimitView>;

/// The limits of a volume for programs.
#[must_use]
pub(crate) fn view(limits: VolumeLimits) -> LimitsView {
    let of = |limit: RateLimit| LimitView { rate: limit.rate, burst: limit.burst, burst_seconds: limit.burst_seconds.into() };
    limits.set().map(|(kind, limit)| (kind.as_str(), of(limit))).collect()
}

/// The limits of a volume for people: `iops 500 (2000 for 30 s), write_bytes 100 MiB/s`.
#[must_use]
pub(crate) fn describe(limits: &LimitsView) -> String {
    let rate = |name: &str, rate: u64| {
        if name.ends_with("bytes") { format!("{}/s", ByteLen(rate)) } else { rate.to_string() }
    };
    let one = |(name, limit): (&&'static str, &LimitView)| {
        let burst = match limit.burst {
            0 => String::new(),
            burst => format!(" ({} for {} s)", rate(name, burst), limit.burst_seconds),
        };
        format!("{name} {}{burst}", rate(name, limit.rate))
    };
    let all: Vec<String> = limits.iter().map(one).collect();
    if all.is_empty() { "-".to_owned() } else { all.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read() {
        assert_eq!(parse(LimitKind::Iops, "500"), Ok(RateLimit { rate: 500, ..RateLimit::NONE }));
        assert_eq!(parse(LimitKind::Iops, "500:2000:30"), Ok(RateLimit { rate: 500, burst: 2000, burst_seconds: 30 }));
        let mib = RateLimit { rate: 100 << 20, burst: 400 << 20, burst_seconds: 5 };
        assert_eq!(parse(LimitKind::WriteBytes, "100:400:5"), Ok(mib));
        assert_eq!(parse(LimitKind::ReadBytes, "none"), Ok(RateLimit::NONE));
        for bad in ["", "0", "x", "-1", "5:", "5:6", "5:4:1", "5:6:0", "5:6:9999999999", "1:2:3:4", "1.5", "99999999999999999999"] {
            assert!(parse(LimitKind::Iops, bad).is_err(), "{bad}");
            assert!(parse(LimitKind::Bytes, bad).is_err(), "{bad}");
        }
        assert!(parse(LimitKind::Bytes, "18446744073709551615").is_err());
    }

    #[test]
    fn limits_are_shown() {
        let limits = VolumeLimits::NONE
            .with(LimitKind::Iops, RateLimit { rate: 500, burst: 2000, burst_seconds: 30 })
            .with(LimitKind::WriteBytes, RateLimit { rate: 100 << 20, ..RateLimit::NONE });
        assert_eq!(describe(&view(limits)), "iops 500 (2000 for 30 s), write_bytes 100 MiB/s");
        assert_eq!(describe(&view(VolumeLimits::NONE)), "-");
        let json = serde_json::to_string(&view(limits)).expect("plain data");
        assert_eq!(json, r#"{"iops":{"rate":500,"burst":2000,"burst_seconds":30},"write_bytes":{"rate":104857600}}"#);
    }
}
