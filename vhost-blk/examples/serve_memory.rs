//! Serves an image file, loaded into memory, on a socket until a line or the end of standard input.
//!
//! `cargo run --release -p ogee-vhost-blk --example serve_memory -- IMAGE SOCKET [QUEUES]`: what a guest writes is lost
//! at the end. For trying a hypervisor without a cluster, and as the null back end of measurements.

use ogee_client::MemoryDevice;
use ogee_vhost_blk::{
    LibvirtDisk, QemuOptions, QemuReconnect, RequestKind, StopHandle, VhostBlkConfig, VhostBlkServer, qemu_args,
};
use std::path::Path;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (Some(image), Some(socket)) = (args.first(), args.get(1)) else {
        return Err("usage: serve_memory IMAGE SOCKET [QUEUES]".into());
    };
    let mut data = std::fs::read(image)?;
    data.resize(data.len().next_multiple_of(4096), 0);
    let mut config = VhostBlkConfig::new(socket);
    if let Some(queues) = args.get(2) {
        config.num_queues = queues.parse()?;
    }
    let options = QemuOptions {
        memory_mib: 512,
        num_queues: config.num_queues,
        queue_size: config.queue_size,
        reconnect: QemuReconnect::Milliseconds,
    };
    println!("{}", qemu_args(Path::new(socket), &options).join(" "));
    print!("{}", LibvirtDisk::new(Path::new(socket), config.num_queues)?.xml());
    let stop = StopHandle::new()?;
    let server = VhostBlkServer::bind(MemoryDevice::with_data(data, false), config, stop.clone())?;
    let stats = server.stats();
    let thread = std::thread::spawn(move || server.run());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    stop.stop();
    thread.join().map_err(|_| "server panicked")??;
    println!("connections {}", stats.connections());
    for kind in RequestKind::ALL {
        let counts = stats.get(kind);
        println!("{} requests {} bytes {} errors {}", kind.name(), counts.requests, counts.bytes, counts.errors);
    }
    Ok(())
}
