//! The command `ogee export`.

use super::image_sink::{ExportFormat, ImageSink};
use super::partial_file::{PartialFile, Replace};
use crate::connect::Context;
use crate::copy_out::copy_out;
use crate::error::{CliError, ErrorKind};
use crate::open::{close_volume, open_for_reading};
use crate::output::{Progress, bytes_per_second, elapsed_ms};
use crate::signals::StopSignals;
use clap::Args;
use ogee_client::{BlockDevice, Volume};
use ogee_common::clock;
use ogee_common::name::VolumeRef;
use ogee_common::size::ByteLen;
use serde::Serialize;
use std::path::PathBuf;

/// Arguments of `ogee export`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ExportArgs {
    /// What to export. A snapshot is exact; a volume that is being written is not
    #[arg(value_name = "VOLUME[@SNAPSHOT]", value_parser = VolumeRef::parse)]
    source: VolumeRef,
    /// The image to write; it appears under its name when it is complete
    file: PathBuf,
    /// Format of the image
    #[arg(long, value_enum, default_value_t = ExportFormat::Raw)]
    format: ExportFormat,
    /// Replace the file if it exists
    #[arg(long)]
    force: bool,
}

/// What `ogee export` reports.
#[derive(Debug, Serialize)]
struct Exported {
    source: String,
    file: String,
    size_bytes: u64,
    /// Bytes of data in the image; zeros are left out.
    data_bytes: u64,
    seconds: f64,
    bytes_per_second: u64,
}

/// Carries out `ogee export`.
///
/// # Errors
/// The volume cannot be read or the file not written; then nothing is left under the file's name.
pub(crate) async fn run(context: &Context, args: ExportArgs) -> Result<(), CliError> {
    let doing = format!("export {} to {}", args.source, args.file.display());
    export(context, args).await.map_err(|e| e.within(doing))
}

async fn export(context: &Context, args: ExportArgs) -> Result<(), CliError> {
    let replace = if args.force { Replace::Yes } else { Replace::No };
    let mut signals = StopSignals::listen()?;
    let (_cluster, volume) = open_for_reading(context, &args.source).await?;
    let size_bytes = volume.info().size_bytes;
    let start = clock::now();
    let progress = Progress::new("export", size_bytes, context.out.is_json());
    let written = match PartialFile::create(&args.file, replace) {
        Ok(partial) => tokio::select! {
            written = write(&volume, partial, &args, &progress) => written,
            () = signals.wait() => Err(CliError::new(ErrorKind::Failure, "interrupted")),
        },
        Err(e) => Err(e),
    };
    progress.finish();
    if let Err(e) = close_volume(&volume).await {
        context.out.warn(&e.chain());
    }
    let data_bytes = written?;
    let seconds = elapsed_ms(start) / 1000.0;
    let report = Exported {
        source: args.source.to_string(),
        file: args.file.display().to_string(),
        size_bytes,
        data_bytes,
        seconds,
        bytes_per_second: bytes_per_second(size_bytes, seconds),
    };
    context.out.result(&report, |r| {
        let (size, rate, data) = (ByteLen(r.size_bytes), ByteLen(r.bytes_per_second), ByteLen(r.data_bytes));
        format!("exported {} to {}: {size} in {:.1} s ({rate}/s), {data} of data", r.source, r.file, r.seconds)
    })
}

async fn write(
    volume: &Volume, partial: PartialFile, args: &ExportArgs, progress: &Progress,
) -> Result<u64, CliError> {
    let sink = ImageSink::new(partial.handle()?, &args.file, volume.info().size_bytes, args.format)?;
    let sink = copy_out(volume, sink, progress).await?;
    let complete = tokio::task::spawn_blocking(move || {
        let data_bytes = sink.finish()?;
        partial.commit()?;
        Ok(data_bytes)
    });
    match complete.await {
        Ok(done) => done,
        Err(e) => Err(CliError::caused(ErrorKind::Failure, "complete the image", e)),
    }
}
