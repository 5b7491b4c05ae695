//! `ogee image import`.
//!
//! The volume is filled under the name `VOLUME.importing` and gets its own name when all data is flushed. So a volume
//! never looks complete when it is not, not even after `kill -9`. After an error or SIGINT the half-made one is deleted.

use super::source::{ImageFormat, ImageSource};
use super::upload::{Copied, upload};
use crate::connect::Context;
use crate::error::{CliError, ErrorKind};
use crate::half_made::{Wish, create, refuse_taken, rename, take_back};
use crate::names;
use crate::open::{close_volume, open_volume};
use crate::output::{Progress, bytes_per_second, elapsed_ms};
use crate::signals::StopSignals;
use crate::volume::{sector_size, volume_size};
use clap::{Args, Subcommand};
use ogee_client::{Cluster, OpenMode};
use ogee_common::clock;
use ogee_common::limits::{PAGE_BYTES, SECTOR_BYTES, VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};
use ogee_common::name::{VolumePath, VolumeRef};
use ogee_common::size::ByteLen;
use serde::Serialize;
use std::path::PathBuf;
use std::sync::Arc;

/// What the volume's name ends in until it is complete.
const SUFFIX: &str = ".importing";

/// The commands of `ogee image`.
#[derive(Debug, Clone, Subcommand)]
pub(crate) enum ImageCommand {
    /// Make a volume from an image file; holes and zeros take no space
    #[command(after_help = "Examples:\n  ogee image import debian-12.qcow2 golden\n  \
        ogee image import disk.raw tenant-a/web/disk0 --size 64G --owner tenant-a")]
    Import(ImportArgs),
}

/// Arguments of `image import`.
#[derive(Debug, Clone, Args)]
pub(crate) struct ImportArgs {
    /// The image: raw or qcow2, a file or a block device
    file: PathBuf,
    /// The new volume; missing folders are made
    #[arg(value_parser = VolumePath::parse)]
    volume: VolumePath,
    /// Size of the volume; default: that of the image
    #[arg(long, value_parser = volume_size)]
    size: Option<u64>,
    /// Format of the image; auto looks at its first bytes, so name it for images that are not yours
    #[arg(long, value_enum, default_value_t = ImageFormat::Auto)]
    format: ImageFormat,
    /// Who may delete the volume
    #[arg(long, value_parser = names::plain)]
    owner: Option<String>,
    /// The pool of chunkservers that holds it
    #[arg(long, value_parser = names::plain, default_value = "default")]
    pool: String,
    /// Bytes of a logical sector, 512 or 4096, for good
    #[arg(long, value_name = "BYTES", value_parser = sector_size, default_value_t = SECTOR_BYTES)]
    sector_size: u32,
}

/// What `image import` reports.
#[derive(Debug, Serialize)]
struct Imported {
    volume: String,
    format: &'static str,
    size_bytes: u64,
    image_bytes: u64,
    read_bytes: u64,
    written_bytes: u64,
    seconds: f64,
    /// Image bytes a second, holes included.
    bytes_per_second: u64,
}

impl Imported {
    fn text(&self) -> String {
        format!(
            "imported {}: {} image of {} in {:.1} s ({}/s), {} written",
            self.volume,
            self.format,
            ByteLen(self.image_bytes),
            self.seconds,
            ByteLen(self.bytes_per_second),
            ByteLen(self.written_bytes),
        )
    }
}

/// Carries out a command of `ogee image`.
///
/// # Errors
/// The image cannot be read, the name is taken, or the cluster fails; nothing is left but, at worst, a volume whose
/// name ends in `.importing`, and the message says so.
pub(crate) async fn run(context: &Context, command: ImageCommand) -> Result<(), CliError> {
    let ImageCommand::Import(args) = command;
    let doing = format!("import {} as {}", args.file.display(), args.volume);
    import(context, args).await.map_err(|e| e.within(doing))
}

async fn import(context: &Context, args: ImportArgs) -> Result<(), CliError> {
    let source = Arc::new(ImageSource::open(&args.file, args.format)?);
    let size_bytes = target_size(source.size_bytes(), args.size)?;
    let mut signals = StopSignals::listen()?;
    let cluster = context.copying_cluster()?;
    refuse_taken(&cluster, &args.volume).await?;
    let wish = Wish {
        path: &args.volume,
        suffix: SUFFIX,
        size_bytes,
        owner: args.owner.as_deref(),
        pool: &args.pool,
        sector_bytes: args.sector_size,
    };
    let temporary = create(&cluster, &wish).await?;
    let start = clock::now();
    let progress = Progress::new("import", source.size_bytes(), context.out.is_json());
    let filled = tokio::select! {
        filled = fill(&cluster, &temporary, &source, &progress) => filled,
        () = signals.wait() => Err(CliError::new(ErrorKind::Failure, "interrupted")),
    };
    progress.finish();
    let copied = match filled {
        Ok(copied) => match rename(&cluster, &temporary, &args.volume).await {
            Ok(()) => copied,
            Err(e) => return Err(take_back(&cluster, &temporary, e).await),
        },
        Err(e) => return Err(take_back(&cluster, &temporary, e).await),
    };
    let seconds = elapsed_ms(start) / 1000.0;
    let report = Imported {
        volume: args.volume.to_string(),
        format: source.format_name(),
        size_bytes,
        image_bytes: source.size_bytes(),
        read_bytes: copied.read_bytes,
        written_bytes: copied.written_bytes,
        seconds,
        bytes_per_second: bytes_per_second(source.size_bytes(), seconds),
    };
    context.out.result(&report, Imported::text)
}

/// The size of the volume for an image of `image_bytes`.
fn target_size(image_bytes: u64, wanted: Option<u64>) -> Result<u64, CliError> {
    let least = image_bytes.next_multiple_of(u64::from(PAGE_BYTES)).max(VOLUME_BYTES_MIN);
    if least > VOLUME_BYTES_MAX {
        let text = format!("the image has {}; a volume has at most {}", ByteLen(image_bytes), ByteLen(VOLUME_BYTES_MAX));
        return Err(CliError::new(ErrorKind::Usage, text));
    }
    match wanted {
        Some(size) if size < least => {
            let text = format!("--size {size} is too small: the image has {image_bytes} bytes");
            Err(CliError::new(ErrorKind::Usage, text))
        }
        Some(size) => Ok(size),
        None => Ok(least),
    }
}

/// Attaches, copies, flushes and detaches.
async fn fill(
    cluster: &Cluster, path: &VolumePath, source: &Arc<ImageSource>, progress: &Progress,
) -> Result<Copied, CliError> {
    let name = VolumeRef { path: path.clone(), snapshot: None };
    let volume = open_volume(cluster, &name, OpenMode::ReadWrite { steal: false }).await?;
    let copied = upload(source, &volume, progress).await;
    let closed = close_volume(&volume).await;
    let copied = copied?;
    closed?;
    Ok(copied)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_volume_holds_the_image_whole() {
        assert_eq!(target_size(5 << 30, None).expect("fits"), 5 << 30);
        assert_eq!(target_size((5 << 30) + 1, None).expect("fits"), (5 << 30) + 4096);
        assert_eq!(target_size(0, None).expect("fits"), VOLUME_BYTES_MIN);
        assert_eq!(target_size(5 << 30, Some(6 << 30)).expect("fits"), 6 << 30);
        assert_eq!(target_size(5 << 30, Some(4 << 30)).expect_err("too small").kind(), ErrorKind::Usage);
        assert_eq!(target_size(VOLUME_BYTES_MAX + 1, None).expect_err("too large").kind(), ErrorKind::Usage);
    }
}
