//! The `/metrics` endpoint of the daemons: HTTP/1.1 on a thread of its own, text in the format of OpenMetrics, which
//! Prometheus reads.
//!
//! Called by the daemons and by `ogee vhost-blk`: they implement [`Figures`] over counters that they keep anyway, and
//! start a [`MetricsServer`]. Invariants: nothing is counted or remembered here, a scrape reads the counters as they
//! are; a scrape never runs on the daemon's loop; one connection is served at a time, for at most
//! [`CONNECTION_TIMEOUT`], so that no client can hold memory or threads. Deliberately absent: TLS and passwords. Names
//! of volumes are shown by `ogee vhost-blk serve` alone.
//!
//! ```no_run
//! # use std::sync::Arc;
//! use ogee_metrics::{Figures, MetricsServer, Page};
//!
//! #[derive(Debug)]
//! struct Mine;
//!
//! impl Figures for Mine {
//!     fn fill(&self, page: &mut Page<'_>) -> std::fmt::Result {
//!         page.counter("wal_flushes", "Durable writes of the log", 17)
//!     }
//! }
//! let server = MetricsServer::start("127.0.0.1:9100".parse().expect("an address"), Arc::new(Mine));
//! ```

mod page;
mod server;

pub use page::{Figures, Page, render};
pub use server::{CONNECTION_TIMEOUT, MetricsError, MetricsServer};
