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

    /// Numbers that only grow, told apart by several labels; shown as `ogee_<name>_total{a="...",b="..."}`. No two may have the
    /// same labels.
    ///
    /// # Errors
    /// As [`Page::counter`].
    pub fn counters_by<'v, const N: usize>(
        &mut self, name: &str, meaning: &str, labels: [&str; N], values: impl IntoIterator<Item = ([&'v str; N], u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, meaning, None, MetricType::Counter)?;
        for (value, count) in values {
            let labels: [(&str, &str); N] = std::array::from_fn(|i| (labels[i], value[i]));
            ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }

    /// Numbers that come and go, told apart by a label; shown as `ogee_<name>{label="..."}`.
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
            page.counters_by("ios", "By both", ["volume", "kind"], [(["a/b", "read"], 1), (["c", "read"], 2)])?;
            page.gauges("open", "Of each", "volume", [("a/b", 1)])
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
# HELP ogee_ios By both
# TYPE ogee_ios counter
ogee_ios_total{volume=\"a/b\",kind=\"read\"} 1
ogee_ios_total{volume=\"c\",kind=\"read\"} 2
# HELP ogee_open Of each
# TYPE ogee_open gauge
ogee_open{volume=\"a/b\"} 1
# EOF
";
        assert_eq!(text, expected);
    }
}
