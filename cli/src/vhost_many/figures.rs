//! `/metrics` of a daemon with many volumes: what each of them did, in the label `volume`.
//!
//! Invariant: nothing of the IO path is touched; counters are read as they are. What is attached on several sockets under one name is
//! added up. A volume that was attached anew counts from 0, which Prometheus takes for a restart.

use super::daemon::Daemon;
use super::protocol::Phase;
use crate::volume_metrics::fill_by_volume;
use ogee_metrics::{Figures, Page};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

/// The figures of a daemon.
pub(super) struct DaemonFigures(pub(super) Arc<Daemon>);

impl fmt::Debug for DaemonFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DaemonFigures")
    }
}

const PHASES: [Phase; 5] = [Phase::Starting, Phase::Serving, Phase::Fenced, Phase::Waiting, Phase::Leaving];

impl Figures for DaemonFigures {
    fn fill(&self, page: &mut Page<'_>) -> fmt::Result {
        let (mut in_phase, mut connected, mut connections, mut resubmitted) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let mut volumes = vec![];
        for attachment in self.0.attachments() {
            let listed = attachment.listed();
            *in_phase.entry(listed.state.word()).or_insert(0) += 1;
            if let Some((io, front_ends)) = attachment.volume_stats() {
                *connected.entry(listed.volume.clone()).or_insert(0) += u64::from(front_ends.is_connected());
                *connections.entry(listed.volume.clone()).or_insert(0) += front_ends.connections();
                *resubmitted.entry(listed.volume.clone()).or_insert(0) += front_ends.resubmitted();
                volumes.push((listed.volume, io));
            }
        }
        let by_phase = PHASES.map(|phase| (phase.word(), in_phase.get(phase.word()).copied().unwrap_or(0)));
        page.gauges("vhost_volumes", "Volumes of this daemon", "state", by_phase)?;
        page.gauges("vhost_front_ends", "Front ends that are connected", "volume", each(&connected))?;
        page.counters("vhost_connections", "Front ends that connected", "volume", each(&connections))?;
        let meaning = "Requests that a dead daemon left in flight and that were run again";
        page.counters("vhost_resubmitted_requests", meaning, "volume", each(&resubmitted))?;
        fill_by_volume(&volumes, page)
    }
}

fn each(values: &BTreeMap<String, u64>) -> impl Iterator<Item = (&str, u64)> {
    values.iter().map(|(volume, value)| (volume.as_str(), *value))
}
