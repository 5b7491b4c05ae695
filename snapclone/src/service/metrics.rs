//! What an instance counts and shows at `/metrics`: tasks by kind and how they ended, requests by route and status.
//!
//! Invariants: labels are words of this program, never what a client sent, so their number is bounded; no names of volumes, no tokens.

use ogee_metrics::{Figures, MetricsServer, Page};
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The figures of an instance.
#[derive(Debug, Default)]
pub(super) struct ServiceFigures {
    running: Mutex<BTreeMap<&'static str, u64>>,
    ended: Mutex<BTreeMap<(&'static str, &'static str), u64>>,
    requests: Mutex<BTreeMap<(String, u16), u64>>,
}

fn open<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A task is under way as long as this lives.
#[derive(Debug)]
pub(super) struct Running {
    figures: Arc<ServiceFigures>,
    kind: &'static str,
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut running = open(&self.figures.running);
        let count = running.entry(self.kind).or_default();
        *count = count.saturating_sub(1);
    }
}

impl ServiceFigures {
    /// A task of this kind begins.
    pub(super) fn begin(self: &Arc<Self>, kind: &'static str) -> Running {
        *open(&self.running).entry(kind).or_default() += 1;
        Running { figures: self.clone(), kind }
    }

    /// A task of this kind was parted with.
    pub(super) fn ended(&self, kind: &'static str, end: &'static str) {
        *open(&self.ended).entry((kind, end)).or_default() += 1;
    }

    /// A request was answered. `route` is a word of this program.
    pub(super) fn answered(&self, route: &str, status: u16) {
        *open(&self.requests).entry((route.to_owned(), status)).or_default() += 1;
    }

    /// Serves the figures. An address that cannot be had is told and is no reason not to work.
    pub(super) fn serve(self: &Arc<Self>, addr: SocketAddr) -> Option<MetricsServer> {
        match MetricsServer::start(addr, self.clone()) {
            Ok(server) => Some(server),
            Err(error) => {
                tracing::error!(target: "controlpath", error = &error as &dyn std::error::Error, %addr, "there are no metrics");
                None
            }
        }
    }
}

impl Figures for ServiceFigures {
    fn fill(&self, page: &mut Page<'_>) -> fmt::Result {
        let running = open(&self.running).clone();
        page.gauges("snapclone_tasks_running", "Tasks that this instance is at", "kind", running)?;
        let ended = open(&self.ended).clone();
        let ended = ended.into_iter().map(|((kind, end), n)| ([kind, end], n));
        page.counters_by("snapclone_tasks_ended", "Tasks that this instance parted with", ["kind", "end"], ended)?;
        let requests: Vec<(String, String, u64)> =
            open(&self.requests).iter().map(|((route, status), n)| (route.clone(), status.to_string(), *n)).collect();
        let requests = requests.iter().map(|(route, status, n)| ([route.as_str(), status.as_str()], *n));
        page.counters_by("snapclone_requests", "Requests to the API that were answered", ["route", "status"], requests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_moves() {
        let figures = Arc::new(ServiceFigures::default());
        let running = figures.begin("backup");
        drop(figures.begin("gc"));
        figures.ended("gc", "done");
        figures.answered("GET /v1/tasks", 200);
        figures.answered("GET /v1/tasks", 200);
        let shown: Arc<dyn Figures> = figures.clone();
        let text = ogee_metrics::render(&shown).expect("rendered");
        for line in [
            "ogee_snapclone_tasks_running{kind=\"backup\"} 1\n",
            "ogee_snapclone_tasks_running{kind=\"gc\"} 0\n",
            "ogee_snapclone_tasks_ended_total{kind=\"gc\",end=\"done\"} 1\n",
            "ogee_snapclone_requests_total{route=\"GET /v1/tasks\",status=\"200\"} 2\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        drop(running);
    }
}
