//! [`MetricsServer`]: answers `GET /metrics` on a thread of its own.
//!
//! Invariants: the port is bound when [`MetricsServer::start`] returns; the thread ends when the server is dropped.

use crate::page::{Figures, render};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

/// A connection is served for so long, then it is closed.
pub const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);
/// Bytes of a request's head; what a scraper sends is far below.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// OpenMetrics 1.0, "Protocol negotiation".
const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why the endpoint cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("serve metrics on {addr}")]
pub struct MetricsError {
    /// Where.
    pub addr: SocketAddr,
    /// The port is taken, or there is no thread to be had.
    #[source]
    pub source: io::Error,
}

/// The endpoint; it ends when this is dropped.
#[derive(Debug)]
pub struct MetricsServer {
    addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl MetricsServer {
    /// Binds the address and serves it from a thread of its own. Port 0 takes a free one.
    ///
    /// # Errors
    /// [`MetricsError`].
    pub fn start(addr: SocketAddr, figures: Arc<dyn Figures>) -> Result<Self, MetricsError> {
        let fail = |source| MetricsError { addr, source };
        let listener = std::net::TcpListener::bind(addr).map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        let bound = listener.local_addr().map_err(fail)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(fail)?;
        let (stop, stopped) = oneshot::channel();
        let serve = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = accept_all(listener, figures) => {}
                    // An error means that the server was dropped, which is the same wish.
                    _ = stopped => {}
                }
            });
        };
        let thread = std::thread::Builder::new().name("metrics".to_owned()).spawn(serve).map_err(fail)?;
        Ok(Self { addr: bound, stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Drop for MetricsServer {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the metrics endpoint panicked");
        }
    }
}

async fn accept_all(listener: std::net::TcpListener, figures: Arc<dyn Figures>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "serve metrics");
            return;
        }
    };
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                if tokio::time::timeout(CONNECTION_TIMEOUT, serve(stream, &figures)).await.is_err() {
                    tracing::debug!(%peer, "a scrape took too long");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "accept a connection for metrics");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Answers one request.
async fn serve(stream: TcpStream, figures: &Arc<dyn Figures>) {
    let service = service_fn(|request| std::future::ready(Ok::<_, Infallible>(answer(&request, figures))));
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).keep_alive(false).max_buf_size(HEAD_BYTES_MAX);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "a scrape ended early");
    }
}

fn answer(request: &Request<Incoming>, figures: &Arc<dyn Figures>) -> Response<Full<Bytes>> {
    let plain = |status: StatusCode, text: &'static str| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = status;
        response
    };
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "the only page is /metrics\n");
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "GET /metrics\n");
    }
    match render(figures) {
        Ok(text) => {
            let mut response = Response::new(Full::from(text));
            response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(TEXT));
            response
        }
        Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, "the figures cannot be written\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Page;
    use std::io::{Read as _, Write as _};
    use std::sync::atomic::{AtomicU64, Ordering};

    #[derive(Debug, Default)]
    struct Counting(AtomicU64);

    impl Figures for Counting {
        fn fill(&self, page: &mut Page<'_>) -> std::fmt::Result {
            page.counter("scrapes", "Scrapes so far", self.0.fetch_add(1, Ordering::Relaxed) + 1)
        }
    }

    fn ask(addr: SocketAddr, request: &str) -> String {
        let mut stream = std::net::TcpStream::connect(addr).expect("connected");
        stream.write_all(request.as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("the server closes");
        answer
    }

    fn server() -> MetricsServer {
        MetricsServer::start(([127, 0, 0, 1], 0).into(), Arc::new(Counting::default())).expect("started")
    }

    #[test]
    fn every_scrape_reads_the_figures_anew() {
        let server = server();
        let get = || ask(server.addr(), "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        let first = get();
        assert!(first.starts_with("HTTP/1.1 200") && first.contains("openmetrics-text"), "{first}");
        assert!(first.contains("\nogee_scrapes_total 1\n"), "{first}");
        assert!(get().contains("\nogee_scrapes_total 2\n"));
    }

    #[test]
    fn anything_else_is_refused() {
        let server = server();
        assert!(ask(server.addr(), "GET / HTTP/1.1\r\nHost: x\r\n\r\n").starts_with("HTTP/1.1 404"));
        assert!(ask(server.addr(), "PUT /metrics HTTP/1.1\r\nHost: x\r\n\r\n").starts_with("HTTP/1.1 405"));
        assert!(ask(server.addr(), "nonsense\r\n\r\n").starts_with("HTTP/1.1 400"));
        let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(2 * HEAD_BYTES_MAX));
        assert!(!ask_lossy(server.addr(), &long).contains("200 OK"));
    }

    /// As [`ask`], for a server that may close before it has read everything.
    fn ask_lossy(addr: SocketAddr, request: &str) -> String {
        let mut stream = std::net::TcpStream::connect(addr).expect("connected");
        let _ = stream.write_all(request.as_bytes());
        let mut answer = vec![];
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    #[test]
    fn the_port_is_free_when_the_server_is_gone_and_taken_while_it_lives() {
        let server = server();
        let addr = server.addr();
        let error = MetricsServer::start(addr, Arc::new(Counting::default())).expect_err("taken");
        assert_eq!((error.addr, error.source.kind()), (addr, io::ErrorKind::AddrInUse));
        drop(server);
        MetricsServer::start(addr, Arc::new(Counting::default())).expect("free again");
    }
}
