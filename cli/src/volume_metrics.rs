//! What `ogee vhost-blk` and `ogee nbd serve` show at `/metrics`: what their volumes did, as the SDK counts it.
//!
//! Invariant: nothing of the IO path is touched; the SDK's counters are read as they are.

use crate::error::{CliError, ErrorKind};
use ogee_client::{OpStats, Volume, VolumeStats};
use ogee_metrics::{Figures, MetricsServer, Page};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

#[derive(Debug)]
struct VolumeFigures(Volume);

/// The figures of one kind of IO.
type FiguresOf = fn(&VolumeStats) -> &OpStats;

/// Serves the figures of an open volume until dropped.
///
/// # Errors
/// The address cannot be had ([`ErrorKind::Conflict`] if somebody has it).
pub(crate) fn serve(addr: SocketAddr, volume: &Volume) -> Result<MetricsServer, CliError> {
    serve_figures(addr, Arc::new(VolumeFigures(volume.clone())))
}

/// Serves figures until dropped.
///
/// # Errors
/// As [`serve`].
pub(crate) fn serve_figures(addr: SocketAddr, figures: Arc<dyn Figures>) -> Result<MetricsServer, CliError> {
    MetricsServer::start(addr, figures).map_err(|error| {
        let is_taken = error.source.kind() == std::io::ErrorKind::AddrInUse;
        let kind = if is_taken { ErrorKind::Conflict } else { ErrorKind::Failure };
        CliError::caused(kind, format!("serve metrics on {addr}"), error.source)
    })
}

impl Figures for VolumeFigures {
    fn fill(&self, page: &mut Page<'_>) -> std::fmt::Result {
        fill(std::slice::from_ref(&self.0), page)
    }
}

/// Kinds of IO and where their figures are.
const KINDS: [(&str, FiguresOf); 5] = [
    ("read", |s| &s.read),
    ("write", |s| &s.write),
    ("flush", |s| &s.flush),
    ("discard", |s| &s.discard),
    ("write_zeroes", |s| &s.write_zeroes),
];

/// A counter: its name, its meaning, its value.
type Counter<T> = (&'static str, &'static str, fn(&T) -> u64);

/// Counters of each kind of IO.
const OF_KIND: [Counter<OpStats>; 3] = [
    ("volume_ios", "IOs that ended, well or not", |o| o.ops),
    ("volume_io_errors", "IOs that failed", |o| o.errors),
    ("volume_io_bytes", "Bytes of IOs that ended well", |o| o.bytes),
];

/// Counters of a volume as a whole.
const OF_VOLUME: [Counter<VolumeStats>; 6] = [
    ("volume_retries", "Attempts that did not end in success, redirects included", |s| s.retries),
    ("volume_redirects", "Attempts answered by a chunkserver that does not lead", |s| s.redirects),
    ("volume_unknown_outcomes", "Attempts without an answer in time", |s| s.unknown_outcomes),
    ("volume_checksum_mismatches", "Replies and writes whose checksums did not match", |s| s.checksum_mismatches),
    ("volume_holds", "Times that writes were held for a volume snapshot", |s| s.holds),
    ("volume_throttled_ios", "IOs that waited for the volume's limits before they began", |s| s.throttled),
];

/// The one gauge.
const IN_FLIGHT: (&str, &str) = ("volume_ios_in_flight", "IOs that have not ended");

/// The figures of volumes, added up: names of volumes are not shown.
///
/// # Errors
/// Only those of the page.
pub(crate) fn fill(volumes: &[Volume], page: &mut Page<'_>) -> std::fmt::Result {
    let stats: Vec<VolumeStats> = volumes.iter().map(Volume::stats).collect();
    let sum = |value: fn(&VolumeStats) -> u64| stats.iter().map(value).sum::<u64>();
    for (name, meaning, value) in OF_KIND {
        let of = |of_kind: FiguresOf| stats.iter().map(|s| value(of_kind(s))).sum();
        page.counters(name, meaning, "kind", KINDS.map(|(kind, of_kind)| (kind, of(of_kind))))?;
    }
    page.gauge(IN_FLIGHT.0, IN_FLIGHT.1, sum(|s| s.inflight))?;
    for (name, meaning, value) in OF_VOLUME {
        page.counter(name, meaning, sum(value))?;
    }
    Ok(())
}

/// The figures of volumes, each under its name in the label `volume`; what has the same name is added up, because a page may
/// not have the same figure twice.
///
/// # Errors
/// Only those of the page.
pub(crate) fn fill_by_volume(volumes: &[(String, VolumeStats)], page: &mut Page<'_>) -> std::fmt::Result {
    let mut by_name: BTreeMap<&str, Vec<&VolumeStats>> = BTreeMap::new();
    for (name, stats) in volumes {
        by_name.entry(name).or_default().push(stats);
    }
    for (name, meaning, value) in OF_KIND {
        let values = by_name.iter().flat_map(|(volume, stats)| {
            KINDS.map(|(kind, of_kind)| ([*volume, kind], sum(stats, |s| value(of_kind(s)))))
        });
        page.counters_by(name, meaning, ["volume", "kind"], values)?;
    }
    let inflight = by_name.iter().map(|(volume, stats)| (*volume, sum(stats, |s| s.inflight)));
    page.gauges(IN_FLIGHT.0, IN_FLIGHT.1, "volume", inflight)?;
    for (name, meaning, value) in OF_VOLUME {
        page.counters(name, meaning, "volume", by_name.iter().map(|(volume, stats)| (*volume, sum(stats, value))))?;
    }
    Ok(())
}

fn sum(stats: &[&VolumeStats], value: impl Fn(&VolumeStats) -> u64) -> u64 {
    stats.iter().map(|s| value(s)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Two;

    impl Figures for Two {
        fn fill(&self, page: &mut Page<'_>) -> std::fmt::Result {
            let of = |ops, inflight| VolumeStats { read: OpStats { ops, ..OpStats::default() }, inflight, ..VolumeStats::default() };
            let volumes = [("b@s", of(2, 1)), ("team/a", of(3, 0)), ("b@s", of(5, 1))];
            fill_by_volume(&volumes.map(|(name, stats)| (name.to_owned(), stats)), page)
        }
    }

    #[test]
    fn figures_have_the_name_of_their_volume_once() {
        let figures: Arc<dyn Figures> = Arc::new(Two);
        let page = ogee_metrics::render(&figures).expect("rendered");
        for line in [
            "ogee_volume_ios_total{volume=\"b@s\",kind=\"read\"} 7",
            "ogee_volume_ios_total{volume=\"team/a\",kind=\"read\"} 3",
            "ogee_volume_ios_total{volume=\"team/a\",kind=\"write_zeroes\"} 0",
            "ogee_volume_ios_in_flight{volume=\"b@s\"} 2",
            "ogee_volume_retries_total{volume=\"team/a\"} 0",
        ] {
            assert_eq!(page.lines().filter(|found| *found == line).count(), 1, "{line}:\n{page}");
        }
    }
}
