//! Free ports on 127.0.0.1 for daemons that keep them for ever.
//!
//! They are taken from below the range of outgoing connections. A port inside it could be taken by any connection while
//! the daemon is down, even by a client that tries to reach that very daemon (TCP connects a port to itself then).

use crate::error::{CliError, ErrorKind};
use ogee_common::clock::now;
use ogee_common::rng;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;

/// The lowest port that is tried.
const LOWEST: u16 = 10_000;
/// The first outgoing port where the kernel does not say (its default).
const OUTGOING_DEFAULT: u16 = 32_768;
/// Tries for one port; with half of all ports taken, all fail once in 10^30.
const TRIES: usize = 100;

/// A pause between two looks at a taken port.
const POLL: Duration = Duration::from_millis(20);

/// Chooses `count` different free ports.
///
/// # Errors
/// No free port was found.
pub(crate) fn choose(count: usize) -> Result<Vec<SocketAddr>, CliError> {
    let end = first_outgoing().max(LOWEST + 1000);
    // All stay bound until all are found, so that none is found twice.
    let mut bound: Vec<TcpListener> = Vec::with_capacity(count);
    let mut addrs = Vec::with_capacity(count);
    for _ in 0..count {
        let listener = (0..TRIES).find_map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, random_port(end))).ok());
        let none = || CliError::new(ErrorKind::Failure, format!("no free port from {LOWEST} to {end} on 127.0.0.1"));
        let listener = listener.ok_or_else(none)?;
        let addr = listener.local_addr();
        addrs.push(addr.map_err(|e| CliError::caused(ErrorKind::Failure, "read the address of a free port", e))?);
        bound.push(listener);
    }
    Ok(addrs)
}

/// Waits until a daemon's port is free, and says clearly when somebody else keeps it. A daemon that was just killed
/// keeps its port a moment longer than its process is seen.
///
/// # Errors
/// [`ErrorKind::Conflict`] when it is still taken after `limit`.
pub(crate) async fn wait_free(daemon: &str, addr: SocketAddr, limit: Duration) -> Result<(), CliError> {
    let deadline = now() + limit;
    loop {
        match TcpListener::bind(addr) {
            Ok(_) => return Ok(()),
            Err(e) if e.kind() != std::io::ErrorKind::AddrInUse => {
                return Err(CliError::caused(ErrorKind::Failure, format!("{daemon} cannot listen on {addr}"), e));
            }
            Err(_) if now() < deadline => tokio::time::sleep(POLL).await,
            Err(_) => {
                let text = format!("{daemon} cannot listen on {addr}: another process uses the port; stop that process");
                return Err(CliError::new(ErrorKind::Conflict, text));
            }
        }
    }
}

fn random_port(end: u16) -> u16 {
    let offset = rng::nonzero_u64() % u64::from(end - LOWEST);
    LOWEST + u16::try_from(offset).expect("a remainder of a 16-bit number fits")
}

fn first_outgoing() -> u16 {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    text.split_whitespace().next().and_then(|first| first.parse().ok()).unwrap_or(OUTGOING_DEFAULT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[tokio::test]
    async fn chosen_ports_differ_are_free_and_not_for_outgoing_connections() {
        let addrs = choose(20).expect("free ports");
        assert_eq!(addrs.iter().collect::<BTreeSet<_>>().len(), 20);
        for addr in addrs {
            wait_free("cs-1", addr, Duration::ZERO).await.expect("free");
            assert!(addr.port() >= LOWEST && addr.port() < first_outgoing().max(LOWEST + 1000));
        }
    }

    #[tokio::test]
    async fn a_taken_port_is_named_and_one_that_becomes_free_is_waited_for() {
        let foreign = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bound");
        let addr = foreign.local_addr().expect("an address");
        let error = wait_free("mds-1", addr, Duration::from_millis(50)).await.expect_err("taken");
        assert_eq!(error.kind(), ErrorKind::Conflict);
        assert!(error.chain().contains("mds-1") && error.chain().contains(&addr.to_string()), "{}", error.chain());
        let waiting = tokio::spawn(async move { wait_free("mds-1", addr, Duration::from_secs(30)).await });
        drop(foreign);
        waiting.await.expect("no panic").expect("free in the end");
    }
}
