//! gRPC channels whose connections are made by [`Network`].

use super::{Network, Plane};
use hyper_util::rt::TokioIo;
use std::io;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint, Uri};

/// Pings of an idle connection: a dead host is noticed within two of them.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// A channel to `host:port` that connects when it is first used, within `connect_timeout`, and again after a loss.
/// `None` if the address makes no URI.
#[must_use]
pub fn channel(network: &Network, host: &str, connect_timeout: Duration) -> Option<Channel> {
    // The scheme is a formality: the connector decides about TLS.
    let endpoint = Endpoint::from_shared(format!("http://{host}")).ok()?;
    let (network, host) = (network.clone(), host.to_owned());
    let connector = tower::service_fn(move |_: Uri| {
        let (network, host) = (network.clone(), host.clone());
        async move { Ok::<_, io::Error>(TokioIo::new(network.connect_host(&host, Plane::Control).await?)) }
    });
    let endpoint = endpoint
        .connect_timeout(connect_timeout)
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .keep_alive_while_idle(true);
    Some(endpoint.connect_with_connector_lazy(connector))
}
