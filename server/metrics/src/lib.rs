//! The `/metrics` endpoint of the daemons: HTTP/1.1 on a thread of its own, text in the format of Prometheus.
//!
//! Called by the daemons and by `ogee vhost-blk`. It knows HTTP and nothing of what is counted.
