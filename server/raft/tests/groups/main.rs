//! Tests of whole groups: real sockets, real logs, processes that die and hang. One binary, because linking costs more
//! than running.

mod cluster;
mod failover;
mod frames;
mod many_groups;
mod reads;
mod recovery;
mod replication;
