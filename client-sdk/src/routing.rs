//! Copysets, their replicas and leaders.

/// What is known of copysets.
#[derive(Debug, Default)]
pub(crate) struct RouteTable {}
