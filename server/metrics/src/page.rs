//! One scrape as text. Pure.
//!
//! Invariants: every name begins with `ogee_`; counters end with `_total`, as OpenMetrics 1.0 wants it; every figure
//! has a line that says what it is.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use std::fmt::{self, Debug};
use std::sync::Arc;

/// What a daemon has to show. Called from the server's thread, once for each scrape; must not block for long.
pub trait Figures: Debug + Send + Sync + 'static {
    /// Puts every figure on the page.
    ///
    /// # Errors
    /// Only those of the page's own functions.
    fn fill(&self, page: &mut Page<'_>) -> fmt::Result;
}

/// The page that is being filled.
#[derive(Debug)]
pub struct Page<'a>(DescriptorEncoder<'a>);

impl Page<'_> {
    /// A number that only grows; shown as `ogee_<name>_total`. The unit is the last word of the name.
    ///
    /// # Errors
    /// When the page cannot be written; that ends the scrape.
    pub fn counter(&mut self, name: &str, meaning: &str, value: u64) -> fmt::Result {
        let metric = ConstCounter::new(value);
        metric.encode(self.0.encode_descriptor(name, meaning, None, MetricType::Counter)?)
    }

    /// Numbers of one kind that only grow, told apart by a label; shown as `ogee_<name>_total{label="..."}`.
    ///
    /// # Errors
    /// As [`Page::counter`].
    pub fn counters<'v>(
        &mut self, name: &str, meaning: &str, label: &str, values: impl IntoIterator<Item = (&'v str, u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, meaning, None, MetricType::Counter)?;
        for (value, count) in values {
            let labels = [(label, value)];
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    /// Numbers of one kind that only grow, told apart by several labels.
    ///
    /// # Errors
    /// As [`Page::counter`].
    pub fn labelled_counters<'v, const N: usize>(
        &mut self, name: &str, meaning: &str, values: impl IntoIterator<Item = ([(&'v str, &'v str); N], u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, meaning, None, MetricType::Counter)?;
        for (labels, count) in values {
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    /// Numbers of one kind that come and go, told apart by a label.
    ///
    /// # Errors
    /// As [`Page::counter`].
    pub fn gauges<'v>(
        &mut self, name: &str, meaning: &str, label: &str, values: impl IntoIterator<Item = (&'v str, u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, meaning, None, MetricType::Gauge)?;
        for (value, count) in values {
            let labels = [(label, value)];
            ConstGauge::new(count).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    /// A number that comes and goes; shown as `ogee_<name>`.
    ///
    /// # Errors
    /// As [`Page::counter`].
    pub fn gauge(&mut self, name: &str, meaning: &str, value: u64) -> fmt::Result {
        let metric = ConstGauge::new(value);
        metric.encode(self.0.encode_descriptor(name, meaning, None, MetricType::Gauge)?)
    }
}

#[derive(Debug)]
struct Adapter(Arc<dyn Figures>);

impl Collector for Adapter {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0.fill(&mut Page(encoder))
    }
}

/// The text of a scrape.
///
/// # Errors
/// What [`Figures::fill`] returned.
pub fn render(figures: &Arc<dyn Figures>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("ogee");
    registry.register_collector(Box::new(Adapter(figures.clone())));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Sample;

    impl Figures for Sample {
        fn fill(&self, page: &mut Page<'_>) -> fmt::Result {
            page.counter("wal_flushes", "Durable writes of the log", 17)?;
            page.counters("volume_ios", "IOs that ended", "kind", [("read", 3), ("write", u64::MAX)])?;
            page.gauge("raft_groups_led", "Groups that this process leads", 0)?;
            page.labelled_counters("snapclone_requests", "Requests", [([("route", "/v1/tasks"), ("status", "200")], 2)])?;
            page.gauges("snapclone_tasks", "Tasks", "kind", [("gc", 1)])
        }
    }

    #[test]
    fn a_page_is_what_prometheus_reads() {
        let figures: Arc<dyn Figures> = Arc::new(Sample);
        let text = render(&figures).expect("rendered");
        let expected = "\
# HELP ogee_wal_flushes Durable writes of the log
# TYPE ogee_wal_flushes counter
ogee_wal_flushes_total 17
# HELP ogee_volume_ios IOs that ended
# TYPE ogee_volume_ios counter
ogee_volume_ios_total{kind=\"read\"} 3
ogee_volume_ios_total{kind=\"write\"} 18446744073709551615
# HELP ogee_raft_groups_led Groups that this process leads
# TYPE ogee_raft_groups_led gauge
ogee_raft_groups_led 0
# HELP ogee_snapclone_requests Requests
# TYPE ogee_snapclone_requests counter
ogee_snapclone_requests_total{route=\"/v1/tasks\",status=\"200\"} 2
# HELP ogee_snapclone_tasks Tasks
# TYPE ogee_snapclone_tasks gauge
ogee_snapclone_tasks{kind=\"gc\"} 1
# EOF
";
        assert_eq!(text, expected);
    }
}
