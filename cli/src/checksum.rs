//! `ogee checksum`: SHA-256 of what a volume or snapshot reads as; the same as `sha256sum` of its raw export.

use crate::connect::Context;
use crate::copy_out::{Sink, copy_out};
use crate::error::CliError;
use crate::open::{close_volume, open_for_reading};
use crate::output::{Progress, elapsed_ms};
use clap::Args;
use ogee_client::{BlockDevice, ReadData, ReadPiece};
use ogee_common::clock;
use ogee_common::name::VolumeRef;
use serde::Serialize;
use sha2::{Digest, Sha256};

/// Arguments of `ogee checksum`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ChecksumArgs {
    /// What to read. A snapshot always gives the same sum; a volume that is being written does not
    #[arg(value_name = "VOLUME[@SNAPSHOT]", value_parser = VolumeRef::parse)]
    source: VolumeRef,
}

#[derive(Debug, Serialize)]
struct Checksum {
    sha256: String,
    bytes: u64,
    seconds: f64,
}

/// Hashes what it is given.
#[derive(Debug, Default)]
struct HashSink(Sha256);

/// Zeros to hash where a read gave none.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

impl Sink for HashSink {
    fn put(&mut self, _offset: u64, data: &ReadData) -> Result<(), CliError> {
        for piece in &data.pieces {
            match piece {
                ReadPiece::Data(bytes) => self.0.update(bytes),
                ReadPiece::Zeros(n) => {
                    let mut left = *n as usize;
                    while left > 0 {
                        let now = left.min(ZEROS.len());
                        self.0.update(&ZEROS[..now]);
                        left -= now;
                    }
                }
            }
        }
        Ok(())
    }
}

impl HashSink {
    fn hex(self) -> String {
        self.0.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }
}

/// Carries out `ogee checksum`.
///
/// # Errors
/// The volume cannot be opened or read.
pub(crate) async fn run(context: &Context, args: ChecksumArgs) -> Result<(), CliError> {
    let name = args.source;
    let (_cluster, volume) = open_for_reading(context, &name).await?;
    let bytes = volume.info().size_bytes;
    let start = clock::now();
    let progress = Progress::new("checksum", bytes, context.out.is_json());
    let hashed = copy_out(&volume, HashSink::default(), &progress).await;
    progress.finish();
    if let Err(e) = close_volume(&volume).await {
        context.out.warn(&e.chain());
    }
    let sha256 = hashed.map_err(|e| e.within(format!("checksum {name}")))?.hex();
    let sum = Checksum { sha256, bytes, seconds: elapsed_ms(start) / 1000.0 };
    context.out.result(&sum, |s| format!("{}  {name}", s.sha256))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn zeros_count_like_data() {
        let mut sparse = HashSink::default();
        let pieces = [ReadPiece::Data(Bytes::from_static(b"abc")), ReadPiece::Zeros(100_000)];
        sparse.put(0, &ReadData { pieces: pieces.into_iter().collect() }).expect("put");
        let mut plain = b"abc".to_vec();
        plain.resize(100_003, 0);
        assert_eq!(sparse.hex(), Sha256::digest(&plain).iter().map(|b| format!("{b:02x}")).collect::<String>());
        // FIPS 180-2, appendix B.1.
        let mut abc = HashSink::default();
        abc.put(0, &ReadData { pieces: [ReadPiece::Data(Bytes::from_static(b"abc"))].into_iter().collect() }).expect("put");
        assert_eq!(abc.hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
