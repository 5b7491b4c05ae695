//! A proxy that can be shut: a client that is cut off from one server and reaches all others.
//!
//! Invariant: what a shut gate holds back is delivered, in order, when it opens again; no connection breaks.

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A way to the MDS that can be stopped: connections stay, nothing passes.
#[derive(Debug)]
pub struct Gate {
    /// Where clients connect to.
    pub addr: String,
    shut: watch::Sender<bool>,
    task: JoinHandle<()>,
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut shut: watch::Receiver<bool>) {
    let mut buffer = vec![0; 16 << 10];
    while let Ok(n) = from.read(&mut buffer).await {
        if n == 0 || shut.wait_for(|shut| !*shut).await.is_err() || to.write_all(&buffer[..n]).await.is_err() {
            return;
        }
    }
}

impl Gate {
    /// A gate before a server.
    ///
    /// # Errors
    /// No port on the loopback address.
    pub async fn before(target: String) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (addr, shut) = (listener.local_addr()?.to_string(), watch::Sender::new(false));
        let state = shut.clone();
        let task = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(&target).await else { continue };
                let ((from_near, to_near), (from_far, to_far)) = (near.into_split(), far.into_split());
                tokio::spawn(pass(from_near, to_far, state.subscribe()));
                tokio::spawn(pass(from_far, to_near, state.subscribe()));
            }
        });
        Ok(Self { addr, shut, task })
    }

    /// Stops what passes, or lets it pass.
    pub fn shut(&self, shut: bool) {
        self.shut.send_replace(shut);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.task.abort();
    }
}
